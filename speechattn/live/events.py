"""What a session says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Event", "Trace", "Word"]


@dataclass(frozen=True)
class Word:
    """A committed word: `start` and `end` in seconds of the stream, `confidence` its posterior in [0, 1]."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Trace:
    """What a search proposed behind the committed text, the `draft` of so many `tokens`, and what became of it.

    The first `committed` tokens were committed. The word behind them, `at`, waits: `why` says it in the terms of the
    policy, or of the session, which commits whole words alone. Both are empty where nothing waits.
    """

    draft: str
    tokens: int
    committed: int
    at: str = ""
    why: str = ""

    def __str__(self) -> str:
        waits = f": {self.at.strip()!r} waits, {self.why}" if self.why else ""
        return f"{self.committed} of {self.tokens} tokens{waits}"


@dataclass(frozen=True)
class Event:
    """One decision. `committed` is new text that never changes: joined over all events it is the transcript.

    `unstable` is the rest of the current hypothesis, replaced by every later event. `final` marks the end of an
    utterance. A `withheld` event carries in `withheld` text that was judged a loop and will not be committed. A session
    that was asked for a `trace` says at every step that has a draft why it committed no more. `terms` are those that
    were retrieved and that `committed` completes.

    Times in seconds: `audio_s` of sound had been heard; `emitted_s` is when the words appeared had the sound come at
    speaking speed, the time of computing and of waiting for earlier steps included; `wall_s` is the clock since the
    session began. Events are compared without the two that depend on the machine.
    """

    kind: Literal["text", "withheld"]
    committed: str
    unstable: str
    words: tuple[Word, ...]
    audio_s: float
    final: bool = False
    withheld: str = ""
    emitted_s: float = field(default=0.0, compare=False)
    wall_s: float = field(default=0.0, compare=False)
    trace: Trace | None = None
    terms: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One line of JSON; times to the millisecond; a trace and terms only where there are some."""

        def short(value: Any) -> Any:
            if isinstance(value, float):
                return round(value, 3)
            if isinstance(value, dict):
                return {key: short(item) for key, item in value.items()}
            return [short(item) for item in value] if isinstance(value, list | tuple) else value

        said = {key: value for key, value in asdict(self).items() if key not in ("trace", "terms") or value}
        return json.dumps(short(said), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Event:
        """The event that `to_json` wrote; ValueError or TypeError when the line is none."""
        said = json.loads(line)
        trace = Trace(**said["trace"]) if said.get("trace") is not None else None
        words, terms = tuple(Word(**word) for word in said["words"]), tuple(said.get("terms", ()))
        return cls(**{**said, "words": words, "trace": trace, "terms": terms})
