"""What one listener prefers: phrases of its user, and terms that are retrieved from the sound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.live.events import Word
from speechattn.live.report import Report
from speechattn.live.terms import Terms, TermUse, Watch
from speechattn.search.leaning import Leaning
from speechattn.search.phrases import Hits, Phrases
from speechattn.terms.text import Term
from speechattn.text.pieces import Encodes, spelled

__all__ = ["NO_TERMS", "Preferred"]

NO_TERMS = "this session was made without terms"
PROMPT = 100  # tokens, of 224 that Whisper takes


class Preferred:
    """A set of phrases in a `book` that others may use, too; None: there can be none.

    `root` is that of the set; None as long as it is the book's first one.
    """

    def __init__(
        self, book: Phrases | None, tokenizer: Encodes, *, spaceless: bool = False, terms: Terms | None = None,
        translates: bool = False,
    ) -> None:  # fmt: skip
        self.book, self.spaceless = book, spaceless
        self.tokenizer: Any = tokenizer
        self.watch = None if terms is None else Watch(terms, translates=translates)
        self.root: int | None = None
        self.phrases = () if book is None else book.lines
        self.report = Report(self.phrases)
        if terms is not None:
            self._book()
            self._check(terms.bank.terms)

    def _check(self, terms: Sequence[Term]) -> None:
        """InputError for terms that this model cannot say, before they are retrieved."""
        assert self.watch is not None
        for term in terms:
            spellings(self.watch.said(term), self.tokenizer, self.spaceless)

    def _book(self) -> Phrases:
        if self.book is None:
            raise InputError("this search takes no phrases: make it with phrases, if only an empty list")
        return self.book

    def prefer(self, phrases: Sequence[str]) -> int | None:
        """From now on these phrases and no others, beside terms; the old set's root, which is still in the book.

        InputError, and nothing is changed, for phrases that cannot be spelled.
        """
        self._book()
        spelled(phrases, self.tokenizer, spaceless=self.spaceless)
        self.phrases = tuple(phrases)
        old = self.turn()
        self.report = Report(phrases)
        return old

    def turn(self) -> int | None:
        """Another set: the phrases, and the terms that are retrieved now; the old one's root."""
        book, terms = self._book(), () if self.watch is None else self.watch.phrases
        wanted = (*self.phrases, *terms)
        found = [tokens for one in wanted for tokens in spellings(one, self.tokenizer, self.spaceless)]
        before, self.root = self.root, book.add(found)
        return before

    def drop(self, root: int | None) -> None:
        """A set that nobody uses any more: its place is free for those of others."""
        if root is not None:
            self._book().remove(root)

    def look(self, window: Frames) -> None:
        """Terms are sought in a window of frames [1, T, D]: those found, and no others, are preferred from now on."""
        if self.watch is not None:
            before = {*self.watch.phrases}
            self.watch.spotter.forget()
            self.watch.hear(window)
            if {*self.watch.phrases} != before:
                self.drop(self.turn())

    def leaning(self, said: Sequence[int]) -> Leaning | None:
        """For a text behind the tokens `said`; None where nothing can be preferred."""
        if self.book is None:
            return None
        root = self.book.root if self.root is None else self.root
        return Leaning(self.book, Leaning(self.book, root).walked(said))

    def prompt(self) -> list[int]:
        """The phrases and terms as text that was said before; as many as fit, the likeliest terms first."""
        tokens = list[int]()
        for phrase in (*self.phrases, *(() if self.watch is None else self.watch.phrases)):
            more = self.tokenizer.encode(f" {phrase}" if not tokens else f", {phrase}")
            if len(tokens) + len(more) > PROMPT:
                break
            tokens += more
        return tokens

    def add(self, words: Sequence[Word]) -> tuple[str, ...]:
        """More committed words; the retrieved terms that they complete."""
        self.report.add(words)
        return () if self.watch is None else self.watch.add(words)

    def anew(self) -> None:
        """The utterance is over: what was retrieved in it is not preferred any more."""
        if self.watch is not None:
            terms = self.watch.phrases
            self.watch.forget()
            self.drop(self.turn() if terms else None)

    def forget(self) -> None:
        """Nothing is preferred any more."""
        self.drop(self.root)
        self.root = None

    def add_terms(self, terms: Sequence[Term]) -> None:
        """From now on these may be retrieved, too. InputError, and nothing is changed, for one that cannot be."""
        if self.watch is None:
            raise InputError(NO_TERMS)
        self._check(terms)
        self.watch.spotter.add(terms)

    def remove_terms(self, sources: Sequence[str]) -> None:
        """From now on these are not retrieved."""
        if self.watch is None:
            raise InputError(NO_TERMS)
        self.watch.spotter.remove(sources)

    def hits(self) -> list[Hits]:
        """Where each phrase was said since it was asked for."""
        return self.report.hits()

    def uses(self) -> list[TermUse] | None:
        """What became of terms; None where there are none."""
        return None if self.watch is None else [*self.watch.uses.values()]


@lru_cache(maxsize=1 << 16)
def spellings(phrase: str, tokenizer: Any, spaceless: bool) -> tuple[tuple[int, ...], ...]:
    """The token sequences of a phrase, found once for all sessions. InputError for what cannot be spelled."""
    return spelled([phrase], tokenizer, spaceless=spaceless)[0].spellings
