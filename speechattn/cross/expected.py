"""Monotonic alignment as pure functions: what is expected of it in training, what it decides in decoding.

A head stands at a frame. For each token it looks at the frames from there on, one by one, stops at frame j with
probability p[j], and stands where it stopped when the next token comes (Raffel et al., arXiv 1704.00784):

    q[i, j] = (1 - p[i, j-1]) * q[i, j-1] + alpha[i-1, j]        alpha[i, j] = p[i, j] * q[i, j]

`alpha` is the probability that token i is said at frame j. Where a row sums to less than 1, the head never stopped.
Every form has `p` [..., U, T], and where the head stands at first `start` [..., T] (frame 0) -> `alpha` [..., U, T].
The probabilities of frames that are not there must be 0: such frames are passed by. `valid` is [B, T].
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.attention.triton import installed

__all__ = ["Form", "Stops", "chunkwise", "doubling", "fused", "hard", "infinite", "matrix", "preserved", "ranks",
           "ratio", "recurrence", "scan", "sequential"]  # fmt: skip

NEVER = -1e30  # an energy below all others, whose differences are still numbers


class Form(Protocol):
    """One way to compute the expected alignment."""

    def __call__(self, p: Tensor, start: Tensor | None = None) -> Tensor:
        """`p` [..., U, T], `start` [..., T] -> `alpha` [..., U, T]."""


class Stops(NamedTuple):
    """Decisions of heads: `at` [B, H, U] counts the valid frames before the one where the head stops.

    Where it does not stop (`found` [B, H, U] is False) it has passed every frame there is.
    """

    at: Tensor
    found: Tensor


def ranks(valid: Tensor) -> Tensor:
    """How many valid frames stand before each frame [B, T]."""
    return valid.cumsum(1) - valid.long()


def preserved(p: Tensor, valid: Tensor, rows: Tensor) -> Tensor:
    """`p` [B, H, U, T] where in some `rows` [B] nobody passes the last valid frame, so that no mass is lost."""
    last = valid & (ranks(valid) == valid.sum(1, keepdim=True) - 1) & rows[:, None]
    return p.masked_fill(last[:, None, None], 1.0)


def begin(p: Tensor, start: Tensor | None) -> Tensor:
    """Where a head stands before the first token [..., T]."""
    if start is not None:
        return start.to(p.dtype).expand(*p.shape[:-2], p.shape[-1])
    start = p.new_zeros(*p.shape[:-2], p.shape[-1])
    start[..., :1] = 1.0
    return start


def stacked(rows: list[Tensor], p: Tensor) -> Tensor:
    """Rows of tokens [..., T] -> [..., U, T]."""
    return torch.stack(rows, -2) if rows else torch.zeros_like(p)


def sequential(p: Tensor, start: Tensor | None = None) -> Tensor:
    """The recurrence itself, frame by frame: exact, O(U T) steps in Python. The reference."""
    alpha, rows = begin(p, start), []
    for i in range(p.shape[-2]):
        q, found = alpha.new_zeros(alpha.shape[:-1]), []
        for j in range(p.shape[-1]):
            q = q + alpha[..., j]
            found.append(p[..., i, j] * q)
            q = q - found[-1]  # (1 - p) q
        alpha = torch.stack(found, -1) if found else alpha
        rows.append(alpha)
    return stacked(rows, p)


def ratio(p: Tensor, start: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """By sums over a cumulative product that is kept above `eps` (arXiv 1704.00784, eq. 13); at least in float32.

    The fastest form, and a biased one where many frames have been passed: finite and within [0, 1], no more.
    """
    wide = p.to(torch.promote_types(p.dtype, torch.float32))
    logs = (1 - wide).clamp(eps, 1.0).log()
    passed = (logs.cumsum(-1) - logs).exp()  # the product of (1 - p) over the frames before
    below = passed.clamp(eps, 1.0)
    alpha, rows = begin(wide, start), []
    for i in range(p.shape[-2]):
        alpha = (wide[..., i, :] * passed[..., i, :] * (alpha / below[..., i, :]).cumsum(-1)).clamp(0.0, 1.0)
        rows.append(alpha)
    return stacked(rows, p).to(p.dtype)


def matrix(p: Tensor, start: Tensor | None = None) -> Tensor:
    """By the matrix of probabilities to come from frame k to frame j without a stop (EMMA, arXiv 2312.04515).

    Nothing is divided and nothing biased; memory and time O(T^2) a token.
    """
    wide = p.to(torch.promote_types(p.dtype, torch.float32))
    least = torch.finfo(wide.dtype).eps / 2  # that is not stopped at p = 1, where the logarithm has no gradient
    logs = torch.log1p(-wide.clamp(max=1 - least)).double()  # long sums of large numbers, whose differences count
    passed = logs.cumsum(-1) - logs
    up = torch.ones(p.shape[-1], p.shape[-1], dtype=torch.bool, device=p.device).triu()
    alpha, rows = begin(wide, start), []
    for i in range(p.shape[-2]):
        way = passed[..., i, None, :] - passed[..., i, :, None]
        way = way.masked_fill(~up, -torch.inf).to(wide.dtype).exp()
        alpha = wide[..., i, :] * (alpha[..., None, :] @ way)[..., 0, :]
        rows.append(alpha)
    return stacked(rows, p).to(p.dtype)


def powers(a: Tensor) -> list[tuple[int, Tensor]]:
    """Products of the last 1, 2, 4, ... of `a` [..., T], for each frame that has so many before it."""
    found, reach, frames = [], 1, a.shape[-1]
    while reach < frames:
        found.append((reach, a[..., reach:]))
        a = torch.cat([a[..., :reach], a[..., reach:] * a[..., :-reach]], -1)
        reach *= 2
    return found


def carried(b: Tensor, factors: list[tuple[int, Tensor]]) -> Tensor:
    """y[j] = a[j] y[j-1] + b[j] of `b` [..., T], by the `powers` of a."""
    for reach, a in factors:
        b = torch.cat([b[..., :reach], b[..., reach:] + a * b[..., :-reach]], -1)
    return b


def recurrence(a: Tensor, b: Tensor) -> Tensor:
    """y[j] = a[j] y[j-1] + b[j] along the last dimension of `a`, `b` [..., T], in log2(T) steps.

    An associative scan: nothing is divided, there are no logarithms, and what is not negative cannot cancel.
    """
    return carried(b, powers(a))


def scan(p: Tensor, start: Tensor | None = None) -> Tensor:
    """By an associative scan, as exact as the recurrence: `fused` where there is a GPU for it, else `doubling`."""
    return fused(p, start) if p.is_cuda and unable(p) is None else doubling(p, start)


def fused(p: Tensor, start: Tensor | None = None) -> Tensor:
    """The scan in one kernel, O(T) a token, which saves nothing but p and alpha (`speechattn_kernels.monotonic`).

    ValueError where no kernel can run. The other forms can be differentiated twice, this one once.
    """
    if (why := unable(p)) is not None:
        raise ValueError(f"expected alignment: {why}; another form, such as doubling, runs everywhere")
    from speechattn_kernels.monotonic import monotonic

    at = begin(p, start)
    rows = at.shape[:-1].numel()
    alpha: Tensor = monotonic(p.reshape(rows, *p.shape[-2:]), at.reshape(rows, p.shape[-1]))
    return alpha.view(p.shape)


def unable(p: Tensor) -> str | None:
    """Why `fused` cannot run on `p`; None if it can."""
    if not installed():
        return "the kernels need triton, which is not installed"
    from speechattn_kernels import common

    why: str | None = common.unable(p)
    return why


def doubling(p: Tensor, start: Tensor | None = None) -> Tensor:
    """The scan in plain torch, which runs everywhere: log2(T) steps of twice the reach each, O(T log T) a token."""
    wide = p.to(torch.promote_types(p.dtype, torch.float32))
    factors = powers(F.pad(1 - wide[..., :-1], [1, 0])) if p.shape[-1] else []
    alpha, rows = begin(wide, start), []
    for i in range(p.shape[-2]):
        q = carried(alpha, [(reach, a[..., i, :]) for reach, a in factors])
        alpha = wide[..., i, :] * q
        rows.append(alpha)
    return stacked(rows, p).to(p.dtype)


def hard(p: Tensor, start: Tensor, valid: Tensor, finished: Tensor, *, wait: int | None = None) -> Stops:
    """The decision: each head stops at the first valid frame from where it stands with p >= 1/2.

    `p` [B, H, U, T]; `start` [B, H] counts the valid frames before the one where a head stands. With `wait`, when the
    first head has stopped the others do so at the latest so many frames later (head-synchronous decoding, arXiv
    2005.09394, section 3.3), and in rows that have `finished` [B] at the last frame.
    """
    rank, count = ranks(valid)[:, None], valid.sum(1)
    ready = valid[:, None, None] & (p >= 0.5)
    stops = []
    for i in range(p.shape[2]):
        fires = ready[:, :, i] & (rank >= start[..., None])
        at = (valid[:, None] & (fires.long().cumsum(-1) == 0)).sum(-1)
        if wait is not None:
            at = synchronous(at, start, count, finished, wait)
        start = at
        stops.append(at)
    found = torch.stack(stops, 2) if stops else start[..., None][..., :0]
    return Stops(found, found < count[:, None, None])


def synchronous(at: Tensor, start: Tensor, count: Tensor, finished: Tensor, wait: int) -> Tensor:
    """Where heads stop that wait for each other, from where they would stop alone [B, H], and where they stand."""
    count = count[:, None]
    first = at.amin(1, keepdim=True)
    latest = torch.where(finished[:, None], (first + wait).minimum(count - 1), first + wait).maximum(start)
    return torch.where(first < count, at.minimum(latest), at).minimum(count)


def chunkwise(alpha: Tensor, energy: Tensor, valid: Tensor, window: int) -> Tensor:
    """Expected weights of a softmax of `energy` over the `window` frames that end where the head stops (MoChA).

    `alpha`, `energy` [B, H, U, T] -> the same shape (arXiv 1712.05382, eq. 18), each softmax on its own, so that no
    energy is too large. The valid frames of a row stand side by side, as those of an encoder do.
    """
    if window >= alpha.shape[-1]:
        return infinite(alpha, energy, valid)
    energy = energy.masked_fill(~valid[:, None, None], NEVER)
    shares = F.pad(energy, [window - 1, 0], value=NEVER).unfold(-1, window, 1).softmax(-1) * alpha[..., None]
    weights = shares[..., -1]
    for back in range(1, window):  # the frame so far before the one where the head stops
        weights = weights + F.pad(shares[..., back:, window - 1 - back], [0, back])
    return weights.masked_fill(~valid[:, None, None], 0.0)


def infinite(alpha: Tensor, energy: Tensor, valid: Tensor) -> Tensor:
    """The same over all frames up to the one where the head stops (MILk, arXiv 1906.05218, eq. 9).

    With Z[k] the sum of exp(energy) up to k, weights[j] = exp(energy[j]) / Z[j] * R[j], where
    R[j] = alpha[j] + Z[j] / Z[j+1] * R[j+1]; no factor is above 1.
    """
    energy = energy.masked_fill(~valid[:, None, None], NEVER)
    total = energy.logcumsumexp(-1)
    down = F.pad((total[..., :-1] - total[..., 1:]).exp(), [0, 1])
    rest = recurrence(down.flip(-1), alpha.flip(-1)).flip(-1)
    return ((energy - total).exp() * rest).masked_fill(~valid[:, None, None], 0.0)
