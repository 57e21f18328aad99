"""Multi-head soft attention (Vaswani et al., arXiv 1706.03762, eq. 1) over the whole memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.cross import Attended
from speechattn.frames import Memory
from speechattn.linear import run
from speechattn.tree import node

__all__ = ["Soft", "SoftState"]


@node
class SoftState:
    """Projected memory: `key`, `value` [B, H, T, D/H], `mask` [B, T].

    Rows that have read more or less share a batch: the others have unused room in front.
    """

    key: Tensor
    value: Tensor
    mask: Tensor

    @staticmethod
    def align(states: Sequence[SoftState]) -> list[SoftState]:
        """The same with one number of frames."""
        most = max(state.mask.shape[1] for state in states)

        def grown(x: Tensor, room: int, time: list[int]) -> Tensor:
            return F.pad(x, [*time, room, 0]) if room else x

        return [
            SoftState(grown(s.key, room, [0, 0]), grown(s.value, room, [0, 0]), grown(s.mask, room, []))
            for s in states
            for room in (most - s.mask.shape[1],)
        ]

    def trimmed(self) -> SoftState:
        """Without the frames in front that no row has."""
        if not self.mask.numel() or bool(self.mask[:, 0].any()):
            return self
        there = self.mask.any(0)
        first = int(there.long().argmax()) if bool(there.any()) else len(there)
        return SoftState(*(x.narrow(time, first, len(there) - first).clone() for x, time in
                           ((self.key, 2), (self.value, 2), (self.mask, 1))))  # fmt: skip

    def then(self, other: SoftState, skip: int) -> SoftState:
        """These frames, and behind them those of `other` (of one row or as many) without its first `skip`."""

        def joined(mine: Tensor, theirs: Tensor, time: int) -> Tensor:
            rest = theirs.narrow(time, skip, theirs.shape[time] - skip)
            return torch.cat([mine, rest.expand(len(mine), *[-1] * (rest.dim() - 1))], time)

        return SoftState(
            joined(self.key, other.key, 2), joined(self.value, other.value, 2), joined(self.mask, other.mask, 1)
        )


class Soft(nn.Module):
    """Every token may look at every valid frame; a row without a valid frame gets a zero context.

    `normaliser` makes, from the number of heads, what turns scores into weights (`attention.entmax`); by default it is
    the softmax.
    """

    def __init__(
        self, dim: int, heads: int, *, key_bias: bool = True, normaliser: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.normaliser = normaliser(heads) if normaliser else None
        self.query, self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=key_bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def read(self, memory: Memory) -> SoftState:
        """Keys and values of every frame of the memory [B, T, D]."""
        x = memory.frames
        return SoftState(self._split(run(self.key, x.values)), self._split(run(self.value, x.values)), x.mask)

    def place(self, rows: Tensor) -> tuple[()]:
        """Nothing is remembered."""
        return ()

    def attend(self, query: Tensor, read: SoftState, place: tuple[()]) -> tuple[Attended, tuple[()]]:
        """`query` [B, U, D] -> what it saw.

        With K times as many rows as were read, row b * K + k looks at memory b, which is not copied for it.
        """
        return self._seen(query, read), ()

    def _seen(self, query: Tensor, read: SoftState) -> Attended:
        if len(query) != len(read.mask):
            return self._shared(query, read)
        q = self._split(run(self.query, query)) / sqrt(query.shape[-1] // self.heads)
        weights = self.weigh(q @ read.key.transpose(-1, -2), read.mask[:, None, None])
        context = run(self.out, (weights @ read.value).transpose(1, 2).flatten(2))
        return Attended(context, weights, weights, weights.new_zeros(weights.shape[:3], dtype=torch.bool))

    def weigh(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Scores [B, H, U, T] -> weights over the frames that are `seen` (it broadcasts); zeros where none is."""
        if self.normaliser is not None:
            return self.normaliser(scores, seen)  # type: ignore[no-any-return]
        wide = torch.promote_types(scores.dtype, torch.float32)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1, wide).masked_fill(~seen, 0.0).to(scores.dtype)

    def _shared(self, query: Tensor, state: SoftState) -> Attended:
        """The K * U queries of a memory side by side: to soft attention they are nothing but queries."""
        n, tokens, rows = len(query), query.shape[1], len(state.mask)
        seen = self._seen(query.reshape(rows, n // rows * tokens, -1), state)
        weights = (
            seen.weights.view(rows, self.heads, n // rows, tokens, state.mask.shape[1]).transpose(1, 2).flatten(0, 1)
        )
        waiting = weights.new_zeros(weights.shape[:3], dtype=torch.bool)
        return Attended(seen.context.reshape(n, tokens, -1), weights, weights, waiting)
