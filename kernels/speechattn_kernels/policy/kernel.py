"""The kernels of `policy` forwards, and what they share with those backwards.

A row is one token of one head of one hypothesis. Tensors of tokens are [B * K, U, H, ...] in memory. The rows that look
at the same keys, N = K * U * H / G for each recording and head of frames, share their tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["policy_look_kernel", "policy_merge_kernel", "policy_rows_kernel"]


@triton.jit
def row_at(m, b, g, beam, tokens, group, groups):
    """Where row `m` of those that look at head `g` of recording `b` is in [B * K, U, H]."""
    hypothesis = b * beam + m // (group * tokens)
    head = g * group + m // tokens % group
    return (hypothesis * tokens + m % tokens) * (groups * group) + head


@triton.jit
def tile(x, at, d, there, features):
    """Rows that begin at the elements `at` and are `there`, the others 0. [M, D]"""
    return tl.load(x + at[:, None] + d[None, :], mask=there[:, None] & (d < features)[None, :], other=0.0)


@triton.jit
def policy_look_kernel(
    q, k, v, valid, context, sums,
    k_row, k_head, k_frame, v_row, v_head, v_frame, valid_row,
    n, beam, tokens, group, groups, frames, features, share, tiles, rows, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The context of BLOCK_M rows over a `share` of the frames, by online softmax, and log2 of their sum."""
    place = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1)
    b, g = place // groups, place % groups
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = row_at(m, b, g, beam, tokens, group, groups)  # [M]
    asked = tile(q, at * features, d, m < n, features)  # [M, D]
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(part * share, tl.minimum(part * share + share, frames), BLOCK_N):
        t = start + tl.arange(0, BLOCK_N).to(tl.int64)
        there = tl.load(valid + b * valid_row + t, mask=t < frames, other=0) != 0  # [N]
        keys = tile(k, b * k_row + g * k_head + t * k_frame, d, there, features)  # [N, D]
        scores = tl.dot(asked, tl.trans(keys), input_precision=PRECISION) * scale  # [M, N]
        scores = tl.where(there[None, :], scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(most - base)
        values = tile(v, b * v_row + g * v_head + t * v_frame, d, there, features)  # [N, D]
        total = total * fade + tl.sum(weights, 1)
        found = found * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        most = now
    sure = tl.where(total > 0, total, 1.0)
    at += part * rows
    tl.store(sums + at, tl.where(total > 0, most + tl.log2(sure), float("-inf")), mask=m < n)
    found = (found / sure[:, None]).to(context.dtype.element_ty)
    inside = (m < n)[:, None] & (d < features)[None, :]
    tl.store(context + (at * features)[:, None] + d[None, :], found, mask=inside)


@triton.jit
def policy_merge_kernel(
    parts, part_sums, context, sums, rows, features, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Of SPLITS contexts of each row, over other frames each, the one over all: their mean by the sums."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    d = tl.arange(0, BLOCK_D)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for part in range(SPLITS):
        most = tl.maximum(most, tl.load(part_sums + part * rows + at, mask=at < rows, other=float("-inf")))
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in range(SPLITS):
        weight = tl.exp2(tl.load(part_sums + part * rows + at, mask=at < rows, other=float("-inf")) - base)
        total += weight
        found += weight[:, None] * tile(parts, (part * rows + at) * features, d, at < rows, features)
    sure = tl.where(total > 0, total, 1.0)
    tl.store(sums + at, tl.where(total > 0, base + tl.log2(sure), float("-inf")), mask=at < rows)
    inside = (at < rows)[:, None] & (d < features)[None, :]
    found = (found / sure[:, None]).to(context.dtype.element_ty)
    tl.store(context + (at * features)[:, None] + d[None, :], found, mask=inside)


@triton.jit
def policy_rows_kernel(
    q, k, valid, sums, heads, mean, each,
    k_row, k_head, k_frame, valid_row,
    n, tokens, many, group, frames, features, chosen, newest, tiles, spans, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens of a recording's n = K * U over BLOCK_N frames: their weights in the `chosen` heads, once more."""
    b = (tl.program_id(0) // (tiles * spans)).to(tl.int64)
    m = tl.program_id(0) // spans % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.program_id(0) % spans * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    at = b * n + m  # [M] in [B * K, U]
    new = m % tokens - (tokens - newest)
    there = tl.load(valid + b * valid_row + t, mask=t < frames, other=0) != 0  # [N]
    inside = (m < n)[:, None] & (t < frames)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(chosen):
        head = tl.load(heads + i)
        asked = tile(q, (at * many + head) * features, d, m < n, features)  # [M, D]
        keys = tile(k, b * k_row + head // group * k_head + t * k_frame, d, there, features)  # [N, D]
        whole = tl.load(sums + at * many + head, mask=m < n, other=float("-inf"))  # [M]
        scores = tl.dot(asked, tl.trans(keys), input_precision=PRECISION) * scale  # [M, N]
        known = there[None, :] & (whole > float("-inf"))[:, None]
        base = tl.where(whole > float("-inf"), whole, 0.0)
        weights = tl.where(known, tl.exp2(tl.where(known, scores - base[:, None], 0.0)), 0.0)
        total += weights
        row = (at // tokens * chosen + i) * newest + new
        tl.store(each + (row * frames)[:, None] + t[None, :], weights, mask=inside & (new >= 0)[:, None])
    tl.store(mean + (at * frames)[:, None] + t[None, :], total / chosen, mask=inside)
