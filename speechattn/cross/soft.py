"""Multi-head soft attention (Vaswani et al., arXiv 1706.03762, eq. 1) over the whole memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.entmax import Entmax
from speechattn.attention.triton import WIDEST, installed
from speechattn.cross import Attended, chosen
from speechattn.frames import Memory
from speechattn.linear import run
from speechattn.tree import node

__all__ = ["Resting", "Soft", "SoftState"]


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

    Where the weights of no head are asked for, torch's fused attention keeps none, and on a GPU the kernel `entmax`
    none of that normaliser. Where no gradient is wanted there, those of some heads are all that is ever written, by
    the kernel `policy`.
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

    def attend(
        self, query: Tensor, read: SoftState, place: tuple[()], *, heads: Sequence[int] | None = None
    ) -> tuple[Attended, tuple[()]]:
        """`query` [B, U, D] -> what it saw.

        With K times as many rows as were read, row b * K + k looks at memory b, which is not copied for it.
        """
        return self._seen(query, read, heads), ()

    def _seen(self, query: Tensor, read: SoftState, heads: Sequence[int] | None) -> Attended:
        n, tokens, dim = query.shape
        rows = len(read.mask)
        beside = query.reshape(rows, n // rows * tokens, dim) if n != rows else query  # soft attention sees queries
        context, weights = self._looked(self._split(run(self.query, beside)), read, heads)
        context = run(self.out, context.transpose(1, 2).flatten(2)).view(query.shape)
        if n != rows:
            apart = rows, weights.shape[1], n // rows, tokens, weights.shape[3]
            weights = weights.view(apart).transpose(1, 2).flatten(0, 1)
        return Attended(context, weights, weights, query.new_zeros(n, self.heads, tokens, dtype=torch.bool))

    def _looked(self, q: Tensor, read: SoftState, heads: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """`q` [B, H, U, D/H] -> context [B, H, U, D/H], weights of `heads` [B, N, U, T]."""
        if heads is not None and self.normaliser is None:
            kernel = serving(q)
            if kernel is not None:
                context, _, each = kernel(q, read.key, read.value, read.mask, heads=heads, newest=q.shape[2])
                return context, each.to(q.dtype)
            if not heads:
                seen = F.scaled_dot_product_attention(q, read.key, read.value, read.mask[:, None, None])
                return seen, seen.new_zeros(len(q), 0, q.shape[2], read.mask.shape[1])
        if heads is not None and not heads and type(self.normaliser) is Entmax and runs(q):
            from speechattn_kernels.entmax import entmax_attention

            context, _ = entmax_attention(q, read.key, read.value, read.mask, self.normaliser.alpha.to(q.device))
            return context, context.new_zeros(len(q), 0, q.shape[2], read.mask.shape[1])
        scores = (q / sqrt(q.shape[-1])) @ read.key.transpose(-1, -2)
        weights = self.weigh(scores, read.mask[:, None, None])
        return weights @ read.value, chosen(weights, heads)

    def weigh(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Scores [B, H, U, T] -> weights over the frames that are `seen` (it broadcasts); zeros where none is."""
        if self.normaliser is not None:
            return self.normaliser(scores, seen)  # type: ignore[no-any-return]
        wide = torch.promote_types(scores.dtype, torch.float32)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1, wide).masked_fill(~seen, 0.0).to(scores.dtype)


class Resting(Soft):
    """Soft attention that may also look at `rest` places of its own, which belong to no frame: what it looks at when
    there is nothing to hear. Each counts `weight` times.

    Keys and values of these places are trained. Weights and alignment are those of the frames; they sum to less than 1.
    Whisper finds the end of its text in the silence behind it: these places are what that leaves in keys and values.
    """

    def __init__(self, dim: int, heads: int, *, rest: int, weight: float = 1.0, key_bias: bool = True) -> None:
        super().__init__(dim, heads, key_bias=key_bias)
        if rest < 1 or not weight > 0:
            raise ValueError(f"rest {rest}, weight {weight}: wanted at least 1, and more than 0")
        self.rest_key = nn.Parameter(torch.randn(heads, rest, dim // heads))
        self.rest_value = nn.Parameter(torch.zeros(heads, rest, dim // heads))
        self.bias = log(weight)

    def _looked(self, q: Tensor, read: SoftState, heads: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        q, places = q / sqrt(q.shape[-1]), self.rest_key.shape[1]
        scores = torch.cat([q @ self.rest_key.mT + self.bias, q @ read.key.mT], -1)
        weights = self.weigh(scores, F.pad(read.mask, [places, 0], value=True)[:, None, None])
        rest, seen = weights[..., :places], weights[..., places:]
        return rest @ self.rest_value + seen @ read.value, chosen(seen, heads)


def serving(q: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """The kernel `policy` where it can run on `q` [B, H, U, D]: it has no gradient of weights."""
    if torch.is_grad_enabled() or not runs(q):
        return None
    from speechattn_kernels.policy import policy

    kernel: Callable[..., tuple[Tensor, Tensor, Tensor]] = policy
    return kernel


def runs(q: Tensor) -> bool:
    """Kernels run on `q` [B, H, U, D]: on CUDA, if Triton is installed; in the interpreter not by themselves."""
    if not q.is_cuda or q.shape[-1] > WIDEST or not installed():
        return False
    from speechattn_kernels.common import unable

    return unable(q) is None
