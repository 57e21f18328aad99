"""One row of a greedy search that says its tokens one by one, and knows when to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from speechattn.search.leaning import Leaning
from speechattn.search.loops import LONGEST, loop_end

__all__ = ["RECENT", "Speaker"]

RECENT = 3 * LONGEST  # committed tokens in which a loop may have begun


@dataclass
class Speaker:
    """One row while it speaks: its `tokens`, at most `most`, behind those that were `told`; `guess` may be them.

    Of the frames that were `heard` it sees those around `far`, the last one where a token had its peak: `back` before
    it and `reach` behind it, both up to where half a reach begins or ends. It sees more (`wider`) where it finds the
    end of the text, or a peak in the last `edge` frames (that may be about a sound that goes on) or more than `back`
    before `far` (that is said again). Of all that was heard this ends the draft.

    It may be `leaning` towards phrases, but not instead of the end of the text; where one is taken back the row is
    `again` at an earlier token. One that lost something and is half said where the draft ends is left out of it.
    """

    told: list[int]
    guess: list[int]
    most: int
    far: int
    heard: int
    back: int
    reach: int
    edge: int
    leaning: Leaning | None = None
    wider: int = 0
    again: bool = False
    fars: list[int] = field(default_factory=list)  # before each token
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    speaks: bool = True

    @property
    def view(self) -> tuple[int, int]:
        """The first frame that it sees, and the last plus one."""
        step = max(1, self.reach // 2)
        end = -((self.far + self.reach) // -step) + self.wider
        return (self.far - self.back) // step * step, min(self.heard, end * step)

    def follow(
        self, tokens: list[int], log_probs: list[float], ends: list[bool], peaks: list[int], *, whole: bool,
        others: Callable[[int, list[int]], list[float]],
    ) -> int:  # fmt: skip
        """Say `tokens`, which were found in this view, as far as the guess behind which they were is right -> how many
        came into question. Of the `whole` text nothing is about a sound that goes on. `others` are the
        log-probabilities of other tokens at a place.
        """
        guess, self.guess, self.again, view = self.guess, [], False, self.view
        for i, (best, probable, end, peak) in enumerate(zip(tokens, log_probs, ends, peaks, strict=True)):
            token, log_prob = best, probable
            if self.leaning is not None and not end:
                token, log_prob = self.leaning.choose(best, probable, partial(others, i))
            late, end = peak >= view[1] - self.edge, end or peak < self.far - self.back
            if (end or late) and view[1] < self.heard:
                self.guess, self.wider = guess[i:], self.wider + 1
                return i
            full = len(self.tokens) >= self.most
            waits, full = (late or end or full) and not whole, whole and full
            if self.leaning is not None and not waits and self.leaning.fails(token, end or full):
                self._take_back(self.leaning)
                return i
            if self.leaning is not None and waits and self.leaning.fails(token, end=True):
                self._forget(self.leaning.first)  # nobody knows yet whether it is the phrase
            self.wider, right = 0, i < len(guess) and guess[i] == token
            self._say(token, log_prob, end or waits, probable - log_prob)
            self.far = self.far if late else max(self.far, peak)
            if not self.speaks or not right:
                return i + 1
            if self.view != view:
                self.guess = guess[i + 1 :]
                return i + 1
        return len(tokens)

    def _take_back(self, leaning: Leaning) -> None:
        """Speak again from where a phrase began that is none."""
        place = leaning.take_back()
        self.far, self.wider, self.again = self.fars[place], 0, True
        self._forget(place)

    def _forget(self, place: int) -> None:
        """The tokens from there on were not said."""
        del self.tokens[place:], self.log_probs[place:], self.fars[place:]

    def _say(self, token: int, log_prob: float, stop: bool, lost: float) -> None:
        if stop or len(self.tokens) >= self.most:
            self.speaks = False
            return
        if self.leaning is not None:
            self.leaning.say(token, lost)
        self.fars.append(self.far)
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        recent = [*self.told, *self.tokens][-RECENT:]
        if (loop := loop_end(recent)) is not None:
            del self.tokens[max(0, len(self.tokens) - (len(recent) - loop)) :]
            del self.log_probs[len(self.tokens) :]
            self.speaks = False
