"""The picture of latency-quality curves, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from speechattn.score.curves import Point, average
from speechattn.score.metrics import Metric, Scored, scored
from speechattn.score.plots import axes

__all__ = ["by_curve", "drawn", "header", "row"]

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#222222", "#999933")  # P. Tol: bright
MARKS = "osD^vPX*"


def by_curve(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Those that differ in one setting together, in their order."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.setting.curve, []).append(point)
    return found


def drawn(points: Sequence[Point], how: Metric, lag: str, offline: Scored | None, title: str) -> Any:
    """A figure: quality against lag, computing not counted (solid) and counted (dashed); offline is a level line."""
    figure, plot = axes(8.6, 4.6)
    for number, (name, mine) in enumerate(by_curve(points).items()):
        colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
        for aware in (False, True):
            rows = sorted(place for point in mine if (place := placed(point, how, lag, aware=aware)) is not None)
            x, y, values = ([row[k] for row in rows] for k in range(3))
            style: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 5, "linewidth": 1.4}
            if aware:
                style |= {"linestyle": "--", "alpha": 0.55, "markerfacecolor": "none"}
            plot.plot(x, y, label=None if aware else name, **style)
            for a, b, value in [] if aware else zip(x, y, values, strict=True):
                plot.annotate(value, (a, b), (3, 4), textcoords="offset points", fontsize=7, color=colour)
    if offline is not None:
        plot.axhline(offline.value, color="#777777", linestyle="-.", linewidth=1, label=f"offline {offline.value:.1f}")
    plot.plot([], [], color="#555555", linewidth=1.4, label="computing not counted")
    plot.plot([], [], color="#555555", linewidth=1.4, linestyle="--", alpha=0.55, label="computing counted")
    plot.set_xlabel(f"{lag}, seconds")
    plot.set_ylabel(f"{how.name} %, less is better" if how.sign < 0 else f"{how.name}, more is better")
    plot.set_title(title, fontsize=10)
    plot.grid(color="#e4e4e4", linewidth=0.6)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def placed(point: Point, how: Metric, lag: str, *, aware: bool) -> tuple[float, float, str] | None:
    """Where a point lies, and the value that it stands for."""
    mean = average(point.lags[lag].of(aware=aware))
    if mean is None:
        return None
    stats, value = point.quality[how.name].sum(0)[None], point.setting.value
    return mean.value, float(how.score(stats)[0]), "" if value is None else f"{value:g}"


def header(metrics: Sequence[Metric], lags: Sequence[str]) -> list[str]:
    """Columns of `row`."""
    timed = [f"{name} {kind}" for name in lags for kind in ("unaware", "aware")]
    names = [*(how.name for how in metrics), *timed]
    three = [f"{name}{end}" for name in names for end in ("", " low", " high")]
    return ["policy", "option", "value", "n", *three, "normalised erasure", "real-time factor"]


def row(point: Point, metrics: Sequence[Metric]) -> dict[str, str | float | None]:
    """One line of the table: seconds, percent, and the ends of 95 % intervals over utterances."""
    found: dict[str, str | float | None] = {
        "policy": point.setting.policy, "option": point.setting.option, "value": point.setting.value,
        "n": len(point.computing),
    }  # fmt: skip
    for how in metrics:
        score = scored(how, point.quality[how.name])
        found |= ends(how.name, score.value, score.low, score.high)
    for name, lag in point.lags.items():
        for kind in ("unaware", "aware"):
            mean = average(lag.of(aware=kind == "aware"))
            values = (None, None, None) if mean is None else (mean.value, mean.low, mean.high)
            found |= ends(f"{name} {kind}", *values)
    erased, took = average(point.erasure), average(point.computing)
    found["normalised erasure"] = None if erased is None else erased.value
    found["real-time factor"] = None if took is None else took.value
    return found


def ends(name: str, value: float | None, low: float | None, high: float | None) -> Mapping[str, float | None]:
    """A figure and its interval."""
    return {name: value, f"{name} low": low, f"{name} high": high}
