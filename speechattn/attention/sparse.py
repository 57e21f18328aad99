"""Self-attention whose heads learn how many frames to look at (Correia et al., arXiv 1909.00015)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from speechattn.attention.entmax import Entmax
from speechattn.attention.pattern import Pattern, Span, visible
from speechattn.attention.position import Position
from speechattn.attention.self_attention import AttentionState, SelfAttention
from speechattn.attention.softmax import first_valid, gathered, places, scores, shared
from speechattn.frames import Frames
from speechattn.stream import Buffer, flush

__all__ = ["SparseSelfAttention", "Support", "Windows", "windows"]


class Windows(NamedTuple):
    """Queries in groups, each with the keys that it may see: q [N, H, C, D], k and v [N, G, W, D], seen [N, C, W].

    `queries` and `keys` are their indices in a window; N is B times the number of groups.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    queries: range
    keys: range


def windows(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, valid: Tensor) -> Windows:
    """The arguments of `attend` -> each chunk with its window [sinks | left | chunk | right], memory of T x W.

    A pattern that has no bound to the left is one window of everything.
    """
    frames, right, sinks = q.shape[2], pattern.right, pattern.sinks
    if not isinstance(pattern, Span) or pattern.left is None or pattern.chunk is None:
        queries, keys = range(frames), range(right + frames - k.shape[2], right + frames)
        return Windows(q, k, v, valid[:, None] & visible(pattern, queries, keys, q.device), queries, keys)
    chunk, left, n = pattern.chunk, pattern.left, frames // pattern.chunk
    width, which = left + chunk + right, first_valid(valid, sinks)
    queries, keys = range(chunk), range(-left - sinks, chunk + right)
    seen = visible(pattern, queries, keys[sinks:], q.device)
    seen = (seen & valid[:, sinks:].unfold(1, width, chunk)[:, :, None]).flatten(0, 1)
    heads = [x[:, :, sinks:].unfold(2, width, chunk).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v)]
    if sinks:  # those that have left the band
        begin = torch.arange(n, device=q.device) * chunk + sinks
        gone = (places(which)[:, None] < begin[:, None]).flatten(0, 1)
        seen = torch.cat([gone[:, None].expand(-1, chunk, -1), seen], -1)
        held = [gathered(x, which).repeat_interleave(n, 0) for x in (k, v)]
        heads = [torch.cat(pair, 2) for pair in zip(held, heads, strict=True)]
    q = q.view(len(q), q.shape[1], n, chunk, q.shape[3]).transpose(1, 2).flatten(0, 1)
    return Windows(q, heads[0], heads[1], seen, queries, keys)


class Support(NamedTuple):
    """Of each head [H]: its `alpha`, and the mean number of `keys` that get a weight, of so many `visible` ones."""

    alpha: Tensor
    keys: Tensor
    visible: Tensor


class SparseSelfAttention(SelfAttention):
    """Self-attention with alpha-entmax in place of the softmax: keys of low scores get no weight at all.

    Each head learns its alpha from 1 (softmax) to 2 (sparsemax), or all have the one that is given. Everything else is
    that of `SelfAttention`, whose weights fit; it is the same with an alpha of 1.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        group: int = 1, norm: nn.Module | None = None, dropout: float = 0.0, alpha: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            dim, heads, span, position=position, key_heads=key_heads, group=group, norm=norm, dropout=dropout
        )
        self.normaliser = Entmax(heads, alpha)

    def support(self, x: Frames) -> Support:
        """How sparse it is on whole utterances x [B, T, D], over all their frames."""
        x = flush(x, self)
        x = x.pad(-x.mask.shape[1] % self.group)
        state = self.init_state(x) or self._state(x, 0, 0)
        assert isinstance(state, AttentionState)
        q, kv, mask = self._project(x)
        past, late, frames = state.past.append(kv, mask), state.waiting.shape[1], mask.shape[1]
        queries = torch.cat([state.waiting, q], 1)[:, :frames]
        found, weights = self._weights(self.span, queries, past, state.sinks, late)
        begin = past.mask.shape[1] - late - frames
        asks = past.mask[:, begin : begin + frames].reshape(len(found.seen), 1, -1)
        total = asks.sum().clamp(min=1)
        keys = ((weights > 0).sum(-1) * asks).sum((0, 2)) / total
        return Support(self.normaliser.alpha.detach(), keys, (found.seen.sum(-1) * asks[:, 0]).sum() / total)

    def _weights(
        self, span: Pattern, queries: Tensor, past: Buffer, sinks: Buffer, late: int
    ) -> tuple[Windows, Tensor]:
        """As `_looked` -> windows, and weights [N, H, C, W] in them."""
        keys, valid = past.values, past.mask
        if end := span.right - late:
            keys, valid = keys[:, :end], valid[:, :end]
        if sinks.mask.shape[1]:
            keys, valid = torch.cat([sinks.values, keys], 1), torch.cat([sinks.mask, valid], 1)
        b, frames, width = queries.shape
        q = queries.reshape(b, frames, self.heads, width // self.heads).transpose(1, 2)
        k, v = keys.permute(2, 0, 3, 1, 4).unbind()
        found = windows(q, k, v, span, valid)
        logits = scores(found.q, found.k, self.position, found.queries, found.keys)
        return found, self.normaliser(logits, found.seen[:, None])

    def _looked(self, span: Pattern, queries: Tensor, past: Buffer, sinks: Buffer, late: int) -> Tensor:
        found, weights = self._weights(span, queries, past, sinks, late)
        b, frames, width = queries.shape
        y = (weights @ shared(found.v, self.heads)).transpose(1, 2)
        return y.reshape(b, frames * self.group, width // self.group)
