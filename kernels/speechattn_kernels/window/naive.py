"""Window attention with every score in memory: what the kernels are compared with."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

__all__ = ["kept", "window"]


def window(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, *, left: int | None, chunk: int | None = 1, right: int = 0,
    dilation: int = 1, extra: Tensor | None = None, extra_values: Tensor | None = None, rows: Tensor | None = None,
    table: Tensor | None = None, turns: Tensor | None = None, origin: int = 0, dropout: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `speechattn_kernels.window`."""
    (batch, heads, frames, dim), keys = q.shape, k.shape[2]
    first = keys - right - frames
    i, j = torch.arange(frames, device=q.device)[:, None], torch.arange(keys, device=q.device)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1).masked_fill(~valid[:, None, :, None], 0.0) for x in (k, v))
    if turns is not None:
        scores = turned(q, turns[:, first : first + frames]) @ turned(k, turns[:, :keys]).mT / sqrt(dim)
    else:
        scores = q @ k.mT / sqrt(dim)
    distance = (first + i - j - origin).expand(batch, heads, -1, -1)
    if rows is not None:
        scores = scores + looked_up(q @ rows, distance)
    if table is not None:
        scores = scores + looked_up(table[:, None].expand(batch, -1, frames, -1), distance)
    seen = (first + i - j) % dilation == 0
    if chunk is not None:
        own = first + i // chunk * chunk
        seen = seen & (j < own + chunk + right)
        if left is not None:
            seen = seen & (j >= own - left)
    seen = seen & valid[:, None, None]
    number = j
    if extra is not None and extra_values is not None:
        size = extra.shape[-1]
        scores, seen = torch.cat([extra, scores], -1), torch.cat([extra > -torch.inf, seen.expand_as(scores)], -1)
        v = torch.cat([extra_values.repeat_interleave(heads // extra_values.shape[1], 1), v], 2)
        number = torch.cat([keys + torch.arange(size, device=j.device), j])
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    if dropout:
        row = torch.arange(batch * heads, device=j.device).view(batch, heads, 1, 1)
        weights = weights.where(kept(i, number, row, seed, dropout), 0.0) / (1 - dropout)
    return weights @ v, lse


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x [..., T, D], halves turned against each other by cosines and sines [2, T, D / 2]."""
    (cos, sin), (a, b) = turns.to(x.dtype), x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def looked_up(values: Tensor, distance: Tensor) -> Tensor:
    """values [B, H, T, R] by distance -> [B, H, T, N]; 0 where a distance is not in the table."""
    inside = (distance >= 0) & (distance < values.shape[-1])
    return values.gather(-1, distance.clamp(0, values.shape[-1] - 1)).where(inside, 0.0)


def kept(i: Tensor, j: Tensor, row: Tensor, seed: int, dropout: float) -> Tensor:
    """Which weights dropout keeps: Philox 4x32-10 (Salmon et al., SC 2011) counts queries, keys and rows."""
    word = 0xFFFFFFFF
    shape = torch.broadcast_shapes(i.shape, j.shape, row.shape)
    a, b, c, d = (x.long().expand(shape) for x in (i, j, row, torch.zeros_like(row)))
    one, two = seed & word, seed >> 32 & word

    def times(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """High and low word of a product; by halves, as int64 has a sign."""
        high, low = x >> 16, x & 0xFFFF
        upper, lower = high * factor, low * factor
        total = (upper & 0xFFFF) * 0x10000 + lower
        return (upper >> 16) + (total >> 32), total & word

    for _ in range(10):
        (high_a, low_a), (high_c, low_c) = times(0xD2511F53, a), times(0xCD9E8D57, c)
        a, b, c, d = high_c ^ b ^ one, low_c, high_a ^ d ^ two, low_a
        one, two = (one + 0x9E3779B9) & word, (two + 0xBB67AE85) & word
    signed = torch.where(a >= 1 << 31, word - a, a)  # its uniform number: the magnitude of a signed word
    return signed.float() * 4.6566127342e-10 >= dropout
