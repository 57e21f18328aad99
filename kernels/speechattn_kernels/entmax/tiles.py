"""What the forward and backward kernels share: rows of matrices, and weights at a level."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["moved", "rows", "shrunk", "weights"]


@triton.jit
def rows(base, at, stride, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `at` of a matrix with D columns, zero where they are not `there`: [len(at), BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(base + at.to(tl.int64)[:, None] * stride + d[None], mask=there[:, None] & (d < D)[None], other=0.0)


@triton.jit
def weights(z, seen, level, gap):
    """p = [1 + gap (z - level)]_+ ^ (1 / gap) of scores z [M, N] at `level` [M, 1], log p, and s = p^(1 - gap).

    p and s are 0 for what is not seen or falls out. The logarithm of 1 + y is y log(w) / (w - 1) with w = 1 + y as it
    is rounded, which keeps the digits of y where gap is small.
    """
    y = gap * (z - level)
    near = 1 + y
    there = seen & (near > 0)
    base = tl.where(there, near, 1.0)
    by = base - 1
    logs = tl.where(by == 0, y, tl.log(base) * (y / tl.where(by == 0, 1.0, by))) / gap
    p = tl.where(there, tl.exp(tl.minimum(logs, 1.0)), 0.0)
    return p, logs, p / base


@triton.jit
def shrunk(total, gap):
    """(1 - total^-gap) / gap, the logarithm where gap is 0; by its series where it is small."""
    logs = tl.log(total)
    e = gap * logs
    series = 1 - e / 2 * (1 - e / 3 * (1 - e / 4 * (1 - e / 5 * (1 - e / 6))))
    return tl.where(e < 0.25, logs * series, (1 - tl.exp(-e)) / gap)


@triton.jit
def moved(logs, gap):
    """What alpha does to p at a fixed threshold, by s: (e^y - 1 - y e^y) / gap^2, y = gap log p; -log(p)^2 / 2 at 0."""
    y = gap * logs
    small = tl.maximum(y, -1.0)
    # The sum of (k - 1) / k! y^(k - 2) from k = 2 on, where the difference would cancel.
    series = 1 / 2 + small * (1 / 3 + small * (1 / 8 + small * (1 / 30 + small * (1 / 144 + small * (
        1 / 840 + small * (1 / 5760 + small * (1 / 45360 + small * (1 / 403200 + small / 3991680))))))))  # fmt: skip
    grown = tl.exp(y)
    return tl.where(y > -1.0, -series * logs * logs, (grown - 1 - y * grown) / (gap * gap))
