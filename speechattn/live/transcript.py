"""A whole recording as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from speechattn.audio.read import open_recording
from speechattn.audio.resample import Samples
from speechattn.audio.vad import VoiceActivity
from speechattn.live.endings import StreamSettings
from speechattn.live.events import Event, Word
from speechattn.live.formats import Segment, segments
from speechattn.live.listener import StreamModel, WindowModel
from speechattn.live.session import Session
from speechattn.live.windowed import Settings
from speechattn.policy import Policy
from speechattn.search import Search

__all__ = ["Transcript", "transcribe"]


@dataclass(frozen=True)
class Transcript:
    """What was said: the text, and its segments with words, times and confidences."""

    text: str
    segments: tuple[Segment, ...]

    @property
    def words(self) -> tuple[Word, ...]:
        """All words in order."""
        return tuple(word for segment in self.segments for word in segment.words)


def transcribe(
    model: StreamModel | WindowModel, sound: str | Path | Samples, *, policy: Policy | None = None,
    settings: Settings | StreamSettings | None = None, vad: VoiceActivity | None = None, search: Search | None = None,
) -> Transcript:  # fmt: skip
    """A recording, or samples [n] at the model's rate, through a `Session`: the same text as live.

    InputError for a recording that cannot be read.
    """
    session = Session(model, policy=policy, settings=settings, vad=vad, search=search)
    events: list[Event] = []
    session.on_event = events.append
    if isinstance(sound, str | Path):
        recording = open_recording(Path(sound))
        for block in recording.blocks():
            session.feed(block, recording.rate)
    else:
        session.feed(sound, model.sample_rate)
    session.finish()
    parts = segments(events)
    return Transcript(" ".join(part.text for part in parts), tuple(parts))
