"""Two streams side by side, over one input or over two clocks."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, lcm
from typing import Any

import torch
from torch import Tensor, nn

from speechattn.frames import Frames
from speechattn.stream.contract import Buffer, Plan, Planned, Spent, Stream
from speechattn.stream.serial import common
from speechattn.stream.simple import Delay, delayed
from speechattn.tree import node

__all__ = ["Join", "Pair", "Parallel", "Residual", "both"]


class Parallel(Planned):
    """Two streams over the same input, brought to the same delay; their features stand side by side.

    Both must have the same ratio. A subclass may combine them in another way.
    """

    def __init__(self, first: Stream, second: Stream) -> None:
        super().__init__()
        self.first, self.second = first, second

    def plan(self) -> Plan:
        a, b = self.first.plan(), self.second.plan()
        if a.ratio != b.ratio:
            raise ValueError(f"parallel streams with ratios {a.ratio} and {b.ratio}")
        if a.block is None or b.block is None:
            return Plan(None, a.ratio, 0, None, 0)
        block = lcm(a.block, b.block)
        first = self.earliest(0)
        left = None if first is None else -first
        return Plan(block, a.ratio, max(a.latency, b.latency), left, max(a.delay, b.delay))

    def earliest(self, output: int) -> int | None:
        a, b = self.first.earliest(output), self.second.earliest(output)
        return None if a is None or b is None else min(a, b)

    def combine(self, first: Frames, second: Frames) -> Frames:
        """Outputs [B, T, D] and [B, T, D'] -> [B, T, D + D']."""
        return both(torch.cat([first.values, second.values], -1), first, second)

    def init_state(self, x: Frames) -> Any:
        if self.block is None:
            return ()
        x, late = x[:0], self.delay
        states = []
        for member in (self.first, self.second):
            state = member.init_state(x)
            y, _ = member.step(x, state)
            states.append((state, Buffer.empty(y.values, late - member.delay)))
        return tuple(states)

    def at_once(self, x: Frames) -> Frames:
        return self.combine(self.first(x), self.second(x))

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        if isinstance(state, Spent) or not state:
            spent = self._spend(state)
            return self.at_once(x), spent
        (a, a_late), (b, b_late) = state
        y, a = self.first.step(x, a)
        y, a_late = delayed(y, a_late)
        z, b = self.second.step(x, b)
        z, b_late = delayed(z, b_late)
        return self.combine(y, z), ((a, a_late), (b, b_late))


def both(values: Tensor, first: Frames, second: Frames) -> Frames:
    """`values` made of two sides, valid where both are."""
    if first.mask is second.mask:
        return Frames(values, first.mask)
    return Frames.finite(values, first.mask & second.mask)


class Residual(Parallel):
    """`x + scale * body(x)`, the input delayed as much as the body; `skip` stands in where the body changes shape."""

    def __init__(self, body: Stream, *, scale: float = 1.0, skip: Stream | None = None) -> None:
        super().__init__(body, skip or Delay(0))
        self.scale = scale

    def combine(self, first: Frames, second: Frames) -> Frames:
        return both(torch.add(second.values, first.values, alpha=self.scale), first, second)


@node
class Pair:
    """The input of two clocks: pieces of the same stretch of time."""

    first: Frames
    second: Frames


class Join(nn.Module):
    """Two streams with clocks of their own (sound and lips), side by side at one output rate.

    `rates` are the input frames a second of both; their outputs must fall together exactly, else ValueError. A step
    takes the same stretch of time of both; an input that is late or missing comes as invalid frames. An output frame
    is valid when either side is, and zero on the side that is not.
    """

    def __init__(self, first: Stream, second: Stream, *, rates: tuple[Fraction | int, Fraction | int]) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.rates = Fraction(rates[0]), Fraction(rates[1])
        out = [rate * stream.ratio for rate, stream in zip(self.rates, (first, second), strict=True)]
        if out[0] != out[1]:
            raise ValueError(f"outputs at {out[0]} and {out[1]} frames a second cannot be joined")

    @property
    def blocks(self) -> tuple[int, int]:
        """Input frames of each clock: a step takes multiples of both, the same multiple."""
        a, b = self.first.plan(), self.second.plan()
        if a.block is None or b.block is None:
            raise ValueError("a stream that needs the whole utterance cannot be joined with another clock")
        out = common(a.block * a.ratio, b.block * b.ratio)
        return int(out / a.ratio), int(out / b.ratio)

    @property
    def delay(self) -> int:
        """Leading output frames that stand for nothing."""
        return max(self.first.delay, self.second.delay)

    def init_state(self, x: Pair) -> Any:
        """The state before the first step."""
        states = []
        for stream, input in ((self.first, x.first[:0]), (self.second, x.second[:0])):
            state = stream.init_state(input)
            y, _ = stream.step(input, state)
            states.append((state, Buffer.empty(y.values, self.delay - stream.delay)))
        return tuple(states)

    def step(self, x: Pair, state: Any) -> tuple[Frames, Any]:
        """The next stretch of time of both -> [B, T, D + D'] and the next state."""
        (a, a_late), (b, b_late) = state
        y, a = self.first.step(x.first, a)
        y, a_late = delayed(y, a_late)
        z, b = self.second.step(x.second, b)
        z, b_late = delayed(z, b_late)
        joined = Frames(torch.cat([y.values, z.values], -1), y.mask | z.mask)
        return joined, ((a, a_late), (b, b_late))

    def forward(self, x: Pair) -> Frames:
        """Both whole utterances; the shorter one ends in invalid frames."""
        plans, blocks = (self.first.plan(), self.second.plan()), self.blocks
        both = (x.first, x.second)
        outs = [ceil(i.mask.shape[1] * p.ratio) for i, p in zip(both, plans, strict=True)]
        steps = max(
            ceil((i.mask.shape[1] + p.latency + (self.delay - p.delay) / p.ratio) / b)
            for i, p, b in zip(both, plans, blocks, strict=True)
        )
        x = Pair(*(i.pad(steps * b - i.mask.shape[1]) for i, b in zip(both, blocks, strict=True)))
        y, _ = self.step(x, self.init_state(x))
        return y[self.delay : self.delay + max(outs)]
