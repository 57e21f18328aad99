"""How long after its end a word was committed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from speechattn.live.events import Event

__all__ = ["Heard", "Lag", "lag_words", "measure_lag", "pairs_of_equal"]


def lag_words(text: str) -> list[str]:
    """Lower-case words of letters, digits and apostrophes, in order: hyphens, dots and dashes separate."""
    words = re.findall(r"[a-z0-9']+", text.lower().replace("\u2019", "'"))
    return [word.strip("'") for word in words if word.strip("'")]


def pairs_of_equal(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of the words that a minimum-edit alignment calls right: (in the reference, in the hypothesis)."""
    if not reference or not hypothesis:
        return []
    chunks = jiwer.process_words(" ".join(reference), " ".join(hypothesis)).alignments[0]
    return [
        (chunk.ref_start_idx + i, chunk.hyp_start_idx + i)
        for chunk in chunks
        if chunk.type == "equal"
        for i in range(chunk.ref_end_idx - chunk.ref_start_idx)
    ]


@dataclass(frozen=True)
class Heard:
    """A word that was really said, and when it ended, in seconds of the stream."""

    word: str
    end: float


@dataclass(frozen=True)
class Lag:
    """Seconds from the end of each correctly recognised word to its commit; `said` counts the words of the script."""

    seconds: tuple[float, ...]
    said: int

    @property
    def mean(self) -> float:
        """Mean lag in seconds."""
        return float(np.mean(self.seconds)) if self.seconds else float("nan")

    def percentile(self, q: float) -> float:
        """Lag that `q` percent of the words stay below."""
        return float(np.percentile(self.seconds, q)) if self.seconds else float("nan")


def measure_lag(events: Sequence[Event], heard: Sequence[Heard], *, tolerance_s: float = 2.0) -> Lag:
    """Lag against word ends that come from elsewhere, with the time of computing and queueing (`emitted_s`).

    Only words that were recognised correctly count: those that an alignment of both word sequences pairs, and whose
    own time is within `tolerance_s` of the true one (else the pair is a coincidence of frequent words).
    """
    said = [
        (part, event.emitted_s, word.end) for event in events for word in event.words for part in lag_words(word.text)
    ]
    lags = [
        said[j][1] - heard[i].end
        for i, j in pairs_of_equal([h.word for h in heard], [word for word, _, _ in said])
        if abs(said[j][2] - heard[i].end) <= tolerance_s
    ]
    return Lag(tuple(lags), len(heard))
