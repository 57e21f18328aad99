"""StreamAtt's history (Papi, Gaido, Negri, Bentivogli, arXiv 2406.06097): what stays of endless speech and its text.

Behind every look the text is cut first, then the sound: it begins where the text that stays looks first. Where no text
is forgotten all sound stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from speechattn.policy.align_att import AlignAtt
from speechattn.search import Draft

__all__ = ["STRONG", "Characters", "Punctuation", "TextHistory", "Words", "earliest", "kept"]

STRONG = ".!?:;\u3002\uff01\uff1f\uff1a\uff1b"  # marks that end a thought, the wide ones too
MOST_TOKENS = 128


class TextHistory(Protocol):
    """How much of the committed text stays. A pure function; a longer history never keeps less."""

    def keep(self, words: Sequence[str]) -> int:
        """How many of the newest of these committed words stay."""


@dataclass(frozen=True)
class Words:
    """The last `n` words: FixedWords, of which the paper keeps 20."""

    n: int = 20

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"a history of {self.n} words: at least 1")

    def keep(self, words: Sequence[str]) -> int:
        """At most so many."""
        return min(self.n, len(words))


@dataclass(frozen=True)
class Characters:
    """The last words that have at most `n` characters, spaces not counted: where nothing says what a word is."""

    n: int = 60

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"a history of {self.n} characters: at least 1")

    def keep(self, words: Sequence[str]) -> int:
        """As many as fit, and at least the last one."""
        sizes = accumulate(len("".join(word.split())) for word in reversed(words))
        return max(min(1, len(words)), sum(size <= self.n for size in sizes))


@dataclass(frozen=True)
class Punctuation:
    """What was said since the last strong mark, which ends a word; a mark at the very end keeps its sentence."""

    marks: str = STRONG

    def keep(self, words: Sequence[str]) -> int:
        """All where there is no mark."""
        ends = (i for i in range(len(words) - 2, -1, -1) if words[i].rstrip().endswith(tuple(self.marks)))
        return len(words) - 1 - next(ends, -1)


def kept(history: TextHistory, words: Sequence[str], sizes: Sequence[int], *, most: int = MOST_TOKENS) -> int:
    """How many of the newest words stay: what the history says, and no more than fit into `most` tokens.

    `sizes` are the tokens of each word; the last word stays, whatever its size.
    """
    fits = sum(total <= most for total in accumulate(reversed(sizes)))
    return min(history.keep(words), max(min(1, len(words)), fits))


def earliest(draft: Draft, reader: AlignAtt, committed: int, tokens: range) -> int:
    """The first frame at which one of some `tokens` looks: the sound before it is not needed any more.

    They are counted from the first of the last `committed` ones before the draft. The attention is read as `reader`
    reads it: its heads, its last frames dropped, its normalisation.
    """
    peaks, _ = reader.peaks(draft, committed)
    return int(peaks[tokens.start : tokens.stop].min())
