"""The lattice of frames and labels: the sum over all paths, and the probability of each arc (arXiv 1211.3711)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speechattn_kernels.common import launch, power
from speechattn_kernels.rnnt.forward import Arcs
from speechattn_kernels.rnnt.tiles import NOTHING, clipped

__all__ = ["backward_scores", "forward_scores"]


@triton.jit
def either(x, y):
    """log(e^x + e^y)."""
    return tl.maximum(x, y) + tl.log(1 + tl.exp(-tl.abs(x - y)))


@triton.jit
def follow(step, ways, next_step, next_ways):
    """x -> (x + step) or `ways`, then the next of the kind: again one of the kind."""
    x = ways + next_step
    return step + next_step, tl.maximum(x, next_ways) + tl.log(1 + tl.exp(-tl.abs(x - next_ways)))


@triton.jit
def arc(values, place, there):
    """Log-probabilities at `place`; NOTHING where none is, and instead of minus infinity."""
    x = tl.load(values + place, mask=there, other=NOTHING)
    return tl.where(x < NOTHING, NOTHING, x)


@triton.jit(do_not_specialize=["T", "N"])
def rnnt_alpha_kernel(blanks, labels, alpha, loss, frame_lengths, label_lengths, T, N, BLOCK: tl.constexpr):
    """Arcs [B, T, N] -> alpha [B, T, N], the sum over all ways to (t, u), and minus that over whole paths [B]."""
    b = tl.program_id(0)
    frames = clipped(frame_lengths, b, T)
    said = clipped(label_lengths, b, N - 1)
    u = tl.arange(0, BLOCK)
    start = b.to(tl.int64) * T * N
    ways = tl.where(u == 0, 0.0, NOTHING)  # those by a blank from the frame before
    for t in tl.range(0, frames, num_stages=3):
        place = start + t * N + u
        label = arc(labels, place - 1, (u > 0) & (u <= said))
        blank = arc(blanks, place, u <= said)
        _, ways = tl.associative_scan((label, ways), 0, follow)
        tl.store(alpha + place, ways, mask=u <= said)
        ways += blank
    total = tl.sum(tl.where(u == said, ways, 0.0), 0)
    tl.store(loss + b, tl.where(total < NOTHING / 2, float("inf"), -total))


@triton.jit(do_not_specialize=["T", "N"])
def rnnt_beta_kernel(
    blanks, labels, alpha, loss, grads, frame_lengths, label_lengths, blank_mass, label_mass, T, N, BLOCK: tl.constexpr
):
    """Arcs, alpha [B, T, N], loss, its gradient [B] -> the posterior of each arc, times the gradient.

    beta is the sum over all ways from (t, u) to the end. From the last label backwards, lane i is that of u = said - i,
    so that what is summed comes from the lane before; `above` is the beta of u + 1.
    """
    b = tl.program_id(0)
    frames = clipped(frame_lengths, b, T)
    said = clipped(label_lengths, b, N - 1)
    cost = tl.load(loss + b)
    grad = tl.load(grads + b).to(tl.float32)
    i = tl.arange(0, BLOCK)
    there = i <= said
    start = b.to(tl.int64) * T * N + said
    beta = tl.where(i == 0, 0.0, NOTHING)  # of the next frame: behind the last one, the end
    above = tl.where(i == 1, 0.0, NOTHING)
    for back in tl.range(0, frames, num_stages=3):
        place = start + (frames - 1 - back) * N - i
        blank = arc(blanks, place, there)
        label = arc(labels, place, there & (i > 0))
        blank_above = arc(blanks, place + 1, there & (i > 0))
        label_above = arc(labels, place + 1, there & (i > 1))
        before = arc(alpha, place, there)
        before = tl.where(cost == float("inf"), NOTHING, before + cost)
        tl.store(blank_mass + place, tl.exp(before + blank + beta) * grad, mask=there)
        _, above = tl.associative_scan((label_above, above + blank_above), 0, follow)
        tl.store(label_mass + place, tl.exp(before + label + above) * grad, mask=there)
        beta = either(beta + blank, label + above)


def forward_scores(arcs: Arcs, frame_lengths: Tensor, label_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """-> alpha [B, T, U + 1] and the loss [B]: infinite where no path is."""
    b, t, n = arcs.blank.shape
    alpha, loss = torch.empty_like(arcs.blank), arcs.blank.new_empty(b)
    args = {
        "blanks": arcs.blank, "labels": arcs.label, "alpha": alpha, "loss": loss, "frame_lengths": frame_lengths,
        "label_lengths": label_lengths, "T": t, "N": n, "BLOCK": power(n),
    }  # fmt: skip
    launch(rnnt_alpha_kernel, (b,), args, warps=lanes(n), stages=3)
    return alpha, loss


def backward_scores(
    arcs: Arcs, alpha: Tensor, loss: Tensor, grads: Tensor, frame_lengths: Tensor, label_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """-> the posterior of each blank and label [B, T, U + 1], times the loss's gradient `grads` [B].

    Minus them are the gradient of the arcs.
    """
    b, t, n = arcs.blank.shape
    blank_mass, label_mass = torch.empty_like(arcs.blank), torch.empty_like(arcs.blank)
    args = {
        "blanks": arcs.blank, "labels": arcs.label, "alpha": alpha, "loss": loss, "grads": grads,
        "frame_lengths": frame_lengths, "label_lengths": label_lengths, "blank_mass": blank_mass,
        "label_mass": label_mass, "T": t, "N": n, "BLOCK": power(n),
    }  # fmt: skip
    launch(rnnt_beta_kernel, (b,), args, warps=lanes(n), stages=3)
    return blank_mass, label_mass


def lanes(n: int) -> int:
    """Warps for a scan over `n`: one needs no shared memory, and a thread takes up to eight."""
    return min(max(power(n) // 256, 1), 8)
