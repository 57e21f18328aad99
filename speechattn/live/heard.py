"""What a listener knows of the sound beside its words: where nobody speaks, how many words were heard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from speechattn.frames import Frames
from speechattn.live.endings import Limits
from speechattn.live.listener import StreamModel
from speechattn.policy import Policy
from speechattn.policy.adaptive import Counts, WordsHeard
from speechattn.policy.retranslation import Retranslation
from speechattn.search import Beam, Search

__all__ = ["SourceWords", "nothing_said", "room_left", "shown"]


class SourceWords:
    """How many words of an utterance were heard, where the policy counts them; else nobody does.

    A stream tells the labels of its new frames, and those ahead as far as they are known; a window all of its frames
    at each look, and how many of them it forgets then.
    """

    def __init__(self, policy: Policy | None) -> None:
        self.counter = policy.counter if isinstance(policy, Counts) else None
        self.anew()

    def anew(self) -> None:
        """Another utterance begins."""
        self.heard, self.gone, self.now = WordsHeard(), 0, list[int]()

    def labels(self, frames: Frames) -> list[list[int]]:
        """What the counter hears in each frame [B, T, D]; none where nobody counts."""
        return [[] for _ in frames.mask] if self.counter is None else self.counter.labels(frames)

    def hear(self, labels: Sequence[int]) -> None:
        """Labels of the next frames."""
        if self.counter is not None:
            self.heard = self.counter.hear(labels, self.heard)

    def count(self, ahead: Sequence[int]) -> int | None:
        """Words that were begun, also in the labels ahead, which may change."""
        return None if self.counter is None else self.counter.count(self.counter.hear(ahead, self.heard))

    def window(self, frames: Frames) -> int | None:
        """Words that were begun before and in a window [1, T, D] that was read anew."""
        if self.counter is None:
            return None
        self.now = self.counter.labels(frames)[0]
        return self.gone + self.counter.count(self.counter.hear(self.now))

    def forget(self, n: int) -> None:
        """The window loses its first `n` frames."""
        if self.counter is not None:
            self.gone += self.counter.count(self.counter.hear(self.now[:n]))
            self.now = self.now[n:]


def nothing_said(model: StreamModel, search: Search, frames: Frames) -> list[list[bool]]:
    """Frames [B, T] in which nothing is said; where only the search hears, nobody knows of any."""
    return [[False] * frames.mask.shape[1] for _ in frames.mask] if search.hears else model.blank(frames).tolist()


def room_left(search: Search, beam: Beam, limits: Sequence[Limits]) -> list[float]:
    """The share of its room that each search has left: none where it heard nothing for so long that it is over."""
    room: list[float] = search.room(beam).tolist()
    if not search.hears:
        return room
    waited = search.waited(beam).tolist()
    return [0.0 if n >= its.silence else left for n, its, left in zip(waited, limits, room, strict=True)]


def shown(policy: Policy | None, tail: Sequence[int], words: Callable[[Sequence[int]], list[int]]) -> Sequence[int]:
    """As much of an unstable tail as is on the screen: what retranslation masks is not."""
    return tail[: policy.shown(words(tail))] if isinstance(policy, Retranslation) and policy.mask else tail
