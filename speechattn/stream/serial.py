"""One stream after the other, and the arithmetic of delays and grids."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, lcm
from typing import Any

from speechattn.frames import Frames
from speechattn.stream.contract import Buffer, Plan, Planned, Spent, Stream
from speechattn.stream.simple import delayed

__all__ = ["Serial", "common", "delays", "gaps"]


class Serial(Planned):
    """One stream after the other.

    Ratios multiply, latencies add up, and a delayed stream is pushed onto the grid of the next one. A member given
    by keyword is an attribute of that name.
    """

    def __init__(self, *members: Stream, **named: Stream) -> None:
        super().__init__()
        for i, member in enumerate(members):
            self.add_module(str(i), member)
        for name, member in named.items():
            self.add_module(name, member)

    @classmethod
    def of(cls, members: dict[str, Stream]) -> Serial:
        """The same from a mapping: what a configuration can say."""
        return cls(**members)

    @property
    def members(self) -> list[Stream]:
        """The streams in order."""
        return list(self._modules.values())  # type: ignore[arg-type]

    def gaps(self) -> list[int]:
        """Frames by which the input of each member is delayed, so that it falls onto that member's grid."""
        return gaps([member.plan() for member in self.members])

    def delays(self) -> list[int]:
        """Leading output frames of each member that stand for nothing."""
        return delays([member.plan() for member in self.members])

    def plan(self) -> Plan:
        plans = [member.plan() for member in self.members]
        ratio, block = Fraction(1), Fraction(1)
        for plan in plans:
            if plan.block is not None:
                block = common(block, plan.block / ratio)
            ratio *= plan.ratio
        if any(plan.block is None for plan in plans):
            return Plan(None, ratio, 0, None, 0)
        latency = 0
        for plan, gap in zip(reversed(plans), reversed(gaps(plans)), strict=True):
            latency = ceil(latency / plan.ratio) + plan.latency + gap
        first = self.earliest(0)
        return Plan(block.numerator, ratio, latency, None if first is None else -first, (delays(plans) or [0])[-1])

    def earliest(self, output: int) -> int | None:
        at: int | None = output
        for member in reversed(self.members):
            at = None if at is None else member.earliest(at)
        return at

    def init_state(self, x: Frames) -> Any:
        if self.block is None:
            return ()
        states, x = [], x[:0]
        for member, gap in zip(self.members, self.gaps(), strict=True):
            state = member.init_state(x)
            states.append((Buffer.empty(x.values, gap), state))
            x, _ = member.step(x, state)
        return tuple(states)

    def at_once(self, x: Frames) -> Frames:
        for member in self.members:
            x = member(x)
        return x

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        members = self.members
        if isinstance(state, Spent) or (not state and members):
            spent = self._spend(state)
            return self.at_once(x), spent
        states = []
        for member, (gap, before) in zip(members, state, strict=True):
            x, gap = delayed(x, gap)
            x, after = member.step(x, before)
            states.append((gap, after))
        return x, tuple(states)


def common(a: Fraction, b: Fraction) -> Fraction:
    """The least number that is a whole multiple of both."""
    return Fraction(lcm(a.numerator * b.denominator, b.numerator * a.denominator), a.denominator * b.denominator)


def gaps(plans: Sequence[Plan]) -> list[int]:
    """For each of a series: the frames that push the delay before it onto its grid."""
    found, delay = [], 0
    for plan in plans:
        gap = -delay % (plan.block or 1)
        found.append(gap)
        delay = int((delay + gap) * plan.ratio) + plan.delay
    return found


def delays(plans: Sequence[Plan]) -> list[int]:
    """For each of a series: the output frames by which everything up to it is delayed."""
    found, delay = [], 0
    for plan, gap in zip(plans, gaps(plans), strict=True):
        delay = int((delay + gap) * plan.ratio) + plan.delay
        found.append(delay)
    return found
