"""Which reference sentence each word of a talk belongs to: the cut that pairs words that look alike.

I words are in the references, J were said.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

__all__ = ["Soft"]

Array = NDArray[np.float64]
Column = tuple[int | None, int | None]  # of an alignment: a reference word and a word said, or one of them
MARKS = frozenset(".!?,;:-()。！？，；：—（）ー")  # noqa: RUF001


class Soft:
    """The soft segmenter (Polak et al. 2025, arXiv 2509.17349): words pair up with words of similar letters, in order.

    Similarity is that of the sets of letters (Jaccard), of NFKC lower-case words; marks pair with marks only; a gap
    costs nothing; of equal ways a pair, then a missing word. A word without a partner joins the more similar one of the
    reference words around it; where one joins the next, those after it do too. `pieces` cuts a word into those that
    are compared (a tokeniser), the first of which decides; `exact` compares whole characters.
    """

    def __init__(self, *, exact: bool = False, pieces: Callable[[str], Sequence[str]] | None = None) -> None:
        self.exact, self.pieces = exact, pieces

    def __call__(self, words: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
        said, owner = self.cut(words, range(len(words)))
        wanted, sentence = self.cut(chain(*references), (s for s, text in enumerate(references) for _ in text))
        if not wanted:
            return [0] * len(words)
        alike = Likeness(wanted, said, exact=self.exact)
        joined = join(columns(alike), alike)
        first = [j for j in range(len(said)) if not j or owner[j] != owner[j - 1]]
        return [sentence[joined[j]] for j in first]

    def cut(self, words: Iterable[str], owners: Iterable[int]) -> tuple[list[str], list[int]]:
        """Pieces of the words in their normal form, and the owner of each."""
        normal = [unicodedata.normalize("NFKC", word).lower() for word in words]
        parts = [(self.pieces and self.pieces(word)) or [word] for word in normal]
        return list(chain(*parts)), [owner for owner, part in zip(owners, parts, strict=True) for _ in part]


class Likeness:
    """How alike a reference word and a word said are, in [0, 1]; minus infinity for a mark and a word."""

    def __init__(self, wanted: Sequence[str], said: Sequence[str], *, exact: bool) -> None:
        rows, self.row = np.unique(np.array(wanted, object), return_inverse=True)
        others, self.column = np.unique(np.array(said, object), return_inverse=True)
        letters = {letter: k for k, letter in enumerate(sorted({*"".join(rows), *"".join(others)}))}
        a, b = has(rows, letters), has(others, letters)
        both = a @ b.T
        self.table: Array = both / np.maximum(a.sum(1)[:, None] + b.sum(1)[None] - both, 1)
        if exact:
            self.table = (rows[:, None] == others[None]).astype(float)
        mark, other = (np.array([word in MARKS for word in part], bool) for part in (rows, others))
        self.table[mark[:, None] != other[None]] = -np.inf

    def of(self, i: int) -> Array:
        """Of reference word i and every word said [J]."""
        similar: Array = self.table[self.row[i]][self.column]
        return similar

    def between(self, i: int | None, j: int) -> float:
        """Of two words; minus infinity where there is no reference word."""
        return -np.inf if i is None else float(self.table[self.row[i], self.column[j]])


def has(words: NDArray[np.object_], letters: dict[str, int]) -> Array:
    """1 where a word has a letter."""
    table = np.zeros((len(words), len(letters)))
    for k, word in enumerate(words):
        table[k, [letters[letter] for letter in word]] = 1
    return table


def columns(alike: Likeness) -> list[Column]:
    """The alignment whose pairs have the greatest sum of similarities, in order."""
    n, m = len(alike.row), len(alike.column)
    move = np.zeros((n + 1, m + 1), np.int8)  # 0 a pair, 1 a missing word, 2 a spare one
    move[1:, 0], move[0, 1:] = 1, 2
    total = np.zeros(m + 1)
    for i in range(n):
        match = total[:-1] + alike.of(i)
        best = np.concatenate([[0.0], np.maximum(match, total[1:])])
        top = np.maximum.accumulate(best)
        move[i + 1, 1:] = np.where(top[1:] > best[1:], 2, np.where(match >= total[1:], 0, 1))
        total = top
    found, i, j = list[Column](), n, m
    while i or j:
        kind = move[i, j]
        i, j = i - (kind != 2), j - (kind != 1)
        found.append((None if kind == 2 else i, None if kind == 1 else j))
    return found[::-1]


def join(aligned: Sequence[Column], alike: Likeness) -> list[int]:
    """A reference word for every word said [J]."""
    joined, last, coming = list[int](), None, None
    following = next_words(aligned)
    for (i, j), after in zip(aligned, following, strict=True):
        if i is not None:
            last, coming = i, None
        elif j is not None and (last is None or better(alike, after, last, j)):
            coming = after
        if j is not None:
            joined.append(last if coming is None else coming)  # type: ignore[arg-type]  # one of them is a word
    return joined


def better(alike: Likeness, after: int | None, last: int, j: int) -> bool:
    """The next reference word is more similar than the last one."""
    return alike.between(after, j) > alike.between(last, j)


def next_words(aligned: Sequence[Column]) -> list[int | None]:
    """The first reference word at or behind each column."""
    found, after = list[int | None](), None
    for i, _ in reversed(aligned):
        after = after if i is None else i
        found.append(after)
    return found[::-1]
