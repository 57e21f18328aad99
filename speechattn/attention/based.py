"""BASED: a sum over everything so far for recall, a small window for what is near (arXiv 2402.18668)."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from speechattn.attention.attend import attend
from speechattn.attention.linear import (
    Causal,
    LinearState,
    blocked,
    by_head,
    full_precision,
    gapless,
    picked,
    together,
    wide,
)
from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position
from speechattn.frames import Frames
from speechattn.linear import run
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["Based", "BasedState", "TaylorAttention", "taylor", "weighed"]


def taylor(x: Tensor) -> Tensor:
    """x [..., F] -> [..., 1 + F + F (F + 1) / 2] whose products are those of the exponential's series, up to order 2.

    Law: taylor(q) . taylor(k) = 1 + q . k + (q . k)^2 / 2, which is at least 1 / 2 (section 4.1). The paper writes all
    F^2 products of two features; here a product of two different ones stands once, times sqrt(2): the same sum.
    """
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    scale = 1 - (1 - sqrt(0.5)) * (i == j).to(x.dtype)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * scale], -1)


def weighed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q, k [B, H, T, F], v [B, H, T, D], mask [B, T] -> the mean of all values so far [B, H, T, D], the next memory.

    Their weights are the series of exp(q . k / sqrt(F)). The weights are summed as a value that is 1 in each frame.
    """
    ones = torch.ones_like(v[..., :1])
    q, v = q / sqrt(q.shape[-1]), torch.cat([v, ones], -1)
    with full_precision(q):
        y, memory = blocked(q, k, v, mask, features=taylor, memory=memory)
    return y[..., :-1] / y[..., -1:].clamp(min=0.25), memory  # less than 1 / 2 only where no frame was valid yet


class TaylorAttention(Causal):
    """The linear attention of BASED alone, with `features` numbers for each query and key (16 in the paper)."""

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, norm: nn.Module | None = None, dropout: float = 0.0,
        features: int = 16,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, span, norm=norm, dropout=dropout)
        self.features = features
        self.parts = nn.Linear(dim, 2 * heads * features + dim)  # queries, keys, values
        self.out = nn.Linear(dim, dim)

    def init_state(self, x: Frames) -> LinearState:
        return LinearState(nothing(x, self.heads, self.features, self.dim // self.heads))

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        parts = run(self.parts, self.normed(x))
        size = self.heads * self.features
        q, k, v = (by_head(part, self.heads) for part in torch.split(parts, [size, size, self.dim], -1))
        y, memory = weighed(q, k, v, x.mask, state.memory)
        return self.said(self.out, y.transpose(1, 2).flatten(2).to(parts.dtype), x.mask), LinearState(memory)


def nothing(x: Frames, heads: int, features: int, width: int) -> Tensor:
    """The memory [B, H, F', D + 1] of no frame."""
    size = 1 + features + features * (features + 1) // 2
    return x.values.new_zeros(x.values.shape[0], heads, size, width + 1, dtype=wide(x.values.dtype))


@node
class BasedState:
    """The last frames [B, K - 1, D] of the filter, the memory, keys and values [B, W - 1, 2, H, D] of the window."""

    filtered: Buffer
    memory: Tensor
    window: Buffer


class Based(Causal):
    """A short filter, then linear attention and softmax over a window of frames side by side: one layer with all three.

        y = W_o (taylor(x') + window(x')),   x' = x + filter(x)

    The paper keeps them in layers of their own (section 5 and its released models: a gated convolution, linear
    attention and a window alternate). Here an encoder has one kind of attention in every layer, so that each has the
    three; linear attention and window have their own queries and keys and share the values. `window` counts frames
    with the own one (64 in the paper), `kernel` is the filter's; `position` is that of the window. A frame that is not
    valid takes no place in either: a row with holes is the row without them.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, norm: nn.Module | None = None,
        dropout: float = 0.0, features: int = 16, window: int = 64, kernel: int = 3,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, span, norm=norm, dropout=dropout)
        if window < 1 or kernel < 1:
            raise ValueError(f"window {window}, kernel {kernel}: both count the own frame, so at least 1 is needed")
        self.features, self.window, self.kernel, self.position = features, window, kernel, position
        self.filter = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.parts = nn.Linear(dim, 2 * heads * features + 3 * dim)  # far queries and keys, near ones, values
        self.out = nn.Linear(dim, dim)

    def init_state(self, x: Frames) -> BasedState:
        width = self.dim // self.heads
        pairs = Buffer.empty(x.values.new_zeros(x.values.shape[0], 0, 2, self.heads, width), self.window - 1)
        memory = nothing(x, self.heads, self.features, width)
        return BasedState(Buffer.empty(x.values, self.kernel - 1), memory, pairs)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        if not x.mask.shape[1]:
            return x, state
        there, back = together(x)
        mask, frames = there.mask, there.mask.shape[1]
        z = Frames.finite(self.normed(there), mask)
        past = gapless(state.filtered.append(z.values, mask))
        values = z.values + self.filter(past.values.mT)[..., -frames:].mT
        parts = run(self.parts, values)
        size = self.heads * self.features
        q, k, query, pairs = torch.split(parts, [size, size, self.dim, 2 * self.dim], -1)
        q, k, v = (by_head(part, self.heads) for part in (q, k, pairs[..., self.dim :]))
        far, memory = weighed(q, k, v, mask, state.memory)
        kept = pairs.reshape(len(mask), frames, 2, self.heads, self.dim // self.heads)
        window = gapless(state.window.append(Frames.finite(kept, mask).values, mask))
        near = self.looked(query.reshape(len(mask), frames, self.heads, -1), window)
        y = self.said(self.out, (far.to(parts.dtype) + near).transpose(1, 2).flatten(2), mask)
        y = y if back is None else Frames(picked(y.values, back), x.mask)
        return y, BasedState(past.last(self.kernel - 1), memory, window.last(self.window - 1))

    def looked(self, query: Tensor, window: Buffer) -> Tensor:
        """Queries [B, T, H, D] at the newest frames of the window -> what they see [B, H, T, D]."""
        k, v = window.values.permute(2, 0, 3, 1, 4).unbind()
        span = Span.sliding(self.window - 1)
        return attend(query.transpose(1, 2), k, v, pattern=span, valid=window.mask, position=self.position)
