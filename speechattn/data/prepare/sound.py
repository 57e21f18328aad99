"""Sounds of a corpus: any file in, 16 kHz mono out, and files that are either complete or not there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import IO, Literal, TypeAlias

import numpy as np
import soundfile

from speechattn.audio.read import Contained, open_recording
from speechattn.audio.resample import Resampler, Samples, to_mono
from speechattn.errors import InputError

__all__ = [
    "AUDIO_FORMATS", "RATE", "AudioFormat", "Placed", "atomic", "in_place", "part", "read_sound", "whole",
    "write_sound",
]  # fmt: skip

AudioFormat: TypeAlias = Literal["flac", "wav", "ogg"]

RATE = 16000

# Opus at libsndfile's own bitrate, about 30 kbit/s for speech at 16 kHz: an eighth of the samples' size.
AUDIO_FORMATS: dict[AudioFormat, tuple[str, str]] = {
    "flac": ("FLAC", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
    "ogg": ("OGG", "OPUS"),
}

SEEKABLE = ("WAV", "WAVEX", "FLAC", "OGG")
TAIL = 160  # samples


@dataclass(frozen=True)
class Placed:
    """Where a sound is: `path` with `frames` samples in all, of which `length` from `start` on are the utterance."""

    path: Path
    frames: int
    start: int
    length: int


def in_place(path: Path, start_s: float, duration_s: float | None) -> Placed | None:
    """The part of a 16 kHz mono file in WAV, FLAC or Ogg; None for other files, InputError for broken ones."""
    recording = open_recording(path)
    check_size(path)
    if isinstance(recording, Contained):
        return None
    info = soundfile.info(str(path))
    if (info.samplerate, info.channels) != (RATE, 1) or info.format not in SEEKABLE:
        return None
    start, end = bounds(info.frames, start_s, duration_s)
    # A cut-off FLAC file announces samples that are not there: only reading the last ones tells.
    try:
        soundfile.read(str(path), start=max(start, end - TAIL), stop=end, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path}: damaged or cut off ({error.error_string})") from error
    return Placed(path.resolve(), info.frames, start, end - start)


def check_size(path: Path) -> None:
    """InputError for a WAV file that has lost its end, which libsndfile takes for a shorter one."""
    with path.open("rb") as file:
        head = file.read(12)
    announced = int.from_bytes(head[4:8], "little") + 8
    written = path.stat().st_size
    unknown = (8, 0xFFFFFFFF + 8)  # of who wrote it into a pipe
    if head[:4] == b"RIFF" and announced not in unknown and written < announced:
        raise InputError(f"{path}: cut off: it announces {announced} bytes, and {written} are there")


def bounds(frames: int, start_s: float, duration_s: float | None) -> tuple[int, int]:
    """First sample and the one after the last; an end up to 1 s behind the recording's is moved there.

    What lies further behind means that times and recording do not belong together.
    """
    if not (isfinite(start_s) and isfinite(duration_s or 0)):
        raise InputError(f"a part from {start_s} s on, {duration_s} s long")
    start = round(start_s * RATE)
    end = frames if duration_s is None else min(frames, start + round(duration_s * RATE))
    behind = duration_s is not None and start + round(duration_s * RATE) > frames + RATE
    if start < 0 or end <= start or behind:
        long = "" if duration_s is None else f", {duration_s:.2f} s long"
        raise InputError(f"a part from {start_s:.2f} s on{long}, but the recording has {frames / RATE:.2f} s")
    return start, end


def part(samples: Samples, start_s: float, duration_s: float | None) -> Samples:
    """Samples [N] of a part."""
    start, end = bounds(len(samples), start_s, duration_s)
    return samples[start:end]


@lru_cache(maxsize=1)  # the parts of a long recording follow each other
def whole(path: Path) -> Samples:
    """All of a file, as `read_sound` gives it."""
    return read_sound(path)


def read_sound(path: Path) -> Samples:
    """Samples [N] at 16 kHz of any audio file, channels averaged; InputError where it is broken or cut off."""
    recording = open_recording(path)
    resampler = Resampler(recording.rate, RATE)
    pieces = [resampler.feed(block) for block in recording.blocks()]
    return np.concatenate([*pieces, resampler.feed(np.zeros(0, np.float32), last=True)])


def write_sound(path: Path, samples: Samples, audio_format: AudioFormat) -> None:
    """Samples [N] at 16 kHz into a file of that format."""
    container, subtype = AUDIO_FORMATS[audio_format]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        soundfile.write(file, to_mono(samples), RATE, format=container, subtype=subtype)


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes its name only when it is complete, so that a killed run leaves no half of one."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with temporary.open("w+b") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
