"""What `benchmarks/model.py` measures: jobs that a process of its own can do, each with one model and one thread.

Computing is counted in processor time, so that a job may run beside another one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from speechattn import AlignAtt, Event, Session, load_model
from speechattn.attention import Span, set_span
from speechattn.audio.hearing import hear
from speechattn.audio.resample import Samples
from speechattn.data.fotaq import Line
from speechattn.data.streams import Stream
from speechattn.live.listener import WindowModel
from speechattn.model.chunks import set_chunk
from speechattn.model.recognizer import Recognizer
from speechattn.pretrained.whisper import WhisperModel
from speechattn.pretrained.whisper.load import FRAME_THRESHOLD

RATE = 16000
PIECE_S = 0.1  # sound arrives in pieces of this length
TEACHER = "tiny.en"
WINDOW_S = 30.0
AFTER_S = 1.5  # of silence behind a clip that is heard at once: Whisper's decoder ends its text there


@dataclass(frozen=True)
class Listened:
    """One stream heard through: its events, what each piece cost in ms, and megabytes in use each minute."""

    events: list[Event]
    step_ms: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of sound

    @property
    def text(self) -> str:
        """All that was committed."""
        return "".join(event.committed for event in self.events)

    def growth(self) -> tuple[float, str, str]:
        """The slope of memory from minute 2 on, its unit, and where memory stood in between."""
        memory = self.megabytes[2:] if len(self.megabytes) > 4 else self.megabytes
        slope = 60 * float(np.polyfit(range(len(memory)), memory, 1)[0]) if len(memory) > 1 else 0.0
        steps = sum(b - a > 1 for a, b in pairwise(memory))
        stood = ", ".join(f"{memory[round(at * (len(memory) - 1))]:.0f}" for at in (0, 0.25, 0.5, 0.75, 1))
        return slope, "MB/h", f"slope from minute 2 on; MB then and by quarters: {stood}; {steps} steps of over 1 MB"

    @property
    def words(self) -> int:
        """How many."""
        return sum(len(event.words) for event in self.events)


def streaming(name: str, chunk_ms: int | None = None) -> Recognizer:
    """The model, on one thread; with another chunk than its own."""
    torch.set_num_threads(1)
    model = load_model(name)
    assert isinstance(model, Recognizer), f"{name} does not stream"
    if chunk_ms is not None:
        set_chunk(model, chunk_ms)
    return model


def pieces(samples: Samples) -> Iterator[Samples]:
    """The sound as it arrives."""
    step = round(PIECE_S * RATE)
    yield from (samples[at : at + step] for at in range(0, len(samples), step))


def megabytes() -> float:
    """Memory of this process that is of no file; pages of files come and go with what else the machine does."""
    said = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    return int(said.split()[0]) * 1024 / 1e6


def through(session: Session, samples: Samples) -> Listened:
    """Everything that a session says of the samples [n].

    Events go to a file until the end, as those of `speechattn stream --format jsonl` do: memory is that of listening.
    """
    cost, memory = np.zeros(-(-len(samples) // round(PIECE_S * RATE))), list[float]()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        for number, piece in enumerate(pieces(samples)):
            began = time.process_time()
            events = session.feed(piece, RATE)
            cost[number] = 1e3 * (time.process_time() - began)
            log.writelines(f"{event.to_json()}\n" for event in events)
            if number % round(60 / PIECE_S) == 0:
                memory.append(megabytes())
        log.writelines(f"{event.to_json()}\n" for event in session.finish())
        log.seek(0)
        return Listened([*map(Event.from_json, log)], cost.tolist(), memory, len(samples) / RATE)


def clips_streamed(name: str, chunk_ms: int | None, lines: Sequence[Line]) -> list[str]:
    """Each clip in a session of its own."""
    model = streaming(name, chunk_ms)
    said = tqdm(lines, desc=f"{chunk_ms or 'own'} ms", unit=" clips", disable=None)
    return [through(Session(model), sound(line)).text for line in said]


def clips_whole(name: str, lines: Sequence[Line]) -> list[str]:
    """The same weights with full context, each clip at once."""
    model = streaming(name)
    set_span(model.encoder, Span.full())
    window = model.windowed()
    assert window is not None
    return drafts(window, lines, "full", after_s=AFTER_S)


def clips_offline(lines: Sequence[Line]) -> list[str]:
    """Unmodified Whisper: each clip padded to 30 s."""
    torch.set_num_threads(1)
    model = load_model(TEACHER, pad_s=WINDOW_S)
    assert isinstance(model, WhisperModel)
    return drafts(model, lines, "offline")


def drafts(model: WindowModel, lines: Sequence[Line], name: str, *, after_s: float = 0.0) -> list[str]:
    """Greedily, clip after clip, with so much silence behind it."""
    texts = []
    for line in tqdm(lines, desc=name, unit=" clips", disable=None):
        x = np.pad(sound(line), [0, round(after_s * RATE)])
        memory = model.encode(hear(model.front_end, x), samples=len(x), finished=True)
        texts.append(model.tokenizer.decode(model.draft(memory, []).tokens.tolist()))
    return texts


def clips_again(lines: Sequence[Line]) -> list[str]:
    """Whisper live, which encodes its window again and again, under AlignAtt."""
    torch.set_num_threads(1)
    model = load_model(TEACHER)
    assert isinstance(model, WhisperModel)
    policy = AlignAtt.whisper(model.alignment_heads, FRAME_THRESHOLD)
    said = tqdm(lines, desc="alignatt", unit=" clips", disable=None)
    return [through(Session(model, policy=policy), sound(line)).text for line in said]


def stream_heard(name: str, chunk_ms: int | None, streams: Sequence[Stream]) -> list[Listened]:
    """Joined clips, each stream in a session; when a word was committed counts processor time."""
    model = streaming(name, chunk_ms)
    return [through(Session(model, clock=time.process_time), stream.samples) for stream in streams]


def sounds_heard(name: str, sounds: dict[str, Samples]) -> dict[str, tuple[int, float, str]]:
    """Of sounds in which nobody speaks: words, minutes, and what was said."""
    model, found = streaming(name), {}
    for what, samples in sounds.items():
        heard = through(Session(model), samples)
        found[what] = heard.words, heard.seconds / 60, heard.text
    return found


def sound(line: Line) -> Samples:
    """Samples [n] of a clip."""
    return np.asarray(soundfile.read(line.path, dtype="float32")[0])
