"""The backward kernels: one for queries, one for keys and values, one for what depends on distance alone.

With the weights p = exp(scores - lse), the gradient dp of the weights before dropout, and for each query
delta = sum(p dp) = out . d out - d lse, that of the scores is ds = p (dp - delta). Each kernel computes scores anew,
and sums in one fixed order: nothing is added atomically. The one for queries comes first, and finds delta.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speechattn_kernels.window.tiles import (
    CHANGING,
    LOG2E,
    closed,
    columns,
    far_off,
    keeping,
    opened,
    pair,
    product,
    rolled,
    seen,
    tile,
    turned,
    unrolled,
    unwatched,
    watched,
)

__all__ = ["window_distance_kernel", "window_keys_kernel", "window_queries_kernel"]


@triton.jit
def weights(scores, lse, visible):
    """Weights [M, N] of scores, whose level is known."""
    return tl.exp2(tl.where(visible, scores - lse[:, None], float("-inf")))


@triton.jit(do_not_specialize=[name for name in CHANGING if name not in ("B", "S")])
def window_queries_kernel(
    q, k, v, valid, rows, table, turns, lse, delta, out, d_out, d_lse, d_q,
    q_batch, q_head, q_frame, k_batch, k_head, k_frame, v_batch, v_head, v_frame, o_batch, o_head, o_frame,
    rows_head, rows_feature,
    H, G, T, N, R, P, first, origin, left, chunk, right, dilation, scale, dropout, seed,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, CHUNKED: tl.constexpr, DILATED: tl.constexpr, DROPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d q [B, T, H, D] and delta [B, H, T] for the queries m0 .. m0 + M of one head."""
    m0, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    g, line = h // (H // G), b * H + h
    q, k, v = q + b * q_batch + h * q_head, k + b * k_batch + g * k_head, v + b * v_batch + g * v_head
    d_out, valid = d_out + b * o_batch + h * o_head, valid + b * N
    i, jn = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    there = i < T
    qa, qb = pair(q, i, q_frame, there, turns, first + i, P, D, BLOCK_D)  # [M, D]
    grad = tile(d_out, i, o_frame, there, D, BLOCK_V)  # [M, D]
    level = tl.load(lse + line * T + i, mask=there, other=0.0) * LOG2E
    said = tile(out + (b * T * H + h) * D, i, H * D, there, D, BLOCK_V)  # [M, D]
    inner = tl.sum(grad.to(tl.float32) * said.to(tl.float32), 1)
    if d_lse is not None:
        inner -= tl.load(d_lse + line * T + i, mask=there, other=0.0)
    tl.store(delta + line * T + i, inner, mask=there)
    da = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = opened(m0, first, left, chunk, BOUNDED)
    end = closed(tl.minimum(m0 + BLOCK_M, T) - 1, first, chunk, right, N, CHUNKED)
    if table is not None:
        table = table + h * R
    if rows is not None:
        rows = rows + h * rows_head
        near = far_off(qa, rows, table, first + m0 - begin - origin + jn, rows_feature, R, D, BLOCK_D, PRECISION)
        rest = tl.zeros([BLOCK_M, BLOCK_N], qa.dtype)
        da_far = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
        visible = (
            seen(i[:, None], j[None], ok[None], first, left, chunk, right, dilation, N, BOUNDED, CHUNKED, DILATED)
            & there[:, None]
        )
        values = tile(v, j, v_frame, ok, D, BLOCK_V)  # [N, D]
        grads = tl.dot(grad, values.trans(), input_precision=PRECISION)
        p = weights(scores, level, visible)
        if DROPPED:
            keep = keeping(i[:, None], j[None], line, seed, dropout)
            grads *= keep
        ds = p * (grads - inner[:, None])
        da = tl.dot(ds.to(ka.dtype), ka, da, input_precision=PRECISION)
        if turns is not None:
            db = tl.dot(ds.to(kb.dtype), kb, db, input_precision=PRECISION)
        if rows is not None:
            mine, after = unrolled(ds.to(qa.dtype), BLOCK_M, BLOCK_N)
            part = columns(rows, base + jn, rows_feature, R, D, BLOCK_D).to(qa.dtype)
            da_far = tl.dot(mine + rest, part.trans(), da_far, input_precision=PRECISION)
            rest = after
    da, db = da * scale, db * scale
    if rows is not None:
        count = (tl.maximum(end - begin, 0) + BLOCK_N - 1) // BLOCK_N
        at = first + m0 - begin - count * BLOCK_N - origin + jn
        part = columns(rows, at, rows_feature, R, D, BLOCK_D).to(qa.dtype)
        da += tl.dot(rest, part.trans(), da_far, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    where = d_q + ((b * T + i) * H + h)[:, None] * D + d[None]
    if turns is None:
        tl.store(where, da.to(d_q.dtype.element_ty), mask=there[:, None] & (d < D)[None])
    else:
        half = there[:, None] & (d < D // 2)[None]
        da, db = turned(da, db, turns, first + i, there, P, -1.0, D // 2, BLOCK_D)
        tl.store(where, da.to(d_q.dtype.element_ty), mask=half)
        tl.store(where + D // 2, db.to(d_q.dtype.element_ty), mask=half)


@triton.jit(do_not_specialize=[name for name in CHANGING if name not in ("B", "S")])
def window_keys_kernel(
    q, k, v, valid, rows, table, turns, lse, delta, d_out, d_k, d_v,
    q_batch, q_head, q_frame, k_batch, k_head, k_frame, v_batch, v_head, v_frame, o_batch, o_head, o_frame,
    rows_head, rows_feature,
    H, G, T, N, R, P, first, origin, left, chunk, right, dilation, scale, dropout, seed,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, CHUNKED: tl.constexpr, DILATED: tl.constexpr, DROPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d k and d v [B, N, G, D] for the keys n0 .. n0 + N of one head, summed over the query heads that share it."""
    n0, g, b = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k, v, valid = k + b * k_batch + g * k_head, v + b * v_batch + g * v_head, valid + b * N
    j, im, jn = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    ok = tl.load(valid + j, mask=j < N, other=0) != 0
    ka, kb = pair(k, j, k_frame, ok, turns, j, P, D, BLOCK_D)  # [N, D]
    values = tile(v, j, v_frame, ok, D, BLOCK_V)  # [N, D]
    da = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    begin = watched(n0, first, chunk, right, CHUNKED)
    end = unwatched(tl.minimum(n0 + BLOCK_N, N) - 1, first, left, chunk, T, BOUNDED)
    for n in range(0, H // G):
        h = g * (H // G) + n
        line = b * H + h
        for m0 in range(begin, end, BLOCK_M):
            i = m0 + im
            there = i < T
            qa, qb = pair(q + b * q_batch + h * q_head, i, q_frame, there, turns, first + i, P, D, BLOCK_D)  # [M, D]
            scores = product(qa, qb, ka, kb, turns, PRECISION) * (scale * LOG2E)  # [M, N]
            base = first + m0 - n0 - origin
            if rows is not None:
                mine, line_of = rows + h * rows_head, table
                if table is not None:
                    line_of = table + h * R
                near = far_off(qa, mine, line_of, base + jn, rows_feature, R, D, BLOCK_D, PRECISION)
                far = far_off(qa, mine, line_of, base - BLOCK_N + jn, rows_feature, R, D, BLOCK_D, PRECISION)
                scores += rolled(near, far, BLOCK_M, BLOCK_N)
            elif table is not None:
                at = base + im[:, None] - jn[None]
                scores += tl.load(table + h * R + at, mask=(at >= 0) & (at < R), other=0.0).to(tl.float32) * LOG2E
            visible = (
                seen(i[:, None], j[None], ok[None], first, left, chunk, right, dilation, N, BOUNDED, CHUNKED, DILATED)
                & there[:, None]
            )
            grad = tile(d_out + b * o_batch + h * o_head, i, o_frame, there, D, BLOCK_V)  # [M, D]
            level = tl.load(lse + line * T + i, mask=there, other=0.0) * LOG2E
            inner = tl.load(delta + line * T + i, mask=there, other=0.0)
            grads = tl.dot(grad, values.trans(), input_precision=PRECISION)
            p = weights(scores, level, visible)
            if DROPPED:
                keep = keeping(i[:, None], j[None], line, seed, dropout)
                grads *= keep
            ds = p * (grads - inner[:, None])
            if DROPPED:
                p *= keep
            dv = tl.dot(p.to(grad.dtype).trans(), grad, dv, input_precision=PRECISION)
            ds = ds.to(qa.dtype).trans()
            da = tl.dot(ds, qa, da, input_precision=PRECISION)
            if turns is not None:
                db = tl.dot(ds, qb, db, input_precision=PRECISION)
    da, db, inside = da * scale, db * scale, j < N
    d, dd = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    line = ((b * N + j) * G + g)[:, None] * D
    tl.store(d_v + line + dd[None], dv.to(d_v.dtype.element_ty), mask=inside[:, None] & (dd < D)[None])
    if turns is None:
        tl.store(d_k + line + d[None], da.to(d_k.dtype.element_ty), mask=inside[:, None] & (d < D)[None])
    else:
        half = inside[:, None] & (d < D // 2)[None]
        da, db = turned(da, db, turns, j, inside, P, -1.0, D // 2, BLOCK_D)
        tl.store(d_k + line + d[None], da.to(d_k.dtype.element_ty), mask=half)
        tl.store(d_k + line + D // 2 + d[None], db.to(d_k.dtype.element_ty), mask=half)


@triton.jit(do_not_specialize=[name for name in CHANGING if name != "S"])
def window_distance_kernel(
    q, k, v, valid, rows, table, turns, lse, delta, d_out, d_rows, d_table,
    q_batch, q_head, q_frame, k_batch, k_head, k_frame, v_batch, v_head, v_frame, o_batch, o_head, o_frame,
    rows_head, rows_feature,
    B, H, G, T, N, R, P, first, origin, left, chunk, right, dilation, scale, dropout, seed,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, CHUNKED: tl.constexpr, DILATED: tl.constexpr, DROPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d rows [splits, H, R, D] and d table [splits, H, R] for N distances of one head and a share of the queries.

    The keys at these distances from a block of queries lie in two blocks, of which each gives one half.
    """
    r0, h, share = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64), tl.program_id(2)
    g, im, jn = h // (H // G), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    blocks = (T + BLOCK_M - 1) // BLOCK_M
    if table is not None:
        table = table + h * R
    if rows is not None:
        rows = rows + h * rows_head
        d_r = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_t = tl.zeros([BLOCK_N], tl.float32)
    for step in range(share, B * blocks, tl.num_programs(2)):
        b, m0 = (step // blocks).to(tl.int64), step % blocks * BLOCK_M
        line, i = b * H + h, m0 + im
        there = i < T
        qa, qb = pair(q + b * q_batch + h * q_head, i, q_frame, there, turns, first + i, P, D, BLOCK_D)  # [M, D]
        grad = tile(d_out + b * o_batch + h * o_head, i, o_frame, there, D, BLOCK_V)  # [M, D]
        level = tl.load(lse + line * T + i, mask=there, other=0.0) * LOG2E
        inner = tl.load(delta + line * T + i, mask=there, other=0.0)
        far = tl.zeros([BLOCK_M, BLOCK_N], qa.dtype)
        by_distance = tl.zeros([BLOCK_M, BLOCK_N], qa.dtype)
        if rows is not None:
            far = far_off(qa, rows, table, r0 + BLOCK_N + jn, rows_feature, R, D, BLOCK_D, PRECISION)
        for half in tl.static_range(2):
            # First the keys that are farther away than r0 + N for all but the last queries, then those behind them.
            n0 = first + m0 - origin - r0 - (1 - half) * BLOCK_N
            j = n0 + jn
            ok = tl.load(valid + b * N + j, mask=(j >= 0) & (j < N), other=0) != 0
            ka, kb = pair(k + b * k_batch + g * k_head, j, k_frame, ok, turns, j, P, D, BLOCK_D)  # [N, D]
            scores = product(qa, qb, ka, kb, turns, PRECISION) * (scale * LOG2E)  # [M, N]
            if rows is not None:
                near, at = far, r0 - half * BLOCK_N + jn
                far = far_off(qa, rows, table, at, rows_feature, R, D, BLOCK_D, PRECISION)
                scores += rolled(near, far, BLOCK_M, BLOCK_N)
            else:
                at = first + m0 - n0 - origin + im[:, None] - jn[None]
                scores += tl.load(table + at, mask=(at >= 0) & (at < R), other=0.0).to(tl.float32) * LOG2E
            visible = (
                seen(i[:, None], j[None], ok[None], first, left, chunk, right, dilation, N, BOUNDED, CHUNKED, DILATED)
                & there[:, None]
            )
            values = tile(v + b * v_batch + g * v_head, j, v_frame, ok, D, BLOCK_V)  # [N, D]
            grads = tl.dot(grad, values.trans(), input_precision=PRECISION)
            p = weights(scores, level, visible)
            if DROPPED:
                keep = keeping(i[:, None], j[None], line, seed, dropout)
                grads *= keep
            ds = p * (grads - inner[:, None])
            mine, after = unrolled(ds.to(qa.dtype), BLOCK_M, BLOCK_N)
            if half == 0:
                by_distance += after
            else:
                by_distance += mine
        d_t += tl.sum(by_distance.to(tl.float32), 0)
        if rows is not None:
            d_r = tl.dot(by_distance.trans(), qa, d_r, input_precision=PRECISION)
    r, d = r0 + jn, tl.arange(0, BLOCK_D)
    at = (share * H + h) * R + r
    if d_table is not None:
        tl.store(d_table + at, d_t, mask=r < R)
    if rows is not None:
        tl.store(d_rows + at[:, None] * D + d[None], d_r, mask=(r < R)[:, None] & (d < D)[None])
