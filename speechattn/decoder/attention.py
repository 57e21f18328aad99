"""Transformer attention decoder over any cross attention, cached per hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.pattern import Span
from speechattn.attention.self_attention import AttentionState, SelfAttention
from speechattn.cross import CrossAttention
from speechattn.frames import Frames, Memory
from speechattn.tree import node

__all__ = ["AttentionDecoder", "DecoderState", "Head"]

Head = tuple[int, int]  # (decoder layer, head in that layer), both from 0


@node
class DecoderState:
    """One hypothesis per row: `cache` holds each layer's keys and values, `cross` what each layer read."""

    cache: tuple[AttentionState, ...]
    cross: tuple[Any, ...]

    @property
    def length(self) -> Tensor:
        """Tokens read so far [B]."""
        return self.cache[0].past.length

    def truncate(self, length: int) -> DecoderState:
        """Forget the tokens behind the first `length`."""
        return replace(self, cache=tuple(replace(c, past=c.past.truncate(length)) for c in self.cache))


class DecoderLayer(nn.Module):
    """Self attention, cross attention, feed-forward; each behind its own norm and added to its input."""

    def __init__(self, dim: int, heads: int, inner: int, cross: CrossAttention) -> None:
        super().__init__()
        self.self_norm, self.cross_norm, self.ff_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = SelfAttention(dim, heads, Span.causal())
        self.cross = cross
        self.ff = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, x: Tensor, cache: AttentionState, cross: Any) -> tuple[Tensor, Tensor, AttentionState, Any]:
        """`x` [B, U, D] -> the same shape, the alignment [B, H, U, T], and the two states."""
        y, cache = self.self_attention.step(Frames(self.self_norm(x), x.new_ones(x.shape[:2], dtype=torch.bool)), cache)
        x = x + y.values
        seen, cross = self.cross.attend(self.cross_norm(x), cross)
        x = x + seen.context
        return x + self.ff(self.ff_norm(x)), seen.alignment, cache, cross


class AttentionDecoder(nn.Module):
    """Token embeddings and learned positions through `depth` layers; the output shares the embedding's weights.

    Law: reading tokens one by one equals reading them at once. Attention is a return value: `step` gives the
    alignment of the (layer, head) pairs it is asked for.
    """

    def __init__(
        self, vocab: int, context: int, dim: int, heads: int, depth: int, *,
        cross: Callable[[], CrossAttention], inner: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.heads, self.context = dim, heads, context
        self.embed = nn.Embedding(vocab, dim)
        self.positions = nn.Parameter(torch.zeros(context, dim))
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(  # type: ignore[assignment]
            DecoderLayer(dim, heads, inner or 4 * dim, cross()) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def start(self, memory: Memory, *, behind: DecoderState | None = None) -> DecoderState:
        """Read the memory; no tokens yet. `behind` was read before and stands for the frames that would follow."""
        cache = tuple(layer.self_attention.init_state(memory.frames[:0]) for layer in self.layers)
        cross = [layer.cross.read(memory) for layer in self.layers]
        if behind is not None:
            skip = memory.frames.mask.shape[1]
            cross = [state.then(other, skip) for state, other in zip(cross, behind.cross, strict=True)]
        return DecoderState(cache, tuple(cross))

    def step(
        self, tokens: Tensor, state: DecoderState, *, heads: Sequence[Head] = ()
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """Read `tokens` [B, U] -> hidden [B, U, D], the alignment of `heads` [B, N, U, T], the next state.

        Raises ValueError when the row would grow beyond `context` tokens.
        """
        end = int(state.length.max()) + tokens.shape[1]
        if end > self.context:
            raise ValueError(f"{end} tokens do not fit into the decoder's context of {self.context}")
        x = self.embed(tokens)
        x = x + self.positions[state.length[:, None] + torch.arange(tokens.shape[1], device=x.device)]
        cache, cross = list(state.cache), list(state.cross)
        rows: dict[Head, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x, alignment, cache[i], cross[i] = layer(x, cache[i], cross[i])
            rows |= {head: alignment[:, head[1]] for head in heads if head[0] == i}
        frames = alignment.shape[-1]
        picked = [rows[head] for head in heads]
        seen = torch.stack(picked, 1) if picked else x.new_zeros(x.shape[0], 0, tokens.shape[1], frames)
        return self.norm(x), seen, DecoderState(tuple(cache), tuple(cross))

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., D] -> unnormalised scores of the next token [..., V]."""
        return F.linear(hidden, self.embed.weight)
