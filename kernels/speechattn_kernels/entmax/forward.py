"""The forward kernel: the level at which the weights sum to 1, then the values."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from speechattn_kernels.common import divided, launch, power, precision
from speechattn_kernels.entmax.tiles import rows, shrunk, weights

__all__ = ["LEAST", "attended", "exact", "sizes", "strides"]

LEAST = 1e-10  # of alpha - 1: with less, entmax is softmax to the last digit
STEPS = 24  # of Newton's method, at most; most rows need 3 to 6
NEAR = 6e-6  # eps^(3/4): after a step as small, the next one is below rounding


@triton.jit
def entmax_forward_kernel(
    q, k, v, valid, alpha, out, levels,
    q_batch, q_head, q_frame, k_batch, k_head, k_frame, v_batch, v_head, v_frame, H, G, U, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    STEPS: tl.constexpr, NEAR: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """out [B, H, U, D] and levels [B, H, U] of queries m0 .. m0 + M of one head."""
    i, h, b = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = (h // (H // G)).to(tl.int64)
    k, v, valid, line = k + b * k_batch + g * k_head, v + b * v_batch + g * v_head, valid + b * T, b * H + h
    gap = tl.maximum(tl.load(alpha + h).to(tl.float32) - 1, LEAST)
    mine = rows(q + b * q_batch + h.to(tl.int64) * q_head, i, q_frame, i < U, D, BLOCK_D)  # [M, D]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for n0 in range(0, T, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        ok = tl.load(valid + j, mask=j < T, other=0) != 0
        z = tl.dot(mine, rows(k, j, k_frame, ok, D, BLOCK_D).trans(), input_precision=PRECISION) * scale  # [M, N]
        top = tl.maximum(top, tl.max(tl.where(ok[None], z, float("-inf")), 1))
    level = tl.where(top > float("-inf"), top, 0.0)
    left = STEPS
    while left > 0:
        total, slope = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        for n0 in range(0, T, BLOCK_N):
            j = n0 + tl.arange(0, BLOCK_N)
            ok = tl.load(valid + j, mask=j < T, other=0) != 0
            z = tl.dot(mine, rows(k, j, k_frame, ok, D, BLOCK_D).trans(), input_precision=PRECISION) * scale
            p, _, s = weights(z, ok[None], level[:, None], gap)
            total += tl.sum(p, 1)
            slope += tl.sum(s, 1)
        above = (total > 1) & (i < U)
        step = tl.where(above, total / tl.where(above, slope, 1.0) * shrunk(tl.where(above, total, 1.0), gap), 0.0)
        level += step
        left = tl.where(tl.max(step) > NEAR, left - 1, 0)
    mixed, total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(0, T, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        ok = tl.load(valid + j, mask=j < T, other=0) != 0
        z = tl.dot(mine, rows(k, j, k_frame, ok, D, BLOCK_D).trans(), input_precision=PRECISION) * scale
        p, _, _ = weights(z, ok[None], level[:, None], gap)
        total += tl.sum(p, 1)
        held = rows(v, j, v_frame, ok, D, BLOCK_D)  # [N, D]
        mixed = tl.dot(p.to(held.dtype), held, mixed, input_precision=PRECISION)
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    d = tl.arange(0, BLOCK_D)
    tl.store(out + (line * U + i)[:, None] * D + d[None], mixed, mask=(i < U)[:, None] & (d < D)[None])
    tl.store(levels + line * U + i, level, mask=i < U)


def strides(**tensors: Tensor) -> dict[str, int]:
    """Of the batch, the heads and the frames of each [B, H, T, D], by the names that the kernels give them."""
    parts = ("batch", "head", "frame")
    return {f"{name}_{part}": x.stride(at) for name, x in tensors.items() for at, part in enumerate(parts)}


def sizes(q: Tensor, k: Tensor, tile: tuple[int, int]) -> dict[str, Any]:
    """What a launch says of q [B, H, U, D] and k [B, G, T, D]: shape, queries and keys of a tile, arithmetic."""
    (_, heads, tokens, width), (_, groups, frames, _) = q.shape, k.shape
    return {
        "H": heads, "G": groups, "U": tokens, "T": frames, "scale": width**-0.5, "D": width, "BLOCK_D": power(width),
        "BLOCK_M": tile[0], "BLOCK_N": tile[1], "PRECISION": precision(q.dtype), "LEAST": LEAST,
    }  # fmt: skip


def exact(q: Tensor) -> tuple[int, int, int]:
    """Queries, keys and warps of a program that holds one matrix of sums, in float32: wide heads have smaller tiles."""
    wide = power(q.shape[-1])
    return min(power(q.shape[2]), 32 if wide <= 64 else 16), 32 if wide <= 128 else 16, 8


def picks(q: Tensor) -> tuple[int, int, int]:
    """Queries, keys and warps of a program forwards."""
    if q.dtype == torch.float32:
        return exact(q)
    narrow = power(q.shape[-1]) <= 64
    return min(power(q.shape[2]), 64 if narrow else 32), 32, 4 if narrow else 8


def attended(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, alpha: Tensor, *, out: Tensor, levels: Tensor) -> None:
    """Fills `out` and `levels`."""
    m, n, warps = picks(q)
    args: dict[str, Any] = {"q": q, "k": k, "v": v, "valid": valid, "alpha": alpha, "out": out, "levels": levels}
    args |= strides(q=q, k=k, v=v) | sizes(q, k, (m, n)) | {"STEPS": STEPS, "NEAR": NEAR}
    rows, heads, tokens, _ = q.shape
    launch(entmax_forward_kernel, (divided(tokens, args["BLOCK_M"]), heads, rows), args, warps=warps, stages=2)
