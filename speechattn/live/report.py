"""Which of the preferred phrases were said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from speechattn.live.events import Word
from speechattn.search.phrases import Hits, hits

__all__ = ["Report"]


class Report:
    """Finds phrases in committed words as they come; one that was never said is there with no times.

    Words are compared without upper and lower case, and without punctuation at their ends.
    """

    def __init__(self, phrases: Sequence[str]) -> None:
        self.phrases = [(phrase, (tuple(map(plain, phrase.split())),)) for phrase in phrases]
        self.longest = max((len(words) for _, (words,) in self.phrases), default=1)
        self.found = [list[tuple[float, float]]() for _ in phrases]
        self.tail: list[Word] = []  # a phrase may begin in it

    def add(self, words: Iterable[Word]) -> None:
        """More committed words."""
        every, known = [*self.tail, *words], len(self.tail)
        if not self.phrases or len(every) == known:
            return
        for found, hit in zip(self.found, hits(self.phrases, [plain(word.text) for word in every]), strict=True):
            new = [(int(first), int(last)) for first, last in hit.spans if last > known]
            found += [(every[first].start, every[last - 1].end) for first, last in new]
        self.tail = every[max(0, len(every) - self.longest + 1) :] if self.longest > 1 else []

    def hits(self) -> list[Hits]:
        """Each phrase with the times in seconds at which it was said."""
        return [Hits(text, tuple(found)) for (text, _), found in zip(self.phrases, self.found, strict=True)]


def plain(word: str) -> str:
    """A word without spaces, case, and punctuation at its ends."""
    return word.strip(' \t\n.,;:!?"()[]-').casefold()
