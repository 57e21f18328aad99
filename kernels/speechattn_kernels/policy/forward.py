"""The launches of `policy` forwards."""

from __future__ import annotations

from functools import lru_cache
from math import e, log2, sqrt

import torch
from torch import Tensor

from speechattn_kernels.common import divided, launch, power, precision
from speechattn_kernels.policy.kernel import policy_look_kernel, policy_merge_kernel, policy_rows_kernel

__all__ = ["dense", "look", "rows", "scale", "tokenwise"]

PROGRAMS = 264  # that keep a GPU busy: two for each of the 132 multiprocessors of an H100


def scale(features: int) -> float:
    """What makes a product of query and key a score, for exp2."""
    return log2(e) / sqrt(features)


def tokenwise(x: Tensor) -> Tensor:
    """[B * K, H, U, D] -> [B * K, U, H, D], contiguous: as the linear layers leave it, so mostly no copy."""
    return x.transpose(1, 2).contiguous()


def dense(x: Tensor) -> Tensor:
    """The features of a frame side by side in memory; what else may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def looks(n: int, features: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows and frames of a tile of the first pass, and warps. Without tensor cores (float32) tiles are small."""
    wide, exact = power(features), dtype == torch.float32
    if exact:
        return 16, 32 if wide <= 64 else 16, 4
    return min(power(n), 64), 64 if wide <= 128 else 32, 4


def picks(n: int, features: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows and frames of a tile of the second pass, and warps. Few tokens: the frames are all that can be shared."""
    wide, exact = power(features), dtype == torch.float32
    if exact:
        return 16, *((32, 4) if wide <= 128 else (16, 8))
    return min(power(n), 32), 32 if n <= 16 else 64, 4


def splits(programs: int, frames: int, block: int) -> tuple[int, int]:
    """Into how many shares the frames are cut, and how many frames a share has: whole tiles.

    One token of one recording is only H programs: the frames must be shared among more. With many tokens there is one
    share, and no second pass.
    """
    tiles = max(divided(frames, block), 1)
    share = divided(tiles, min(tiles, divided(PROGRAMS, max(programs, 1)))) * block
    return max(divided(frames, share), 1), share


def look(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """-> the context [B * K, H, U, D], and log2 of the sums [B * K, U, H]."""
    (hypotheses, many, tokens, features), (b, groups, frames, _) = q.shape, k.shape
    beam, group = hypotheses // max(b, 1), many // max(groups, 1)
    q, k, v, valid = tokenwise(q), dense(k), dense(v), dense(valid)
    n, rows = beam * tokens * group, hypotheses * tokens * many
    block, span, warps = looks(n, features, q.dtype)
    tiles = divided(n, block)
    parts, share = splits(b * groups * tiles, frames, span)
    context, sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    whole = parts == 1
    some = context if whole else q.new_empty(parts, *q.shape, dtype=torch.float32)
    some_sums = sums if whole else q.new_empty(parts, *q.shape[:3], dtype=torch.float32)
    launch(policy_look_kernel, (b * groups * tiles, parts), {
        "q": q, "k": k, "v": v, "valid": valid, "context": some, "sums": some_sums,
        "k_row": k.stride(0), "k_head": k.stride(1), "k_frame": k.stride(2),
        "v_row": v.stride(0), "v_head": v.stride(1), "v_frame": v.stride(2), "valid_row": valid.stride(0),
        "n": n, "beam": beam, "tokens": tokens, "group": group, "groups": groups, "frames": frames,
        "features": features, "share": share, "tiles": tiles, "rows": rows, "scale": scale(features),
        "BLOCK_M": block, "BLOCK_N": span, "BLOCK_D": power(features), "PRECISION": precision(q.dtype),
    }, warps=warps)  # fmt: skip
    if not whole:
        few = 4
        launch(policy_merge_kernel, (divided(rows, few),), {
            "parts": some, "part_sums": some_sums, "context": context, "sums": sums, "rows": rows,
            "features": features, "SPLITS": parts, "BLOCK_M": few, "BLOCK_D": power(features),
        }, warps=1 if features <= 64 else 2)  # fmt: skip
    return context.transpose(1, 2), sums


@lru_cache(64)
def listed(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The chosen heads where kernels can read them. They are the same for every token of a recording."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


def rows(
    q: Tensor, k: Tensor, valid: Tensor, sums: Tensor, heads: tuple[int, ...], newest: int
) -> tuple[Tensor, Tensor]:
    """-> the mean of the heads [B * K, U, T], and each of them for the newest tokens [B * K, S, newest, T]."""
    (hypotheses, many, tokens, features), (b, groups, frames, _) = q.shape, k.shape
    mean = q.new_empty(hypotheses, tokens, frames, dtype=torch.float32)
    each = q.new_empty(hypotheses, len(heads), newest, frames, dtype=torch.float32)
    if not heads:
        return mean.zero_(), each
    q, k, valid = tokenwise(q), dense(k), dense(valid)
    n = hypotheses // max(b, 1) * tokens
    block, span, warps = picks(n, features, q.dtype)
    tiles, spans = divided(n, block), divided(frames, span)
    launch(policy_rows_kernel, (b * tiles * spans,), {
        "q": q, "k": k, "valid": valid, "sums": sums, "heads": listed(heads, q.device), "mean": mean, "each": each,
        "k_row": k.stride(0), "k_head": k.stride(1), "k_frame": k.stride(2), "valid_row": valid.stride(0),
        "n": n, "tokens": tokens, "many": many, "group": many // max(groups, 1), "frames": frames,
        "features": features, "chosen": len(heads), "newest": newest, "tiles": tiles, "spans": spans,
        "scale": scale(features), "BLOCK_M": block, "BLOCK_N": span, "BLOCK_D": power(features),
        "PRECISION": precision(q.dtype),
    }, warps=warps)  # fmt: skip
    return mean, each
