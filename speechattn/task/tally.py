"""Counting errors over a validation set, and over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jiwer
import torch

from speechattn.frames import Frames
from speechattn.search import Search
from speechattn.search.beam import Hypothesis
from speechattn.stream import Stream, flush

__all__ = ["Tally", "WordTally", "streamed"]


class Tally(Protocol):
    """Sums of a validation set; `shown` is what the names of the figures for the progress bar begin with."""

    shown: str

    def add(self, name: str, total: float, count: int) -> None:
        """So much more of `name`."""

    def compare(self, suffix: str, references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Texts that should be equal; `suffix` is that of the figures."""

    def result(self) -> dict[str, float]:
        """The figures over all processes."""


class WordTally:
    """Word and character errors."""

    shown = "wer"

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: float, count: int) -> None:
        """Sums of numerators and denominators."""
        numerator, denominator = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = numerator + total, denominator + count

    def compare(self, suffix: str, references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Errors of words and characters; a text without words counts what was said all the same."""
        for said, heard in zip(references, hypotheses, strict=True):
            self.add(f"wer{suffix}", errors(jiwer.process_words, said, heard, len(heard.split())), len(said.split()))
            self.add(f"cer{suffix}", errors(jiwer.process_characters, said, heard, len(heard)), len(said))

    def result(self) -> dict[str, float]:
        """Rates over all processes."""
        names = sorted(self.sums)
        return dict(zip(names, ratios([self.sums[name] for name in names]), strict=True))


def errors(process: Callable[[str, str], Any], reference: str, hypothesis: str, size: int) -> int:
    """Substitutions, insertions and deletions; all `size` units of the hypothesis where nothing was said."""
    if not reference.split():
        return size
    found = process(reference, hypothesis)
    return int(found.substitutions + found.insertions + found.deletions)


def ratios(sums: Sequence[tuple[float, float]]) -> list[float]:
    """Numerators over denominators, each added up over processes."""
    total = torch.tensor(sums, dtype=torch.float64).reshape(-1, 2)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        place = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = total.to(place)
        torch.distributed.all_reduce(total)
    return (total[:, 0] / total[:, 1].clamp(min=1)).tolist()


def streamed(listening: Stream, search: Search, sound: Frames, *, least: int = 3200) -> list[list[Hypothesis]]:
    """What a search says of `sound` [B, N] heard in blocks of at least so many samples, as a live session would."""
    plan = listening.plan()
    assert plan.block is not None
    size = -(-least // plan.block) * plan.block
    whole = flush(sound, listening)
    state, beam = listening.init_state(whole), None
    for at in range(0, whole.mask.shape[1], size):
        y, state = listening.step(whole[at : at + size], state)
        beam = search.step(y, search.start(y) if beam is None else beam)
    assert beam is not None
    return search.hypotheses(search.finish(beam))
