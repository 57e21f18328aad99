"""Banded attention over gathered windows: memory of T x W instead of T x T, on any device, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from speechattn.attention.pattern import Pattern, Span, visible
from speechattn.attention.position import Position
from speechattn.attention.softmax import first_valid, fused, gathered, places

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
        there, k_windows, v_windows = valid[:, None, sinks:], k[:, :, None, sinks:], v[:, :, None, sinks:]
        if there.shape[2] > width:
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
        y = fused(chunks, k_windows, v_windows, position, queries, keys, seen[:, None])
        if sinks or pattern.dilation > 1:
            y = y.masked_fill(~seen.any(-1, keepdim=True)[:, None], 0.0)
        return y.flatten(2, 3)  # in a plain band, who sees nothing has a window of zeros
