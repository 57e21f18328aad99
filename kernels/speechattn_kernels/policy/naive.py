"""What `policy` means, with all weights in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["policy", "weights"]


def weights(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """q [B * K, H, U, D], k [B, G, T, D], valid [B, T] -> [B * K, H, U, T]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    beam, group = len(q) // max(len(k), 1), q.shape[1] // max(k.shape[1], 1)
    keys = k.to(wide).repeat_interleave(beam, 0).repeat_interleave(group, 1)
    there = valid.repeat_interleave(beam, 0)[:, None, None]
    scores = torch.einsum("bhud,bhtd->bhut", q.to(wide), keys) / q.shape[3] ** 0.5
    return scores.masked_fill(~there, -torch.inf).softmax(-1).masked_fill(~there, 0.0)


def policy(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, *, heads: Sequence[int], newest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B * K, H, U, D], k, v [B, G, T, D], valid [B, T] -> context, mean over `heads`, their newest rows."""
    found = weights(q, k.where(valid[:, None, :, None], 0.0), valid)
    beam, group = len(q) // max(len(k), 1), q.shape[1] // max(k.shape[1], 1)
    values = v.where(valid[:, None, :, None], 0.0).to(found.dtype)
    context = found @ values.repeat_interleave(beam, 0).repeat_interleave(group, 1)
    chosen = found[:, list(heads)].detach()
    mean = chosen.sum(1) / max(len(heads), 1)
    return context.to(q.dtype), mean, chosen[:, :, q.shape[2] - newest :]
