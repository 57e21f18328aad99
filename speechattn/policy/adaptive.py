"""wait-k by the words that a CTC head has heard, in place of a fixed time for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from speechattn.decoder.ctc import CTC
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.policy import Policy, Source
from speechattn.policy.hold import WaitK
from speechattn.search import Draft
from speechattn.text.pieces import Pieces

__all__ = ["CTCWaitK", "Counts", "WordCounter", "WordsHeard"]


@dataclass(frozen=True)
class WordsHeard:
    """Of a CTC path: `whole` words, the labels of the word that is `open` behind them, and the `last` frame's label."""

    whole: int = 0
    open: tuple[int, ...] = ()
    last: int | None = None


@dataclass(frozen=True)
class WordCounter:
    """Counts the words that the most probable path of a CTC `head` has begun; `pieces` spell its labels.

    Law: for any split of the labels the count is that of `Pieces.words` over the path without repeats and blanks; a
    mark of a word of which no letter was heard is none. In `spaceless` text every piece is a word.
    """

    head: CTC
    pieces: Pieces
    spaceless: bool = False

    def labels(self, frames: Frames) -> list[list[int]]:
        """The most probable label of each frame [B, T, D], for every row; -1 where a frame is not valid."""
        best = self.head(frames).values.argmax(-1)
        return best.where(frames.mask, -1).tolist()  # type: ignore[no-any-return]

    def hear(self, labels: Iterable[int], before: WordsHeard | None = None) -> WordsHeard:
        """The labels of the next frames, behind what was heard `before`."""
        before = before or WordsHeard()
        said, last = [*before.open], before.last
        for label in labels:
            if label >= 0:
                said += [label] if label not in (last, self.head.blank) else []
                last = label
        sizes, whole, at = self.pieces.words(said, spaceless=self.spaceless), before.whole, 0
        for size in sizes[:-1]:
            whole += self._spoken(said[at : at + size])
            at += size
        return WordsHeard(whole, tuple(said[at:]), last)

    def count(self, heard: WordsHeard) -> int:
        """How many words were begun."""
        return heard.whole + self._spoken(heard.open)

    def _spoken(self, word: Iterable[int]) -> bool:
        """It is more than marks of words."""
        return any(label not in self.pieces.spaces for label in word)


@runtime_checkable
class Counts(Policy, Protocol):
    """A policy that wants to be told how many words were heard: `Source.words`, counted by its `counter`."""

    @property
    def counter(self) -> WordCounter:
        """Who counts."""


@dataclass(frozen=True)
class CTCWaitK(WaitK):
    """wait-k of which a CTC head counts the words that were heard (adaptive detection, arXiv 2204.03783, section 3).

    Who speaks slowly is waited for, and a pause is no word. InputError where nobody counted.
    """

    counter: WordCounter = field(kw_only=True)

    def _heard(self, draft: Draft, source: Source) -> int:
        if source.words is None:
            raise InputError("nobody counted the words of the source")
        return source.words
