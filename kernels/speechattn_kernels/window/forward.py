"""The forward kernel: online softmax over the keys that a block of queries may see."""

from __future__ import annotations

import triton
import triton.language as tl

from speechattn_kernels.window.tiles import (
    CHANGING,
    LOG2E,
    closed,
    far_off,
    keeping,
    opened,
    pair,
    product,
    rolled,
    seen,
    tile,
)

__all__ = ["window_forward_kernel"]


@triton.jit(do_not_specialize=[name for name in CHANGING if name != "B"])
def window_forward_kernel(
    q, k, v, valid, extra, extra_values, rows, table, turns, out, lse,
    q_batch, q_head, q_frame, k_batch, k_head, k_frame, v_batch, v_head, v_frame, rows_head, rows_feature,
    H, G, T, N, S, R, P, first, origin, left, chunk, right, dilation, scale, dropout, seed,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BOUNDED: tl.constexpr, CHUNKED: tl.constexpr, DILATED: tl.constexpr, DROPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, H, T, D] and lse [B, H, T] for the queries m0 .. m0 + M of one head."""
    m0, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    g, line = h // (H // G), b * H + h
    q, k, v = q + b * q_batch + h * q_head, k + b * k_batch + g * k_head, v + b * v_batch + g * v_head
    valid, extra_values = valid + b * N, extra_values + (b * G + g) * S * D if extra is not None else extra_values
    i, jn = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    there = i < T
    qa, qb = pair(q, i, q_frame, there, turns, first + i, P, D, BLOCK_D)  # [M, D]
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if extra is not None:
        s = tl.arange(0, BLOCK_S)
        known = there[:, None] & (s < S)[None]
        given = tl.load(extra + (line * T + i)[:, None] * S + s[None], mask=known, other=float("-inf"))
        given = given.to(tl.float32) * LOG2E
        best = tl.max(given, 1)
        apart = tl.exp2(given - tl.where(best > float("-inf"), best, 0.0)[:, None])
        total = tl.sum(apart, 1)
        if DROPPED:
            apart *= keeping(i[:, None], N + s[None], line, seed, dropout)
        held = tile(extra_values, s, D, s < S, D, BLOCK_V)  # [S, D]
        mixed = tl.dot(apart.to(held.dtype), held, input_precision=PRECISION)
    begin = opened(m0, first, left, chunk, BOUNDED)
    end = closed(tl.minimum(m0 + BLOCK_M, T) - 1, first, chunk, right, N, CHUNKED)
    if rows is not None:
        rows = rows + h * rows_head
    if table is not None:
        table = table + h * R
    if rows is not None:
        near = far_off(qa, rows, table, first + m0 - begin - origin + jn, rows_feature, R, D, BLOCK_D, PRECISION)
    for n0 in range(begin, end, BLOCK_N):
        j = n0 + jn
        ok = tl.load(valid + j, mask=j < N, other=0) != 0
        ka, kb = pair(k, j, k_frame, ok, turns, j, P, D, BLOCK_D)  # [N, D]
        scores = product(qa, qb, ka, kb, turns, PRECISION) * (scale * LOG2E)  # [M, N]
        base = first + m0 - n0 - origin
        if rows is not None:
            far = far_off(qa, rows, table, base - BLOCK_N + jn, rows_feature, R, D, BLOCK_D, PRECISION)
            scores += rolled(near, far, BLOCK_M, BLOCK_N)
            near = far
        elif table is not None:
            at = base + (i - m0)[:, None] - jn[None]
            scores += tl.load(table + at, mask=(at >= 0) & (at < R), other=0.0).to(tl.float32) * LOG2E
        visible = seen(i[:, None], j[None], ok[None], first, left, chunk, right, dilation, N, BOUNDED, CHUNKED, DILATED)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        level = tl.where(higher > float("-inf"), higher, 0.0)
        p, fade = tl.exp2(scores - level[:, None]), tl.exp2(best - level)
        total = total * fade + tl.sum(p, 1)
        if DROPPED:
            p *= keeping(i[:, None], j[None], line, seed, dropout)
        values = tile(v, j, v_frame, ok, D, BLOCK_V)  # [N, D]
        mixed = tl.dot(p.to(values.dtype), values, mixed * fade[:, None], input_precision=PRECISION)
        best = higher
    total = tl.where(total > 0, total, 1.0)  # who sees nobody gets zeros, and has the lowest level
    mixed = mixed / total[:, None]
    d = tl.arange(0, BLOCK_V)
    inside = there[:, None] & (d < D)[None]
    tl.store(out + ((b * T + i) * H + h)[:, None] * D + d[None], mixed.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + line * T + i, (best + tl.log2(total)) / LOG2E, mask=there)
