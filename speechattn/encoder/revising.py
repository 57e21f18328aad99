"""Layers that say their newest frames twice: at once, and again when they have heard what follows."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from speechattn.attention.ring import Ring
from speechattn.attention.self_attention import AttentionState
from speechattn.frames import Frames
from speechattn.stream import Buffer, Plan, Planned, Stream
from speechattn.tree import node

__all__ = ["Revised", "Revising"]


@node
class Revised:
    """The state of the layers before the frames that `waiting` [B, R, D] are encoded again, and what they say `ahead`
    of their next step of these [B, R, D']."""

    inner: Any
    waiting: Frames
    ahead: Frames


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
