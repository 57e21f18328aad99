"""How far words are behind the speaker: one number for an utterance, in ms (average proportion: a ratio).

d_i is when word i of n was said (`delays`, or with `aware` computing counted), X the length of the source, R the words
of the reference. None where a number is not defined: nothing was said, the source has no length, or no time of that
kind is known. The average over utterances is that of those with a number.
"""

from __future__ import annotations

import math

from speechattn.score.latency.said import Said

__all__ = [
    "average_lagging", "average_proportion", "differentiable_average_lagging", "finalisation", "first_word",
    "length_adaptive_average_lagging", "long_yaal", "yaal",
]  # fmt: skip


def average_lagging(said: Said, *, aware: bool = False) -> float | None:
    """AL (STACL, Ma et al. 2019, arXiv 1810.08398): mean of d_i - (i - 1) X / R up to the first d_i >= X.

    d_1 where already the first word comes after the source, as SimulEval does.
    """
    return lag_until_end(said, said.wanted, aware=aware)


def length_adaptive_average_lagging(said: Said, *, aware: bool = False) -> float | None:
    """LAAL (Polak et al. 2022, arXiv 2204.06028; Papi et al. 2022, arXiv 2206.05807): AL with max(n, R) for R.

    AL rewards who says more words than the reference has.
    """
    return lag_until_end(said, max(len(said.units), said.wanted), aware=aware)


def lag_until_end(said: Said, words: int, *, aware: bool) -> float | None:
    """Mean lag behind a speaker who says so many words at one pace, up to the first that waited for all of the source.

    Without a word in the reference the pace is not defined: None.
    """
    times, length = said.times(aware=aware), said.source_length
    if not times or length <= 0 or words == 0:
        return None
    if times[0] > length:
        return times[0]
    tau = next((i + 1 for i, time in enumerate(times) if time >= length), len(times))
    return lag(times[:tau], length / words)


def lag(times: tuple[float, ...], pace: float) -> float:
    """Mean of d_i - (i - 1) pace."""
    return math.fsum(time - i * pace for i, time in enumerate(times)) / len(times)


def average_proportion(said: Said, *, aware: bool = False) -> float | None:
    """AP (Cho and Esipova 2016, arXiv 1606.02012): sum of d_i / (X R); 1 is to wait for everything."""
    times = said.times(aware=aware)
    if not times or said.source_length <= 0 or said.wanted == 0:
        return None
    return math.fsum(times) / (said.source_length * said.wanted)


def differentiable_average_lagging(said: Said, *, aware: bool = False) -> float | None:
    """DAL (Cherry and Foster 2019, arXiv 1906.00048; Arivazhagan et al. 2019, arXiv 1906.05218, eq. 14 to 16).

    Each word takes X / n, so that a late word delays those behind it: d'_i = max(d_i, d'_{i-1} + X / n).
    """
    times, length = said.times(aware=aware), said.source_length
    if not times or length <= 0:
        return None
    pace = length / len(times)
    said_at, last = list[float](), -math.inf
    for time in times:
        last = max(time, last + pace)
        said_at.append(last)
    return lag(tuple(said_at), pace)


def yaal(said: Said, *, aware: bool = False) -> float | None:
    """YAAL (Polak et al. 2025, arXiv 2509.17349): LAAL over the words before the end of the source alone.

    The rest is said at once when the source ends, which is no policy. None where no word came before.
    """
    return lag_before(said, said.source_length, aware=aware)


def long_yaal(said: Said, *, aware: bool = False) -> float | None:
    """LongYAAL (Polak et al. 2025, arXiv 2509.17349): YAAL of a sentence of a talk, words up to the recording's end."""
    return lag_before(said, said.to_end, aware=aware)


def lag_before(said: Said, end: float, *, aware: bool) -> float | None:
    """Length-adaptive lag of the words before the first that comes at `end` or later."""
    times, length = said.times(aware=aware), said.source_length
    if not times or length <= 0:
        return None
    tau = next((i for i, time in enumerate(times) if time >= end), len(times))
    return lag(times[:tau], length / max(len(times), said.wanted)) if tau else None


def first_word(said: Said, *, aware: bool = False) -> float | None:
    """When the first word was said (SimulEval: StartOffset)."""
    times = said.times(aware=aware)
    return times[0] if times else None


def finalisation(said: Said, *, aware: bool = False) -> float | None:
    """How long after the end of the source the last word was said (SimulEval: EndOffset)."""
    times = said.times(aware=aware)
    return times[-1] - said.source_length if times else None
