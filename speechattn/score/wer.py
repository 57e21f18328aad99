"""Word error rate with an interval, under a named text normaliser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import jiwer
import numpy as np

from speechattn.errors import InputError

__all__ = ["NORMALISERS", "WordErrors", "bootstrap", "normaliser", "word_errors"]

NORMALISERS = ("whisper-english", "whisper-basic", "none")


@cache
def normaliser(name: str) -> tuple[Callable[[str], str], str]:
    """A text normaliser by name, and the name with the version that a figure must state."""
    if name == "none":
        return str.strip, "none"
    label = f"{name} (whisper-normalizer {version('whisper-normalizer')})"
    if name == "whisper-english":
        from whisper_normalizer.english import EnglishTextNormalizer

        return EnglishTextNormalizer(), label
    if name == "whisper-basic":
        from whisper_normalizer.basic import BasicTextNormalizer

        return BasicTextNormalizer(), label
    raise InputError(f"text normaliser {name}: wanted one of {', '.join(NORMALISERS)}")


@dataclass(frozen=True)
class WordErrors:
    """Errors over all utterances; `low` and `high` bound the rate with 95 % confidence, `n` counts reference words."""

    rate: float
    low: float
    high: float
    substitutions: int
    insertions: int
    deletions: int
    n: int
    utterances: int
    normaliser: str

    def __str__(self) -> str:
        return (
            f"WER {100 * self.rate:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}] "
            f"({self.substitutions} sub, {self.insertions} ins, {self.deletions} del; {self.n} words, "
            f"{self.utterances} utterances; {self.normaliser})"
        )


def word_errors(
    references: Sequence[str], hypotheses: Sequence[str], *, normalise: str = "whisper-english", seed: int = 0
) -> WordErrors:
    """Word errors of paired texts; utterances whose reference is empty after normalisation do not count.

    InputError when the numbers of texts differ or no reference word is left.
    """
    if len(references) != len(hypotheses):
        raise InputError(f"{len(references)} references and {len(hypotheses)} hypotheses: they must pair up")
    clean, label = normaliser(normalise)
    pairs = [(clean(r), clean(h)) for r, h in zip(references, hypotheses, strict=True)]
    pairs = [(r, h) for r, h in pairs if r.split()]
    if not pairs:
        raise InputError("no reference has any words")
    counts = np.array([
        (o.substitutions, o.insertions, o.deletions, len(r.split()))
        for r, h in pairs
        for o in [jiwer.process_words(r, h)]
    ])  # fmt: skip
    low, high = bootstrap(counts[:, :3].sum(1), counts[:, 3], seed=seed)
    s, i, d, n = (int(total) for total in counts.sum(0))
    return WordErrors((s + i + d) / n, low, high, s, i, d, n, len(pairs), label)


def bootstrap(
    errors: Sequence[float] | np.ndarray, sizes: Sequence[float] | np.ndarray, *, seed: int = 0, rounds: int = 2000
) -> tuple[float, float]:
    """95 % interval of sum(errors) / sum(sizes): percentiles over resampled utterances."""
    e, n = np.asarray(errors, float), np.asarray(sizes, float)
    picks = np.random.default_rng(seed).integers(0, len(e), (rounds, len(e)))
    low, high = np.percentile(e[picks].sum(1) / n[picks].sum(1), [2.5, 97.5])
    return float(low), float(high)
