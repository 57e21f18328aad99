"""Fused kernels (speechattn_kernels): any span and every position, memory of T alone, on a GPU."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position, Terms
from speechattn.attention.softmax import first_valid, gathered, places, shared

__all__ = ["WIDEST", "Triton", "installed"]

WIDEST = 256  # features of a head


@cache
def installed() -> bool:
    """Whether compiler and kernels are there."""
    return find_spec("triton") is not None and find_spec("speechattn_kernels") is not None


class Triton:
    """Scores live in a tile, and positions are computed there; where there is no GPU, Triton's interpreter runs it."""

    name = "triton"

    def supports(self, q: Tensor, pattern: Pattern, position: Position | None) -> str | None:
        """Spans, heads of up to 256 features, positions that have `terms`; CUDA, and not float64."""
        if not isinstance(pattern, Span):
            return f"{type(pattern).__name__} is not a span"
        if not installed():
            return "triton is not installed (pip install 'speechattn[kernels]')"
        from speechattn_kernels.common import unable

        if reason := unable(q):
            return str(reason)
        if q.shape[-1] > WIDEST:
            return f"a head has {q.shape[-1]} features, the kernels hold up to {WIDEST}"
        if position is not None and type(position).terms is Position.terms:
            return f"{type(position).__name__} has no terms for kernels"
        return None

    def preferred(self, q: Tensor) -> bool:
        """On CUDA; not in the interpreter."""
        return q.is_cuda

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, valid: Tensor, position: Position | None
    ) -> Tensor:
        """As `attend`."""
        from speechattn_kernels.window import window

        assert isinstance(pattern, Span)
        k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast a state may have other numbers
        extra = held = None
        if pattern.sinks:
            extra, held = sunk(q, k, v, valid, pattern, position)
            k, v, valid = k[:, :, pattern.sinks :], v[:, :, pattern.sinks :], valid[:, pattern.sinks :]
        span = reach(pattern, q.shape[2], k.shape[2])
        terms = Terms() if position is None else position.terms(span, range(k.shape[2]), q)
        assert terms is not None
        if terms.shift is not None:
            q = q + terms.shift[:, None].to(q.dtype)
        found: Tensor
        found, _ = window(
            q, k, v, valid, left=pattern.left, chunk=pattern.chunk, right=pattern.right, dilation=pattern.dilation,
            extra=extra, extra_values=held, rows=terms.rows, table=terms.table, turns=terms.turns, origin=span.start,
        )  # fmt: skip
        return found


def reach(span: Span, frames: int, keys: int) -> range:
    """The distances of queries from keys that a span allows among so many, in ascending order."""
    if span.chunk is None:
        return range(1 - frames, keys)
    back = keys - span.right if span.left is None else span.left + span.chunk
    return range(1 - span.chunk - span.right, back)


def sunk(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, span: Span, position: Position | None
) -> tuple[Tensor, Tensor]:
    """Scores [B, H, T, S] of the sinks, minus infinity while they are in the band, and their values [B, G, S, D]."""
    (batch, heads, frames, _), size = q.shape, span.sinks
    chunk, left = span.chunk or 1, span.left or 0
    which = first_valid(valid, size)
    held, values = gathered(k, which), gathered(v, which)
    rest = -frames % chunk
    parts = F.pad(q, [0, 0, 0, rest]).reshape(batch, heads, -1, chunk, q.shape[-1]).transpose(1, 2).flatten(0, 1)
    queries, keys = range(chunk), range(-left - size, -left)
    turned, bias = parts, None
    if position is not None:
        turned, held = position.turn(parts, held, queries, keys)
        bias = position.bias(parts, queries, keys)
    scores = whole(turned, batch)[:, :, :frames] @ shared(held, heads).mT / sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + whole(bias.expand(len(parts), -1, -1, -1), batch)[:, :, :frames]
    begin = torch.arange(frames, device=q.device) // chunk * chunk + (k.shape[2] - span.right - frames) - left
    gone = places(which)[:, None] < begin[:, None]  # [B, T, S]
    return scores.float().masked_fill(~gone[:, None], -torch.inf), values


def whole(parts: Tensor, batch: int) -> Tensor:
    """Chunks [B * N, H, C, X] -> utterances [B, H, N * C, X]."""
    return parts.reshape(batch, -1, *parts.shape[1:]).transpose(1, 2).flatten(2, 3)
