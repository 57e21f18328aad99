"""A decoder-only language model in the architecture of Llama (arXiv 2302.13971), with a cache of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from speechattn.attention.position import Rotary, turned
from speechattn.decoder.decoder_only import before
from speechattn.frames import Frames
from speechattn.linear import activated, dropped, linear, run
from speechattn.multimodal.attention import AttentionMaker, Usual
from speechattn.multimodal.causal import Inspected
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["Llama", "LlamaState"]


@node
class LlamaState:
    """What each layer made of what was read: keys, not turned, and values [B, N, 2, G, D / H]; `places` [B, N]."""

    layers: tuple[Buffer, ...]
    places: Buffer


@dataclass(frozen=True)
class View:
    """What the T newest of N see of all [B, T, N], and how they all turn: `queries` [2, B, 1, T, D / 2], `keys`.

    Where a cache has a window, `sinks` [B, N] of the keys meet queries that stand `nearer` [2, B, 1, T, D / 2].
    """

    seen: Tensor
    queries: Tensor
    keys: Tensor
    sinks: Tensor | None = None
    nearer: Tensor | None = None

    def turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, H, T, D] and k [B, G, N, D], each at its place.

        With `sinks` they are twice as wide: one half meets the sinks, the other all other keys.
        """
        near, k = turned(q, self.queries), turned(k, self.keys)
        if self.sinks is None or self.nearer is None:
            return near, k
        sinks = self.sinks[:, None, :, None]
        q = torch.cat([near, turned(q, self.nearer)], -1) * sqrt(2)  # the scale is that of twice the width
        return q, torch.cat([k.masked_fill(sinks, 0.0), k.masked_fill(~sinks, 0.0)], -1)


class SelfAttention(nn.Module):
    """Queries, keys that query heads share, values; no biases."""

    def __init__(self, dim: int, heads: int, key_heads: int, attention: AttentionMaker) -> None:
        super().__init__()
        self.width = dim // heads
        self.q_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(dim, key_heads * self.width, bias=False) for _ in range(2))
        self.attend = attention(dim, heads)

    def forward(
        self, x: Tensor, mask: Tensor, cache: Buffer, view: View, weights: bool
    ) -> tuple[Tensor, Buffer, Tensor | None]:
        """x [B, T, D], of which `mask` is there, behind a cache -> as x, the next cache, weights [B, H, T, N]."""
        q, k, v = (run(f, x).view(*x.shape[:2], -1, self.width) for f in (self.q_proj, self.k_proj, self.v_proj))
        cache = cache.append(torch.stack([k, v], 2), mask)
        k, v = cache.values.permute(2, 0, 3, 1, 4).unbind()
        q, k = view.turned(q.transpose(1, 2), k)
        said, looks = self.attend(x, q, k, v, view.seen, weights=weights)
        return run(self.o_proj, said.transpose(1, 2).flatten(2)), cache, looks


class MLP(nn.Module):
    """silu(gate) * up, narrowed (SwiGLU, arXiv 2002.05202): [..., D] -> the same shape."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.down_proj, self.activation = nn.Linear(inner, dim, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., D]."""
        return run(self.down_proj, activated(self.gate_proj, self.activation, x) * run(self.up_proj, x))


class Layer(nn.Module):
    """Self attention and feed-forward, each behind its norm and added to its input."""

    def __init__(
        self, dim: int, heads: int, key_heads: int, inner: int, attention: AttentionMaker, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(dim, eps=eps) for _ in range(2))
        self.self_attn, self.mlp = SelfAttention(dim, heads, key_heads, attention), MLP(dim, inner)

    def forward(
        self, x: Tensor, mask: Tensor, cache: Buffer, view: View, weights: bool
    ) -> tuple[Tensor, Buffer, Tensor | None]:
        """As `SelfAttention`."""
        said, cache, looks = self.self_attn(self.input_layernorm(x), mask, cache, view, weights)
        x = x + self._dropped(said)
        return x + self._dropped(self.mlp(self.post_attention_layernorm(x))), cache, looks

    def _dropped(self, x: Tensor) -> Tensor:
        return dropped(x, self.dropout) if self.training else x


class Llama(nn.Module):
    """A `CausalLM` of `depth` layers. Parameters have the names of Hugging Face's, without the leading "model.".

    `inner` is the width of the feed-forward (None: 8 / 3 of `dim`), `tied`: the embedding is the output as well,
    `attention` makes what is behind the queries of each layer. `window` = (sinks, recent) bounds the cache: each frame
    sees the first `sinks` frames of its row and the last `recent`, itself among them, and distances are those inside
    the cache, not those in the text (StreamingLLM, arXiv 2309.17453, section 3.2).

        window (2, 3):  0 1 . . . 5 6 7     frame 7 stands at place 4 of the cache, frame 5 at place 2

    Law: while a row has no more frames than sinks + recent, a window changes nothing.
    """

    def __init__(
        self, vocab: int, dim: int, heads: int, depth: int, *, inner: int | None = None, key_heads: int | None = None,
        base: float = 10000.0, eps: float = 1e-5, tied: bool = False, dropout: float = 0.0,
        attention: AttentionMaker = Usual, window: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        key_heads, inner = key_heads or heads, inner or 8 * dim // 3
        if dim % heads or heads % key_heads:
            raise ValueError(f"{dim} features, {heads} heads, {key_heads} key heads: they do not divide")
        self.vocab, self.dim, self.key_heads, self.width = vocab, dim, key_heads, dim // heads
        self.window = bounds(window)
        self.position = Rotary(dim, heads, base=base)
        self.embed_tokens, self.norm = nn.Embedding(vocab, dim), nn.RMSNorm(dim, eps=eps)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(dim, heads, key_heads, inner, attention, eps, dropout) for _ in range(depth)
        )
        self.lm_head = None if tied else nn.Linear(dim, vocab, bias=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, U] -> [B, U, D]."""
        embedded: Tensor = self.embed_tokens(tokens)
        return embedded

    def start(self, rows: int) -> LlamaState:
        """Nothing read; with a window the cache has its whole size from the first."""
        return self._empty(rows, sum(self.window or ()))

    def extend(
        self, x: Frames, cache: LlamaState, positions: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, LlamaState]:
        """The next embeddings [B, T, D] -> hidden [B, T, D], of which `logits` says what follows, and the next cache.

        `positions` [B, T] are their places, if they are not counted, and `seen` [B, T, N + T] whom they see of the N
        entries of the cache and of themselves, if not all before them and themselves: so groups that take turns each
        count for themselves (arXiv 2505.16983). Nobody sees an invalid frame. ValueError for these with a window.
        """
        if not x.mask.shape[1]:
            return x.values, cache
        x = Frames.of(x.values, x.mask)
        view, places = self._viewed(x, cache.places, positions, seen)
        y, layers = x.values, list[Buffer]()
        for said, layer, _ in self._through(x, cache, view, False):
            y = said
            layers.append(layer)
        state = LlamaState(tuple(layers), places)
        return Frames.finite(self.norm(y), x.mask).values, state if self.window is None else kept(state, self.window)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden [..., D] -> unnormalised scores of the next token [..., V]."""
        if self.lm_head is None:
            return linear(hidden, self.embed_tokens.weight, None)
        return run(self.lm_head, hidden)

    def inspect(self, x: Frames, *, weights: bool = True) -> tuple[Tensor, Inspected]:
        """As `extend` from nothing, and what is inside, zero where `x` [B, T, D] is not valid."""
        x = Frames.of(x.values, x.mask)
        cache = self._empty(len(x.mask), 0)
        view, _ = self._viewed(x, cache.places, None, None)
        states, looks, there = [x.values], list[Tensor](), x.mask[:, None, :, None]
        for y, _, look in self._through(x, cache, view, weights):
            states.append(Frames.finite(y, x.mask).values)
            if look is not None:
                looks.append(look * there)
        hidden = Frames.finite(self.norm(states[-1]), x.mask).values
        return hidden, Inspected(tuple(states), tuple(looks) if weights else None, x.mask)

    def _empty(self, rows: int, capacity: int) -> LlamaState:
        like = self.embed_tokens.weight
        layer = Buffer.empty(like.new_zeros(rows, 0, 2, self.key_heads, self.width), capacity)
        places = Buffer.empty(torch.zeros(rows, 0, dtype=torch.long, device=like.device), capacity)
        return LlamaState((layer,) * len(self.layers), places)

    def _through(
        self, x: Frames, cache: LlamaState, view: View, weights: bool
    ) -> Iterator[tuple[Tensor, Buffer, Tensor | None]]:
        """Behind each layer: the residual stream, its cache, its weights."""
        y = x.values
        for layer, past in zip(self.layers, cache.layers, strict=True):
            y, past, looks = layer(y, x.mask, past, view, weights)
            yield y, past, looks

    def _viewed(self, x: Frames, past: Buffer, positions: Tensor | None, seen: Tensor | None) -> tuple[View, Buffer]:
        """Of embeddings [B, T, D] behind entries of a cache at places `past`; and the places of all."""
        rows, new = x.mask.shape
        n = past.mask.shape[1] + new
        if self.window is not None and not (positions is None and seen is None):
            raise ValueError("a cache with a window gives places itself, and says who sees whom")
        if positions is None:
            positions = (past.length[:, None] + x.mask.cumsum(1) - 1).clamp(min=0)
        if positions.shape != x.mask.shape or (seen is not None and seen.shape != (rows, new, n)):
            said = f"places {tuple(positions.shape)}, seen {None if seen is None else tuple(seen.shape)}"
            raise ValueError(f"{said}: wanted {(rows, new)} and {(rows, new, n)}")
        places = past.append(positions, x.mask)
        like = x.values[..., : self.width]
        if self.window is None:
            visible = before(places, new) if seen is None else seen & places.mask[:, None]
            keys = self.position.angles(places.values, like)
            return View(visible, keys[..., n - new :, :], keys), places
        sinks, recent = self.window
        ranks = (places.mask.cumsum(1) - 1).clamp(min=0)
        at, first = ranks[:, n - new :], ranks < sinks
        visible = before(places, new) & (first[:, None] | (ranks[:, None] > at[..., None] - recent))
        keys = self.position.angles(ranks, like)
        nearer = self.position.angles(at.clamp(max=sinks + recent - 1), like)
        return View(visible, keys[..., n - new :, :], keys, first, nearer), places


def bounds(window: Sequence[int] | None) -> tuple[int, int] | None:
    """Sinks and recent frames; ValueError for other numbers."""
    if window is None:
        return None
    if len(window) != 2 or window[0] < 0 or window[1] < 1:
        raise ValueError(f"window {tuple(window)}: wanted 0 or more sinks, and 1 or more recent frames")
    return window[0], window[1]


def kept(state: LlamaState, window: tuple[int, int]) -> LlamaState:
    """The cache, no larger than its `window`: the first frames and the last."""
    mask = state.places.mask
    ranks = mask.cumsum(1)
    keep = mask & ((ranks <= window[0]) | (ranks > ranks[:, -1:] - window[1]))
    order = keep.byte().argsort(dim=1, stable=True)[:, -sum(window) :]
    rows = torch.arange(len(order), device=order.device)[:, None]
    left = [Buffer(x.values[rows, order], keep[rows, order]) for x in (*state.layers, state.places)]
    return LlamaState(tuple(left[:-1]), left[-1])
