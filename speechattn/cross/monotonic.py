"""Monotonic attention: heads that walk along the frames, stop for each token, and never go back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.cross import Attended, chosen
from speechattn.cross.expected import Form, chunkwise, hard, infinite, preserved, ranks, scan
from speechattn.frames import Memory
from speechattn.linear import run
from speechattn.tree import node

__all__ = ["Additive", "DotProduct", "Energy", "HardMonotonic", "Heard", "InfiniteLookback", "MoChA", "Monotonic",
           "Place"]  # fmt: skip


@node
class Place:
    """Where the heads of a hypothesis stand: `at` [B, H] counts the valid frames before, since the stream began.

    `waiting` [B, H]: the head has run out of frames for the last token, and has passed all there were. `limit` [B, U]
    counts likewise the last frame that each of the tokens to come may be said at in training; [B, 0] for no limits.
    """

    at: Tensor
    waiting: Tensor
    limit: Tensor


@node
class Heard:
    """Projected memory: `key` [B, H, T, E] to stop at, `behind` and `value` [B, N, T, D/N] to look at, `mask` [B, T].

    `gone` [B] frames were valid and are forgotten; no frame will follow where `finished` [B].
    """

    key: Tensor
    behind: Tensor
    value: Tensor
    mask: Tensor
    gone: Tensor
    finished: Tensor

    def _parts(self, f: Callable[[Tensor, int], Tensor]) -> Heard:
        """`f` of each tensor that has a time, and of the dimension of its time."""
        return replace(self, key=f(self.key, 2), behind=f(self.behind, 2), value=f(self.value, 2), mask=f(self.mask, 1))

    @staticmethod
    def align(many: Sequence[Heard]) -> list[Heard]:
        """The same with one number of frames."""
        most = max(heard.mask.shape[1] for heard in many)

        def grown(heard: Heard) -> Heard:
            room = most - heard.mask.shape[1]
            return heard._parts(lambda x, time: F.pad(x, [0, 0] * (x.dim() - 1 - time) + [room, 0])) if room else heard

        return [grown(heard) for heard in many]

    def trimmed(self) -> Heard:
        """Without the frames in front that no row has."""
        if not self.mask.numel() or bool(self.mask[:, 0].any()):
            return self
        there = self.mask.any(0)
        first = int(there.long().argmax()) if bool(there.any()) else len(there)
        return self._parts(lambda x, time: x.narrow(time, first, len(there) - first).clone())

    def then(self, other: Heard, skip: int) -> Heard:
        """These frames, and behind them those of `other` (of one row or as many) without its first `skip`."""
        rows = len(self.mask)
        theirs = other._parts(lambda x, time: x.narrow(time, skip, x.shape[time] - skip))

        def joined(mine: Tensor, more: Tensor, time: int) -> Tensor:
            return torch.cat([mine, more.expand(rows, *[-1] * (more.dim() - 1))], time)

        return Heard(
            joined(self.key, theirs.key, 2), joined(self.behind, theirs.behind, 2),
            joined(self.value, theirs.value, 2), joined(self.mask, theirs.mask, 1),
            self.gone, self.finished | other.finished,
        )  # fmt: skip

    def forget(self, n: Tensor) -> Heard:
        """Without the frames that stand behind fewer than `n` [B] valid ones, counted since the stream began."""
        kept = self.mask & (self.gone[:, None] + ranks(self.mask) >= n[:, None])
        gone = self.gone + self.mask.sum(1) - kept.sum(1)
        return replace(self, mask=kept, gone=gone).trimmed()


class Energy(nn.Module):
    """How well a query fits a frame, for each head."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} features do not divide by {heads} heads")
        self.heads = heads
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)

    def keys(self, x: Tensor) -> Tensor:
        """Of frames [B, T, D] -> [B, H, T, D/H]."""
        return split(run(self.key, x), self.heads)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Of queries [B * K, U, D] -> [B * K, H, U, T]; row b * K + k looks at the `keys` of row b."""
        rows, tokens = keys.shape[0], query.shape[1]
        beam = len(query) // max(rows, 1)
        q = split(run(self.query, query).reshape(rows, beam * tokens, query.shape[2]), self.heads)
        return apart(self.fit(q, keys), beam, tokens)

    def fit(self, query: Tensor, keys: Tensor) -> Tensor:
        """`query` [B, H, U, E], `keys` [B, H, T, E] -> [B, H, U, T]."""
        raise NotImplementedError


class DotProduct(Energy):
    """Their product, divided by the root of the features of a head."""

    def fit(self, query: Tensor, keys: Tensor) -> Tensor:
        return (query / sqrt(query.shape[-1])) @ keys.transpose(-1, -2)


class Additive(Energy):
    """g v . tanh(W query + V key + b) with v of length 1 (arXiv 1704.00784, eq. 16)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        width = dim // heads
        self.direction = nn.Parameter(torch.randn(heads, width))
        self.scale = nn.Parameter(torch.full((heads, 1), width**-0.5))

    def fit(self, query: Tensor, keys: Tensor) -> Tensor:
        towards = self.scale * F.normalize(self.direction, dim=-1)
        both = (query[:, :, :, None] + keys[:, :, None]).tanh()
        return torch.einsum("bhute,he->bhut", both, towards)


class Monotonic(nn.Module):
    """H heads that each stop at a frame for a token, from the frame where they stopped for the one before.

    A head stops at a frame with the probability p = sigmoid(energy + r), where r begins as `offset`. In training the
    alignment is what is expected of it, by a `form` of `expected` (None: `scan`), and the whole text is read at once;
    in eval the head stops at the first frame with p >= 1/2. It is `waiting` where it ran out of frames and more may
    come; in a memory that has finished it sees nothing then, or with `preserve` its last frame, in training as in eval.

    Laws in eval: tokens one by one equal tokens at once. What is said does not know the frames behind the stops, so
    to read more frames and go on equals having had them all. At p of 0 or 1 training and eval agree,
    but for `wait`, which training does not know.

    In training: `noise` is added to the energy (its standard deviation), so that p learns to be 0 or 1; p is
    `1 - stable_emit` times itself, so that heads learn to stop earlier (StableEmit, arXiv 2107.00635); each head is
    lost with the probability `head_drop`, so that none is idle (HeadDrop, arXiv 2005.09394, section 3.2), which the
    `alignment` does not show; and a token is said no later than its `limit` (DeCoT, arXiv 2004.05009), if the place
    has one. In eval, when the first head has stopped the others do within `wait` frames.
    """

    behind: Energy | None  # what weighs the frames behind the stop, where more than one is seen
    reach: int | None = 0  # frames before the stop that are looked at; None for all

    def __init__(
        self, dim: int, heads: int, *, energy: Callable[[int, int], Energy] = DotProduct, offset: float = -4.0,
        form: Form | None = None, noise: float = 1.0, head_drop: float = 0.0, stable_emit: float = 0.0,
        wait: int | None = None, preserve: bool = False, width: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if noise < 0 or not 0 <= head_drop < 1 or not 0 <= stable_emit < 1 or (wait is not None and wait < 0):
            raise ValueError(f"noise {noise}, head_drop {head_drop}, stable_emit {stable_emit}, wait {wait}: wanted 0 "
                             "or more, and shares below 1")  # fmt: skip
        if dim % (heads * width):
            raise ValueError(f"{dim} features do not divide by {heads} heads of {width}")
        self.heads, self.width, self.form, self.preserve = heads, width, form or scan, preserve
        self.noise, self.head_drop, self.stable_emit, self.wait = noise, head_drop, stable_emit, wait
        self.energy, self.behind = energy(dim, heads), None
        self.offset = nn.Parameter(torch.full((heads, 1, 1), offset))
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def read(self, memory: Memory) -> Heard:
        """Keys and values of every frame of the memory [B, T, D]."""
        x = memory.frames
        key, value = self.energy.keys(x.values), split(run(self.value, x.values), self.heads * self.width)
        behind = value[..., :0] if self.behind is None else self.behind.keys(x.values)
        return Heard(key, behind, value, x.mask, torch.zeros_like(memory.start), memory.finished)

    def place(self, rows: Tensor) -> Place:
        """Every head before the first frame."""
        at = torch.zeros(len(rows), self.heads, dtype=torch.long, device=rows.device)
        return Place(at, torch.zeros_like(at, dtype=torch.bool), at[:, :0])

    def attend(
        self, query: Tensor, read: Heard, place: Place, *, heads: Sequence[int] | None = None
    ) -> tuple[Attended, Place]:
        """`query` [B * K, U, D] -> what it saw, and where the heads stand then.

        In training the place stays as it is. `weights` [B * K, N, U, T] has the N heads that look, several for each
        one that stops where there are.
        """
        beam = len(query) // max(len(read.mask), 1)
        energy = self.energy(query, read.key)
        energy = energy.to(torch.promote_types(energy.dtype, torch.float32)) + self.offset
        valid, gone, finished = (repeated(x, beam) for x in (read.mask, read.gone, read.finished))
        if self.training:
            alignment = self._expected(energy, valid, finished, replace(place, at=place.at - gone[:, None]))
            shown = self._kept(alignment)
            waiting = torch.zeros(alignment.shape[:3], dtype=torch.bool, device=query.device)
            weights = shown if self.behind is None else self._looked(shown, self.behind(query, read.behind), valid)
        else:
            p = energy.sigmoid()
            p = preserved(p, valid, finished) if self.preserve else p
            stops = hard(p, place.at - gone[:, None], valid, finished, wait=self.wait)
            rank = ranks(valid)[:, None, None]
            stopped = stops.found[..., None] & valid[:, None, None]
            alignment = ((rank == stops.at[..., None]) & stopped).to(energy.dtype)
            weights = alignment
            if self.behind is not None:
                seen = stopped & (rank <= stops.at[..., None])
                seen = seen if self.reach is None else seen & (rank >= stops.at[..., None] - self.reach)
                weights = shares(self.behind(query, read.behind), self._wide(seen))
            waiting = ~stops.found & ~finished[:, None, None]
            if query.shape[1]:
                at = stops.at[..., -1] + gone[:, None]
                place = Place(at, waiting[..., -1], place.limit)
        return Attended(self._context(weights, read), weights, chosen(alignment, heads), waiting), place

    def _expected(self, energy: Tensor, valid: Tensor, finished: Tensor, place: Place) -> Tensor:
        """The expected alignment, from where the heads stand."""
        if self.noise:
            energy = energy + self.noise * torch.randn_like(energy)
        p = energy.sigmoid() * (1 - self.stable_emit)
        rank, may = ranks(valid), valid[:, None].expand(-1, energy.shape[2], -1)
        if place.limit.shape[1]:
            may = may & (rank[:, None] <= place.limit[:, : energy.shape[2], None])
        p = p.masked_fill(~may[:, None], 0.0)
        p = preserved(p, valid, finished) if self.preserve else p
        return self.form(p, ((rank[:, None] == place.at[..., None]) & valid[:, None]).to(p.dtype))

    def _kept(self, alignment: Tensor) -> Tensor:
        """Without the heads that are dropped in this step, the others larger for it."""
        if not self.head_drop:
            return alignment
        kept = torch.rand(self.heads, 1, 1, device=alignment.device) >= self.head_drop
        return alignment * kept * (self.heads / kept.sum().clamp(min=1))

    def _wide(self, x: Tensor) -> Tensor:
        """[B, H, U, T] for each of the heads that look."""
        return x.repeat_interleave(self.width, 1)

    def _looked(self, alignment: Tensor, energy: Tensor, valid: Tensor) -> Tensor:
        """Expected weights of the frames behind the stop."""
        energy, alignment = energy.to(alignment.dtype), self._wide(alignment)
        if self.reach is None:
            return infinite(alignment, energy, valid)
        return chunkwise(alignment, energy, valid, self.reach + 1)

    def _context(self, weights: Tensor, read: Heard) -> Tensor:
        """`weights` [B * K, N, U, T] -> [B * K, U, D], with the values of row b for row b * K + k."""
        n, heads, tokens, frames = weights.shape
        rows = len(read.mask)
        side = weights.reshape(rows, n // max(rows, 1), heads, tokens, frames).transpose(1, 2).flatten(2, 3)
        seen = (side.to(read.value.dtype) @ read.value).transpose(1, 2).flatten(2)
        return run(self.out, seen.reshape(n, tokens, seen.shape[2]))


class HardMonotonic(Monotonic):
    """A head sees the frame where it stops, and no other: of several heads, MMA-H (arXiv 1909.12406)."""


class Chunkwise(Monotonic):
    """A head that stops has `chunk_heads` that look back from there, by a softmax of a second energy."""

    def __init__(
        self, dim: int, heads: int, *, chunk_heads: int = 1, energy: Callable[[int, int], Energy] = DotProduct,
        offset: float = -4.0, form: Form | None = None, noise: float = 1.0, head_drop: float = 0.0,
        stable_emit: float = 0.0, wait: int | None = None, preserve: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            dim, heads, energy=energy, offset=offset, form=form, noise=noise, head_drop=head_drop,
            stable_emit=stable_emit, wait=wait, preserve=preserve, width=chunk_heads,
        )  # fmt: skip
        self.behind = energy(dim, heads * chunk_heads)


class InfiniteLookback(Chunkwise):
    """A head sees all frames up to the one where it stops (MILk, arXiv 1906.05218): MMA-IL of several heads."""

    reach = None


class MoChA(Chunkwise):
    """A head sees the `window` frames that end where it stops (monotonic chunkwise attention, arXiv 1712.05382)."""

    def __init__(
        self, dim: int, heads: int, window: int = 4, *, chunk_heads: int = 1,
        energy: Callable[[int, int], Energy] = DotProduct, offset: float = -4.0, form: Form | None = None,
        noise: float = 1.0, head_drop: float = 0.0, stable_emit: float = 0.0, wait: int | None = None,
        preserve: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            dim, heads, chunk_heads=chunk_heads, energy=energy, offset=offset, form=form, noise=noise,
            head_drop=head_drop, stable_emit=stable_emit, wait=wait, preserve=preserve,
        )  # fmt: skip
        if window < 1:
            raise ValueError(f"a window of {window} frames: at least 1 is needed")
        self.reach = window - 1


def split(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, H, T, D/H]."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2)


def apart(x: Tensor, beam: int, tokens: int) -> Tensor:
    """[B, H, K * U, T] -> [B * K, H, U, T]."""
    if beam == 1:
        return x
    return x.view(len(x), x.shape[1], beam, tokens, x.shape[3]).transpose(1, 2).flatten(0, 1)


def repeated(x: Tensor, beam: int) -> Tensor:
    """Each row `beam` times."""
    return x if beam == 1 else x.repeat_interleave(beam, 0)


def shares(energy: Tensor, seen: Tensor) -> Tensor:
    """The softmax of `energy` [B, N, U, T] over what is `seen`; 0 where nothing is."""
    energy = energy.to(torch.promote_types(energy.dtype, torch.float32))
    return energy.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
