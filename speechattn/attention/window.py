"""Banded attention over gathered windows: memory of T x W instead of T x T, on any device, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from speechattn.attention.pattern import Pattern, Span, visible
from speechattn.attention.position import Position
from speechattn.attention.softmax import first_valid, gathered, mixed, places, scores

__all__ = ["Windowed"]


class Windowed:
    """Each chunk of queries meets its own window of keys [sinks | left | chunk | right].

    Inside a window nothing depends on where it stands: mask, distances and tables are the same for all.
    """

    name = "window"

    def supports(self, q: Tensor, pattern: Pattern, position: Position | None) -> str | None:
        """Spans that are bounded to the left."""
        if not isinstance(pattern, Span):
            return f"{type(pattern).__name__} is not a band"
        if pattern.left is None or pattern.chunk is None:
            return "the pattern is not bounded to the left"
        return None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, valid: Tensor, position: Position | None
    ) -> Tensor:
        """As `attend`."""
        assert isinstance(pattern, Span)
        sinks, chunk, left = pattern.sinks, pattern.chunk or 1, pattern.left or 0
        width = left + chunk + pattern.right
        queries, keys = range(chunk), range(-left - sinks, chunk + pattern.right)
        seen = visible(pattern, queries, keys[sinks:], q.device)
        there = valid[:, sinks:].unfold(1, width, chunk)  # [B, N, W]
        k_windows, v_windows = (x[:, :, sinks:].unfold(2, width, chunk).transpose(-1, -2) for x in (k, v))
        seen = seen & there[:, :, None]
        if sinks:
            which = first_valid(valid, sinks)
            begin = torch.arange(there.shape[1], device=q.device) * chunk + sinks
            gone = places(which)[:, None] < begin[:, None]  # [B, N, S]
            k_windows, v_windows = (
                torch.cat([gathered(x, which)[:, :, None].expand(-1, -1, there.shape[1], -1, -1), windows], 3)
                for x, windows in ((k, k_windows), (v, v_windows))
            )
            seen = torch.cat([gone[:, :, None].expand(-1, -1, chunk, -1), seen], -1)
        chunks = q.reshape(*q.shape[:2], -1, chunk, q.shape[3])
        return mixed(scores(chunks, k_windows, position, queries, keys), v_windows, seen[:, None]).flatten(2, 3)
