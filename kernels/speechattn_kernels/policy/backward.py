"""The way back of `policy`: the gradients of its context. The weights are made once more, tile by tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speechattn_kernels.common import divided, launch, power, precision
from speechattn_kernels.policy.forward import dense, scale, tokenwise
from speechattn_kernels.policy.kernel import row_at, tile

__all__ = ["back", "policy_frames_kernel", "policy_tokens_kernel"]


@triton.jit
def between(asked, keys, values, grad, whole, spent, there, scale, PRECISION: tl.constexpr):
    """Weights of rows [M] and frames [N] and the gradients of their scores [M, N]."""
    scores = tl.dot(asked, tl.trans(keys), input_precision=PRECISION) * scale
    known = there[None, :] & (whole > float("-inf"))[:, None]
    base = tl.where(whole > float("-inf"), whole, 0.0)
    weights = tl.where(known, tl.exp2(tl.where(known, scores - base[:, None], 0.0)), 0.0)
    wanted = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
    return weights, weights * (wanted - spent[:, None])


@triton.jit
def policy_tokens_kernel(
    grad, q, k, v, valid, sums, spent, to_q,
    k_row, k_head, k_frame, v_row, v_head, v_frame, valid_row,
    n, beam, tokens, group, groups, frames, features, tiles, scale, root,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M rows of q, from all frames."""
    place = (tl.program_id(0) // tiles).to(tl.int64)
    b, g = place // groups, place % groups
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = row_at(m, b, g, beam, tokens, group, groups)  # [M]
    asked = tile(q, at * features, d, m < n, features)  # [M, D]
    wanted = tile(grad, at * features, d, m < n, features)  # [M, D]
    whole = tl.load(sums + at, mask=m < n, other=float("-inf"))
    less = tl.load(spent + at, mask=m < n, other=0.0)
    found = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, frames, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N).to(tl.int64)
        there = tl.load(valid + b * valid_row + t, mask=t < frames, other=0) != 0  # [N]
        keys = tile(k, b * k_row + g * k_head + t * k_frame, d, there, features)  # [N, D]
        values = tile(v, b * v_row + g * v_head + t * v_frame, d, there, features)  # [N, D]
        _, steep = between(asked, keys, values, wanted, whole, less, there, scale, PRECISION)
        found += tl.dot(steep.to(keys.dtype), keys, input_precision=PRECISION)
    inside = (m < n)[:, None] & (d < features)[None, :]
    tl.store(to_q + (at * features)[:, None] + d[None, :], (found * root).to(to_q.dtype.element_ty), mask=inside)


@triton.jit
def policy_frames_kernel(
    grad, q, k, v, valid, sums, spent, to_k, to_v,
    k_row, k_head, k_frame, v_row, v_head, v_frame, valid_row,
    n, beam, tokens, group, groups, frames, features, spans, scale, root,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_N frames of k and v, from all rows that look at them."""
    place = (tl.program_id(0) // spans).to(tl.int64)
    b, g = place // groups, place % groups
    t = tl.program_id(0) % spans * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    there = tl.load(valid + b * valid_row + t, mask=t < frames, other=0) != 0  # [N]
    keys = tile(k, b * k_row + g * k_head + t * k_frame, d, there, features)  # [N, D]
    values = tile(v, b * v_row + g * v_head + t * v_frame, d, there, features)  # [N, D]
    of_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, n, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        at = row_at(m, b, g, beam, tokens, group, groups)  # [M]
        asked = tile(q, at * features, d, m < n, features)  # [M, D]
        wanted = tile(grad, at * features, d, m < n, features)  # [M, D]
        whole = tl.load(sums + at, mask=m < n, other=float("-inf"))
        less = tl.load(spent + at, mask=m < n, other=0.0)
        weights, steep = between(asked, keys, values, wanted, whole, less, there, scale, PRECISION)
        of_values += tl.dot(tl.trans(weights.to(wanted.dtype)), wanted, input_precision=PRECISION)
        of_keys += tl.dot(tl.trans(steep.to(asked.dtype)), asked, input_precision=PRECISION)
    at = (place * frames + t) * features
    inside = (t < frames)[:, None] & (d < features)[None, :]
    tl.store(to_k + at[:, None] + d[None, :], (of_keys * root).to(to_k.dtype.element_ty), mask=inside)
    tl.store(to_v + at[:, None] + d[None, :], of_values.to(to_v.dtype.element_ty), mask=inside)


def blocks(features: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows and frames of a tile, and warps. Without tensor cores (float32) tiles are small."""
    wide, exact = power(features), dtype == torch.float32
    if exact:
        return 16, 32 if wide <= 32 else 16, 4 if wide <= 64 else 8
    return 32, 64 if wide <= 64 else 32, 4 if wide <= 128 else 8


def back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, context: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from that of the context [B * K, H, U, D]."""
    (hypotheses, many, tokens, features), (b, groups, frames, _) = q.shape, k.shape
    beam, group = hypotheses // max(b, 1), many // max(groups, 1)
    grad, q, k, v, valid = tokenwise(grad), tokenwise(q), dense(k), dense(v), dense(valid)
    spent = (grad.float() * tokenwise(context).float()).sum(-1)  # [B * K, U, H]
    to_q, to_k, to_v = torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)
    n = beam * tokens * group
    block, span, warps = blocks(features, q.dtype)
    tiles, spans = divided(n, block), divided(frames, span)
    shared = {
        "grad": grad, "q": q, "k": k, "v": v, "valid": valid, "sums": sums, "spent": spent,
        "k_row": k.stride(0), "k_head": k.stride(1), "k_frame": k.stride(2),
        "v_row": v.stride(0), "v_head": v.stride(1), "v_frame": v.stride(2), "valid_row": valid.stride(0),
        "n": n, "beam": beam, "tokens": tokens, "group": group, "groups": groups, "frames": frames,
        "features": features, "scale": scale(features), "root": features**-0.5,
        "BLOCK_M": block, "BLOCK_N": span, "BLOCK_D": power(features), "PRECISION": precision(q.dtype),
    }  # fmt: skip
    launch(policy_tokens_kernel, (b * groups * tiles,), {**shared, "to_q": to_q, "tiles": tiles}, warps=warps)
    launch(
        policy_frames_kernel, (b * groups * spans,), {**shared, "to_k": to_k, "to_v": to_v, "spans": spans}, warps=warps
    )
    return to_q.transpose(1, 2), to_k, to_v
