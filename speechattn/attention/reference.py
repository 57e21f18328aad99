"""Dense attention: any pattern, memory of T x N. What the other backends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from speechattn.attention.pattern import Pattern, Span, visible
from speechattn.attention.position import Position
from speechattn.attention.softmax import first_valid, gathered, mixed, places, scores

__all__ = ["Reference"]


class Reference:
    """Every score, masked."""

    name = "reference"

    def supports(self, q: Tensor, pattern: Pattern, position: Position | None) -> str | None:
        """Everything."""
        return None

    def preferred(self, q: Tensor) -> bool:
        """Always."""
        return True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, valid: Tensor, position: Position | None
    ) -> Tensor:
        """As `attend`."""
        frames, keys, sinks = q.shape[2], k.shape[2], pattern.sinks
        before = keys - pattern.right - frames - sinks  # the first query has index 0: it starts a chunk
        queries, main = range(frames), range(-before, frames + pattern.right)
        seen = visible(pattern, queries, main, q.device) & valid[:, None, sinks:]
        logits = scores(q, k[:, :, sinks:], position, queries, main)
        if not sinks:
            return mixed(logits, v, seen[:, None])
        assert isinstance(pattern, Span)
        sunk, gone = self.sinks(q, k, valid, pattern, position)
        held = gathered(v, first_valid(valid, sinks))
        return mixed(
            torch.cat([sunk, logits], -1), torch.cat([held, v[:, :, sinks:]], 2), torch.cat([gone, seen], -1)[:, None]
        )

    def sinks(
        self, q: Tensor, k: Tensor, valid: Tensor, pattern: Span, position: Position | None
    ) -> tuple[Tensor, Tensor]:
        """Scores of the first valid frames [B, H, T, S] and, for each query, which of them left its band [B, T, S]."""
        n, chunk, left, frames = pattern.sinks, pattern.chunk or 1, pattern.left or 0, q.shape[2]
        which = first_valid(valid, n)
        held = gathered(k, which)
        inside = torch.cat([
            scores(q[:, :, at : at + chunk], held, position, range(min(chunk, frames - at)), range(-left - n, -left))
            for at in range(0, frames, chunk)
        ], 2)  # fmt: skip
        begin = torch.arange(frames, device=q.device) // chunk * chunk + (k.shape[2] - pattern.right - frames) - left
        return inside, places(which)[:, None] < begin[:, None]
