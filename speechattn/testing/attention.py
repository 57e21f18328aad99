"""Self-attention by definition: one T x T table of scores, one pair of frames at a time. For tests; slow."""

from __future__ import annotations

from math import cos, log, sin, sqrt

import torch
from torch import Tensor

from speechattn.attention.pattern import Blocks, Pattern, Span
from speechattn.attention.position import Alibi, Bucketed, Position, Relative, Rotary
from speechattn.attention.self_attention import SelfAttention
from speechattn.frames import Frames

__all__ = ["dense"]


def dense(layer: SelfAttention, x: Frames) -> Frames:
    """What `layer` says of x [B, T, D], from the definitions of its pattern and position alone."""
    rows = [row(layer, values, mask) for values, mask in zip(x.values, x.mask, strict=True)]
    return Frames.of(torch.stack(rows), x.mask)


def row(layer: SelfAttention, x: Tensor, mask: Tensor) -> Tensor:
    """One row [T, D]."""
    frames, group, width = len(x), layer.group, layer.width * layer.group
    own, shared = layer.heads * layer.width, layer.key_heads * layer.width
    if not frames:
        return x
    spare = -frames % group
    padded = torch.cat([x, x.new_zeros(spare, x.shape[1])])
    padded = padded if layer.norm is None else layer.norm(padded)
    valid = torch.cat([mask, mask.new_zeros(spare)])[::group].tolist()
    q, k, v = (
        (padded @ layer.qkv.weight[rows].T + layer.qkv.bias[rows]).reshape(len(valid), -1, width)
        for rows in (slice(own), slice(own, own + shared), slice(own + shared, None))
    )
    share = layer.heads // layer.key_heads
    order = [j for j, there in enumerate(valid) if there]
    out = q.new_zeros(len(valid), layer.heads, width)
    for i in range(len(valid)):
        apart = {j: distance(layer.span, i, j, order) for j in order}
        seen = [(j, d) for j, d in apart.items() if d is not None]
        for h in range(layer.heads):
            if seen:
                scores = torch.stack([score(layer.position, q[i, h], k[j, h // share], h, d) for j, d in seen])
                out[i, h] = torch.einsum("n,nd->d", scores.softmax(0), v[[j for j, _ in seen], h // share])
    y: Tensor = layer.out(out.reshape(-1, own)[:frames])
    return y


def distance(pattern: Pattern, i: int, j: int, order: list[int]) -> int | None:
    """How far key j is from query i; None if it is not visible. `order` are the valid frames."""
    if isinstance(pattern, Blocks):
        return i - j if pattern.table[i // pattern.size][j // pattern.size] else None
    assert isinstance(pattern, Span)
    chunk = pattern.chunk or 10**9
    begin, far = i // chunk * chunk, (i - j) % pattern.dilation != 0
    if pattern.left is not None and j < begin - pattern.left:
        if j in order[: pattern.sinks]:
            return i - (begin - pattern.left - pattern.sinks + order.index(j))
        return None
    return None if far or j >= begin + chunk + pattern.right else i - j


def score(position: Position | None, q: Tensor, k: Tensor, head: int, d: int) -> Tensor:
    """The score of a query and a key [D] that are d apart (d > 0: the key is older)."""
    width = len(q)
    match position:
        case Relative():
            angles = [d * 10000 ** (-2 * n / position.dim) for n in range(position.dim // 2)]
            table = torch.tensor([f(a) for a in angles for f in (sin, cos)], dtype=q.dtype)
            r = position.linear(table).view(position.heads, -1)[head]
            total: Tensor = (q + position.u[head]) @ k + (q + position.v[head]) @ r
            return total / sqrt(width)
        case Rotary():
            pairs = width // 2
            angle = torch.tensor([d * position.base ** (-n / pairs) for n in range(pairs)], dtype=q.dtype)
            qa, qb, ka, kb = q[:pairs], q[pairs:], k[:pairs], k[pairs:]
            return (angle.cos() * (qa * ka + qb * kb) + angle.sin() * (qa * kb - qb * ka)).sum() / sqrt(width)
        case Alibi():
            return q @ k / sqrt(width) - abs(d) * 2 ** (-8 * (head + 1) / position.heads)
        case Bucketed():
            half, near = position.buckets // 2, position.buckets // 4
            size = abs(d)
            if size >= near:
                size = min(half - 1, near + int(log(size / near) / log(position.farthest / near) * (half - near)))
            return q @ k / sqrt(width) + position.table.weight[size + (half if d < 0 else 0), head]
        case None:
            return q @ k / sqrt(width)
        case _:
            raise TypeError(f"no definition of {type(position).__name__}")
