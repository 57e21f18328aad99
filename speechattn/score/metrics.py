"""WER, CER, BLEU and chrF as one thing: statistics of each utterance, and the score of their sums.

N utterances, K statistics of each, R rounds. Scores are in percent (BLEU and chrF: of 100).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from speechattn.errors import InputError
from speechattn.score.significance import Array, Difference, compare, interval
from speechattn.score.wer import RATES, error_counts, normaliser

__all__ = ["BLEU", "METRICS", "ChrF", "ErrorRate", "Metric", "Scored", "compared", "metric", "scored"]

METRICS = ("wer", "cer", "bleu", "chrf")


class Metric(Protocol):
    """How texts are judged. `sign` is -1 where less is better; `seed` and `rounds` are those of intervals."""

    name: str
    sign: int
    seed: int
    rounds: int

    @property
    def label(self) -> str:
        """The normaliser, or sacrebleu's signature."""

    def stats(self, references: Sequence[str], hypotheses: Sequence[str]) -> Array:
        """Of each utterance [N, K]; rows of zeros do not count."""

    def score(self, sums: Array) -> Array:
        """Of sums of statistics [R, K] -> [R]."""


class ErrorRate:
    """Word or character errors per hundred of the reference, of normalised texts."""

    sign = -1
    seed = 0
    rounds = 2000

    def __init__(self, unit: str = "word", *, normalise: str = "whisper-english") -> None:
        self.unit, self.normalise = unit, normalise
        self.name = RATES[unit]

    @property
    def label(self) -> str:
        """The normaliser and its version."""
        return normaliser(self.normalise)[1]

    def stats(self, references: Sequence[str], hypotheses: Sequence[str]) -> Array:
        """Errors and units of the reference; without such units the errors do not count either."""
        counts = error_counts(references, hypotheses, normalise=self.normalise, unit=self.unit)
        return np.stack([counts[:, :3].sum(1), counts[:, 3]], 1) * (counts[:, 3:] > 0)

    def score(self, sums: Array) -> Array:
        """100 * errors / units."""
        return 100 * sums[:, 0] / sums[:, 1]


class Sacre:
    """A corpus score of sacrebleu (Post, arXiv 1804.08771), whose statistics and formulas these are.

    `seed` and `rounds` are sacrebleu's own defaults, so that intervals rest on the same resampled utterances.
    """

    sign = 1
    seed = 12345
    rounds = 1000

    def __init__(self, name: str, judge: Any) -> None:
        self.name, self.judge = name, judge

    @property
    def label(self) -> str:
        """The signature, which is complete once something was scored."""
        signature = self.judge.get_signature()
        signature.update("bs", self.rounds)
        signature.update("seed", self.seed)
        return str(signature)

    def stats(self, references: Sequence[str], hypotheses: Sequence[str]) -> Array:
        """N-grams that match, and all."""
        if len(references) != len(hypotheses):
            raise InputError(f"{len(references)} references and {len(hypotheses)} hypotheses: they must pair up")
        if not references:
            return np.zeros((0, 1))
        return np.array(self.judge._extract_corpus_statistics(list(hypotheses), [list(references)]), float)

    def score(self, sums: Array) -> Array:
        """Row by row."""
        return np.array([self.judge._compute_score_from_stats(row).score for row in sums])


class BLEU(Sacre):
    """Papineni et al. 2002, with sacrebleu's `tokenize`."""

    def __init__(self, *, tokenize: str = "13a", lowercase: bool = False) -> None:
        judge = sacrebleu_metrics().BLEU
        if tokenize not in judge.TOKENIZERS:
            raise InputError(f"tokenizer {tokenize}: sacrebleu has {', '.join(judge.TOKENIZERS)}")
        super().__init__("BLEU", judge(tokenize=tokenize, lowercase=lowercase))


class ChrF(Sacre):
    """Popovic 2015: character n-grams up to 6, beta 2."""

    def __init__(self, *, lowercase: bool = False) -> None:
        super().__init__("chrF", sacrebleu_metrics().CHRF(lowercase=lowercase))


def sacrebleu_metrics() -> Any:
    """sacrebleu, where it is installed."""
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise InputError("BLEU and chrF need sacrebleu: pip install 'speechattn[train]'") from error
    return metrics


def metric(name: str, *, normalise: str = "whisper-english") -> Metric:
    """By one of the names in `METRICS`."""
    if name in ("wer", "cer"):
        return ErrorRate("word" if name == "wer" else "character", normalise=normalise)
    if name == "bleu":
        return BLEU()
    if name == "chrf":
        return ChrF()
    raise InputError(f"metric {name}: wanted one of {', '.join(METRICS)}")


@dataclass(frozen=True)
class Scored:
    """A corpus score with its 95 % interval over `n` utterances."""

    name: str
    value: float
    low: float
    high: float
    n: int
    label: str

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def scored(how: Metric, stats: Array) -> Scored:
    """The score of the utterances' statistics [N, K]; InputError when none of them counts."""
    stats = counting(stats)[0]
    low, high = interval(stats, how.score, seed=how.seed, rounds=how.rounds)
    return Scored(how.name, float(how.score(stats.sum(0)[None])[0]), low, high, len(stats), how.label)


def compared(how: Metric, first: Array, second: Array) -> Difference:
    """Second minus first, from the statistics [N, K] of both on the same utterances."""
    first, second = counting(first, second)
    return compare(first, second, how.score, seed=how.seed, rounds=how.rounds)


def counting(*stats: Array) -> list[Array]:
    """The utterances with any statistics in any of them; InputError when there are none."""
    some = np.any([part.any(1) for part in stats], 0)
    if not some.any():
        raise InputError("no reference has any words")
    return [part[some] for part in stats]
