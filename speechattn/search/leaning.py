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
    far. A phrase begins where a word begins. One that lost something and is not said whole is taken back to where it
    began (`since`, a place in the draft; below 0 it is committed and stays), and none begins there again (`barred`).
    """

    phrases: Phrases
    node: int
    lost: float = 0.0
    since: int = 0
    barred: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.root, self.trie = self.phrases.set_of(self.node)
        self.node -= self.root

    def choose(
        self, place: int, token: int, log_prob: float, log_probs: Callable[[list[int]], list[float]]
    ) -> tuple[int, float]:  # fmt: skip
        """What is said at this place of the draft instead of the most probable `token`, and its log-probability.

        `log_probs` gives those of other tokens.
        """
        arcs = {t: (self.trie.depth[to], lost) for t, to, lost in self._arcs(new=place not in self.barred)}
        if not arcs or token in arcs:
            return token, log_prob
        best, other = max(zip(log_probs([*arcs]), arcs, strict=True))
        length, lost = arcs[other]
        fits = lost + log_prob - best <= self.phrases.bonus * length
        return (other, best) if fits else (token, log_prob)

    def fails(self, token: int, end: bool) -> bool:
        """With this token, or at the `end` of the text, a phrase that lost something is not said whole."""
        if not self.lost:
            return False
        at = self._at(end or self._begins(token))
        return self.trie.open[at] > 0 and (end or token not in self.trie.children[at])

    def say(self, token: int, *, place: int = -1, lost: float = 0.0) -> None:
        """The text goes on with this token, which lost so much."""
        at, children = self._at(self._begins(token)), self.trie.children
        self.lost = self.lost if self.trie.open[at] else 0.0  # what was said whole stays
        while at and token not in children[at]:
            at = self.trie.failure[at]
        inside = not at and not self._begins(token)
        node = 0 if inside else children[at].get(token, 0)
        self.node = 0 if self.trie.depth[node] == 1 and place in self.barred else node
        if lost and not self.lost:
            self.since = place - self.trie.depth[self.node] + 1
        self.lost += lost

    def take_back(self) -> int:
        """The place in the draft at which the text is said again, without the phrase that began there."""
        self.barred.add(self.since)
        self.node, self.lost = 0, 0.0
        return max(0, self.since)

    def walked(self, tokens: Iterable[int]) -> int:
        """The node behind these tokens."""
        for token in tokens:
            self.say(token)
        return self.root + self.node

    def _at(self, word: bool) -> int:
        """Where the text stands if a word begins now, or if the last one goes on."""
        return self.trie.ended[self.node] if word else self.node

    def _begins(self, token: int) -> bool:
        begins = self.phrases.begins
        return begins is None or token in begins

    def _arcs(self, *, new: bool) -> Iterator[tuple[int, int, float]]:
        """Tokens that go on with a phrase, or begin a `new` one, where they lead, and what that phrase lost before."""
        for word in (True, False):
            at = self._at(word)
            lost = self.lost if self.trie.open[at] else 0.0  # else it was said
            while at or (word and new):
                yield from ((t, to, lost) for t, to in self.trie.children[at].items() if self._begins(t) == word)
                if not at or lost:
                    break
                at = self.trie.failure[at]
