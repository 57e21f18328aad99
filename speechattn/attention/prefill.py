"""Attention over whole utterances that looks at a few queries first, and reads what these needed.

Both measure exact weights for some queries, keep the fewest keys that hold a wished share of them, and compute no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.blocks import turnable, turned
from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position
from speechattn.attention.self_attention import SelfAttention
from speechattn.attention.softmax import shared
from speechattn.frames import known
from speechattn.linear import dropped, run
from speechattn.stream import Buffer, Plan

__all__ = ["FlexPrefill", "Prefill", "SampleAttention", "columns", "covering", "pairs", "weights"]

TILE = 256  # queries that share the reading of columns


class Prefill(SelfAttention):
    """Self-attention over a whole utterance, full or causal, that reads a part of the keys; a subclass says which.

    Positions count the valid frames of a row. The choice has no gradient, what was chosen has one; it is made from the
    last queries, so in the causal pattern too it knows the whole utterance. Traced for export it computes all scores
    and hides what was not chosen, because how much that is depends on the data.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        norm: nn.Module | None = None, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, self._whole(span), position=turnable(position), key_heads=key_heads, norm=norm,
                         dropout=dropout)  # fmt: skip

    def _whole(self, span: Pattern) -> Span:
        if isinstance(span, Span) and span in (Span.full(), Span.causal()):
            return span
        raise ValueError(f"{type(self).__name__} reads whole utterances: its span is Span.full() or Span.causal(), "
                         f"not {span}")  # fmt: skip

    def scaled(self, span: Pattern) -> Pattern:
        return self._whole(super().scaled(span))

    def plan(self) -> Plan:
        return Plan(None, Fraction(1), 0, None, 0)

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, count: Tensor, causal: bool) -> Tensor:
        """q, k and v [B, H, T, D], of which the first `count` [B] of each row are valid -> [B, H, T, D]."""
        raise NotImplementedError

    def prepared(self, queries: Tensor, past: Buffer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B, T, D], keys and values -> q, k, v [B, H, T, D], valid frames in front; where each frame went."""
        b, frames, _ = queries.shape
        q, (k, v) = queries.view(b, frames, self.heads, -1), past.values.unbind(2)
        order = torch.arange(frames, device=q.device).expand(b, -1)
        at = order
        if not (known(past.mask) and past.mask.all()):
            order = (~past.mask).byte().argsort(dim=1, stable=True)
            q, k, v = (x.gather(1, order[..., None, None].expand_as(x)) for x in (q, k, v))
        place = turnable(self.position)
        q, k = turned(q, at, place), turned(k, at, place)
        q, k, v = (shared(x.transpose(1, 2), self.heads) for x in (q, k, v))
        return q, k, v, order.argsort(1)

    def _attend(self, queries: Tensor, past: Buffer, sinks: Buffer, late: int) -> Tensor:
        q, k, v, back = self.prepared(queries, past)
        y = self.sparse(q, k, v, past.mask.sum(1), self.span == Span.causal())
        y = y.transpose(1, 2).reshape(queries.shape)
        out = run(self.out, y.gather(1, back[..., None].expand_as(y)))
        return dropped(out, self.dropout) if self.training else out


class SampleAttention(Prefill):
    """Sinks, a window, and the columns that sampled queries need (arXiv 2406.15486).

    Every query reads the first `sinks` frames, the frames up to a share `window` of the utterance away, and the columns
    of its head: ranked by the weight that the sampled queries put on them, as many as it takes until each sampled query
    keeps the share `target` of its weight (the cumulative residual attention, a minimum over queries, of the paper).
    One query in 1 / `sample` is sampled, from the last one back; with all of them the target holds for every query.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        norm: nn.Module | None = None, dropout: float = 0.0, target: float = 0.95, sample: float = 0.05,
        window: float = 0.08, sinks: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, span, position=position, key_heads=key_heads, norm=norm, dropout=dropout)
        if not (0 <= target <= 1 and 0 < sample <= 1 and 0 <= window <= 1 and sinks >= 0):
            raise ValueError(f"target {target}, sample {sample}, window {window}, {sinks} sinks: wanted shares of 1")
        self.target, self.stride, self.window, self.sinks = target, max(1, round(1 / sample)), window, sinks

    def reach(self, count: Tensor) -> Tensor:
        """How far the window reaches to each side [B]."""
        return (count * self.window).ceil().long()

    def chosen(self, q: Tensor, k: Tensor, count: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Keys in the order of what sampled queries would miss [B, H, T], and how many of them are read [B, H]."""
        with torch.no_grad():
            return columns(q, k, count, causal, self.reach(count), stride=self.stride, sinks=self.sinks,
                           target=self.target)  # fmt: skip

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, count: Tensor, causal: bool) -> Tensor:
        frames, reach = q.shape[2], self.reach(count)
        rank, many = self.chosen(q, k, count, causal)
        most, far = (frames, frames) if torch.compiler.is_compiling() else (int(many.amax()), int(reach.amax()))
        column, sinks = rank[..., :most], min(self.sinks, frames)
        held = [taken(x, column) for x in (k, v)]
        kept = (torch.arange(most, device=q.device) < many[..., None])[:, :, None]
        column, tiles = column[:, :, None], []
        for i in range(0, frames, TILE):
            query = torch.arange(i, min(i + TILE, frames), device=q.device)[:, None]
            begin, end = max(0, i - far), min(frames, i + TILE + (0 if causal else far))
            near = torch.arange(begin, end, device=q.device)
            first = torch.arange(sinks, device=q.device)
            wide = reach[:, None, None, None]
            seen = [
                (first < sinks).expand(len(q), 1, len(query), -1),
                kept & (column >= sinks) & ((query - column).abs() > wide),
                (near >= sinks) & ((query - near).abs() <= wide),
            ]
            keys = [first, column, near]
            heads = [(x[:, :, :sinks], y, x[:, :, begin:end]) for x, y in zip((k, v), held, strict=True)]
            tiles.append(softly(q[:, :, i : i + TILE], heads, keys, seen, query, count, causal))
        return torch.cat(tiles, 2)


def softly(
    q: Tensor, parts: Sequence[tuple[Tensor, ...]], keys: list[Tensor], seen: list[Tensor], query: Tensor,
    count: Tensor, causal: bool,
) -> Tensor:  # fmt: skip
    """Attention of q [B, H, C, D] at `query` [C, 1] to parts of keys and values that are `seen`, valid and allowed."""
    shape = *q.shape[:3], -1
    there = [
        (s & (j < count[:, None, None, None]) & (j <= query if causal else True)).expand(shape)
        for j, s in zip(keys, seen, strict=True)
    ]
    k, v = (torch.cat(part, 2) for part in parts)
    hidden = torch.where(torch.cat(there, -1), q.new_zeros(()), torch.finfo(q.dtype).min / 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)


def taken(x: Tensor, which: Tensor) -> Tensor:
    """x [B, H, N, D] at `which` [B, H, M] -> [B, H, M, D]."""
    return x.gather(2, which[..., None].expand(-1, -1, -1, x.shape[-1]))


def weights(q: Tensor, k: Tensor, at: Tensor, count: Tensor, causal: bool) -> Tensor:
    """Exact weights of queries q [B, H, R, D] at positions [B, R] over k [B, H, T, D], `count` [B] of them valid."""
    key = torch.arange(k.shape[2], device=k.device)
    seen = key < count[:, None, None]
    seen = (seen & (key <= at[..., None]) if causal else seen)[:, None]
    logits = ((q / sqrt(q.shape[-1])) @ k.mT).masked_fill(~seen, torch.finfo(q.dtype).min)
    return logits.softmax(-1)


def columns(
    q: Tensor, k: Tensor, count: Tensor, causal: bool, reach: Tensor, *, stride: int, sinks: int, target: float
) -> tuple[Tensor, Tensor]:
    """What `SampleAttention.chosen` says of q and k [B, H, T, D]; a window `reach` [B], each `stride`-th query.

    What sinks and window hold counts as kept. At a target of 1 all keys are read.
    """
    frames = q.shape[2]
    at = count[:, None] - 1 - stride * torch.arange(-(-frames // stride), device=q.device)  # [B, R]
    asked, at = at >= 0, at.clamp(min=0)
    mass = weights(taken(q, at[:, None].expand(-1, q.shape[1], -1)), k, at, count, causal)
    key = torch.arange(frames, device=q.device)
    free = (key < sinks) | ((at[..., None] - key).abs() <= reach[:, None, None])
    mass = mass.masked_fill(free[:, None], 0.0)
    rank = (mass * asked[:, None, :, None]).sum(2).argsort(dim=-1, descending=True, stable=True)
    if target == 1:
        return rank, torch.full_like(rank[..., 0], frames)
    missed = (mass.sum(-1) - (1 - target)).clamp(min=0)  # what columns must give each query: it may miss 1 - target
    gained = mass.gather(3, rank[:, :, None].expand_as(mass)).cumsum_(-1)
    needed = (gained < missed[..., None]).sum(-1) + (missed > 0)
    return rank, needed.masked_fill(~asked[:, None], 0).amax(-1).clamp(max=frames)


class FlexPrefill(Prefill):
    """Blocks of keys for blocks of queries, as many as the input needs (arXiv 2502.20766).

    The last `size` queries are asked exactly. Where the product of mean query and mean keys foretells how their weight
    spreads over blocks (the root of the Jensen-Shannon divergence is less than `tau`), a head reads the best pairs of
    blocks by that product, as many as hold the share `gamma`; else it reads the columns, and the diagonals, that hold
    `gamma` of the exact weights. The first block and the own one are always read. In the full pattern the first `size`
    queries are asked as well, because the last ones have nothing ahead of them; that is ours, the paper is causal.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        norm: nn.Module | None = None, dropout: float = 0.0, size: int = 64, gamma: float = 0.95, tau: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, span, position=position, key_heads=key_heads, norm=norm, dropout=dropout)
        if size < 1 or not 0 <= gamma <= 1 or tau < 0:
            raise ValueError(f"blocks of {size}, gamma {gamma}, tau {tau}: wanted 1 or more, a share of 1, 0 or more")
        self.size, self.gamma, self.tau = size, gamma, tau

    def chosen(self, q: Tensor, k: Tensor, count: Tensor, causal: bool) -> Tensor:
        """Which block of keys each block of queries reads [B, H, N, N]."""
        with torch.no_grad():
            return pairs(q, k, count, causal, size=self.size, gamma=self.gamma, tau=self.tau)

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, count: Tensor, causal: bool) -> Tensor:
        size, (b, h, frames, dim) = self.size, q.shape
        kept = self.chosen(q, k, count, causal)
        blocks, order = kept.shape[-1], (~kept).byte().argsort(dim=-1, stable=True)
        many = [blocks] * blocks if torch.compiler.is_compiling() else kept.sum(-1).amax((0, 1)).clamp(min=1).tolist()
        space = [0, 0, 0, blocks * size - frames]
        k, v = (F.pad(x, space).reshape(b * h * blocks, size * dim) for x in (k, v))
        rows = torch.arange(b * h, device=q.device)[:, None] * blocks
        inside, tiles = torch.arange(size, device=q.device), []
        for i, most in enumerate(many):
            block = order[:, :, i, :most]
            which = (rows + block.reshape(b * h, most)).flatten()
            parts = [(x.index_select(0, which).view(b, h, most * size, dim),) for x in (k, v)]
            seen = kept[:, :, i].gather(2, block).repeat_interleave(size, -1)[:, :, None]
            key = (block[..., None] * size + inside).flatten(2)[:, :, None]
            query = torch.arange(i * size, min((i + 1) * size, frames), device=q.device)[:, None]
            tiles.append(softly(q[:, :, i * size : (i + 1) * size], parts, [key], [seen], query, count, causal))
        return torch.cat(tiles, 2)


def covering(mass: Tensor, share: float) -> Tensor:
    """The fewest of the last dimension of `mass` [..., M] that hold a `share` of its sum; with 1 all of them."""
    if share == 1:
        return torch.ones_like(mass, dtype=torch.bool)
    best = mass.sort(dim=-1, descending=True, stable=True)
    before = best.values.cumsum(-1) - best.values
    taken = before < share * mass.sum(-1, keepdim=True)
    return torch.zeros_like(taken).scatter(-1, best.indices, taken)


def pooled(x: Tensor, valid: Tensor) -> Tensor:
    """x [..., N, size, D] -> the mean of what is valid [..., N, size] in each block, or zeros."""
    return (x * valid[..., None]).sum(-2) / valid.sum(-1, keepdim=True).clamp(min=1)


def pairs(q: Tensor, k: Tensor, count: Tensor, causal: bool, *, size: int, gamma: float, tau: float) -> Tensor:
    """What `FlexPrefill.chosen` says of q and k [B, H, T, D]."""
    b, h, frames, dim = q.shape
    blocks = -(-frames // size)
    block = torch.arange(blocks, device=q.device)
    exist = block * size < count[:, None]  # [B, N]
    allowed = (exist[:, :, None] & exist[:, None] & ((block <= block[:, None]) if causal else True))[:, None]
    valid = (torch.arange(blocks * size, device=q.device) < count[:, None]).view(b, 1, blocks, size)
    q_mean, k_mean = (
        pooled(F.pad(x, [0, 0, 0, blocks * size - frames]).view(b, h, blocks, size, dim), valid) for x in (q, k)
    )
    places = [count[:, None] - size + torch.arange(size, device=q.device)]
    if not causal:
        places.append(torch.arange(size, device=q.device).expand(b, -1))
    gaps, mass, at, asked = [], [], [], []
    for place in places:
        there, place = (place >= 0) & (place < count[:, None]), place.clamp(0, frames - 1)
        query = taken(q, place[:, None].expand(-1, h, -1))
        exact = weights(query, k, place, count, causal) * there[:, None, :, None]
        spread = F.pad(exact.sum(2), [0, blocks * size - frames]).view(b, h, blocks, size).sum(-1)
        spread = spread / there.sum(1).clamp(min=1)[:, None, None]
        mean = pooled(query, there[:, None])[:, :, None]  # [B, H, 1, D]
        guess = ((mean / sqrt(dim)) @ k_mean.mT)[:, :, 0].masked_fill(~exist[:, None], -torch.inf)
        gaps.append(divergence(guess.masked_fill(~exist.any(-1)[:, None, None], 0.0).softmax(-1), spread))
        mass.append(exact)
        at.append(place)
        asked.append(there)
    near = torch.stack(gaps).mean(0).sqrt() < tau  # [B, H]
    lines = vertical_slash(torch.cat(mass, 2), torch.cat(at, 1), size, gamma)
    guess = ((q_mean / sqrt(dim)) @ k_mean.mT).masked_fill(~allowed, torch.finfo(q.dtype).min).softmax(-1) * allowed
    free = covering(guess.flatten(2), gamma).view(b, h, blocks, blocks)
    kept = torch.where(near[..., None, None], free, lines)
    return (kept | (block == 0) | (block == block[:, None])) & allowed


def vertical_slash(mass: Tensor, at: Tensor, size: int, gamma: float) -> Tensor:
    """Blocks of the columns and diagonals with a share `gamma` of exact weights [B, H, R, T], queries at [B, R].

    -> [B, H, N, N]. A diagonal runs through two blocks of each row of blocks, unless it starts in a corner.
    """
    b, h, _, frames = mass.shape
    blocks = -(-frames // size)
    column = F.pad(covering(mass.sum(2), gamma), [0, blocks * size - frames]).view(b, h, blocks, size).any(-1)
    apart = at[..., None] - torch.arange(frames, device=at.device) + frames - 1  # query minus key, from 0
    sums = mass.new_zeros(b, h, 2 * frames - 1)
    sums = sums.scatter_add(2, apart.flatten(1)[:, None].expand(-1, h, -1), mass.flatten(2))
    kept = covering(sums, gamma)
    offset = torch.arange(1 - frames, frames, device=at.device)
    lower = torch.div(offset, size, rounding_mode="floor")
    diagonal = mass.new_zeros(b, h, 2 * blocks + 1, dtype=torch.long)
    for line in (lower, lower + (offset % size > 0)):
        diagonal = diagonal.scatter_add(2, (line + blocks).expand_as(kept), kept.long())
    block = torch.arange(blocks, device=at.device)
    return column[:, :, None] | (diagonal > 0)[:, :, block[:, None] - block + blocks]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of distributions [..., N], in nats."""
    m = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny)
    return (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(-1).clamp(min=0) / 2
