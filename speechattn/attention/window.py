"""Banded attention over gathered windows: memory of T x W instead of T x T, on any device, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.attention.pattern import Pattern, Span, visible
from speechattn.attention.position import Position
from speechattn.attention.softmax import first_valid, fused, gathered, places

__all__ = ["Windowed"]


SMALL, TILE = 8, 32  # chunks of fewer queries go together, up to so many


class Windowed:
    """Each chunk of queries meets its own window of keys [sinks | left | chunk | right]; small chunks some at a time.

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

    def preferred(self, q: Tensor) -> bool:
        """Always."""
        return True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, valid: Tensor, position: Position | None
    ) -> Tensor:
        """As `attend`."""
        assert isinstance(pattern, Span)
        sinks, chunk, left = pattern.sinks, pattern.chunk or 1, pattern.left or 0
        if not sinks and chunk < SMALL:  # what is gathered more than once costs most
            chunk *= min(TILE // chunk, q.shape[2] // chunk)
        frames, rest = q.shape[2], -q.shape[2] % chunk
        if rest:
            q, k, v = (F.pad(x, [0, 0, 0, rest]) for x in (q, k, v))
            valid = F.pad(valid, [0, rest])
        width, batch, n = left + chunk + pattern.right, len(q), q.shape[2] // chunk
        queries, keys = range(chunk), range(-left - sinks, chunk + pattern.right)
        seen, heads = visible(pattern, queries, keys[sinks:], q.device), (k, v)
        if n == 1:  # nothing to gather
            seen = seen & (valid[:, sinks:] if sinks else valid)[:, None]
            k, v = (x[:, :, sinks:] for x in heads) if sinks else heads
        else:
            q = q.transpose(1, 2).reshape(batch * n, chunk, q.shape[1], q.shape[3]).transpose(1, 2)
            seen = (seen & valid[:, sinks:].unfold(1, width, chunk)[:, :, None]).flatten(0, 1)
            k, v = (
                x[:, :, sinks:].unfold(2, width, chunk).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in heads
            )  # [B * N, G, W, D]
        if sinks:
            which = first_valid(valid, sinks)
            begin = torch.arange(n, device=q.device) * chunk + sinks
            gone = (places(which)[:, None] < begin[:, None]).flatten(0, 1)  # [B * N, S]
            held = (gathered(x, which).repeat_interleave(n, 0) for x in heads)
            k, v = (torch.cat(pair, 2) for pair in zip(held, (k, v), strict=True))
            seen = torch.cat([gone[:, None].expand(-1, chunk, -1), seen], -1)
        y = fused(q, k, v, position, queries, keys, seen[:, None])
        if sinks or pattern.dilation > 1 or chunk != pattern.chunk:  # else who sees nothing has a window of zeros
            y = y.masked_fill(~seen.any(-1, keepdim=True)[:, None], 0.0)
        if n > 1:
            y = y.transpose(1, 2).reshape(batch, n * chunk, y.shape[1], y.shape[3]).transpose(1, 2)
        return y[:, :, :frames] if rest else y
