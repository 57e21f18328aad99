"""Transformer attention decoder over any cross attention, cached per hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log, sqrt
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.pattern import Span
from speechattn.attention.self_attention import AttentionState, SelfAttention
from speechattn.cross import CrossAttention, CrossMaker
from speechattn.cross.soft import Soft
from speechattn.frames import Frames, Memory
from speechattn.linear import dropped, linear, run
from speechattn.tree import leaves, node

__all__ = ["AttentionDecoder", "DecoderState", "Forced", "Head", "learned", "sinusoids"]

Head = tuple[int, int]  # (decoder layer, head in that layer), both from 0


def learned(context: int, dim: int) -> Tensor:
    """A trained row for each position [context, D]."""
    return nn.Parameter(torch.zeros(context, dim))


def sinusoids(context: int, dim: int) -> Tensor:
    """Sines in the even features and cosines in the odd ones [context, D] (arXiv 1706.03762, section 3.5)."""
    rates = torch.exp(torch.arange(0, dim, 2, device="cpu").double() * (-log(10000.0) / dim))
    angles = torch.arange(context, device="cpu").double()[:, None] * rates
    table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    return table[:, :dim].to(torch.get_default_dtype())


@node
class DecoderState:
    """One hypothesis per row: `cache` holds each layer's keys and values, `cross` what each layer read of the memory,
    `place` where it stands in that.

    Cache and place may have K rows for each row of the memory: row b * K + k is hypothesis k over memory b.
    """

    cache: tuple[AttentionState, ...]
    cross: tuple[Any, ...]
    place: tuple[Any, ...]

    @property
    def length(self) -> Tensor:
        """Tokens read so far [B]."""
        return self.cache[0].past.length

    def truncate(self, length: int) -> DecoderState:
        """Forget the tokens behind the first `length`. ValueError where a layer remembers where it stands."""
        if leaves(self.place):
            raise ValueError("tokens cannot be taken back where cross attention remembers where it stands")
        return replace(self, cache=tuple(replace(c, past=c.past.truncate(length)) for c in self.cache))


class Forced(NamedTuple):
    """Of given texts: `scores` [B, U + 1, V] of the `tokens` [B, U + 1] that should come, the last of them the end;
    which of them `counts` [B, U + 1]; the `alignment` [B, N, U + 1, T] of the heads that were asked for.
    """

    scores: Tensor
    tokens: Tensor
    counts: Tensor
    alignment: Tensor


class DecoderLayer(nn.Module):
    """Self attention, cross attention, feed-forward; each behind its own norm and added to its input."""

    def __init__(
        self, dim: int, heads: int, inner: int, cross: CrossAttention, *,
        activation: Callable[[], nn.Module] = nn.GELU, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.self_norm, self.cross_norm, self.ff_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = SelfAttention(dim, heads, Span.causal(), dropout=dropout)
        self.cross = cross
        bent = nn.Sequential(activation(), nn.Dropout(dropout)) if dropout else activation()
        self.ff = nn.Sequential(nn.Linear(dim, inner), bent, nn.Linear(inner, dim))
        self.dropout = dropout

    def _dropped(self, x: Tensor) -> Tensor:
        return dropped(x, self.dropout) if self.training else x

    def forward(
        self, x: Tensor, cache: AttentionState, cross: Any, place: Any, *, heads: Sequence[int]
    ) -> tuple[Tensor, Tensor, AttentionState, Any]:
        """`x` [B, U, D] -> the same shape, the alignment of `heads` [B, N, U, T], the next cache, the next place."""
        y, cache = self.self_attention.step(Frames(self.self_norm(x), x.new_ones(x.shape[:2], dtype=torch.bool)), cache)
        x = x + y.values
        seen, place = self.cross.attend(self.cross_norm(x), cross, place, heads=heads)
        x = x + self._dropped(seen.context)
        return x + self._dropped(run(self.ff, self.ff_norm(x))), seen.alignment, cache, place


class AttentionDecoder(nn.Module):
    """Token embeddings and a row for each position through `depth` layers (arXiv 1706.03762, section 3.1; pre-norm).

    `positions` makes the table: `learned`, or `sinusoids`, where embeddings are multiplied by `scale`, the root of D.
    `cross` makes a layer's attention to the frames, from width and heads.
    Without an `output` layer the embedding's own weights score the next token.

    `memory_positions` makes a row for each of `memory_context` frames, which is added to the valid frame that has this
    number since `start`, before anything attends to it: who has learnt with segments needs no edges of the recording to
    know where in it he is (arXiv 2512.14652). More frames are refused.

    `alignment_heads` are the (layer, head) pairs that look at the frames in which a token is said, for whoever wants to
    know when it was; by default those of the middle layer.

    Every hypothesis begins with `opening` trained vectors in the places of tokens, which hear nothing: a fixed prompt.

    Law: reading tokens one by one equals reading them at once. Attention is a return value: `step` gives the
    alignment of the (layer, head) pairs it is asked for.
    """

    def __init__(
        self, vocab: int, context: int, dim: int, heads: int, depth: int, *,
        cross: CrossMaker = Soft, inner: int | None = None,
        positions: Callable[[int, int], Tensor] = learned, scale: float = 1.0,
        activation: Callable[[], nn.Module] = nn.GELU, output: nn.Module | None = None, dropout: float = 0.0,
        memory_positions: Callable[[int, int], Tensor] | None = None, memory_context: int = 3000,
        alignment_heads: Sequence[Sequence[int]] | None = None, opening: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        middle = [(depth // 2, head) for head in range(heads)]
        self.alignment_heads: tuple[Head, ...] = tuple((a, b) for a, b in alignment_heads or middle)
        if wrong := [head for head in self.alignment_heads if not (0 <= head[0] < depth and 0 <= head[1] < heads)]:
            raise ValueError(f"alignment heads {wrong}: there are {depth} layers of {heads} heads")
        self.dim, self.heads, self.context, self.vocab, self.scale = dim, heads, context, vocab, scale
        self.embed = nn.Embedding(vocab, dim)
        self.positions: Tensor
        self.memory_positions: Tensor | None
        self._table("positions", positions(context, dim))
        self._table("memory_positions", memory_positions(memory_context, dim) if memory_positions else None)
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(  # type: ignore[assignment]
            DecoderLayer(
                dim,
                heads,
                inner or 4 * dim,
                cast(CrossAttention, cross(dim, heads)),
                activation=activation,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.output = output
        self.dropout = dropout
        self.opening = nn.Parameter(torch.zeros(opening, dim)) if opening else None

    @property
    def opened(self) -> int:
        """Places that the opening takes, of those in the context."""
        return 0 if self.opening is None else len(self.opening)

    def _table(self, name: str, table: Tensor | None) -> None:
        """A parameter, or what needs not be saved."""
        if isinstance(table, nn.Parameter):
            setattr(self, name, table)
        else:
            self.register_buffer(name, table, persistent=False)

    @classmethod
    def soft(
        cls, vocab: int, context: int, dim: int, heads: int, depth: int, *, inner: int | None = None,
        dropout: float = 0.0,
    ) -> AttentionDecoder:  # fmt: skip
        """With soft cross attention to frames of the same width, and all else as it is: trained positions, GELU."""
        return cls(vocab, context, dim, heads, depth, inner=inner, dropout=dropout)

    @classmethod
    def usual(
        cls, vocab: int, dim: int = 256, heads: int = 4, depth: int = 6, inner: int = 2048, *, context: int = 5000,
        cross: CrossMaker = Soft, dropout: float = 0.1, memory_positions: Callable[[int, int], Tensor] | None = None,
    ) -> AttentionDecoder:  # fmt: skip
        """That of hybrid CTC/attention recognisers: sinusoids, ReLU, an output layer; any cross attention."""
        return cls(
            vocab, context, dim, heads, depth, cross=cross, inner=inner, positions=sinusoids,
            scale=sqrt(dim), activation=nn.ReLU, output=nn.Linear(dim, vocab), dropout=dropout,
            memory_positions=memory_positions,
        )  # fmt: skip

    def start(self, memory: Memory, *, behind: DecoderState | None = None, beam: int = 1) -> DecoderState:
        """Read the memory; no tokens yet, in `beam` hypotheses of each row.

        `behind` was read before and stands for the frames that would follow.
        """
        like = memory.frames[:0]
        if beam > 1:
            like = Frames(like.values.repeat_interleave(beam, 0), like.mask.repeat_interleave(beam, 0))
        cache = tuple(layer.self_attention.init_state(like) for layer in self.layers)
        memory = self._placed(memory, None)
        cross = [layer.cross.read(memory) for layer in self.layers]
        if behind is not None:
            skip = memory.frames.mask.shape[1]
            cross = [state.then(other, skip) for state, other in zip(cross, behind.cross, strict=True)]
        place = tuple(layer.cross.place(like.values) for layer in self.layers)
        return self._begun(DecoderState(cache, tuple(cross), place), like)

    def _begun(self, state: DecoderState, like: Frames) -> DecoderState:
        """With the opening, which has heard nothing, whatever the memory is."""
        if self.opening is None:
            return state
        if leaves(state.place):
            raise ValueError("an opening hears nothing: not with cross attention that remembers where it stands")
        nothing = tuple(layer.cross.read(Memory.of(like)) for layer in self.layers)
        x = (self.opening + self.positions[: self.opened]).expand(len(like.mask), -1, -1)
        _, _, after = self._through(x, replace(state, cross=nothing), ())
        return replace(state, cache=after.cache)

    def read(self, memory: Memory, cross: tuple[Any, ...]) -> tuple[Any, ...]:
        """What each layer has read [the `cross` of a state], and behind it the frames of `memory`."""
        memory = self._placed(memory, cross)
        return tuple(old.then(layer.cross.read(memory), 0) for layer, old in zip(self.layers, cross, strict=True))

    def _placed(self, memory: Memory, cross: tuple[Any, ...] | None) -> Memory:
        """The frames with their positions, behind those that were read before."""
        table, x = self.memory_positions, memory.frames
        if table is None:
            return memory
        if not isinstance(memory, Memory):
            raise ValueError(f"memory positions are for the frames of one source, not for {type(memory).__name__}")
        before = cross[0].mask.sum(1, keepdim=True) if cross else 0
        at = (before + x.mask.cumsum(1) - 1).clamp(min=0)
        if at.numel() and int(at.max()) >= len(table):
            raise ValueError(f"{int(at.max()) + 1} frames do not fit into the decoder's {len(table)} memory positions")
        return replace(memory, frames=Frames.of(x.values + table[at], x.mask))

    def step(
        self, tokens: Tensor, state: DecoderState, *, heads: Sequence[Head] = ()
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """Read `tokens` [B, U] -> hidden [B, U, D], the alignment of `heads` [B, N, U, T], the next state.

        Raises ValueError when the row would grow beyond `context` tokens.
        """
        end = state.cache[0].past.mask.shape[1] + tokens.shape[1]  # at most: known without waiting for a device
        if end > self.context:
            end = (int(state.length.max()) if len(tokens) else 0) + tokens.shape[1]
        if end > self.context:
            raise ValueError(f"{end} tokens do not fit into the decoder's context of {self.context}")
        x = self.embed(tokens)
        x = x if self.scale == 1.0 else x * self.scale
        x = x + self.positions[state.length[:, None] + torch.arange(tokens.shape[1], device=x.device)]
        return self._through(dropped(x, self.dropout) if self.training else x, state, heads)

    def _through(self, x: Tensor, state: DecoderState, heads: Sequence[Head]) -> tuple[Tensor, Tensor, DecoderState]:
        """All layers, over the inputs `x` [B, U, D]."""
        cache, place = list(state.cache), list(state.place)
        rows: dict[Head, Tensor] = {}
        for i, layer in enumerate(self.layers):
            asked = [head for head in heads if head[0] == i]
            x, alignment, cache[i], place[i] = layer(
                x, cache[i], state.cross[i], place[i], heads=[head for _, head in asked]
            )
            rows |= dict(zip(asked, alignment.unbind(1), strict=True))
        frames = alignment.shape[-1]
        picked = [rows[head] for head in heads]
        seen = torch.stack(picked, 1) if picked else x.new_zeros(x.shape[0], 0, x.shape[1], frames)
        return self.norm(x), seen, DecoderState(tuple(cache), state.cross, tuple(place))

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., D] -> unnormalised scores of the next token [..., V]."""
        if self.output is not None:
            return run(self.output, hidden)
        return linear(hidden, self.embed.weight, None)

    def forced(
        self, state: DecoderState, targets: Tensor, lengths: Tensor, *, sos: int, eos: int, heads: Sequence[Head] = ()
    ) -> Forced:
        """What is said of given texts `targets` [B, U], of which the first `lengths` [B] count, where `heads` look."""
        at = torch.arange(targets.shape[1] + 1, device=targets.device)
        targets = targets.where(at[:-1] < lengths[:, None], eos)
        end = targets.new_full((len(targets), 1), eos)
        hidden, seen, _ = self.step(torch.cat([torch.full_like(end, sos), targets], 1), state, heads=heads)
        return Forced(self.logits(hidden), torch.cat([targets, end], 1), at <= lengths[:, None], seen)

    def log_prob(self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int) -> Tensor:
        """Of texts and their ends [B * K]: of the first `lengths` [B * K] tokens of `targets` [B * K, U].

        K texts look at each memory, in one pass.
        """
        beam = len(targets) // max(len(memory.frames.mask), 1)
        scores, wanted, counts, _ = self.forced(self.start(memory, beam=beam), targets, lengths, sos=sos, eos=eos)
        scores = scores.log_softmax(-1, torch.promote_types(scores.dtype, torch.float32))
        return scores.gather(2, wanted[..., None])[..., 0].masked_fill(~counts, 0.0).sum(1)

    def loss(
        self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """Mean over the batch of `losses`; 0 for a batch of none."""
        losses = self.losses(memory, targets, lengths, sos=sos, eos=eos, smoothing=smoothing)
        return losses.sum() / max(len(losses), 1)

    def losses(
        self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """Cross-entropy of each row's text and its end [B], summed over the tokens.

        A share `smoothing` of the wanted distribution is uniform over the vocabulary (arXiv 1512.00567, section 7).
        """
        scores, wanted, counts, _ = self.forced(self.start(memory), targets, lengths, sos=sos, eos=eos)
        each = F.cross_entropy(scores.mT, wanted, reduction="none", label_smoothing=smoothing)
        return each.masked_fill(~counts, 0.0).sum(1)
