"""When a step is finished that began with the arrival of sound: four answers of four tools.

K steps: step k begins when `arrivals[k]` ms of sound are there, and computes for `computes[k]` ms. What the clocks say
is ordered: `Apart` <= `InOrder` <= `Queueing` <= `Cumulative`, and all are the same where nothing takes any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

from speechattn.score.latency.said import Said

__all__ = ["CLOCKS", "Apart", "Clock", "Cumulative", "InOrder", "Queueing", "retimed"]


class Clock(Protocol):
    """`finish` and `computes` are inverse where what they are given can have come from the other."""

    def finish(self, arrivals: Sequence[float], computes: Sequence[float]) -> list[float]:
        """When each step is done [K]."""

    def computes(self, arrivals: Sequence[float], finished: Sequence[float]) -> list[float]:
        """How long each step computed [K]."""


class Queueing:
    """What a listener waits: finish_k = max(finish_{k-1}, arrival_k) + compute_k. Events have it as `emitted_s`."""

    def finish(self, arrivals: Sequence[float], computes: Sequence[float]) -> list[float]:
        done, last = list[float](), float("-inf")
        for arrival, compute in zip(arrivals, computes, strict=True):
            last = max(last, arrival) + compute
            done.append(last)
        return done

    def computes(self, arrivals: Sequence[float], finished: Sequence[float]) -> list[float]:
        before = [float("-inf"), *finished]
        return [done - max(last, come) for come, done, last in zip(arrivals, finished, before, strict=False)]


class Cumulative:
    """`elapsed` of SimulEval: arrival_k + compute_1 + ... + compute_k, as if free moments never made up for busy ones.

    It plays sound faster than anybody speaks and adds the clock. On a long talk the sum grows without bound.
    """

    def finish(self, arrivals: Sequence[float], computes: Sequence[float]) -> list[float]:
        done, total = list[float](), 0.0
        for arrival, compute in zip(arrivals, computes, strict=True):
            total += compute
            done.append(arrival + total)
        return done

    def computes(self, arrivals: Sequence[float], finished: Sequence[float]) -> list[float]:
        totals = [done - come for come, done in zip(arrivals, finished, strict=True)]
        return [total - last for total, last in zip(totals, [0.0, *totals], strict=False)]


class Apart:
    """simulstream's computation-aware time: arrival_k + compute_k, as if no step waited for the one before it.

    A system slower than speech looks as good as a fast one, and words can appear before earlier ones.
    """

    def finish(self, arrivals: Sequence[float], computes: Sequence[float]) -> list[float]:
        return [come + compute for come, compute in zip(arrivals, computes, strict=True)]

    def computes(self, arrivals: Sequence[float], finished: Sequence[float]) -> list[float]:
        return [done - come for come, done in zip(arrivals, finished, strict=True)]


class InOrder(Apart):
    """OmniSTEval's repair of SimulEval's times (`--fix_simuleval_emission_ca`): `Apart`, but no word before another.

    max(finish_{k-1}, arrival_k + compute_k). A step waits for the words before it, not for their computing.
    """

    def finish(self, arrivals: Sequence[float], computes: Sequence[float]) -> list[float]:
        return list(accumulate(super().finish(arrivals, computes), max))


CLOCKS: dict[str, Clock] = {
    "queueing": Queueing(), "simuleval": Cumulative(), "simulstream": Apart(), "omnisteval": InOrder(),
}  # fmt: skip


def retimed(said: Said, logged: Clock, wanted: Clock) -> Said:
    """The same with its computation-aware times told by another clock than the one of its log.

    A log of words does not show the steps that said nothing: what these computed counts for the next that did, so that
    `Queueing` comes out too late rather than too early. Words of one delay and one time are one step.
    """
    if not said.elapsed:
        return said
    steps = [
        k
        for k in range(len(said.elapsed))
        if not k or (said.delays[k], said.elapsed[k]) != (said.delays[k - 1], said.elapsed[k - 1])
    ]
    arrivals = [said.delays[k] for k in steps]
    done = wanted.finish(arrivals, logged.computes(arrivals, [said.elapsed[k] for k in steps]))
    ends = [*steps[1:], len(said.elapsed)]
    return replace(
        said, elapsed=tuple(time for k, end, time in zip(steps, ends, done, strict=True) for _ in range(k, end))
    )
