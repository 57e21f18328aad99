"""How much the attention sees in training, drawn anew for each batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from speechattn.attention.pattern import Span

__all__ = ["DynamicChunks", "Spans"]


class Spans(Protocol):
    """Draws the span of a training step."""

    def draw(self, generator: torch.Generator) -> Span:
        """The next one; all its randomness comes from the generator."""


class DynamicChunks:
    """The whole utterance with probability `full`, else one of `chunks` with one of `left` frames before it.

    One model then works at every look-ahead (arXiv 2012.05481, section 3.2). A `left` of None is everything before.
    """

    def __init__(
        self, chunks: Sequence[int] = (8, 16, 32), left: Sequence[int | None] = (None, 64), full: float = 0.5
    ) -> None:
        if not chunks or not left or not 0 <= full <= 1:
            raise ValueError(f"chunks {list(chunks)}, left {list(left)}, full {full}: wanted some of each, and a share")
        self.chunks, self.left, self.full = tuple(chunks), tuple(left), full

    def draw(self, generator: torch.Generator) -> Span:
        """The span of a step."""
        chance, chunk, left = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        if chance < self.full:
            return Span.full()
        return Span.chunked(self.left[int(left * len(self.left))], self.chunks[int(chunk * len(self.chunks))])
