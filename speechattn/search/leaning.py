"""A greedy choice that leans towards phrases, and takes back what turns out to be none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from speechattn.search.phrases import Phrases

__all__ = ["Leaning"]


@dataclass
class Leaning:
    """Where the text of one row stands in its set of `phrases`: at `node`, as in a state of `Phrases`.

    A token that goes on with a phrase is said although another one is more probable, as long as what the phrase `lost`
    against the most probable tokens (a sum of differences of log-probabilities) is at most the bonus of its tokens so
    far. A phrase begins where a word begins. What was said whole stays, and what it lost is forgotten. A phrase that
    lost something and is not said whole is taken back to where it lost something `first` (a place in the draft): from
    there on the text leans towards none that began where it did (`since`, below 0 in committed text) (`barred`).
    """

    phrases: Phrases
    node: int
    lost: float = 0.0
    since: int = 0
    first: int = 0
    barred: dict[int, int] = field(default_factory=dict)
    before: list[tuple[int, float, int, int]] = field(default_factory=list)  # each token of the draft

    def __post_init__(self) -> None:
        self.root, self.trie = self.phrases.set_of(self.node)
        self.node -= self.root

    def choose(
        self, token: int, log_prob: float, log_probs: Callable[[list[int]], list[float]]
    ) -> tuple[int, float]:  # fmt: skip
        """What is said instead of the most probable `token`, and its log-probability; `log_probs` are those of others.

        Of the tokens that a phrase can afford it is the most probable one.
        """
        arcs: dict[int, float] = {}
        for other, left in self._arcs():
            arcs.setdefault(other, left)  # the longest phrase has most
        if not arcs or token in arcs:
            return token, log_prob
        each = zip(log_probs([*arcs]), arcs.items(), strict=True)
        fits = [(probable, other) for probable, (other, left) in each if log_prob - probable <= left]
        best, other = max(fits, default=(log_prob, token))
        return other, best

    def fails(self, token: int, end: bool) -> bool:
        """With this token, or at the `end` of the text, a phrase that lost something is not said whole."""
        at, lost = self._stands(end or self._begins(token))
        return lost > 0 and (end or token not in self.trie.children[at])

    def say(self, token: int, lost: float = 0.0) -> None:
        """The text goes on with this token, which lost so much."""
        before, place = (self.node, self.lost, self.since, self.first), len(self.before)
        word, children, failure = self._begins(token), self.trie.children, self.trie.failure
        at, self.lost = self._stands(word)
        if lost and not self.lost:
            while at and (token not in children[at] or self._barred(at, place)):
                at = failure[at]
            self.since, self.first = place - self.trie.depth[at], place
        self.lost += lost
        at = self._at(word)
        while at and token not in children[at]:
            at = failure[at]
        self.node = children[at].get(token, 0) if at or word else 0
        self.before.append(before)

    def take_back(self) -> int:
        """The place in the draft at which the text is said again, without the phrase that failed."""
        place, self.barred[self.since] = self.first, self.first
        self.node, self.lost, self.since, self.first = self.before[place]
        del self.before[place:]
        return place

    def walked(self, tokens: Iterable[int]) -> int:
        """The node behind these tokens."""
        for token in tokens:
            self.say(token)
        return self.root + self.node

    def _at(self, word: bool) -> int:
        """Where the text stands if a word begins now, or if the last one goes on."""
        return self.trie.ended[self.node] if word else self.node

    def _stands(self, word: bool) -> tuple[int, float]:
        """The same; in a phrase that lost something and was not said yet: where it stands, and what it lost."""
        at = here = self._at(word)
        while self.lost and self.trie.depth[here] > len(self.before) - self.since:
            here = self.trie.failure[here]
        return (here, self.lost) if self.lost and self.trie.open[here] else (at, 0.0)

    def _barred(self, at: int, place: int) -> bool:
        """A phrase that stands there at this place is one that failed, or began where that did."""
        return self.barred.get(place - self.trie.depth[at], place + 1) <= place

    def _begins(self, token: int) -> bool:
        begins = self.phrases.begins
        return begins is None or token in begins

    def _arcs(self) -> Iterator[tuple[int, float]]:
        """Tokens that go on with a phrase, or begin one, and what it can lose with them; of long phrases first."""
        place, bonus = len(self.before), self.phrases.bonus
        for word in (True, False):
            at, lost = self._stands(word)
            while at or word:
                if not self._barred(at, place):
                    left = bonus * (self.trie.depth[at] + 1) - lost
                    yield from ((t, left) for t in self.trie.children[at] if self._begins(t) == word)
                if not at or lost:
                    break
                at = self.trie.failure[at]
