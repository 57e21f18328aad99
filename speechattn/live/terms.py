"""Terms in a session: what is retrieved from the sound so far is what the search prefers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.live.events import Word
from speechattn.live.report import plain
from speechattn.search.phrases import hits
from speechattn.terms.bank import Bank, Found
from speechattn.terms.spotter import Spotter
from speechattn.terms.text import Term

__all__ = ["TermUse", "Terms", "Watch"]


@dataclass(frozen=True)
class Terms:
    """What may be said: of the terms of a `bank` up to `top_k` at a time, those with a probability of `threshold`.

    The bank's matcher must be made for the encoder of the session's model. Every session has a bank of its own. A term
    that is retrieved is not said for that: it must nearly be what is said anyway. So the threshold is a low one.
    """

    bank: Bank
    top_k: int = 10
    threshold: float = 0.02

    def __post_init__(self) -> None:
        if self.top_k < 1 or not 0 <= self.threshold <= 1:
            raise InputError(f"top k {self.top_k}, threshold {self.threshold:g}: wanted 1 or more, and 0 to 1")


@dataclass(frozen=True)
class TermUse:
    """What became of a term: in how many utterances it was `retrieved`, where of these it was `said` (start and end in
    seconds), and in how many it was not said: false alarms, or words that were not recognised all the same.
    """

    term: str
    retrieved: int
    said: tuple[tuple[float, float], ...]
    missed: int


class Watch:
    """The terms of one stream. A translation says their targets."""

    def __init__(self, terms: Terms, *, translates: bool = False) -> None:
        self.terms, self.translates = terms, translates
        self.spotter = Spotter(terms.bank.copy())
        self.uses: dict[str, TermUse] = {}
        self._anew()

    def _anew(self) -> None:
        self.found: list[Found] = []
        self.retrieved: dict[str, Term] = {}  # in this utterance, at any time
        self.words: list[Word] = []  # of this utterance
        self.told = 0  # words in which terms were looked for

    @property
    def phrases(self) -> tuple[str, ...]:
        """What is to be preferred now."""
        return tuple(self.said(found.term) for found in self.found)

    def said(self, term: Term) -> str:
        """What is written of it."""
        return term.target if self.translates and term.target is not None else term.source

    def hear(self, x: Frames) -> bool:
        """More frames [1, T, D] of the utterance; tells whether other phrases are preferred now."""
        before = {*self.phrases}
        if x.mask.shape[1]:
            self.spotter.hear(x)
            self.found = self.spotter.found(top_k=self.terms.top_k, threshold=self.terms.threshold)
            self.retrieved |= {self.said(found.term): found.term for found in self.found}
        return {*self.phrases} != before

    def add(self, words: Sequence[Word]) -> tuple[str, ...]:
        """More committed words; the retrieved terms that they complete."""
        if not words:
            return ()
        self.words += words
        names = tuple(name for name, spans in self._hits() for _, last in spans if last > self.told)
        self.told = len(self.words)
        return names

    def _hits(self) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
        """Where retrieved terms are said in this utterance, in words."""
        wanted = [(name, (tuple(map(plain, name.split())),)) for name in self.retrieved]
        found = hits(wanted, [plain(word.text) for word in self.words])
        return [(hit.text, tuple((int(a), int(b)) for a, b in hit.spans)) for hit in found]

    def forget(self) -> None:
        """The utterance is over; it counts if it had words."""
        for name, spans in self._hits() if self.words else []:
            old = self.uses.get(name, TermUse(name, 0, (), 0))
            said = tuple((self.words[a].start, self.words[b - 1].end) for a, b in spans)
            self.uses[name] = TermUse(name, old.retrieved + 1, old.said + said, old.missed + (not said))
        self.spotter.forget()
        self._anew()
