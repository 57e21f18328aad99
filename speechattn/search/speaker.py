"""One row of a greedy search that says its tokens one by one, and knows when to stop."""

from __future__ import annotations

from dataclasses import dataclass, field

from speechattn.search.loops import LONGEST, loop_end

__all__ = ["RECENT", "Speaker"]

RECENT = 3 * LONGEST  # committed tokens in which a loop may have begun


@dataclass
class Speaker:
    """One row while it speaks: its `tokens`, at most `most`, behind those that were `told`; `guess` may be them.

    `far` is the last frame where a token had its peak; none may have it before frame `far - rewind`.
    """

    told: list[int]
    guess: list[int]
    most: int
    far: int
    rewind: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    speaks: bool = True

    def follow(
        self, tokens: list[int], log_probs: list[float], stops: list[bool], peaks: list[int], late: list[bool]
    ) -> int:
        """Say `tokens`, as far as the guess behind which they were found is right -> how many came into question.

        What is `late` looks at the end of the sound, and says nothing of how far the text is.
        """
        guess, self.guess = self.guess, []
        for i, found in enumerate(zip(tokens, log_probs, stops, strict=True)):
            self._say(found[0], found[1], found[2] or peaks[i] < self.far - self.rewind)
            self.far = self.far if late[i] else max(self.far, peaks[i])
            if not self.speaks or i >= len(guess) or guess[i] != found[0]:
                return i + 1
        return len(tokens)

    def _say(self, token: int, log_prob: float, stop: bool) -> None:
        if stop or len(self.tokens) >= self.most:
            self.speaks = False
            return
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        recent = [*self.told, *self.tokens][-RECENT:]
        if (loop := loop_end(recent)) is not None:
            del self.tokens[max(0, len(self.tokens) - (len(recent) - loop)) :]
            del self.log_probs[len(self.tokens) :]
            self.speaks = False
