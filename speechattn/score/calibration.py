"""Whether a confidence of 0.8 means right eight times out of ten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechattn.live.events import Word
from speechattn.score.lag import lag_words, pairs_of_equal

__all__ = ["Calibration", "calibration", "word_marks"]


@dataclass(frozen=True)
class Calibration:
    """`ece`: expected calibration error over ten equal bins; `nce`: normalised cross entropy (1 perfect, 0 no news)."""

    ece: float
    nce: float
    n: int
    accuracy: float


def word_marks(words: Sequence[Word], reference: str) -> tuple[list[float], list[bool]]:
    """Confidence of each word and whether an alignment with the reference calls it right."""
    parts = [(part, word.confidence) for word in words for part in lag_words(word.text)]
    right = {j for _, j in pairs_of_equal(lag_words(reference), [part for part, _ in parts])}
    return [confidence for _, confidence in parts], [i in right for i in range(len(parts))]


def calibration(confidences: Sequence[float], correct: Sequence[bool], *, bins: int = 10) -> Calibration:
    """Guo et al., arXiv 1706.04599, eq. 3, and NIST's normalised cross entropy; ValueError without words."""
    p, y = np.clip(np.asarray(confidences, float), 1e-6, 1 - 1e-6), np.asarray(correct, float)
    if not len(p):
        raise ValueError("no words to calibrate")
    at = np.minimum((p * bins).astype(int), bins - 1)
    ece = sum(abs(p[at == b].mean() - y[at == b].mean()) * (at == b).mean() for b in range(bins) if (at == b).any())
    rate = np.clip(y.mean(), 1e-6, 1 - 1e-6)
    prior = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    entropy = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    return Calibration(float(ece), float((prior - entropy) / prior), len(p), float(y.mean()))
