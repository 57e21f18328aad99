"""Word and character error rate with an interval, under a named text normaliser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version

import numpy as np

from speechattn.errors import InputError
from speechattn.score.alignment import counts, edits
from speechattn.score.significance import Array, interval

__all__ = ["NORMALISERS", "WordErrors", "bootstrap", "error_counts", "normaliser", "word_errors"]

NORMALISERS = ("whisper-english", "whisper-basic", "none")
MOST_TEXTS = 1 << 16  # whose normal form is remembered: each is asked for several times
RATES = {"word": "WER", "character": "CER"}


@cache
def normaliser(name: str) -> tuple[Callable[[str], str], str]:
    """A text normaliser by name, and the name with the version that a figure must state."""
    if name == "none":
        return str.strip, "none"
    label = f"{name} (whisper-normalizer {version('whisper-normalizer')})"
    if name == "whisper-english":
        from whisper_normalizer.english import EnglishTextNormalizer

        return lru_cache(MOST_TEXTS)(EnglishTextNormalizer()), label
    if name == "whisper-basic":
        from whisper_normalizer.basic import BasicTextNormalizer

        return lru_cache(MOST_TEXTS)(BasicTextNormalizer()), label
    raise InputError(f"text normaliser {name}: wanted one of {', '.join(NORMALISERS)}")


@dataclass(frozen=True)
class WordErrors:
    """Errors over all utterances; `low` and `high` bound the rate with 95 % confidence, `n` counts reference units."""

    rate: float
    low: float
    high: float
    substitutions: int
    insertions: int
    deletions: int
    n: int
    utterances: int
    normaliser: str
    unit: str = "word"

    def __str__(self) -> str:
        return (
            f"{RATES[self.unit]} {100 * self.rate:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}] "
            f"({self.substitutions} sub, {self.insertions} ins, {self.deletions} del; {self.n} {self.unit}s, "
            f"{self.utterances} utterances; {self.normaliser})"
        )


def word_errors(
    references: Sequence[str], hypotheses: Sequence[str], *, normalise: str = "whisper-english", unit: str = "word",
    seed: int = 0,
) -> WordErrors:  # fmt: skip
    """Word (or character) errors of paired texts; utterances with an empty reference after normalisation do not count.

    InputError when the numbers of texts differ or no reference word is left.
    """
    counts = error_counts(references, hypotheses, normalise=normalise, unit=unit)
    counts = counts[counts[:, 3] > 0]
    if not len(counts):
        raise InputError("no reference has any words")
    low, high = bootstrap(counts[:, :3].sum(1), counts[:, 3], seed=seed)
    s, i, d, n = (int(total) for total in counts.sum(0))
    return WordErrors((s + i + d) / n, low, high, s, i, d, n, len(counts), normaliser(normalise)[1], unit)


def error_counts(
    references: Sequence[str], hypotheses: Sequence[str], *, normalise: str = "whisper-english", unit: str = "word"
) -> Array:
    """Substitutions, insertions, deletions and reference units of each pair of texts [N, 4].

    InputError when the numbers of texts differ.
    """
    if len(references) != len(hypotheses):
        raise InputError(f"{len(references)} references and {len(hypotheses)} hypotheses: they must pair up")
    clean, _ = normaliser(normalise)
    rows = [counts(edits(clean(r), clean(h), unit=unit)) for r, h in zip(references, hypotheses, strict=True)]
    return np.array(rows, float).reshape(-1, 4)


def bootstrap(
    errors: Sequence[float] | np.ndarray, sizes: Sequence[float] | np.ndarray, *, seed: int = 0, rounds: int = 2000
) -> tuple[float, float]:
    """95 % interval of sum(errors) / sum(sizes): percentiles over resampled utterances."""
    stats = np.stack([np.asarray(errors, float), np.asarray(sizes, float)], 1)
    return interval(stats, lambda sums: sums[:, 0] / sums[:, 1], seed=seed, rounds=rounds)
