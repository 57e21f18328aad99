"""Latency of a system: each metric over all utterances, computing not counted and counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from speechattn.score.latency import lagging
from speechattn.score.latency.said import PLAIN, Counting, Said
from speechattn.score.latency.segmenter import WordErrors, latin_runs
from speechattn.score.latency.segments import Sentence, resegmented
from speechattn.score.latency.soft import Soft
from speechattn.score.latency.tokens import average_token_delay
from speechattn.score.significance import interval

__all__ = ["METRICS", "Figure", "Mean", "Metric", "figures", "mean", "talk_figures", "text_table"]


class Metric(Protocol):
    """One number of an utterance; None where it is not defined."""

    def __call__(self, said: Said, *, aware: bool = False) -> float | None:
        """`aware` counts computing."""


REFERRING: dict[str, Metric] = {
    "AL": lagging.average_lagging, "LAAL": lagging.length_adaptive_average_lagging, "AP": lagging.average_proportion,
    "DAL": lagging.differentiable_average_lagging, "YAAL": lagging.yaal,
}  # fmt: skip
REFERENCELESS: dict[str, Metric] = {
    "ATD": average_token_delay, "first word": lagging.first_word, "finalisation": lagging.finalisation,
}  # fmt: skip
METRICS: dict[str, Metric] = {**REFERRING, **REFERENCELESS}
LONG: dict[str, Metric] = {
    "LongYAAL": lagging.long_yaal, "LongLAAL": lagging.length_adaptive_average_lagging,
    "LongAL": lagging.average_lagging, "LongAP": lagging.average_proportion,
    "LongDAL": lagging.differentiable_average_lagging,
}  # fmt: skip
RATIOS = frozenset({"AP", "LongAP"})


@dataclass(frozen=True)
class Mean:
    """The mean over `n` utterances with a number, and its 95 % bootstrap interval; `skipped` have none."""

    value: float
    low: float
    high: float
    n: int
    skipped: int


@dataclass(frozen=True)
class Figure:
    """A metric in ms (or a ratio); `aware` counts computing, None where the log does not tell."""

    name: str
    unaware: Mean | None
    aware: Mean | None


def mean(utterances: Sequence[Said], metric: Metric, *, aware: bool = False) -> Mean | None:
    """The mean of the numbers that are defined; None when none is."""
    found = [number for said in utterances if (number := metric(said, aware=aware)) is not None]
    if not found:
        return None
    stats = np.stack([np.array(found), np.ones(len(found))], 1)
    low, high = interval(stats, lambda sums: sums[:, 0] / sums[:, 1])
    return Mean(float(np.mean(found)), low, high, len(found), len(utterances) - len(found))


def figures(utterances: Sequence[Said], *, metrics: dict[str, Metric] | None = None) -> list[Figure]:
    """Of utterances; AL, LAAL, AP, DAL and YAAL only where a reference says at which pace to speak.

    Sentences that were cut out of talks (`to_end`) have the long forms of these instead.
    """
    referred = any(said.reference_length is not None for said in utterances)
    cut = any(math.isfinite(said.to_end) for said in utterances)
    wanted = metrics or (LONG if cut else METRICS if referred else REFERENCELESS)
    return [
        Figure(name, mean(utterances, metric), mean(utterances, metric, aware=True)) for name, metric in wanted.items()
    ]


def talk_figures(
    talks: Sequence[tuple[Said, Sequence[Sentence]]], *, counting: Counting = PLAIN,
    pieces: Callable[[str], Sequence[str]] | None = None,
) -> list[Figure]:  # fmt: skip
    """Of long talks, sentence by sentence: StreamLAAL on the cut with the fewest word errors, the others on `Soft`'s.

    StreamLAAL (Papi et al. 2024, arXiv 2406.06097) is LAAL of each sentence that has any words. `finalisation` is the
    end of the talk. `pieces` are those of `Soft`.
    """
    letters = any(talk.unit == "char" for talk, _ in talks)
    errors, soft = (
        [said for talk, sentences in talks for said in resegmented(talk, sentences, segmenter, counting=counting)]
        for segmenter in (WordErrors(pieces=latin_runs if letters else None), Soft(exact=letters, pieces=pieces))
    )
    found = figures(errors, metrics={"StreamLAAL": lagging.length_adaptive_average_lagging})
    return [
        *found, *figures(soft, metrics=LONG),
        *figures([talk for talk, _ in talks], metrics={"finalisation": lagging.finalisation}),
    ]  # fmt: skip


def text_table(found: Sequence[Figure]) -> str:
    """Lines of text: seconds, or a ratio."""
    rows = [("", "computing not counted", "computing counted", "utterances with a number")]
    for figure in found:
        scale = 1.0 if figure.name in RATIOS else 1000.0
        number = figure.unaware or figure.aware
        rows.append((
            figure.name + ("" if figure.name in RATIOS else " s"), cell(figure.unaware, scale),
            cell(figure.aware, scale), f"{number.n} of {number.n + number.skipped}" if number else "0",
        ))  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def cell(number: Mean | None, scale: float) -> str:
    """The mean with its interval."""
    if number is None:
        return "-"
    return f"{number.value / scale:.3f} [{number.low / scale:.3f}, {number.high / scale:.3f}]"
