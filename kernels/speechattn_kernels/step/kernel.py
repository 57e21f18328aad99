"""The kernel of a step, and its launch."""

from __future__ import annotations

from math import sqrt

import triton
import triton.language as tl
from torch import Tensor

from speechattn_kernels.common import divided, launch, power, precision
from speechattn_kernels.window.tiles import LOG2E, columns, pair, product, rolled, tile, turned

__all__ = ["forward", "step_kernel"]


@triton.jit
def held_or_new(
    cache, slot, step, held, new, frame, stride, fresh, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows [N, BLOCK] of the cache where they are `held`, of what is new where they are `fresh`, else zero."""
    old = tile(cache, slot, step, held, D, BLOCK)
    return tl.where(fresh[:, None], tile(new, frame, stride, fresh, D, BLOCK), old)


@triton.jit
def keys_at(
    cache, slot, step, held, new, frame, stride, fresh, turns, place, P, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Keys as two tiles of halves, turned by their place; without `turns` the whole, twice."""
    if turns is None:
        a = held_or_new(cache, slot, step, held, new, frame, stride, fresh, D, BLOCK)
        b = a
    else:
        x = held_or_new(cache, slot, step, held, new, frame, stride, fresh, D // 2, BLOCK)
        y = held_or_new(cache + D // 2, slot, step, held, new + D // 2, frame, stride, fresh, D // 2, BLOCK)
        a, b = turned(x, y, turns, place, held | fresh, P, 1.0, D // 2, BLOCK)
    return a, b


@triton.jit
def by_distance(a, rows, table, at, R, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """What columns `at` of the tables add to the scores of queries `a` [M, D]: [M, len(at)]."""
    found = tl.dot(a, columns(rows, at, R, R, D, BLOCK), input_precision=PRECISION)
    if table is not None:
        found += tl.load(table + at, mask=(at >= 0) & (at < R), other=0.0).to(tl.float32)[None]
    return found


@triton.jit
def write(
    k, v, k_frame, v_frame, mask, cache, begin, i, T, CAP, step, half, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """New frames `i` of one key head go into their slots, zero where nothing is."""
    there = i < T
    known = tl.load(mask + i, mask=there, other=0) != 0
    slot, d = (begin + i) % CAP, tl.arange(0, BLOCK)
    to, inside = cache + slot.to(tl.int64)[:, None] * step + d[None], there[:, None] & (d < D)[None]
    tl.store(to, tile(k, i, k_frame, known, D, BLOCK), mask=inside)
    tl.store(to + half, tile(v, i, v_frame, known, D, BLOCK), mask=inside)


@triton.jit
def remember(filled, mask, kept, HELD, T, BLOCK: tl.constexpr):
    """Which frames of the next history are there."""
    for n0 in range(0, HELD, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        old = tl.load(filled + n + T, mask=n + T < HELD, other=0) != 0
        new = tl.load(mask + n + T - HELD, mask=(n + T >= HELD) & (n < HELD), other=0) != 0
        tl.store(kept + n, old | new, mask=n < HELD)


@triton.jit
def step_kernel(
    q, k, v, mask, cache, filled, at, rows, table, turns, out, kept, after,
    q_batch, q_head, q_frame, k_batch, k_head, k_frame, v_batch, v_head, v_frame,
    H, G, T, CAP, HELD, R, P, left, chunk, right, dilation, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, D] for the queries m0 .. m0 + M of one head; the first head of a group writes what is new."""
    m0, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2).to(tl.int64)
    share = H // G
    g = h // share
    q, k, v = q + b * q_batch + h * q_head, k + b * k_batch + g * k_head, v + b * v_batch + g * v_head
    cache, mask, filled = cache + (b * CAP * 2 * G + g) * D, mask + b * T, filled + b * HELD
    begin = tl.load(at + b).to(tl.int32)
    i, jn = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    there = i < T
    if h % share == 0:
        write(k, v, k_frame, v_frame, mask, cache, begin + HELD, i, T, CAP, 2 * G * D, G * D, D, BLOCK_V)
    if h + m0 == 0:
        tl.store(after + b, ((begin + T) % CAP).to(after.dtype.element_ty))
        remember(filled, mask, kept + b * HELD, HELD, T, BLOCK_N)
    qa, qb = pair(q, i, q_frame, there, turns, left + i, P, D, BLOCK_D)  # [M, D]
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    low = i // chunk * chunk  # the first key that a query sees
    high = low + left + chunk + right
    start = m0 // chunk * chunk
    end = (tl.minimum(m0 + BLOCK_M, T) - 1) // chunk * chunk + left + chunk + right
    zero = left + chunk - 1 + right + m0  # the column of query m0 and key 0
    if rows is not None:
        rows = rows + h * D * R
    if table is not None:
        table = table + h * R
    if rows is not None:
        near = by_distance(qa, rows, table, zero - start + jn, R, D, BLOCK_D, PRECISION)
    for n0 in range(start, end, BLOCK_N):
        n = n0 + jn
        slot = begin + n
        slot = tl.where(slot < CAP, slot, slot - CAP)
        held = tl.load(filled + n, mask=n < HELD, other=0) != 0
        fresh = tl.load(mask + n - HELD, mask=(n >= HELD) & (n < HELD + T), other=0) != 0
        ka, kb = keys_at(cache, slot, 2 * G * D, held, k, n - HELD, k_frame, fresh, turns, n, P, D, BLOCK_D)  # [N, D]
        scores = product(qa, qb, ka, kb, turns, PRECISION) * scale  # [M, N]
        if rows is not None:
            far = by_distance(qa, rows, table, zero - n0 - BLOCK_N + jn, R, D, BLOCK_D, PRECISION)
            scores += rolled(near, far, BLOCK_M, BLOCK_N)
            near = far
        elif table is not None:
            column = zero - n0 + (i - m0)[:, None] - jn[None]
            scores += tl.load(table + column, mask=(column >= 0) & (column < R), other=0.0).to(tl.float32)
        seen = (held | fresh)[None] & (n[None] >= low[:, None]) & (n[None] < high[:, None])
        seen = seen & ((left + i[:, None] - n[None]) % dilation == 0)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        level = tl.where(higher > float("-inf"), higher, 0.0)
        p, fade = tl.exp2(scores - level[:, None]), tl.exp2(best - level)
        total = total * fade + tl.sum(p, 1)
        values = held_or_new(cache + G * D, slot, 2 * G * D, held, v, n - HELD, v_frame, fresh, D, BLOCK_V)  # [N, D]
        mixed = tl.dot(p.to(values.dtype), values, mixed * fade[:, None], input_precision=PRECISION)
        best = higher
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]  # who sees nobody gets zeros
    d = tl.arange(0, BLOCK_V)
    inside = there[:, None] & (d < D)[None]
    to = out + ((b * T + i)[:, None] * H + h) * D + d[None]
    tl.store(to, mixed.to(out.dtype.element_ty), mask=inside)


def sizes(q: Tensor, rows: Tensor | None) -> tuple[int, int, int]:
    """Queries and keys of a tile, and warps: a step is short, so one tile of queries mostly is enough."""
    wide, low = power(q.shape[3]) * q.element_size(), q.element_size() < 4  # bytes of a row
    m = min(power(q.shape[2]), 32 if low and wide <= 128 else 16)
    n = max(m, 64 if low and wide <= 128 else 32 if (wide <= 256 and low) or wide <= 128 else 16)
    few = low and m == 16 and wide <= (256 if rows is None else 128)
    return m, n, 4 if few else 8


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cache: Tensor, filled: Tensor, at: Tensor, y: Tensor, kept: Tensor,
    after: Tensor, *, left: int, chunk: int, right: int, dilation: int, late: int, rows: Tensor | None = None,
    table: Tensor | None = None, turns: Tensor | None = None,
) -> None:  # fmt: skip
    """As `speechattn_kernels.step`, into y, kept and after."""
    (batch, heads, frames, dim), (m, n, warps) = q.shape, sizes(q, rows)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    rows, table, turns = (None if x is None else x.contiguous() for x in (rows, table, turns))
    columns = left + 2 * chunk - 1 + right
    args = {
        "q": q, "k": k, "v": v, "mask": mask.contiguous(), "cache": cache, "filled": filled.contiguous(),
        "at": at.contiguous(), "rows": rows, "table": table, "turns": turns, "out": y, "kept": kept, "after": after,
        **strides("q", q), **strides("k", k), **strides("v", v), "H": heads, "G": k.shape[1], "T": frames,
        "CAP": cache.shape[1], "HELD": left + late, "R": columns, "P": 0 if turns is None else turns.shape[1],
        "left": left, "chunk": chunk, "right": right, "dilation": dilation, "scale": 1 / sqrt(dim), "D": dim,
        "BLOCK_D": power(dim if turns is None else dim // 2), "BLOCK_V": power(dim), "BLOCK_M": m, "BLOCK_N": n,
        "PRECISION": precision(q.dtype),
    }  # fmt: skip
    launch(step_kernel, (divided(frames, m), heads, batch), args, warps=warps)


def strides(name: str, x: Tensor) -> dict[str, int]:
    """How far rows, heads and frames of x [B, H, T, D] are apart."""
    return {f"{name}_batch": x.stride(0), f"{name}_head": x.stride(1), f"{name}_frame": x.stride(2)}
