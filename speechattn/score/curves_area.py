"""Which of two latency-quality curves is better, and by how much, where both exist.

N utterances, P points of a curve, R draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechattn.score.curves import Point
from speechattn.score.metrics import Metric
from speechattn.score.significance import Array, draws

__all__ = ["Area", "area", "gap"]


@dataclass(frozen=True)
class Area:
    """Between two curves from `first_s` to `last_s` of lag: positive where the first curve is the better one.

    `mean` is the mean difference of quality over that range in points, `low` and `high` its 95 % interval by a
    bootstrap over `n` utterances, the same for all points of both curves; `drawn` is the share of draws in which both
    curves exist somewhere in the range, on which it rests.
    """

    first_s: float
    last_s: float
    mean: float
    low: float
    high: float
    n: int
    drawn: float

    @property
    def value(self) -> float:
        """The area in points times seconds."""
        return self.mean * (self.last_s - self.first_s)

    def __str__(self) -> str:
        range_s = f"{self.first_s:.2f} to {self.last_s:.2f} s"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}] points over {range_s}"


def gap(first: Array, second: Array, *, least: float, most: float) -> tuple[float, float, float] | None:
    """Mean of first minus second between two lags, both as rows of (lag, quality) [P, 2]; and the range it is over.

    Points are joined by straight lines in the order of their lags. The range is the part of `least` to `most` where
    both curves exist; None where there is no such part.
    """
    curves = [rows[np.argsort(rows[:, 0], kind="stable")] for rows in (first, second)]
    low = max(least, *(float(rows[0, 0]) for rows in curves))
    high = min(most, *(float(rows[-1, 0]) for rows in curves))
    if not low < high or not all(np.isfinite(rows).all() for rows in curves):
        return None
    knots = np.unique(np.clip(np.concatenate([rows[:, 0] for rows in curves] + [[low, high]]), low, high))
    heights = [np.interp(knots, rows[:, 0], rows[:, 1]) for rows in curves]
    return float(np.trapezoid(heights[0] - heights[1], knots)) / (high - low), low, high


def coordinates(points: Sequence[Point], how: Metric, lag: str, *, aware: bool) -> tuple[Array, Array]:
    """Statistics of lag [P, N, 2] and of quality [P, N, K]."""
    lags = np.stack([point.lags[lag].of(aware=aware) for point in points])
    return lags, np.stack([point.quality[how.name] for point in points])


def placed(lags: Array, quality: Array, how: Metric) -> Array:
    """Sums of both [P, R, 2] and [P, R, K] -> (lag, quality, more is better) [R, P, 2]."""
    p, r, k = quality.shape
    scores = how.sign * how.score(quality.reshape(p * r, k)).reshape(p, r)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([lags[..., 0] / lags[..., 1], scores], -1).transpose(1, 0, 2)


def area(
    first: Sequence[Point], second: Sequence[Point], how: Metric, lag: str, *, aware: bool = False,
    least_s: float = 1.0, most_s: float = 3.0,
) -> Area | None:  # fmt: skip
    """Between two curves of the same utterances; None where they do not both exist anywhere in the range."""
    both = [coordinates(points, how, lag, aware=aware) for points in (first, second)]
    whole = [placed(lags.sum(1)[:, None], quality.sum(1)[:, None], how)[0] for lags, quality in both]
    found = gap(*whole, least=least_s, most=most_s)
    if found is None:
        return None
    n, width = both[0][1].shape[1], max(part.shape[2] * len(part) for curve in both for part in curve)
    gaps = list[float]()
    for picks in draws(n, width, how.seed, how.rounds):
        rows = [placed(lags[:, picks].sum(2), quality[:, picks].sum(2), how) for lags, quality in both]
        new = [gap(a, b, least=least_s, most=most_s) for a, b in zip(*rows, strict=True)]
        gaps += [one[0] for one in new if one is not None]
    low, high = np.percentile(gaps, [2.5, 97.5]) if gaps else (np.nan, np.nan)
    return Area(found[1], found[2], found[0], float(low), float(high), n, len(gaps) / how.rounds)
