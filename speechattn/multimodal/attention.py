"""Attention of a language model, and what keeps it from having to look somewhere."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.softmax import fused, scores, shared
from speechattn.linear import run

__all__ = ["Attention", "AttentionMaker", "Gated", "LearnedSink", "OffByOne", "Usual", "attended"]


class Attention(Protocol):
    """What queries make of keys and values. A query that sees nothing gets zeros."""

    def __call__(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """-> [B, H, T, D] and, if asked, the weights [B, H, T, N].

        `x` [B, T, H * D] is what queries q [B, H, T, E] were made of; keys k [B, G, N, E] and values v [B, G, N, D]
        are finite, and looked at where they are `seen` [B, T, N].
        """


AttentionMaker = Callable[[int, int], nn.Module]  # an `Attention` from width and heads


class Usual(nn.Module):
    """Softmax: weights sum to 1, so a head that wants to look at nothing looks at a sink (arXiv 2309.17453)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, dim // heads

    def nothing(self, q: Tensor) -> Tensor | None:
        """The logit [H] of looking at nothing."""
        return None

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `Attention`."""
        return attended(q, k, v, seen, self.nothing(q), weights=weights)


class OffByOne(Usual):
    """exp(s_j) / (1 + sum exp(s)): a head may look at nothing (Miller, "Attention is off by one", 2023)."""

    def nothing(self, q: Tensor) -> Tensor:
        """Zeros."""
        return q.new_zeros(self.heads)


class LearnedSink(Usual):
    """exp(s_j) / (exp(b) + sum exp(s)) with a learned b for each head, as in gpt-oss (arXiv 2508.10925); 0 at first."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.logit = nn.Parameter(torch.zeros(heads))

    def nothing(self, q: Tensor) -> Tensor:
        """What was learned."""
        return self.logit.to(q.dtype)


class Gated(Usual):
    """What each head says, times sigmoid(W x), a gate for each of its features (arXiv 2505.06708, "elementwise")."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.gate = nn.Linear(dim, heads * self.width, bias=False)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `Attention`; the weights are those before the gate."""
        said, looks = super().forward(x, q, k, v, seen, weights=weights)
        gate = run(self.gate, x).sigmoid().view(*x.shape[:2], self.heads, self.width).transpose(1, 2)
        return said * gate, looks


def attended(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, nothing: Tensor | None = None, *, weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Softmax over what is `seen` and, if given, over `nothing` [H], one logit more for a value of zero.

    Shapes as `Attention` says. Without `weights` by a fused kernel that does not keep them.
    """
    seen = seen[:, None]
    if weights:
        looks = looked(q, k, seen, nothing)
        return looks @ shared(v, q.shape[1]), looks
    if nothing is None:
        said = fused(q, k, v, None, range(0), range(0), seen)
    else:
        k, v = (shared(F.pad(x, [0, 0, 0, 1]), q.shape[1]) for x in (k, v))
        mask = torch.where(seen, q.new_zeros(()), torch.finfo(q.dtype).min / 2)
        last = nothing[:, None, None].expand(*mask.shape[:1], -1, mask.shape[2], 1)
        mask = torch.cat([mask.expand(-1, last.shape[1], -1, -1), last], -1)
        said = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1 / sqrt(q.shape[-1]))
    return said * seen.any(-1, keepdim=True), None


def looked(q: Tensor, k: Tensor, seen: Tensor, nothing: Tensor | None) -> Tensor:
    """The weights [B, H, T, N]; zero where nothing is seen."""
    logits = scores(q, k, None, range(0), range(0))
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    if nothing is not None:
        last = nothing[:, None, None].expand(len(q), -1, q.shape[2], 1)
        logits = torch.cat([logits, last.to(logits.dtype)], -1)
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=exact)[..., : k.shape[2]].to(q.dtype).masked_fill(~seen, 0.0)
