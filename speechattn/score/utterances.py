"""What is evaluated: utterances of a manifest, with what was really said."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isfinite
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile

from speechattn.audio.clip import EVERY
from speechattn.audio.read import open_recording
from speechattn.audio.resample import Samples
from speechattn.audio.vision import Image, Stretch, read_video
from speechattn.data import cuts
from speechattn.errors import InputError

__all__ = ["CutSound", "FileSound", "Sound", "Utterance", "read_utterances"]


class Sound(Protocol):
    """Where the samples of an utterance are; it can be sent to another process."""

    def read(self) -> tuple[Samples, int]:
        """Mono samples [N] and their rate; InputError when they cannot be had."""

    def lips(self, samples: int, size: int) -> Image | None:
        """Pictures [T, size, size] of so many samples at 16 kHz; None where it has none, InputError as for `read`."""


@dataclass(frozen=True)
class FileSound:
    """An audio file, and a video that begins with it; `duration_s` seconds of both from `offset_s`, or all."""

    path: Path
    offset_s: float = 0.0
    duration_s: float | None = None
    video: Path | None = None

    def read(self) -> tuple[Samples, int]:
        """As `Recording` reads it, so that what is damaged or cut off is an error."""
        recording = open_recording(self.path)
        samples = np.concatenate(list(recording.blocks()))
        first = round(self.offset_s * recording.rate)
        last = len(samples) if self.duration_s is None else first + round(self.duration_s * recording.rate)
        if first >= last or last > len(samples) + recording.rate // 10:
            raise InputError(
                f"{self.path}: {self.offset_s:g} s and {self.duration_s} s behind it are not inside the file"
            )
        return samples[first:last], recording.rate

    def lips(self, samples: int, size: int) -> Image | None:
        """Of the same time."""
        if self.video is None:
            return None
        stretch = Stretch(Fraction(str(self.offset_s)), ceil(samples / EVERY))
        return read_video(self.video, size=size, stretch=stretch).frames


@dataclass(frozen=True)
class CutSound:
    """A cut of lhotse, read as in training."""

    said: cuts.Utterance

    def read(self) -> tuple[Samples, int]:
        """At the rate of the cut."""
        rate = int(self.said.cut.sampling_rate)
        try:
            return cuts.load_sound(self.said, rate), rate
        except InputError as error:
            raise InputError(f"{self.said.id}: {error}") from error

    def lips(self, samples: int, size: int) -> Image | None:
        """As in training."""
        try:
            return cuts.load_lips(self.said, samples, size=size)
        except InputError as error:
            raise InputError(f"{self.said.id}: {error}") from error


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest; `duration_s` is 0 where the file does not say."""

    id: str
    text: str
    duration_s: float
    sound: Sound
    speaker: str | None = None
    translation: str | None = None


def read_utterances(path: Path) -> list[Utterance]:
    """Cuts of lhotse (`NAME_cuts_SPLIT.jsonl.gz`), or JSONL of {audio, text} and, if need be, {id, speaker,
    translation, offset, duration, video}; relative paths begin at the manifest's folder.

    InputError names the line that is neither, and ids that are there twice.
    """
    found: list[Utterance] = []
    for number, row in rows(path):
        where = f"{path}, line {number}"
        try:
            found.append(
                of_cut(row, path.parent) if {"supervisions", "tracks"} & row.keys() else of_row(row, path.parent, where)
            )
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise InputError(f"{where}: not a cut of lhotse and not {{audio, text}} ({error!r})") from error
    seen: set[str] = set()
    for utterance in found:
        if utterance.id in seen:
            raise InputError(f"{path}: the id {utterance.id} is there twice; give each line an id of its own")
        seen.add(utterance.id)
    if not found:
        raise InputError(f"{path}: no utterances")
    return found


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line, plain or in gzip."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{path}, line {number}: not an object of JSON")
                    yield number, row
    except (ValueError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not JSONL in UTF-8 ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def of_cut(row: dict[str, Any], folder: Path) -> Utterance:
    """A cut as training reads it, and who speaks."""
    try:
        said = cuts.utterance(row, folder)
    except ImportError as error:
        raise InputError("cuts of lhotse need lhotse: pip install 'speechattn[train]'") from error
    speakers = {supervision.speaker for supervision in said.cut.supervisions if supervision.speaker}
    return Utterance(
        str(said.id), said.text, said.duration_s, CutSound(said), speaker="+".join(sorted(speakers)) or None,
        translation=said.translation,
    )  # fmt: skip


def of_row(row: dict[str, Any], folder: Path, where: str) -> Utterance:
    """A plain line; `duration` cuts a piece out only where `offset` says from when."""
    audio, text = row.get("audio", row.get("audio_filepath")), row.get("text")
    if not isinstance(audio, str) or not isinstance(text, str):
        raise InputError(f"{where}: wanted audio (a path) and text")
    path, piece = folder / audio, "offset" in row
    duration = float(row["duration"]) if row.get("duration") is not None else None
    offset = float(row.get("offset") or 0)
    if not (isfinite(offset) and offset >= 0 and isfinite(duration or 0) and (duration or 0) >= 0):
        raise InputError(f"{where}: offset {offset} and duration {duration} are no place in a recording")
    video = row.get("video")
    sound = FileSound(path, offset, duration if piece else None, None if video is None else folder / str(video))
    speaker, translation = row.get("speaker"), row.get("translation")
    return Utterance(
        str(row.get("id", audio)), text, seconds(path) if duration is None else duration, sound,
        speaker=None if speaker is None else str(speaker),
        translation=None if translation is None else str(translation),
    )  # fmt: skip


def seconds(path: Path) -> float:
    """How long a file says it is; 0 where it cannot be read, which is told when its turn comes."""
    try:
        return float(soundfile.info(str(path)).duration)
    except (OSError, soundfile.LibsndfileError):
        return 0.0
