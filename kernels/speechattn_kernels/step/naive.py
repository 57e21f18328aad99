"""The step with every score in memory: what the kernel is compared with."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

__all__ = ["step"]


def step(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cache: Tensor, filled: Tensor, at: Tensor, *, left: int, chunk: int,
    right: int, dilation: int, late: int, rows: Tensor | None = None, table: Tensor | None = None,
    turns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `speechattn_kernels.step`."""
    (batch, heads, frames, dim), held, cap = q.shape, left + late, cache.shape[1]
    slots = (at[:, None] + torch.arange(held + frames, device=at.device)) % cap
    row = torch.arange(batch, device=at.device)[:, None]
    cache[row, slots[:, held:]] = torch.stack([k, v], 2).permute(0, 3, 2, 1, 4).where(mask[..., None, None, None], 0.0)
    there = torch.cat([filled, mask], 1)
    keys, values = (
        x.transpose(1, 2).repeat_interleave(heads // k.shape[1], 1).where(there[:, None, :, None], 0.0)
        for x in cache[row, slots].unbind(2)
    )
    t, j = torch.arange(frames, device=at.device)[:, None], torch.arange(held + frames, device=at.device) - left
    begin = t // chunk * chunk
    seen = (j >= begin - left) & (j < begin + chunk + right) & ((t - j) % dilation == 0) & there[:, None, None]
    scores = turned(q, turns, left) @ turned(keys, turns, 0).mT / sqrt(dim)
    if rows is not None:
        scores = scores + by_key(q @ rows, t - j + chunk - 1 + right)
    if table is not None:
        scores = scores + by_key(table[:, None].expand(batch, -1, frames, -1), t - j + chunk - 1 + right)
    exact = torch.promote_types(q.dtype, torch.float32)
    weights = scores.to(exact).masked_fill(~seen, -torch.inf).softmax(-1).where(seen, 0.0)
    return weights.to(q.dtype) @ values, there[:, frames:], (at + frames) % cap


def turned(x: Tensor, turns: Tensor | None, first: int) -> Tensor:
    """x [B, H, N, D] from place `first` on, halves turned against each other."""
    if turns is None:
        return x
    (cos, sin), (a, b) = turns[:, first : first + x.shape[2]].to(x.dtype), x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def by_key(x: Tensor, column: Tensor) -> Tensor:
    """x [B, H, T, R] by distance -> [B, H, T, N]; 0 where there is no such column."""
    inside = (column >= 0) & (column < x.shape[-1])
    return x.gather(-1, column.clamp(0, x.shape[-1] - 1).expand(*x.shape[:2], -1, -1)).where(inside, 0.0)
