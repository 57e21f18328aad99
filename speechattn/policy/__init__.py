"""How much of a draft is safe now: the READ/WRITE decision of simultaneous recognition and translation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from speechattn.decoder.attention import Head
from speechattn.search import Draft

__all__ = ["Policy", "Source"]


@dataclass(frozen=True)
class Source:
    """What has been heard of the utterance: `frames` encoder frames of `frame_s` seconds each; `finished` when no more
    will come.

    `paused`: the newest frames hold no speech, so that no word is cut off at their end; never said of a translation,
    whose words may depend on what follows. `words`: how many words were heard, for a policy that counts them
    (`adaptive.Counts`); None where nobody does.
    """

    frames: int
    frame_s: float
    finished: bool
    paused: bool = False
    words: int | None = None


class Policy(Protocol):
    """A pure function of draft, source and its own state.

    Laws: at most the whole draft is committed; a finished source commits all of it; a more conservative setting
    never commits more of the same draft. Whole words are the session's business, not the policy's.
    """

    @property
    def heads(self) -> tuple[Head, ...]:
        """Whose attention rows it wants in the draft."""

    def initial(self) -> Any:
        """The state at the start of a session."""

    def accept(self, draft: Draft, source: Source, state: Any) -> tuple[int, Any]:
        """Commit the first n tokens of the draft; 0 waits for more input."""

    def why(self, draft: Draft, source: Source, state: Any, n: int) -> str:
        """Why token `n` of the draft waits, in the policy's own words and numbers; asked for a trace alone.

        `accept` was given the same and committed only the first `n`. Empty where the policy would not hold it back.
        """
