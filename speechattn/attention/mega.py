"""Mega: a learned moving average, and gated attention with one head that reads it (arXiv 2209.10655).

The average of a feature is the sum over N damped averages of it (section 3.1):

    h_t = alpha beta x_t + (1 - alpha delta) h_(t - 1),     y_t = eta . h_t / sqrt(N)       alpha, delta in (0, 1)^N

a recurrence, or a convolution with the filter k_n = sum of eta alpha beta (1 - alpha delta)^n / sqrt(N).

    averaged_by_definition    every pair of frames
    averaged_one_by_one       the recurrence, frame by frame
    averaged                  blocks of frames and a state between them: what streams
    convolved                 a whole utterance by Fourier transforms

are the same function.
"""

from __future__ import annotations

from fractions import Fraction
from math import pi, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.linear import full_precision, picked, together, wide
from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position, Relative, Rotary
from speechattn.attention.self_attention import Spanned
from speechattn.frames import Frames
from speechattn.linear import dropped, run
from speechattn.stream import Plan
from speechattn.tree import node

__all__ = ["Averages", "Laplace", "Mega", "MegaState", "MovingAverage", "Softmax", "averaged",
           "averaged_by_definition", "averaged_one_by_one", "convolved"]  # fmt: skip

BLOCK = 32  # frames that are averaged at once


class Averages(NamedTuple):
    """N moving averages of each feature, all [D, N]: what a frame adds, what stays of the past, what is read."""

    write: Tensor
    keep: Tensor
    read: Tensor

    def powers(self, frames: int) -> Tensor:
        """What stays after 0, 1, ... `frames` frames [D, N, frames + 1]; never more than 1."""
        at = torch.arange(frames + 1, device=self.keep.device, dtype=self.keep.dtype)
        return self.keep[..., None] ** at

    def kernel(self, frames: int) -> Tensor:
        """What is read of a frame 0, 1, ... frames later [D, frames], block by block: N numbers each take room."""
        first, size = self.powers(min(frames, BLOCK))[..., :-1], self.read * self.write
        parts = [torch.einsum("dn,dnt->dt", size * self.keep**at, first) for at in range(0, frames, BLOCK)]
        return torch.cat(parts, 1)[:, :frames] if parts else size[:, :0]

    def table(self, frames: int) -> Tensor:
        """What frame t (row) reads of frame s [D, frames, frames]."""
        at = torch.arange(frames, device=self.keep.device)
        distance = at[:, None] - at
        return self.kernel(frames)[:, distance.clamp(min=0)] * (distance >= 0)


def averaged_by_definition(x: Tensor, by: Averages) -> Tensor:
    """x [B, T, D] -> [B, T, D]: each frame reads all before it."""
    return torch.einsum("dts,bsd->btd", by.table(x.shape[1]), x)


def averaged_one_by_one(x: Tensor, mask: Tensor, by: Averages, state: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, D], zero where `mask` [B, T] says so, state [B, D, N] -> [B, T, D] and the next state, by frame."""
    outputs = []
    for t in range(x.shape[1]):
        state = torch.where(mask[:, t, None, None], by.write * x[:, t, :, None] + by.keep * state, state)
        outputs.append((by.read * state).sum(-1))
    return torch.stack(outputs, 1) if outputs else x, state


def averaged(x: Tensor, mask: Tensor, by: Averages, state: Tensor, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """As `averaged_one_by_one`, `block` frames at once; the valid frames of a row stand last."""
    most = min(block, x.shape[1])
    outputs, powers, table = [], by.powers(most), by.table(most)
    for at in range(0, x.shape[1], block):
        piece, seen = x[:, at : at + block], mask[:, at : at + block]
        frames = piece.shape[1]
        near = torch.einsum("dts,bsd->btd", table[:, :frames, :frames], piece)
        ages = seen.cumsum(1)  # valid frames since the state
        far = torch.einsum("bdn,dnt->btd", by.read * state, powers[..., : frames + 1])
        outputs.append(near + picked(far, ages))
        added = torch.einsum("btd,dnt->bdn", piece, powers[..., :frames].flip(-1)) * by.write
        state = powers[..., ages[:, -1]].permute(2, 0, 1) * state + added
    return torch.cat(outputs, 1) if outputs else x, state


def convolved(x: Tensor, by: Averages) -> Tensor:
    """As `averaged_by_definition`, in T log T. A frame hears the rounding of later ones: not for what streams."""
    frames = x.shape[1]
    spectrum = torch.fft.rfft(x.mT, 2 * frames) * torch.fft.rfft(by.kernel(frames), 2 * frames)
    y: Tensor = torch.fft.irfft(spectrum, 2 * frames)[..., :frames].mT
    return y


class MovingAverage(nn.Module):
    """silu(averages(x) + omega x), the first layer of Mega; `size` is the number N of averages of each feature.

    1 / sqrt(N), the term of the frame itself and the activation are not in the paper's equations but in its program.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.alpha, self.delta = (nn.Parameter(0.2 * torch.randn(dim, size)) for _ in range(2))
        signs = 1.0 - 2.0 * (torch.arange(size) % 2)
        self.beta = nn.Parameter(signs + 0.02 * torch.randn(dim, size))
        self.eta = nn.Parameter(torch.randn(dim, size))
        self.omega = nn.Parameter(torch.randn(dim))

    def averages(self) -> Averages:
        """The numbers of the recurrence."""
        dtype = wide(self.alpha.dtype)
        alpha, delta, beta, eta = (p.to(dtype) for p in (self.alpha, self.delta, self.beta, self.eta))
        added = alpha.sigmoid()
        return Averages(added * beta, 1 - added * delta.sigmoid(), eta / sqrt(eta.shape[1]))

    def forward(self, x: Frames, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D], state [B, D, N] -> [B, T, D], the next state; a frame that is not valid changes neither.

        Without a state x is the whole utterance, and there is no next one.
        """
        there, back = together(x)
        with full_precision(x.values):
            values, by = there.values.to(wide(x.values.dtype)), self.averages()
            y, state = (convolved(values, by), None) if state is None else averaged(values, there.mask, by, state)
        y = y if back is None else picked(y, back)
        return F.silu(y.to(x.values.dtype) + self.omega * x.values), state


class Softmax(nn.Module):
    """Weights softmax(q . k / sqrt(Z) + bias)."""

    def forward(self, q: Tensor, k: Tensor, bias: Tensor | None, seen: Tensor) -> Tensor:
        """q, k [B, 1, C, Z], bias [1, 1, C, C], seen [B, 1, 1, C] -> [B, 1, C, C]."""
        scores = (q / sqrt(q.shape[-1])) @ k.mT
        scores = scores if bias is None else scores + bias
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)


class Laplace(nn.Module):
    """Weights (1 + erf((s - mu) / (sigma sqrt(2)))) / 2 of s = q . k / n + bias, n the number of keys (eq. 16).

    With mu = sqrt(1 / 2) and sigma = sqrt(1 / (4 pi)) it is close to relu(s)^2 where s is small, and bounded. The
    weights of a query do not sum to 1.
    """

    def forward(self, q: Tensor, k: Tensor, bias: Tensor | None, seen: Tensor) -> Tensor:
        """As `Softmax`."""
        scores = q @ k.mT / seen.sum(-1, keepdim=True).clamp(min=1)
        scores = scores if bias is None else scores + bias
        return 0.5 * (1 + torch.erf((scores - sqrt(0.5)) * sqrt(2 * pi))) * seen


@node
class MegaState:
    """All that Mega keeps from one chunk to the next: the moving averages [B, D, N]."""

    averages: Tensor


class Mega(Spanned):
    """The change that one layer of Mega makes: x + Mega(x) is the paper's layer, behind a `norm` if there is one.

        m = average(x),  z = silu(W_z m),  q = a_q * z + b_q,  k = a_k * z + b_k,  v = silu(W_v x)
        c = silu(W_h m + U_h (reset * o)),   o = attention(q, k) v,   reset = silu(W_r m)
        y = update * (c - x),                update = sigmoid(W_u m)                              (eq. 7 to 15)

    `Span.chunked(0, C)` is its streaming form, Mega-chunk (section 3.4): attention stays in the chunk, which counts
    frames as every span does, and the average alone carries the past, in a state of constant size. `Span.full()` is
    attention to the whole utterance. The average looks back in both. `function` makes weights of scores: `Softmax` or
    `Laplace`. Queries and keys have `keys` features (by default D, so that a position made for D fits; the paper takes
    about D / 4), values `values` (2 D). `averages` is N.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, norm: nn.Module | None = None,
        dropout: float = 0.0, averages: int = 16, keys: int | None = None, values: int | None = None,
        function: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if heads != 1:
            raise ValueError(f"Mega has 1 head, whose gates stand in for the others; not {heads}")
        self.dim, self.keys, self.values, self.dropout = dim, keys or dim, values or 2 * dim, dropout
        if isinstance(position, Relative) and position.dim != self.keys:
            raise ValueError(f"a position for {position.dim} features, but queries and keys have {self.keys}")
        if isinstance(position, Rotary) and self.keys % 2:
            raise ValueError(f"rotary positions turn pairs of features, but queries and keys have {self.keys}")
        self.span: Pattern = self.honoured(span)
        self.position, self.norm, self.function = position, norm, function or Softmax()
        self.average = MovingAverage(dim, averages)
        self.value = nn.Linear(dim, self.values)
        self.parts = nn.Linear(dim, 2 * dim + self.keys + self.values)  # update gate, W_h, z, reset gate
        self.out = nn.Linear(self.values, dim, bias=False)
        self.scale = nn.Parameter(0.02 * torch.randn(2, self.keys))
        self.shift = nn.Parameter(torch.zeros(2, self.keys))

    def honoured(self, span: Pattern) -> Pattern:
        """`span`; ValueError for one that is neither the whole utterance, nor chunks that do not see each other."""
        if not isinstance(span, Span) or span != Span(None if span.chunk is None else 0, span.chunk):
            raise ValueError(
                f"Mega attends to the whole utterance or inside a chunk, where its average carries the past: it needs "
                f"Span.full() or Span.chunked(0, C), not {span}"
            )
        return span

    def scaled(self, span: Pattern) -> Pattern:
        return self.honoured(super().scaled(span))

    def plan(self) -> Plan:
        return Plan(getattr(self.span, "chunk", None), Fraction(1), 0, None, 0)

    def init_state(self, x: Frames) -> Any:
        if self.plan().block is None:
            return ()
        shape = x.values.shape[0], *self.average.alpha.shape
        return MegaState(x.values.new_zeros(shape, dtype=wide(x.values.dtype)))

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        past = state.averages if isinstance(state, MegaState) else None
        spent = self._spend(state) if past is None else None
        if not x.mask.shape[1]:
            return x, spent or state
        normed = Frames.finite(x.values if self.norm is None else self.norm(x.values), x.mask)
        moved, past = self.average(normed, past)
        sizes = [self.dim, self.dim, self.keys, self.values]
        update, hidden, z, reset = torch.split(run(self.parts, moved), sizes, -1)
        seen = self.attended(F.silu(z), F.silu(run(self.value, normed.values)), x.mask)
        candidate = F.silu(hidden + run(self.out, F.silu(reset) * seen))
        candidate = dropped(candidate, self.dropout) if self.training else candidate
        y = Frames.finite(update.sigmoid() * (candidate - x.values), x.mask)
        return y, spent if past is None else MegaState(past)

    def attended(self, z: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """z [B, T, Z], v [B, T, V], mask [B, T] -> what the frames of each chunk see of each other [B, T, V]."""
        chunk = self.plan().block or mask.shape[1]
        q, k = (z * self.scale[i] + self.shift[i] for i in range(2))
        q, k, values = (part.reshape(-1, 1, chunk, part.shape[-1]) for part in (q, k, v))
        bias, own = None, range(chunk)
        if self.position is not None:
            bias = self.position.bias(q, own, own)
            q, k = self.position.turn(q, k, own, own)
        weights = self.function(q, k, bias, mask.reshape(-1, 1, 1, chunk))
        y: Tensor = (weights @ values).reshape(v.shape)
        return y
