"""Alpha-entmax attention with all scores, and the level by bisection."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["entmax_attention"]

TERMS = 12


def weights(z: Tensor, gap: Tensor, level: Tensor) -> Tensor:
    """[1 + gap (z - level)]_+ ^ (1 / gap), exp(z - level) where gap is 0."""
    away = z - level
    y = gap * away
    small = y.abs() < 0.05
    few = torch.where(small, y, 0.0)
    series = sum(((-few) ** n / (n + 1) for n in range(TERMS)), torch.zeros_like(y)) * away
    base = torch.where(small | (y <= -1), 1.0, 1 + y)
    logs = torch.where(small, series, base.log() / torch.where(gap == 0, 1.0, gap))
    return torch.where(y > -1, logs, -torch.inf).exp()


def entmax_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, H, U, D], k and v [B, G, T, D], valid [B, T], alpha [H] -> context [B, H, U, D], levels [B, H, U].

    Differentiable once: from the level that bisection finds, one step of Newton's method has the right gradient.
    """
    wide, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).masked_fill(~valid[:, None, :, None], 0.0).repeat_interleave(group, 1) for x in (k, v))
    seen, gap = valid[:, None, None].expand(*q.shape[:3], -1), (alpha.to(wide) - 1)[:, None, None]
    z = q.to(wide) @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    if not z.shape[-1]:
        return torch.zeros_like(q) + 0 * q, z.sum(-1)
    with torch.no_grad():
        low = z.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
        low = torch.where(low == -torch.inf, 0.0, low)
        high = low + torch.log(seen.sum(-1, keepdim=True).clamp(min=1).to(wide)) + 1e-3
        for _ in range(60):
            middle = (low + high) / 2
            above = weights(z, gap, middle).masked_fill(~seen, 0.0).sum(-1, keepdim=True) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    p = weights(z, gap, low).masked_fill(~seen, 0.0)
    slope = torch.where(p > 0, p, 1.0).log().mul(1 - gap).exp().masked_fill(p == 0, 0.0).sum(-1, keepdim=True).detach()
    level = low + (p.sum(-1, keepdim=True) - seen.any(-1, keepdim=True).to(wide)) / slope.clamp(min=1e-30)
    p = weights(z, gap, level).masked_fill(~seen, 0.0)
    return (p @ values).to(q.dtype), level[..., 0]
