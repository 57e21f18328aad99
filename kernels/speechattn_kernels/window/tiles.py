"""What the forward and backward kernels share: the band, tiles in memory, and positions inside a tile."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["CHANGING", "LOG2E", "closed", "columns", "far_off", "keeping", "opened", "pair", "product", "rolled",
           "seen", "tile", "turned", "unrolled", "unwatched", "watched"]  # fmt: skip

# Lengths and spans change from call to call: one kernel for all, whatever they divide by.
CHANGING = ["B", "T", "N", "S", "R", "P", "first", "origin", "left", "chunk", "right", "dilation", "seed"]
LOG2E = tl.constexpr(1.4426950408889634)  # scores are logarithms to the base 2 inside the kernels


@triton.jit
def opened(i, first, left, chunk, BOUNDED: tl.constexpr):
    """The first key that query `i` may see."""
    return tl.maximum(first + i // chunk * chunk - left, 0) if BOUNDED else i * 0


@triton.jit
def closed(i, first, chunk, right, N, CHUNKED: tl.constexpr):
    """The key behind the last one that query `i` may see."""
    return tl.minimum(first + (i // chunk + 1) * chunk + right, N) if CHUNKED else i * 0 + N


@triton.jit
def watched(j, first, chunk, right, CHUNKED: tl.constexpr):
    """The first query that may see key `j`: the chunk that just reaches so far ahead."""
    return tl.maximum(j - first - right, 0) // chunk * chunk if CHUNKED else j * 0


@triton.jit
def unwatched(j, first, left, chunk, T, BOUNDED: tl.constexpr):
    """The query behind the last one that may see key `j`: the chunk that just reaches so far back."""
    return tl.minimum((tl.maximum(j - first + left, -chunk) // chunk + 1) * chunk, T) if BOUNDED else j * 0 + T


@triton.jit
def seen(
    i, j, there, first, left, chunk, right, dilation, N,
    BOUNDED: tl.constexpr, CHUNKED: tl.constexpr, DILATED: tl.constexpr,
):  # fmt: skip
    """Which of the keys `j` that are `there` query `i` sees; both broadcast."""
    found = there & (j >= opened(i, first, left, chunk, BOUNDED)) & (j < closed(i, first, chunk, right, N, CHUNKED))
    if DILATED:
        found = found & ((first + i - j) % dilation == 0)
    return found


@triton.jit
def tile(base, at, stride, there, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `at` of a matrix with D columns [len(at), BLOCK]; zero where they are not `there`, and beyond D."""
    d = tl.arange(0, BLOCK)
    mask = there[:, None] & (d < D)[None]
    return tl.load(base + at.to(tl.int64)[:, None] * stride + d[None], mask=mask, other=0.0)


@triton.jit
def pair(base, at, stride, there, turns, place, places, D: tl.constexpr, BLOCK: tl.constexpr):
    """The same as two tiles of halves, turned by their `place`; without `turns` the whole, twice."""
    if turns is None:
        a = tile(base, at, stride, there, D, BLOCK)
        b = a
    else:
        x = tile(base, at, stride, there, D // 2, BLOCK)
        y = tile(base + D // 2, at, stride, there, D // 2, BLOCK)
        a, b = turned(x, y, turns, place, there, places, 1.0, D // 2, BLOCK)
    return a, b


@triton.jit
def turned(x, y, turns, place, there, places, way, D: tl.constexpr, BLOCK: tl.constexpr):
    """Halves of rows [M, BLOCK], turned by their `place` (one `way`, 1.0, or back, -1.0)."""
    d = tl.arange(0, BLOCK)
    mask = there[:, None] & (d < D)[None]
    where = turns + place.to(tl.int64)[:, None] * D + d[None]
    cos = tl.load(where, mask=mask, other=1.0)
    sin = way * tl.load(turns + (place.to(tl.int64) + places)[:, None] * D + d[None], mask=mask, other=0.0)
    a, b = x.to(tl.float32), y.to(tl.float32)
    return (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(y.dtype)


@triton.jit
def product(a, b, c, d, turns, PRECISION: tl.constexpr):
    """Products of all rows of one pair with all of another [M, N]."""
    found = tl.dot(a, c.trans(), input_precision=PRECISION)
    if turns is not None:
        found += tl.dot(b, d.trans(), input_precision=PRECISION)
    return found


@triton.jit
def columns(rows, at, stride, R, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns `at` of a table [D, R] of distances, zero where there are none: [BLOCK, len(at)]."""
    d = tl.arange(0, BLOCK)
    mask = (d < D)[:, None] & ((at >= 0) & (at < R))[None]
    return tl.load(rows + d.to(tl.int64)[:, None] * stride + at[None], mask=mask, other=0.0)


@triton.jit
def far_off(a, rows, table, at, stride, R, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """What distances `at` add to the scores of queries `a` [M, D]: [M, len(at)], as long as the queries' numbers."""
    found = tl.dot(a, columns(rows, at, stride, R, D, BLOCK).to(a.dtype), input_precision=PRECISION)
    if table is not None:
        found += tl.load(table + at, mask=(at >= 0) & (at < R), other=0.0).to(tl.float32)[None]
    return (found * LOG2E).to(a.dtype)


@triton.jit
def rolled(near, far, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns by distance -> columns by key [M, N]; M is at most N.

    Column c of `near` is the distance c of the first query from the first key and on, of `far` that less N. Query i
    and key j are i - j apart, beyond what the first ones are.
    """
    i, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None]
    return tl.gather(tl.where(c <= i, near, far), (i - c) & (BLOCK_N - 1), 1)


@triton.jit
def unrolled(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns by key -> columns by distance, those of `near` and those of `far`: the transpose of `rolled`."""
    i, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None]
    moved = tl.gather(x, (i - c) & (BLOCK_N - 1), 1)
    return tl.where(c <= i, moved, 0.0).to(x.dtype), tl.where(c <= i, 0.0, moved).to(x.dtype)


@triton.jit
def keeping(i, j, line, seed, dropout):
    """What dropout multiplies weights with: a counter-based generator of query, key, and row of batch and head."""
    zero = (i + j) * 0
    bits, _, _, _ = tl.philox(seed, zero + i, zero + j, zero + line.to(tl.int32), zero)
    return tl.where(tl.uint_to_uniform_float(bits) >= dropout, 1 / (1 - dropout), 0.0)
