"""Tokens, words and normalised text."""

__all__: list[str] = []
