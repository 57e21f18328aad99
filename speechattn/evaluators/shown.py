"""What an evaluator sees, as tokens: new ones at the end, after old ones were taken away."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from speechattn.live.events import Event
from speechattn.score.latency.simulstream import Tokens

__all__ = ["Output", "Shown", "string_of"]

MARK = "\u2581"  # before a piece of text that begins a word


@dataclass(frozen=True)
class Output:
    """Take the deleted tokens, or their string, from the end; then put the new ones there. Fields as in simulstream."""

    new_tokens: list[str]
    new_string: str
    deleted_tokens: list[str]
    deleted_string: str


class Shown:
    """The text of a recording on the screen: what is committed, and with `unstable` the rest behind it.

    `unit` says how tokens make a text: a `word` each, with blanks between them, a `char` each, or pieces (`spm`) that
    begin with U+2581 where a word does. Pieces alone can add to a word that stands there; a word that is a token goes,
    and comes again longer. Otherwise nothing is deleted but what is unstable. Memory does not grow with the text.
    """

    def __init__(self, unit: Tokens = "spm", *, unstable: bool = False) -> None:
        self.unit, self.unstable = unit, unstable
        self.last = ""  # the last committed word, where words are tokens
        self.loose: list[str] = []  # tokens at the end that may change
        self.begun = False  # some stand before them

    @property
    def empty(self) -> bool:
        """Nothing stands there."""
        return not (self.begun or self.loose)

    def show(self, events: Sequence[Event]) -> Output:
        """What the next events of a session change."""
        if not events:
            return Output([], "", [], "")
        text = self.last + "".join(event.committed for event in events)
        fixed, rest = self.tokens(text), events[-1].unstable if self.unstable else ""
        after = fixed + self.tokens(rest, more=bool(fixed)) if self.unit == "spm" else self.tokens(text + rest)
        before, stays = self.loose, len(fixed)
        if self.unit == "word" and fixed:
            word = re.search(r"\S+\s*$", text)
            self.last, stays = word.group() if word else "", stays - 1
        same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(before, after, strict=False)))
        output = self.output(after[same:], before[same:], begun=self.begun or same > 0)
        self.loose, self.begun = after[stays:], self.begun or stays > 0
        return output

    def again(self, output: Output) -> Output:
        """The last output, but with a new token: the last loose one, taken away and put back."""
        last = self.loose[-1:]
        return self.output(last, [*last, *output.deleted_tokens], begun=self.begun or len(self.loose) > 1)

    def output(self, new: Sequence[str], gone: Sequence[str], *, begun: bool) -> Output:
        """With the strings; lists of their own, since simulstream adds to them."""
        return Output(
            list(new), string_of(new, self.unit, begun=begun), list(gone), string_of(gone, self.unit, begun=begun)
        )

    def tokens(self, text: str, *, more: bool = False) -> list[str]:
        """Of a text behind those that stand there for good, and behind `more`."""
        if not (self.begun or more):
            text = text.lstrip()
        if self.unit == "word":
            return text.split()
        if self.unit == "char":
            return list(re.sub(r"\s+", " ", text))
        return [re.sub(r"^\s+", MARK, piece) for piece in re.findall(r"\s*\S+|\s+$", text)]


def string_of(tokens: Sequence[str], unit: Tokens, *, begun: bool) -> str:
    """The text of tokens, to be put behind what stands there when it has `begun`."""
    text = "".join(f" {token}" for token in tokens) if unit == "word" else "".join(tokens).replace(MARK, " ")
    return text if begun else text.removeprefix(" ")
