"""Weights of others in this library's modules."""

__all__: list[str] = []
