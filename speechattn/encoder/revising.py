"""Layers that say their newest frames twice: at once, and again when they have heard what follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speechattn.attention.pattern import Span
from speechattn.attention.ring import Ring
from speechattn.attention.self_attention import AttentionState, SelfAttention, Spanned, set_span
from speechattn.frames import Frames
from speechattn.stream import Buffer, Plan, Planned, Stream
from speechattn.tree import node

__all__ = ["Revised", "Revising", "Windows"]


@node
class Revised:
    """The state of the layers before the frames that `waiting` [B, R, D] are encoded again, and what they say `ahead`
    of their next step of these [B, R, D']."""

    inner: Any
    waiting: Frames
    ahead: Frames


@dataclass(frozen=True)
class Windows:
    """Windows of `chunk` frames in a row, each of which begins with the last `revise` frames of the one before.

    A frame sees its window, and of those before what was final in them, `left` frames back from the first new one.
    """

    left: int | None
    chunk: int
    revise: int
    sinks: ClassVar[int] = 0
    right: ClassVar[int] = 0

    def allowed(self, q: Tensor, k: Tensor) -> Tensor:
        """True where query index `q` may see key index `k`."""
        new = self.chunk - self.revise
        mine, theirs = (torch.div(n, self.chunk, rounding_mode="floor") for n in (q, k))
        place = k - theirs * self.chunk
        before = (theirs < mine) & (place < new)
        if self.left is not None:
            before = before & (theirs * new - self.revise + place >= mine * new - self.left)
        return (mine == theirs) | before


class Revising(Planned):
    """`inner` in chunks that overlap: the newest `revise` frames are read again with the next chunk, which they see.

    So each frame that is said has heard at least `revise` frames behind it; until then `ahead` tells what is thought
    of it. The chunk of `inner` are the frames read at a step, those that are read again and the new ones; each is read
    at most twice where `revise` is no more than half of it. Older frames are remembered as they were when they became
    final; the history of the span is counted from the first new frame. It costs what the right context of an Emformer
    does (arXiv 2010.10759).

    `inner` is made of attention and what maps each frame alone. ValueError for other streams.
    """

    def __init__(self, inner: Stream, revise: int) -> None:
        super().__init__()
        if revise < 1:
            raise ValueError(f"revise {revise}: at least 1 frame")
        self.inner, self.revise = inner, revise

    def plan(self) -> Plan:
        inner = self.inner.plan()
        if inner.block is None:
            return inner
        if inner.block <= self.revise:
            raise ValueError(f"a chunk of {inner.block} frames, of which {self.revise} are read again: nothing is new")
        if inner.latency or inner.ratio != 1:
            raise ValueError("what looks ahead or changes the rate cannot be read again")
        return Plan(inner.block - self.revise, Fraction(1), self.revise, None, self.revise)

    def init_state(self, x: Frames) -> Any:
        if self.block is None:
            return ()
        inner = taken_back(self.inner.init_state(x), 0, keep=False)
        y, _ = self.inner.step(x[:0], inner)
        return Revised(inner, x[:0].pad(self.revise), y.pad(self.revise))

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        if not isinstance(state, Revised):
            return self.inner.step(x, state)
        plan = self.inner.plan()  # which takes a while to work out
        assert plan.block is not None
        bounded, new = plan.left is not None, plan.block - self.revise
        said, inner, waiting, ahead = list[Frames](), state.inner, state.waiting, state.ahead
        for at in range(0, x.mask.shape[1], new):
            window = Frames.cat([waiting, x[at : at + new]])
            y, inner = self.inner.step(window, inner)
            inner = taken_back(inner, self.revise, keep=bounded)
            said.append(y[:new])
            waiting, ahead = window[new:], y[new:]
        out = Frames.cat(said) if said else ahead[:0]
        return out, Revised(inner, waiting, ahead)

    def ahead(self, state: Any) -> Frames | None:
        return state.ahead if isinstance(state, Revised) else None

    def at_once(self, x: Frames) -> Frames:
        """`forward` with all windows side by side in one pass, for training; step by step where distances matter."""
        plan, inner = self.plan(), [m for m in self.inner.modules() if isinstance(m, Spanned)]
        spans = {module.span for module in inner}
        alike = len(spans) == 1 and all(isinstance(m, SelfAttention) and m.position is None for m in inner)
        if plan.block is None or not alike:
            return super().at_once(x)
        (span,) = spans
        assert isinstance(span, Span)
        new, total = plan.block, x.mask.shape[1]
        count = -(-(total + self.revise) // new)
        padded = Frames.cat([x[:0].pad(self.revise), x, x[:0].pad(count * new - total)])
        at = (torch.arange(count)[:, None] * new + torch.arange(new + self.revise)).flatten().to(x.mask.device)
        windows = Frames(padded.values[:, at], padded.mask[:, at])
        with seeing(self.inner, Windows(span.left, new + self.revise, self.revise), span):
            said = self.inner(windows)
        kept = torch.arange(len(at), device=at.device).view(count, -1)[:, :new].flatten()[self.revise :][:total]
        return Frames(said.values[:, kept], said.mask[:, kept])


@contextmanager
def seeing(stream: nn.Module, pattern: Windows, usual: Span) -> Iterator[None]:
    """Attention inside `stream` sees the pattern, and then what is usual again."""
    set_span(stream, pattern)
    try:
        yield
    finally:
        set_span(stream, usual)


def taken_back(state: Any, n: int, *, keep: bool) -> Any:
    """The same as if the last `n` frames had not been read; ValueError for a state that cannot tell.

    To `keep` its size, history gets as much unused room in front.
    """
    if isinstance(state, tuple):
        return tuple(taken_back(part, n, keep=keep) for part in state)
    if isinstance(state, AttentionState) and not state.waiting.shape[1] and not state.sinks.mask.shape[1]:
        past = state.past.buffer() if isinstance(state.past, Ring) else state.past
        before = Buffer.empty(past.values, n * keep)
        last = past.mask.shape[1] - n
        if last < 0:
            raise ValueError(f"{last + n} frames before a chunk are fewer than the {n} that are read again")
        values = torch.cat([before.values, past.values[:, :last]], 1)
        return replace(state, past=Buffer(values, torch.cat([before.mask, past.mask[:, :last]], 1)))
    if isinstance(state, Buffer) and not state.mask.shape[1]:
        return state
    raise ValueError(f"a stream with the state {type(state).__name__} cannot read frames again")
