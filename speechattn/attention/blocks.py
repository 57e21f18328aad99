"""What attentions that choose their keys have in common: blocks, their marks, the choice, and how it is read.

Positions count the valid frames of a row. Block j holds those from j * size to (j + 1) * size - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position, Rotary
from speechattn.attention.self_attention import SelfAttention
from speechattn.attention.softmax import shared
from speechattn.frames import Frames, known
from speechattn.linear import dropped, run
from speechattn.stream.contract import extended
from speechattn.tree import node

__all__ = ["Blockwise", "Read", "chosen", "looked", "turnable", "turned"]

TILE = 64  # queries that share one reading of a block
LOOK = 2048  # queries that choose and look at once


@node
class Read:
    """What was read of a row: at index p the key and value of its valid frame p, and M marks of each block.

    `values` [B, N, G, 2 D], `marks` [B, N / size, M, G, D], `count` [B] valid frames; behind them is nothing.
    """

    values: Tensor
    marks: Tensor
    count: Tensor

    @staticmethod
    def align(states: Sequence[Read]) -> list[Read]:
        """The same in states of one size."""
        sizes = [max(state.values.shape[1] for state in states), max(state.marks.shape[1] for state in states)]

        def grown(x: Tensor, size: int) -> Tensor:
            return F.pad(x, [0, 0] * (x.dim() - 2) + [0, size - x.shape[1]]) if x.shape[1] < size else x

        return [Read(grown(state.values, sizes[0]), grown(state.marks, sizes[1]), state.count) for state in states]


def turnable(position: Position | None) -> Rotary | None:
    """`position`, if keys can be turned by their own place before they are chosen; else ValueError."""
    if position is None or isinstance(position, Rotary):
        return position
    raise ValueError(f"{type(position).__name__}: who reads only chosen keys has no table of all distances; "
                     "use Rotary, or no position")  # fmt: skip


def turned(x: Tensor, at: Tensor, position: Rotary | None) -> Tensor:
    """x [B, T, H, D] turned by its positions `at` [B, T] (arXiv 2104.09864, eq. 34)."""
    if position is None:
        return x
    exact = torch.float64 if x.device.type != "mps" else torch.float32
    dim = x.shape[-1]
    rate = position.base ** (-torch.arange(0, dim, 2, dtype=exact, device=x.device) / dim)
    angle = (at.to(exact)[..., None] * rate)[:, :, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def chosen(scores: Tensor, own: Tensor, many: int) -> tuple[Tensor, Tensor]:
    """scores [B, H, T, N] of blocks, own block [B, T] -> blocks [B, H, T, K], and which of them are there.

    The own block and the best of those before it: K = min(many, N) in all. Who has fewer gets his own again, not there.
    """
    count = scores.shape[-1]
    mine = own[:, None, :, None].expand(-1, scores.shape[1], -1, -1)
    past = torch.arange(count, device=own.device) < mine
    best = scores.masked_fill(~past, -torch.inf).topk(min(many, count) - 1, -1)
    there = best.values > -torch.inf
    blocks = torch.where(there, best.indices, mine)
    return torch.cat([mine, blocks], -1), torch.cat([torch.ones_like(mine, dtype=torch.bool), there], -1)


def looked(q: Tensor, values: Tensor, at: Tensor, blocks: Tensor, there: Tensor, size: int) -> Tensor:
    """Softmax over the keys of chosen blocks, as far as they are not newer than the query.

    q [B, H, T, D] at positions `at` [B, T], values [B, N, G, 2 D], blocks and there [B, H, T, K] -> [B, H, T, D].
    Each block is a softmax of its own; they are put together by the logarithms of their sums. Queries that chose the
    same block read it together, in tiles; what nobody chose is not read, and the work is T * K * size.
    """
    b, h, frames, dim = q.shape
    keys, groups = values.shape[1], values.shape[2]
    many = blocks.shape[-1]
    pairs, count = frames * many, -(-keys // size)
    tile = max(1, min(TILE, pairs // count))
    slot, pair, block = tiles(blocks.reshape(b * h, pairs), count, tile)
    query = pair // many
    asked = q.reshape(b * h, frames, dim).gather(1, query[..., None].expand(-1, -1, dim))
    asked = asked.view(-1, tile, dim)
    place = block[..., None] * size + torch.arange(size, device=q.device)  # [B * H, tiles, size]
    held = read(values, place.view(b, h, -1).clamp(max=keys - 1), h // groups).view(-1, size, 2 * dim)
    k, v = held.chunk(2, -1)
    newest = at[:, None].expand(-1, h, -1).reshape(b * h, frames).gather(1, query).view(*block.shape, tile, 1)
    seen = (place[:, :, None] <= newest).flatten(0, 1)
    logits = ((asked / sqrt(dim)) @ k.mT).masked_fill(~seen, torch.finfo(q.dtype).min)
    total = logits.logsumexp(-1).view(b * h, -1).gather(1, slot).view(blocks.shape)
    found = (logits.softmax(-1) @ v).view(b * h, -1, dim).gather(1, slot[..., None].expand(-1, -1, dim))
    weights = total.masked_fill(~there, torch.finfo(q.dtype).min).softmax(-1)
    return (weights[..., None, :] @ found.view(*blocks.shape, dim)).squeeze(-2)


def tiles(blocks: Tensor, count: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort pairs of a query and its block [R, P] into tiles of `tile` places, each for one of `count` blocks.

    -> the place of each pair [R, P], the pair at each place [R, tiles * tile] (any, where nobody stands), the block of
    each tile [R, tiles]. The number of tiles depends on shapes alone.
    """
    rows, pairs = blocks.shape
    number = torch.arange(pairs, device=blocks.device).expand(rows, -1)
    if tile == 1:
        return number, number, blocks
    sizes = torch.zeros(rows, count, dtype=torch.long, device=blocks.device)
    sizes = sizes.scatter_add(1, blocks, torch.ones_like(blocks))
    needed = (sizes + tile - 1) // tile
    first, begin = needed.cumsum(1) - needed, sizes.cumsum(1) - sizes
    order = blocks.argsort(dim=1, stable=True)
    inside = blocks.gather(1, order)
    place = first.gather(1, inside) * tile + number - begin.gather(1, inside)
    slot = torch.zeros_like(blocks).scatter(1, order, place)
    most = (pairs + count * (tile - 1)) // tile
    pair = torch.zeros(rows, most * tile, dtype=torch.long, device=blocks.device).scatter(1, slot, number)
    each = torch.arange(most, device=blocks.device).expand(rows, -1).contiguous()
    return slot, pair, torch.searchsorted(needed.cumsum(1), each, right=True).clamp(max=count - 1)


def read(values: Tensor, place: Tensor, share: int) -> Tensor:
    """values [B, N, G, E] at `place` [B, H, M], each key head for `share` query heads -> [B, H, M, E]."""
    b, n, g, e = values.shape
    head = torch.arange(place.shape[1], device=place.device)[:, None] // share
    row = torch.arange(b, device=place.device)[:, None, None]
    which = ((row * n + place) * g + head).flatten()
    return values.reshape(-1, e).index_select(0, which).view(*place.shape, e)


class Blockwise(SelfAttention):
    """Causal self-attention that reads `blocks` blocks of `size` keys for each query and head: its own, and the best.

    A subclass says how a full block is marked, and what its marks are worth to a query. Only blocks before the own one
    are ranked; they are full, so no choice depends on what comes later. The choice has no gradient, what was chosen has
    one. With as many blocks as there are it is dense attention. Distance counts valid frames.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        norm: nn.Module | None = None, dropout: float = 0.0, size: int, blocks: int,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, self._causal(span), position=turnable(position), key_heads=key_heads, norm=norm,
                         dropout=dropout)  # fmt: skip
        if size < 1 or blocks < 1:
            raise ValueError(f"{blocks} blocks of {size} keys: at least 1 of 1 is needed")
        self.size, self.blocks = size, blocks

    def _causal(self, span: Pattern) -> Span:
        if isinstance(span, Span) and span == Span.causal():
            return span
        raise ValueError(f"{type(self).__name__} chooses among all that came before: its span is Span.causal(), "
                         f"not {span}")  # fmt: skip

    def scaled(self, span: Pattern) -> Pattern:
        return self._causal(super().scaled(span))

    def marked(self, k: Tensor) -> Tensor:
        """Keys of blocks [..., size, G, D] -> their marks [..., M, G, D]."""
        raise NotImplementedError

    def worth(self, q: Tensor, marks: Tensor) -> Tensor:
        """q [B, H, T, D], marks [B, H, N, M, D] of its key head -> scores [B, H, T, N]: the higher, the sooner read."""
        raise NotImplementedError

    def init_state(self, x: Frames) -> Read:
        rows, width = x.values.shape[0], self.width
        values = x.values.new_zeros(rows, 0, self.key_heads, 2 * width)
        marks = self.marked(x.values.new_zeros(rows, 0, self.size, self.key_heads, width))
        return Read(values, marks, torch.zeros(rows, dtype=torch.long, device=x.values.device))

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        b, frames = x.mask.shape
        if not frames:
            return x, state
        queries, kv, mask = self._project(x)
        place = turnable(self.position)
        at = (state.count[:, None] + mask.cumsum(1) - 1).clamp(min=0)
        q = turned(queries.view(b, frames, self.heads, -1), at, place).transpose(1, 2)
        kv = torch.cat([turned(kv[:, :, 0], at, place), kv[:, :, 1]], -1)
        state = self._read(kv, mask, state)
        pieces = [self._look(q[:, :, i : i + LOOK], at[:, i : i + LOOK], state) for i in range(0, frames, LOOK)]
        y = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)).transpose(1, 2).flatten(2)
        out = run(self.out, y)
        return Frames.finite(dropped(out, self.dropout) if self.training else out, x.mask), state

    def _read(self, kv: Tensor, mask: Tensor, state: Read) -> Read:
        """Keys and values [B, T, G, 2 D], as far as they are valid, at the next positions of each row."""
        old, frames = state.values.shape[1], mask.shape[1]
        values, count = extended(state.values.to(kv.dtype), kv), state.count
        if not (known(mask) and mask.all() and (count == old).all()):
            order = (~mask).byte().argsort(dim=1, stable=True)  # what is valid first; the rest is overwritten
            kv = kv.gather(1, order[..., None, None].expand_as(kv))
            values = put(values, count[:, None] + torch.arange(frames, device=count.device), kv)
        return Read(values, self._mark(values, state, frames), count + mask.sum(1))

    @torch.no_grad()
    def _mark(self, values: Tensor, state: Read, frames: int) -> Tensor:
        """The marks, those of the blocks made that are full with `frames` new frames; no others are ever looked at."""
        size, last = self.size, values.shape[1] - 1
        grown = F.pad(state.marks, [0, 0, 0, 0, 0, 0, 0, last // size + 1 - state.marks.shape[1]])
        touched = torch.arange(-(-frames // size), device=values.device)
        touched = (state.count[:, None] // size + touched).clamp(max=last // size)
        place = (touched[..., None] * size + torch.arange(size, device=values.device)).clamp(max=last)
        rows = torch.arange(len(values), device=values.device)[:, None, None]
        return put(grown, touched, self.marked(values[rows, place].chunk(2, -1)[0]).to(grown.dtype))

    def choice(self, q: Tensor, at: Tensor, state: Read) -> tuple[Tensor, Tensor]:
        """q [B, H, T, D] at positions [B, T] -> the blocks that it reads [B, H, T, K], and which of them are there."""
        own = at // self.size
        if min(self.blocks, state.marks.shape[1]) == 1:
            mine = own[:, None, :, None].expand(-1, self.heads, -1, -1)
            return mine, torch.ones_like(mine, dtype=torch.bool)
        with torch.no_grad():
            marks = shared(state.marks.permute(0, 3, 1, 2, 4), self.heads)
            return chosen(self.worth(q, marks.to(q.dtype)), own, self.blocks)

    def _look(self, q: Tensor, at: Tensor, state: Read) -> Tensor:
        blocks, there = self.choice(q, at, state)
        return looked(q, state.values, at, blocks, there, self.size)


def put(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """x [B, N, ...] with `new` [B, T, ...] at the places `at` [B, T]; written in place where no gradient is asked."""
    where = (torch.arange(len(x), device=x.device)[:, None], at)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x.index_put(where, new)
    return x.index_put_(where, new)
