"""Plots of an evaluation as SVG."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from speechattn.errors import InputError
from speechattn.score.document import Picture
from speechattn.score.evaluation import Evaluation
from speechattn.score.significance import Array, interval

__all__ = ["by_duration", "by_speaker", "computing", "need_matplotlib", "two_ways"]

COLOURS = {"offline": "#4477aa", "streamed": "#ee6677"}  # which also the colour-blind can tell apart
MOST_SPEAKERS = 20
MOST_BINS = 6
BIN = 5  # utterances at least


def need_matplotlib() -> None:
    """InputError where it is missing: before the work, not after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the report of --output-dir has plots, which need matplotlib: pip install 'speechattn[train]'"
        ) from error


def axes(width: float = 7.5, height: float = 3.4) -> tuple[Any, Any]:
    """An empty figure, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    plot = figure.add_subplot()
    plot.spines[["top", "right"]].set_visible(False)
    plot.set_axisbelow(True)
    return figure, plot


def picture(name: str, figure: Any, says: str) -> Picture:
    """The figure as SVG, the same bytes for the same numbers."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "speechattn", "font.size": 10}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Picture(name, text.getvalue(), says)


def grouped(evaluation: Evaluation, groups: Sequence[Sequence[int]], way: int) -> tuple[Array, Array]:
    """Score [G] of groups of utterances, and how far its 95 % interval reaches down and up [2, G]."""
    how = evaluation.metrics[0]
    stats = evaluation.stats[how.name][way]
    values, reach = [], []
    for group in groups:
        part = stats[list(group)]
        value = float(how.score(part.sum(0)[None])[0])
        low, high = interval(part, how.score, seed=how.seed, rounds=500)
        values.append(value)
        reach.append((max(0.0, value - low), max(0.0, high - value)))
    return np.array(values), np.array(reach).T


def judged(evaluation: Evaluation) -> list[int]:
    """Utterances whose reference has words."""
    return np.flatnonzero(evaluation.stats[evaluation.metrics[0].name][0].any(1)).tolist()


def bars(evaluation: Evaluation, plot: Any, groups: Sequence[Sequence[int]], *, lying: bool = False) -> None:
    """One bar for each group and way, with its interval."""
    ways = evaluation.ways
    size = 0.8 / len(ways)
    for number, way in enumerate(ways):
        values, reach = grouped(evaluation, groups, number)
        at = np.arange(len(groups)) + size * (number - (len(ways) - 1) / 2)
        style = {"color": COLOURS[way], "label": way, "ecolor": "#444", "capsize": 2, "error_kw": {"linewidth": 0.9}}
        if lying:
            plot.barh(at, values, size, xerr=reach, **style)
        else:
            plot.bar(at, values, size, yerr=reach, **style)


def legend(evaluation: Evaluation, figure: Any) -> None:
    """Beside the axes, where it hides nothing; none where there is one way only."""
    if evaluation.streams:
        figure.legend(loc="outside right upper", frameon=False)


def axis_name(evaluation: Evaluation) -> str:
    """What the scores are."""
    how = evaluation.metrics[0]
    return f"{how.name} %" if how.sign < 0 else how.name


def by_duration(evaluation: Evaluation) -> Picture:
    """Groups of like length, equally many utterances in each."""
    some = sorted(judged(evaluation), key=lambda i: evaluation.heard[i].duration_s)
    bins = max(1, min(MOST_BINS, len(some) // BIN))
    groups = [part.tolist() for part in np.array_split(np.array(some), bins)]
    figure, plot = axes()
    bars(evaluation, plot, groups)
    length = [evaluation.heard[i].duration_s for i in some]
    ends = np.cumsum([len(group) for group in groups])
    names = [
        f"{length[end - len(group)]:.1f}-{length[end - 1]:.1f} s\nn = {len(group)}"
        for group, end in zip(groups, ends, strict=True)
    ]
    plot.set_xticks(range(len(groups)), names)
    plot.set_ylabel(axis_name(evaluation))
    plot.set_ylim(bottom=0)
    plot.set_xlabel("length of the utterance")
    legend(evaluation, figure)
    return picture("by-duration", figure, f"{axis_name(evaluation)} by length of the utterance")


def by_speaker(evaluation: Evaluation) -> Picture | None:
    """The speakers who are understood worst; None where fewer than two are known."""
    some = [i for i in judged(evaluation) if evaluation.utterances[i].speaker]
    of: dict[str, list[int]] = {}
    for i in some:
        of.setdefault(str(evaluation.utterances[i].speaker), []).append(i)
    if len(of) < 2:
        return None
    how = evaluation.metrics[0]
    stats = evaluation.stats[how.name][0]
    worst = sorted(of, key=lambda name: (how.sign * float(how.score(stats[of[name]].sum(0)[None])[0]), name))
    worst = worst[:MOST_SPEAKERS]
    figure, plot = axes(height=1.2 + 0.3 * len(worst))
    bars(evaluation, plot, [of[name] for name in worst], lying=True)
    plot.set_yticks(range(len(worst)), [f"{name[:40]} (n = {len(of[name])})" for name in worst], parse_math=False)
    plot.invert_yaxis()
    plot.set_xlim(left=0)
    plot.set_xlabel(axis_name(evaluation))
    legend(evaluation, figure)
    which = f"the {len(worst)} worst of {len(of)} speakers" if len(of) > len(worst) else f"{len(of)} speakers"
    return picture("by-speaker", figure, f"{axis_name(evaluation)} by speaker, {which}")


def two_ways(evaluation: Evaluation) -> Picture | None:
    """Each utterance offline against streamed, as dots whose area counts utterances; None without streaming."""
    if not evaluation.streams:
        return None
    how = evaluation.metrics[-1] if evaluation.translates else evaluation.metrics[0]
    offline, streamed = (
        [round(float(how.score(row[None])[0]), 1) if evaluation.translates else row[0] for row in stats]
        for stats in evaluation.stats[how.name]
    )
    count = Counter(zip(offline, streamed, strict=True))
    x, y = (np.array([pair[i] for pair in count]) for i in (0, 1))
    n = np.array(list(count.values()))
    figure, plot = axes(4.6, 4.2)
    low, high = min(x.min(), y.min()), max(x.max(), y.max(), 1)
    room = 0.06 * (high - low)
    plot.plot([low - room, high + room], [low - room, high + room], color="#999", linewidth=1, zorder=0)
    colour = np.where(how.sign * (y - x) < 0, COLOURS["streamed"], np.where(x == y, "#888888", COLOURS["offline"]))
    area = 18 + 500 * n / max(n.sum(), 50)
    plot.scatter(x, y, s=area, c=colour, alpha=0.75, linewidth=0)
    for a, b, times, size in zip(x, y, n, area, strict=True):
        if times > 1:
            beside = (np.sqrt(size / np.pi) + 2, -9)
            plot.annotate(f"{times}", (a, b), beside, textcoords="offset points", fontsize=8, color="#333")
    what = f"{how.name} of an utterance" if evaluation.translates else "errors in an utterance"
    plot.set_xlabel(f"{what}, offline")
    plot.set_ylabel(f"{what}, streamed")
    if not evaluation.translates:
        plot.xaxis.get_major_locator().set_params(integer=True)
        plot.yaxis.get_major_locator().set_params(integer=True)
    plot.set_aspect("equal")
    by = f"each utterance by its {how.name if evaluation.translates else 'errors'}, offline against streamed: "
    says = "red where streaming is worse, blue where it is better; numbers count utterances that share a dot"
    return picture("offline-streamed", figure, by + says)


def computing(evaluation: Evaluation) -> Picture:
    """Seconds of computing over seconds of sound."""
    figure, plot = axes()
    length = np.array([said.duration_s for said in evaluation.heard])
    for way in evaluation.ways:
        took = [said.offline_s if way == "offline" else said.streamed_s for said in evaluation.heard]
        plot.scatter(length, took, s=12, color=COLOURS[way], alpha=0.6, linewidth=0, label=way)
    plot.set_xlabel("seconds of sound")
    plot.set_ylabel("seconds of computing")
    plot.set_xlim(left=0)
    plot.set_ylim(bottom=0)
    legend(evaluation, figure)
    return picture("computing", figure, "seconds of computing over seconds of sound, each utterance")
