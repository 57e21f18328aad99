"""Tokens, words and normalised text."""

from speechattn.text.pieces import Phrase, Pieces, spelled

__all__ = ["Phrase", "Pieces", "spelled"]
