"""Which reference sentence each word of a talk belongs to: the cut with the fewest word errors.

I words are in the references of S sentences, J were said. Times play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Segmenter", "WordErrors", "latin_runs"]

Int = NDArray[np.int64]


class Segmenter(Protocol):
    """How a talk's output is cut at the sentences of its references."""

    def __call__(self, words: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
        """The sentence of every word [J], never decreasing. Without any reference word, the first for all."""


class WordErrors:
    """The cut with the fewest word errors in all (Matusov et al. 2005; mwerSegmenter), as `mweralign` finds it.

    Letters of ASCII are compared in lower case. Where cuts are as good, that program's choice is taken: a missing word
    before a spare one before a wrong one; and a sentence of which nothing at all was said before the first word costs
    one error more. `pieces` joins characters to what is compared.
    """

    def __init__(self, *, pieces: Callable[[Sequence[str]], list[str]] | None = None) -> None:
        self.pieces = pieces

    def __call__(self, words: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
        if not words:
            return []
        if self.pieces is not None:
            runs = self.pieces(words)
            owners = WordErrors()(runs, [self.pieces(sentence) for sentence in references])
            return [owner for owner, run in zip(owners, runs, strict=True) for _ in run]
        begins = best_begins(*numbered(words, references))
        ends = [*begins[1:], len(words)]
        return [s for s, (begin, end) in enumerate(zip(begins, ends, strict=True)) for _ in range(begin, end)]


def latin_runs(letters: Sequence[str]) -> list[str]:
    """Characters to pieces: those of Latin-1 and blanks in a row are one, any other is one alone."""
    runs = list[str]()
    for latin, group in groupby(letters, lambda letter: ord(letter) < 256):
        run = "".join(group)
        runs += [run] if latin else run
    return runs


def numbered(words: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Int, Int]:
    """Words [J] and references with a -1 behind each sentence [I + S], as numbers."""
    known: dict[str, int] = {}

    def number(word: str) -> int:
        lower = word.encode().lower().decode()  # bytes know the letters of ASCII alone
        return known.setdefault(lower, len(known))

    said = np.array([number(word) for word in words], np.int64)
    wanted = [[*(number(word) for word in sentence), -1] for sentence in references]
    return said, np.array(list(chain(*wanted)), np.int64)


def best_begins(said: Int, wanted: Int) -> list[int]:
    """Where each sentence begins in `said` [J]; `wanted` [I + S] has a -1 behind every sentence.

    One row of edit costs for each word said. `begin` follows the cheapest path to where its sentence began; a gap of
    missing words is found for a whole row at once: it begins at the last column that is cheaper without it.
    """
    cut = wanted == -1
    missing = np.concatenate([[0], np.cumsum(~cut)])  # reference words before a column
    columns = np.arange(len(wanted) + 1)
    cuts = np.flatnonzero(cut) + 1
    cost, begin = columns.copy(), np.zeros_like(columns)  # before the first word: cuts cost one too
    history = np.zeros((len(said) + 1, len(cuts)), np.int64)
    for j, word in enumerate(said, 1):
        spare, wrong = cost[1:] + 1, cost[:-1] + (wanted != word)
        best = np.where(cut, np.iinfo(np.int64).max // 2, np.minimum(spare, wrong))
        origin = np.where(spare <= wrong, begin[1:], begin[:-1])
        best, origin = np.concatenate([[j], best]), np.concatenate([[0], origin])
        level = best - missing
        lowest = np.minimum.accumulate(level)
        fresh = np.concatenate([[True], level[1:] < lowest[:-1]])
        last = np.maximum.accumulate(np.where(fresh, columns, 0))  # where the gap before each column begins
        latest_cut = np.maximum.accumulate(np.where(np.concatenate([[False], cut]), columns, 0))
        path = np.where(latest_cut > last, j, origin[last])
        history[j] = path[cuts - 1]
        cost, begin = lowest + missing, np.where(np.concatenate([[False], cut]), j, path)
    begins, at = [0] * len(cuts), len(said)
    for s in range(len(cuts) - 1, -1, -1):
        at = begins[s] = int(history[at, s])
    return begins
