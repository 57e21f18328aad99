"""How much of what was shown had to be taken back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

__all__ = ["Erasure", "erasure"]


@dataclass(frozen=True)
class Erasure:
    """Words that were taken back, and words of the last text. Erasures add up over utterances."""

    erased: int = 0
    last: int = 0

    @property
    def normalised(self) -> float | None:
        """NE (Arivazhagan et al. 2020, arXiv 1912.03393): erased words for each word of the last text; None if none."""
        return self.erased / self.last if self.last else None

    def __add__(self, other: Erasure) -> Erasure:
        return Erasure(self.erased + other.erased, self.last + other.last)


def erasure(shown: Iterable[Sequence[str]]) -> Erasure:
    """Of the texts that stood there one after the other: a text loses the words behind its common part with the next.

    Who changes one word early in a line takes all words after it back. A policy that only commits has none.
    """
    total, last = 0, list[str]()
    for text in shown:
        words = list(text)
        same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(last, words, strict=False)))
        total, last = total + len(last) - same, words
    return Erasure(total, len(last))
