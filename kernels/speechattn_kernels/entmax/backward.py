"""The backward kernels: one for the queries and alpha, one for keys and values; no atomics, so always the same."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speechattn_kernels.common import divided, launch, power
from speechattn_kernels.entmax.forward import exact, sizes, strides
from speechattn_kernels.entmax.tiles import moved, rows, weights

__all__ = ["blocks", "to_keys", "to_queries"]


@triton.jit
def entmax_backward_queries_kernel(
    q, k, v, valid, alpha, levels, grad, to_q, centres, to_alpha,
    q_batch, q_head, q_frame, k_batch, k_head, k_frame, v_batch, v_head, v_frame, H, G, U, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """to_q [B, H, U, D], centres [B, H, U] and, if wanted, to_alpha [B, H, U / M], for M queries of one head."""
    i, h, b = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = (h // (H // G)).to(tl.int64)
    k, v, valid, line = k + b * k_batch + g * k_head, v + b * v_batch + g * v_head, valid + b * T, b * H + h
    gap = tl.maximum(tl.load(alpha + h).to(tl.float32) - 1, LEAST)
    mine = rows(q + b * q_batch + h.to(tl.int64) * q_head, i, q_frame, i < U, D, BLOCK_D)  # [M, D]
    theirs = rows(grad + line * U * D, i, D, i < U, D, BLOCK_D)
    level = tl.load(levels + line * U + i, mask=i < U, other=0.0)[:, None]
    slope, drawn = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(0, T, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        ok = tl.load(valid + j, mask=j < T, other=0) != 0
        z = tl.dot(mine, rows(k, j, k_frame, ok, D, BLOCK_D).trans(), input_precision=PRECISION) * scale  # [M, N]
        worth = tl.dot(theirs, rows(v, j, v_frame, ok, D, BLOCK_D).trans(), input_precision=PRECISION)
        _, _, s = weights(z, ok[None], level, gap)
        slope += tl.sum(s, 1)
        drawn += tl.sum(s * worth, 1)
    centre = drawn / tl.where(slope > 0, slope, 1.0)
    turned, change = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(0, T, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        ok = tl.load(valid + j, mask=j < T, other=0) != 0
        keys = rows(k, j, k_frame, ok, D, BLOCK_D)  # [N, D]
        z = tl.dot(mine, keys.trans(), input_precision=PRECISION) * scale
        worth = tl.dot(theirs, rows(v, j, v_frame, ok, D, BLOCK_D).trans(), input_precision=PRECISION)
        _, logs, s = weights(z, ok[None], level, gap)
        to_z = s * (worth - centre[:, None])
        turned = tl.dot(to_z.to(keys.dtype), keys, turned, input_precision=PRECISION)
        if to_alpha is not None:
            change += tl.sum(tl.where(s > 0, moved(logs, gap) * to_z, 0.0), 1)
    d = tl.arange(0, BLOCK_D)
    tl.store(to_q + (line * U + i)[:, None] * D + d[None], turned * scale, mask=(i < U)[:, None] & (d < D)[None])
    tl.store(centres + line * U + i, centre, mask=i < U)
    if to_alpha is not None:
        tl.store(to_alpha + line * tl.cdiv(U, BLOCK_M) + tl.program_id(0), tl.sum(tl.where(i < U, change, 0.0)))


@triton.jit
def entmax_backward_keys_kernel(
    q, k, v, valid, alpha, levels, grad, centres, to_k, to_v,
    q_batch, q_head, q_frame, k_batch, k_head, k_frame, v_batch, v_head, v_frame, H, G, U, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """to_k and to_v [B, G, T, D] of keys n0 .. n0 + N of one group, from all queries of all its heads."""
    j, g, b = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1), tl.program_id(2).to(tl.int64)
    wide, d = g.to(tl.int64), tl.arange(0, BLOCK_D)
    ok = tl.load(valid + b * T + j, mask=j < T, other=0) != 0
    keys = rows(k + b * k_batch + wide * k_head, j, k_frame, ok, D, BLOCK_D)  # [N, D]
    values = rows(v + b * v_batch + wide * v_head, j, v_frame, ok, D, BLOCK_D)
    turned, moved_by = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        line = b * H + h
        gap = tl.maximum(tl.load(alpha + h).to(tl.float32) - 1, LEAST)
        for m0 in range(0, U, BLOCK_M):
            i = m0 + tl.arange(0, BLOCK_M)
            mine = rows(q + b * q_batch + tl.cast(h, tl.int64) * q_head, i, q_frame, i < U, D, BLOCK_D)  # [M, D]
            theirs = rows(grad + line * U * D, i, D, i < U, D, BLOCK_D)
            level = tl.load(levels + line * U + i, mask=i < U, other=0.0)[:, None]
            centre = tl.load(centres + line * U + i, mask=i < U, other=0.0)[:, None]
            z = tl.dot(mine, keys.trans(), input_precision=PRECISION) * scale  # [M, N]
            p, _, s = weights(z, ok[None] & (i < U)[:, None], level, gap)
            moved_by = tl.dot(p.to(theirs.dtype).trans(), theirs, moved_by, input_precision=PRECISION)
            to_z = s * (tl.dot(theirs, values.trans(), input_precision=PRECISION) - centre)
            turned = tl.dot(to_z.to(mine.dtype).trans(), mine, turned, input_precision=PRECISION)
    at, mask = ((b * G + g) * T + j)[:, None] * D + d[None], (j < T)[:, None] & (d < D)[None]
    tl.store(to_k + at, turned * scale, mask=mask)
    tl.store(to_v + at, moved_by, mask=mask)


def queries(q: Tensor) -> tuple[int, int, int]:
    """Queries, keys and warps of a program for queries."""
    if q.dtype == torch.float32:
        return exact(q)
    return (16, 64, 8) if power(q.shape[-1]) == 128 else (16, 32, 4)


def keys(q: Tensor) -> tuple[int, int, int]:
    """Queries, keys and warps of a program for keys, which holds two matrices of sums."""
    if q.dtype == torch.float32:
        return 16, 16, 8
    return (32, 32, 4) if power(q.shape[-1]) <= 64 else (16, 32, 8)


def blocks(q: Tensor) -> int:
    """How many parts the gradient of alpha has."""
    return divided(q.shape[2], queries(q)[0])


def to_queries(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, alpha: Tensor, levels: Tensor, grad: Tensor, *, to_q: Tensor,
    centres: Tensor, to_alpha: Tensor | None,
) -> None:  # fmt: skip
    """Fills `to_q`, `centres` and `to_alpha`."""
    m, n, warps = queries(q)
    args = {
        "q": q, "k": k, "v": v, "valid": valid, "alpha": alpha, "levels": levels, "grad": grad, "to_q": to_q,
        "centres": centres, "to_alpha": to_alpha,
    } | strides(q=q, k=k, v=v) | sizes(q, k, (m, n))  # fmt: skip
    grid = (divided(q.shape[2], m), q.shape[1], q.shape[0])
    launch(entmax_backward_queries_kernel, grid, args, warps=warps, stages=2)


def to_keys(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, alpha: Tensor, levels: Tensor, grad: Tensor, *, centres: Tensor,
    to_k: Tensor, to_v: Tensor,
) -> None:  # fmt: skip
    """Fills `to_k` and `to_v`."""
    m, n, warps = keys(q)
    args = {
        "q": q, "k": k, "v": v, "valid": valid, "alpha": alpha, "levels": levels, "grad": grad, "centres": centres,
        "to_k": to_k, "to_v": to_v,
    } | strides(q=q, k=k, v=v) | sizes(q, k, (m, n))  # fmt: skip
    grid = (divided(k.shape[2], n), k.shape[1], k.shape[0])
    launch(entmax_backward_keys_kernel, grid, args, warps=warps, stages=2)
