"""Multi-head soft attention (Vaswani et al., arXiv 1706.03762, eq. 1) over the whole memory."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from speechattn.cross import Attended
from speechattn.frames import Memory
from speechattn.tree import node

__all__ = ["Soft", "SoftState"]


@node
class SoftState:
    """Projected memory: `key`, `value` [B, H, T, D/H], `mask` [B, T]."""

    key: Tensor
    value: Tensor
    mask: Tensor

    def then(self, other: SoftState, skip: int) -> SoftState:
        """These frames, and behind them those of `other` (of one row or as many) without its first `skip`."""

        def joined(mine: Tensor, theirs: Tensor, time: int) -> Tensor:
            rest = theirs.narrow(time, skip, theirs.shape[time] - skip)
            return torch.cat([mine, rest.expand(len(mine), *[-1] * (rest.dim() - 1))], time)

        return SoftState(
            joined(self.key, other.key, 2), joined(self.value, other.value, 2), joined(self.mask, other.mask, 1)
        )


class Soft(nn.Module):
    """Every token may look at every valid frame; a row without a valid frame gets a zero context."""

    def __init__(self, dim: int, heads: int, *, key_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=key_bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def read(self, memory: Memory) -> SoftState:
        """Keys and values of every frame of the memory [B, T, D]."""
        x = memory.frames
        return SoftState(self._split(self.key(x.values)), self._split(self.value(x.values)), x.mask)

    def attend(self, query: Tensor, state: SoftState) -> tuple[Attended, SoftState]:
        """`query` [B, U, D] -> what it saw; the state does not change."""
        q = self._split(self.query(query)) / sqrt(query.shape[-1] // self.heads)
        valid = state.mask[:, None, None]
        scores = (q @ state.key.transpose(-1, -2)).masked_fill(~valid, -torch.inf)
        weights = scores.softmax(-1, torch.promote_types(q.dtype, torch.float32)).masked_fill(~valid, 0.0).to(q.dtype)
        context = self.out((weights @ state.value).transpose(1, 2).flatten(2))
        return Attended(context, weights, weights, weights.new_zeros(weights.shape[:3], dtype=torch.bool)), state
