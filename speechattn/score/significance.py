"""How far chance could have moved a score, and the difference of two systems on the same utterances.

N utterances, K statistics of each, R rounds. A corpus score is a function of the sums of the statistics over
utterances (errors and words; matching n-grams), so utterances are what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Difference", "compare", "interval", "p_value", "resampled"]

Array = NDArray[np.float64]
ROOM = 4_000_000  # numbers that a piece of the work may hold
SAME = 1e-9  # scores closer than this are equal


@dataclass(frozen=True)
class Difference:
    """`value`: second score minus first; `low`, `high`: its 95 % interval; `p`: how often chance does as much.

    The interval is that of a paired bootstrap over `n` utterances, `p` comes from approximate randomisation, two-sided.
    """

    value: float
    low: float
    high: float
    p: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}], p = {self.p:.2g}"


def interval(
    stats: Array, score: Callable[[Array], Array], *, seed: int = 0, rounds: int = 2000
) -> tuple[float, float]:
    """95 % interval of the score of `stats` [N, K]: percentiles over resampled utterances (Efron 1979)."""
    low, high = np.percentile(resampled(stats, score, seed=seed, rounds=rounds), [2.5, 97.5])
    return float(low), float(high)


def resampled(stats: Array, score: Callable[[Array], Array], *, seed: int, rounds: int) -> Array:
    """Scores [R] of as many utterances, drawn with replacement from `stats` [N, K]."""
    return np.concatenate([score(stats[picks].sum(1)) for picks in draws(len(stats), stats.shape[1], seed, rounds)])


def draws(n: int, width: int, seed: int, rounds: int) -> Iterator[NDArray[np.int64]]:
    """Indices [r, N] of resampled utterances, `rounds` rows in pieces that fit into memory."""
    random = np.random.default_rng(seed)
    most = max(1, ROOM // max(1, n * width))
    for at in range(0, rounds, most):
        yield random.integers(0, n, (min(most, rounds - at), n))


def compare(
    first: Array, second: Array, score: Callable[[Array], Array], *, seed: int = 0, rounds: int = 2000,
    trials: int = 10000,
) -> Difference:  # fmt: skip
    """Second system minus first, from their statistics [N, K] of the same utterances; ValueError when these differ."""
    if first.shape != second.shape or not len(first):
        raise ValueError(f"statistics of shapes {first.shape} and {second.shape}: wanted the same utterances twice")
    width = first.shape[1]

    def gap(sums: Array) -> Array:
        return score(sums[:, width:]) - score(sums[:, :width])

    both = np.concatenate([first, second], 1)
    value = float(gap(both.sum(0)[None])[0])
    low, high = interval(both, gap, seed=seed, rounds=rounds)
    return Difference(value, low, high, p_value(first, second, score, seed=seed, trials=trials), len(first))


def p_value(
    first: Array, second: Array, score: Callable[[Array], Array], *, seed: int = 0, trials: int = 10000
) -> float:
    """Approximate randomisation (Noreen 1989): utterances [N, K] change sides by chance; how often is the gap as large?

    The real gap is one of the trials (Phipson and Smyth 2010), and gaps exactly as large count: equal systems have
    p = 1, and two systems that differ in a handful of utterances cannot look significant.
    """
    total, change = first.sum(0), second - first
    real = abs(float((score((total + change.sum(0))[None]) - score(total[None]))[0]))
    random = np.random.default_rng(seed)
    most, as_large = max(1, ROOM // len(first)), 0
    for at in range(0, trials, most):
        moved = random.integers(2, size=(min(most, trials - at), len(first)), dtype=bool) @ change
        gaps = np.abs(score(total + moved) - score(total + change.sum(0) - moved))
        as_large += int((gaps >= real - SAME).sum())
    return (as_large + 1) / (trials + 1)
