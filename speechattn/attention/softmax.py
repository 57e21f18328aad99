"""What the backends in plain torch share: scores, and the softmax that leaves nobody with NaN."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.attention.position import Position
from speechattn.frames import known

__all__ = ["first_valid", "fused", "gathered", "mixed", "places", "scores", "shared"]


def shared(k: Tensor, heads: int) -> Tensor:
    """Key heads [B, G, ...], each repeated for the query heads that share it [B, H, ...] (arXiv 2305.13245)."""
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def scores(q: Tensor, k: Tensor, position: Position | None, queries: range, keys: range) -> Tensor:
    """q [B, H, C, D], k [B, G, W, D] -> scaled scores with their bias [B, H, C, W]."""
    k, scale = shared(k, q.shape[1]), 1 / sqrt(q.shape[-1])
    if position is None:
        return (q * scale) @ k.transpose(-1, -2)
    turned, k = position.turn(q, k, queries, keys)
    logits = (turned * scale) @ k.transpose(-1, -2)
    bias = position.bias(q, queries, keys)
    return logits if bias is None else logits + bias


def mixed(logits: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax of [B, H, C, W] over what is `seen` (broadcast), times v [B, G, W, D]; zero where none is."""
    weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
    return (weights @ shared(v, logits.shape[1])).masked_fill(~seen.any(-1, keepdim=True), 0.0)


def fused(
    q: Tensor, k: Tensor, v: Tensor, position: Position | None, queries: range, keys: range, seen: Tensor
) -> Tensor:
    """As `mixed` of `scores`, in one kernel and without keeping the weights.

    A query that sees nothing gets the mean of all values in its row.
    """
    k, v, turned, mask = shared(k, q.shape[1]), shared(v, q.shape[1]), q, None
    if position is not None:
        turned, k = position.turn(q, k, queries, keys)
        mask = position.bias(q, queries, keys)
    if not (known(seen) and seen.all()):
        # Half of the lowest number: a bias may come on top of it.
        hidden = torch.where(seen, q.new_zeros(()), torch.finfo(q.dtype).min / 2)
        mask = hidden if mask is None else hidden + mask
    # Without a bias the mask is one for all heads, and the fused kernel need not spread it.
    if q.dtype == torch.bfloat16 and q.is_cpu and mask is not None and mask.shape[-3] > 1:
        return multiplied(turned, k, v, mask)
    return F.scaled_dot_product_attention(turned, k, v, attn_mask=mask)


def multiplied(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same by two multiplications: in bfloat16 on a CPU much faster than the fused kernel (0.29 for 0.47 ms).

    q [B, H, C, D], k and v [B, H, W, D], mask [B, H, C, W]. By head, then row: so `Relative` lays out its bias.
    """
    b, h, c, d = q.shape
    q, k, v, mask = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v, mask.expand(b, h, c, k.shape[2])))
    weights = torch.baddbmm(mask, q, k.mT, alpha=1 / sqrt(d)).softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights, v).view(h, b, c, d).transpose(0, 1)


def first_valid(valid: Tensor, n: int) -> Tensor:
    """One-hot rows [B, n, N] that point at the first n valid entries of `valid` [B, N], as far as there are so many."""
    rank = valid.cumsum(1) - 1
    return (rank[:, None] == torch.arange(n, device=valid.device)[:, None]) & valid[:, None]


def gathered(x: Tensor, which: Tensor) -> Tensor:
    """The entries of x [B, G, N, D] that `which` [B, S, N] points at, or zeros."""
    return which.to(x.dtype)[:, None] @ x


def places(which: Tensor) -> Tensor:
    """Where `which` [B, S, N] points [B, S]; N for nowhere."""
    return torch.where(which.any(-1), which.to(torch.int8).argmax(-1), which.shape[-1])
