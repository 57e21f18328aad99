"""Counting errors over a validation set, and over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, lcm
from typing import Any, Protocol

import jiwer
import numpy as np
import torch

from speechattn.audio.clip import EVERY, Clip
from speechattn.frames import Frames
from speechattn.score.metrics import BLEU, ChrF, Metric
from speechattn.score.significance import Array
from speechattn.search import Search
from speechattn.search.beam import Hypothesis
from speechattn.stream import Stream, flush

__all__ = ["Tally", "TextTally", "TranslationTally", "WordTally", "streamed"]


class Tally(Protocol):
    """Sums of a validation set.

    `shown` is what the names of the figures for the progress bar begin with, `best` whether the first of them had
    better be low (`min`) or high (`max`).
    """

    shown: str
    best: str

    def add(self, name: str, total: float, count: int) -> None:
        """So much more of `name`."""

    def compare(self, suffix: str, references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Texts that should be equal; `suffix` is that of the figures."""

    def result(self) -> dict[str, float]:
        """The figures over all processes."""


class WordTally:
    """Word and character errors."""

    shown, best = "wer", "min"

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: float, count: int) -> None:
        """Sums of numerators and denominators."""
        numerator, denominator = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = numerator + total, denominator + count

    def compare(self, suffix: str, references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Errors of words and characters; a text without words counts what was said all the same."""
        for name in ("wer", "cer"):  # also where a process has no texts: all must have the same sums
            self.add(f"{name}{suffix}", 0, 0)
        for said, heard in zip(references, hypotheses, strict=True):
            self.add(f"wer{suffix}", errors(jiwer.process_words, said, heard, len(heard.split())), len(said.split()))
            self.add(f"cer{suffix}", errors(jiwer.process_characters, said, heard, len(heard)), len(said))

    def result(self) -> dict[str, float]:
        """Rates over all processes."""
        names = sorted(self.sums)
        total = summed([self.sums[name] for name in names])
        return {name: over / max(under, 1) for name, (over, under) in zip(names, total, strict=True)}


class TextTally(WordTally):
    """Perplexities: the exponential of a cost for each unit."""

    shown, best = "perplexity", "min"

    def result(self) -> dict[str, float]:
        """Of each unit, over all processes."""
        return {name: exp(min(cost, 700.0)) for name, cost in super().result().items()}


class TranslationTally:
    """BLEU and chrF of the whole set, from sums of the utterances' statistics: those of sacrebleu, percent."""

    shown, best = "bleu", "max"

    def __init__(self) -> None:
        self.rates = WordTally()
        self.metrics: dict[str, Metric] = {"bleu": BLEU(), "chrf": ChrF()}
        self.nothing = {name: 0 * metric.stats(["a"], ["a"])[0] for name, metric in self.metrics.items()}
        self.sums: dict[str, Array] = {}

    def add(self, name: str, total: float, count: int) -> None:
        """Sums of numerators and denominators."""
        self.rates.add(name, total, count)

    def compare(self, suffix: str, references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Statistics of n-grams."""
        for name, metric in self.metrics.items():
            before = self.sums.get(name + suffix, self.nothing[name])
            self.sums[name + suffix] = before + (metric.stats(references, hypotheses).sum(0) if references else 0)

    def result(self) -> dict[str, float]:
        """Scores over all processes."""
        found = self.rates.result()
        for name in sorted(self.sums):
            total = np.array(summed([self.sums[name].tolist()]))
            found[name] = float(self.metrics[name.split("_")[0]].score(total)[0])
        return found


def errors(process: Callable[[str, str], Any], reference: str, hypothesis: str, size: int) -> int:
    """Substitutions, insertions and deletions; all `size` units of the hypothesis where nothing was said."""
    if not reference.split():
        return size
    found = process(reference, hypothesis)
    return int(found.substitutions + found.insertions + found.deletions)


def summed(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each number added up over processes."""
    total = torch.tensor(rows, dtype=torch.float64)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        place = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = total.to(place)
        torch.distributed.all_reduce(total)
    return total.tolist()


def streamed(listening: Stream, search: Search, sound: Frames, *, least: int = 3200) -> list[list[Hypothesis]]:
    """What a search says of `sound` [B, N] heard in blocks of at least so many samples, as a live session would."""
    plan = listening.plan()
    assert plan.block is not None
    block = lcm(plan.block, EVERY) if isinstance(sound, Clip) else plan.block
    size = -(-least // block) * block
    whole = flush(sound, listening)
    state, beam = listening.init_state(whole), None
    for at in range(0, whole.mask.shape[1], size):
        y, state = listening.step(whole[at : at + size], state)
        beam = search.step(y, search.start(y) if beam is None else beam)
    assert beam is not None
    return search.hypotheses(search.finish(beam))
