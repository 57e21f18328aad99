"""Speech for a text file: one utterance per line, read by many voices, and kept.

Who reads a line, and how fast, depends on the seed and the line alone (its text, and how often it came before), so that
a text that grows keeps the sounds it has. A sound is named after what makes it: voice, speed and text. What is there is
not read again, neither after a kill nor for another text file.
"""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tqdm import tqdm

from speechattn.data.prepare.manifests import Skipped, Utterance, Written, prepared, write_manifests
from speechattn.data.prepare.sound import AudioFormat, write_sound
from speechattn.data.prepare.voices import Voice, find_voices
from speechattn.errors import InputError

__all__ = ["Cast", "Reading", "parse_cast", "prepare", "readings"]


@dataclass(frozen=True)
class Cast:
    """The voices, how often each of them is chosen, and the slowest and fastest speed."""

    voices: tuple[Voice, ...]
    weights: tuple[float, ...]
    speeds: tuple[float, float] = (1.0, 1.0)

    def choose(self, seed: int, text: str, take: int) -> tuple[Voice, float]:
        """Voice and speed (in hundredths): a pure function of its arguments."""
        digest = hashlib.sha256(f"{seed}\0{take}\0{text}".encode()).digest()
        first, second = (int.from_bytes(digest[at : at + 8], "big") / 2**64 for at in (0, 8))
        bounds = list(accumulate(self.weights))
        voice = self.voices[min(bisect(bounds, first * bounds[-1]), len(self.voices) - 1)]
        slowest, fastest = self.speeds
        return voice, round(slowest + second * (fastest - slowest), 2)


@dataclass(frozen=True)
class Reading:
    """A line, who reads it, and how fast; `translation` where there is one."""

    text: str
    voice: Voice
    speed: float
    translation: str | None = None

    @property
    def key(self) -> str:
        """Short name of this sound among all others."""
        said = f"{self.voice.identity}\0{self.speed:.2f}\0{self.text}"
        return hashlib.sha256(said.encode()).hexdigest()[:20]

    def path(self, folder: Path, audio_format: AudioFormat) -> Path:
        """Where its sound is kept."""
        return folder / "speech" / self.voice.speaker / self.key[:2] / f"{self.key}.{audio_format}"


def parse_cast(names: Sequence[str], speeds: tuple[float, float] = (1.0, 1.0)) -> Cast:
    """Voices from their names, each with an optional weight: `piper=3 flite espeak:en-gb=0.5`.

    The weight of an engine (1 without one) is shared among its voices. InputError for what cannot speak here.
    """
    if not 0.3 <= speeds[0] <= speeds[1] <= 3:
        raise InputError(f"speeds {speeds[0]:g} to {speeds[1]:g}: wanted two numbers from 0.3 to 3, the slower first")
    voices: list[Voice] = []
    weights: list[float] = []
    for name in names:
        head, mark, tail = name.rpartition("=")
        found = find_voices(head if mark else name)
        weight = as_weight(name, tail) if mark else 1.0
        for voice in found:
            voice.check()
            if voice in voices:
                raise InputError(f"the voice {voice.speaker} is named twice")
            voices.append(voice)
            weights.append(weight / len(found))
    return Cast(tuple(voices), tuple(weights), speeds)


def as_weight(name: str, text: str) -> float:
    """A positive number; InputError names the voice."""
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < 1e6:
        raise InputError(f"voice {name}: {text} is not a positive weight")
    return weight


def readings(
    lines: Sequence[str], cast: Cast, *, seed: int = 0, takes: int = 1, translations: Sequence[str] | None = None
) -> Iterator[Reading | Skipped]:
    """Who reads what: each line `takes` times; an empty line, or one that the same voice has read, is left out."""
    if translations is not None and len(translations) != len(lines):
        raise InputError(f"{len(lines)} lines of text, but {len(translations)} translations")
    came: Counter[str] = Counter()
    keys: set[str] = set()
    for number, line in enumerate(lines):
        text = " ".join(line.split())
        if not text:
            yield Skipped(f"line-{number + 1}", "no text")
            continue
        for _ in range(takes):
            translation = None if translations is None else translations[number]
            reading = Reading(text, *cast.choose(seed, text, came[text]), translation)
            came[text] += 1
            if reading.key in keys:
                yield Skipped(f"line-{number + 1}", f"{reading.voice.speaker} has read this line already, as fast")
                continue
            keys.add(reading.key)
            yield reading


def prepare(
    folder: Path, lines: Sequence[str], cast: Cast, *, split: str = "train", name: str = "synthetic",
    language: str = "en", seed: int = 0, takes: int = 1, jobs: int = 1, audio_format: AudioFormat = "flac",
    translations: Sequence[str] | None = None, translation_language: str | None = None,
) -> Written:  # fmt: skip
    """Read the lines that have not been read yet, on `jobs` threads, and write the manifests.

    The engines compute outside Python's lock, so that threads keep as many cores busy as there are.
    """
    plan = list(readings(lines, cast, seed=seed, takes=takes, translations=translations))
    asked = hashlib.sha256("\n".join(one.key if isinstance(one, Reading) else one.id for one in plan).encode())
    asked.update("\n".join(translations or ()).encode())
    options = {
        "audio_format": audio_format, "language": language, "translation_language": translation_language,
        "seed": seed, "takes": takes, "speeds": cast.speeds, "voices": [voice.speaker for voice in cast.voices],
        "readings": asked.hexdigest(),
    }  # fmt: skip
    done = prepared(folder, name, split, options)
    if done is not None:
        return done
    failed = read_aloud(folder, [one for one in plan if isinstance(one, Reading)], audio_format, jobs)

    def utterances() -> Iterator[Utterance | Skipped]:
        for one in plan:
            if isinstance(one, Skipped):
                yield one
            elif one.key in failed:
                yield Skipped(one.key, failed[one.key])
            else:
                yield Utterance(
                    f"{one.voice.speaker}-{one.key}", one.path(folder, audio_format), one.text, one.voice.speaker,
                    language, one.translation, translation_language if one.translation is not None else None,
                    custom={"synthetic": one.voice.engine, "speed": one.speed},
                )  # fmt: skip

    return write_manifests(
        folder, name, split, utterances(), audio_format=audio_format, options=options, total=len(plan)
    )


def read_aloud(folder: Path, wanted: Sequence[Reading], audio_format: AudioFormat, jobs: int) -> dict[str, str]:
    """Make the sounds that are not there; key -> reason for those that could not be made."""
    missing = [reading for reading in wanted if not reading.path(folder, audio_format).is_file()]

    def make(reading: Reading) -> str | None:
        try:
            sound = reading.voice.say(reading.text, reading.speed)
        except InputError as error:
            return str(error)
        except Exception as error:  # an engine may choke on a line in its own way: the others are still read
            return f"{type(error).__name__}: {error}"
        write_sound(reading.path(folder, audio_format), sound, audio_format)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        try:
            made = tqdm(pool.map(make, missing), total=len(missing), desc="speech", unit=" lines", disable=None)
            reasons = list(made)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {reading.key: reason for reading, reason in zip(missing, reasons, strict=True) if reason is not None}
