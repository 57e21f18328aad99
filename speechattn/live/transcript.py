"""A whole recording as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from speechattn.audio.read import open_recording
from speechattn.audio.resample import Samples
from speechattn.audio.vad import VoiceActivity
from speechattn.audio.vision import Image
from speechattn.live.endings import StreamSettings
from speechattn.live.events import Event, Word
from speechattn.live.formats import Segment, segments
from speechattn.live.lips import beside
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
    lips: Image | None = None,
) -> Transcript:  # fmt: skip
    """A recording, or samples [n] at the model's rate, through a `Session`: the same text as live.

    `lips` are pictures [m, size, size] of the same time, 25 a second, for a model that sees them; of a video alone the
    sound is heard. InputError for a recording that cannot be read.
    """
    session = Session(model, policy=policy, settings=settings, vad=vad, search=search)
    events: list[Event] = []
    session.on_event = events.append
    if isinstance(sound, str | Path):
        recording = open_recording(Path(sound))
        for block, seen in beside(recording.blocks(), recording.rate, lips):
            session.feed(block, recording.rate, seen)
    else:
        session.feed(sound, model.sample_rate, lips)
    session.finish()
    parts = segments(events)
    return Transcript(" ".join(part.text for part in parts), tuple(parts))
