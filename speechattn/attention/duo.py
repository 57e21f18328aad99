"""DuoAttention (Xiao et al., arXiv 2410.10819): few heads need all that was said; the others stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position
from speechattn.attention.pruning import replaced, taken
from speechattn.attention.self_attention import SelfAttention
from speechattn.frames import Frames
from speechattn.linear import dropped, run
from speechattn.stream import Buffer, Parallel, Pointwise, Serial, Stream
from speechattn.stream.parallel import both

__all__ = ["Divided", "DuoAttention", "Rolling", "apart", "divided", "hardened", "needed", "opened", "split"]

M = TypeVar("M", bound=nn.Module)


def rolled(span: Pattern, left: int, sinks: int) -> Span:
    """Chunk and look-ahead of a span that remembers everything, with `left` frames and `sinks` first ones instead.

    ValueError for any other span.
    """
    if not isinstance(span, Span) or span.left is not None or span.chunk is None or span.dilation > 1:
        raise ValueError(f"{span}: wanted chunks and everything before them, as Span(None, 4)")
    return Span(left, span.chunk, span.right, 1, sinks)


class Rolling(SelfAttention):
    """Self-attention that forgets: the `left` frames before the chunk and the row's first `sinks` (arXiv 2309.17453).

    `span` says the chunks, with everything before them; its state does not grow.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        norm: nn.Module | None = None, dropout: float = 0.0, left: int = 64, sinks: int = 4, width: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, rolled(span, left, sinks), position=position, key_heads=key_heads, norm=norm,
                         dropout=dropout, width=width)  # fmt: skip
        self.kept = left, sinks

    def scaled(self, span: Pattern) -> Pattern:
        return rolled(super().scaled(span), *self.kept)


class DuoAttention(SelfAttention):
    """Each key head is a mixture, by its gate `a` in [0, 1]: a * full + (1 - a) * streaming.

    Both have the same keys, queries and values: `full` sees its chunk and everything before it (`span`), `streaming`
    the `left` frames before the chunk and the row's first `sinks`. Law: with all gates 1, as they begin, this is
    `SelfAttention`; with gates of 0 and 1 it is what `split` makes of it, where the streaming heads forget.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        norm: nn.Module | None = None, dropout: float = 0.0, left: int = 64, sinks: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, span, position=position, key_heads=key_heads, norm=norm, dropout=dropout)
        rolled(span, left, sinks)
        self.kept, self.full = (left, sinks), False
        self.gates = nn.Parameter(torch.ones(self.key_heads))

    def scaled(self, span: Pattern) -> Pattern:
        span = super().scaled(span)
        rolled(span, *self.kept)
        return span

    @property
    def mixture(self) -> Tensor:
        """The gates [G], in [0, 1]; in training what an optimizer pushed beyond is first brought back for good.

        Their gradient is that of the parameter, also at the ends, where they begin.
        """
        if self.training and not torch.compiler.is_compiling():
            with torch.no_grad():
                if bool(((self.gates < 0) | (self.gates > 1)).any()):
                    self.gates.clamp_(0, 1)
        return self.gates.detach().clamp(0, 1) + (self.gates - self.gates.detach())

    def _attend(self, queries: Tensor, past: Buffer, sinks: Buffer, late: int) -> Tensor:
        y = self._looked(self.span, queries, past, sinks, late)
        if not self.full:
            near = self._looked(
                rolled(self.span, *self.kept), queries, *self._near(past, queries.shape[1] + late), late
            )
            a = self.mixture.repeat_interleave(self.heads // self.key_heads * self.width)
            y = a * y + (1 - a) * near
        out = run(self.out, y)
        return dropped(out, self.dropout) if self.training else out

    def _near(self, past: Buffer, frames: int) -> tuple[Buffer, Buffer]:
        """Of all keys those that a streaming head would have: `left` frames before the last `frames`, and the sinks."""
        window, (left, sinks) = past.mask.shape[1], self.kept
        room = max(0, left + frames - window)
        values, mask = F.pad(past.values, [0, 0, 0, 0, 0, 0, room, 0]), F.pad(past.mask, [room, 0])
        past, gone = Buffer(values, mask), window + room - left - frames
        recent = Buffer(values[:, gone:], mask[:, gone:])
        return recent, self._sunk(past, recent, Buffer.empty(values, sinks))


class Divided(Parallel):
    """Two groups of heads over the same frames, whose outputs are added."""

    def combine(self, first: Frames, second: Frames) -> Frames:
        return both(first.values + second.values, first, second)


@contextmanager
def opened(encoder: nn.Module) -> Iterator[None]:
    """All gates inside count as 1."""
    layers = [module for module in encoder.modules() if isinstance(module, DuoAttention)]
    before = [layer.full for layer in layers]
    for layer in layers:
        layer.full = True
    try:
        yield
    finally:
        for layer, full in zip(layers, before, strict=True):
            layer.full = full


def hardened(encoder: M, sparsity: float) -> M:
    """A copy whose gates are 0, in the `sparsity` share of all its key heads that have the lowest ones, or 1."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity {sparsity}: wanted a share of the heads")
    encoder = deepcopy(encoder)
    layers = [module for module in encoder.modules() if isinstance(module, DuoAttention)]
    if not layers:
        raise ValueError(f"{type(encoder).__name__} has no DuoAttention")
    every = torch.cat([layer.gates.detach() for layer in layers])
    hard = torch.ones_like(every)
    hard[every.argsort(stable=True)[: round(sparsity * len(every))]] = 0
    for layer, gates in zip(layers, torch.split(hard, [layer.key_heads for layer in layers]), strict=True):
        layer.gates.data = gates.clone()
    return encoder


def divided(attention: DuoAttention, full: Sequence[int]) -> Stream:
    """The key heads `full` of `attention` with a history that grows, the others with one that rolls.

    Law: it says what `attention` says when these gates are 1 and the others 0.
    """
    share = attention.heads // attention.key_heads
    there = [h for h in range(attention.heads) if h // share in full]
    rest = [h for h in range(attention.heads) if h // share not in full]
    if not rest:
        return taken(attention, there)
    near = taken(attention, rest)
    rolling = Rolling(
        near.dim, near.heads, attention.span, position=near.position, key_heads=near.key_heads, norm=near.norm,
        dropout=near.dropout, left=attention.kept[0], sinks=attention.kept[1], width=near.width,
    )  # fmt: skip
    rolling.rate, rolling.qkv, rolling.out = near.rate, near.qkv, near.out
    rolling.train(attention.training)
    if not there:
        return rolling
    far = taken(attention, there)
    norm = far.norm
    far.norm = rolling.norm = None
    rolling.out.bias.data.zero_()  # the other has it
    heads = Divided(far, rolling)
    return heads if norm is None else Serial(norm=Pointwise(norm), heads=heads)


def split(encoder: M, sparsity: float) -> M:
    """A copy in which the `sparsity` share of all key heads, those with the lowest gates, keep a rolling history.

    The others keep all of it. Law: it says what `hardened` with the same share says, whole and in steps.
    """
    hard = hardened(encoder, sparsity)
    return apart(hard, needed(hard))


def needed(encoder: nn.Module) -> list[list[int]]:
    """The key heads of each `DuoAttention` inside, in order, whose gates are not 0."""
    layers = [module for module in encoder.modules() if isinstance(module, DuoAttention)]
    return [layer.gates.nonzero().flatten().tolist() for layer in layers]


def apart(encoder: M, full: Sequence[Sequence[int]]) -> M:
    """A copy in which each `DuoAttention`, in order, is `divided`; ValueError where `full` does not fit."""
    layers = [module for module in encoder.modules() if isinstance(module, DuoAttention)]
    if len(layers) != len(full) or any({*f} - {*range(m.key_heads)} for m, f in zip(layers, full, strict=True)):
        raise ValueError(f"full heads {[list(f) for f in full]}: wanted some of each of {len(layers)} layers")
    left, encoder = iter(full), deepcopy(encoder)
    replaced(encoder, lambda module: divided(module, next(left)) if isinstance(module, DuoAttention) else None)
    return encoder
