"""Synthetic audio-visual speech: lines of a text, read by voices that tell their times, and a drawn mouth for each.

Nobody speaks and nobody is filmed here. A clip is a function of its id (voice, speed and text) and the seed: who is
seen, how the head moves, light and noise. Sounds and videos are kept, named after what makes them, as in `synthetic`.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from math import ceil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechattn.audio.resample import Samples
from speechattn.audio.vision import RATE as FRAMES
from speechattn.audio.vision import pyav, write_video
from speechattn.data.augment import mixed, power
from speechattn.data.prepare.face import Face, Image, draw
from speechattn.data.prepare.manifests import Skipped, Utterance, Written, prepared, write_manifests
from speechattn.data.prepare.mouth import movement
from speechattn.data.prepare.phones import Spoken, speak, tells_times
from speechattn.data.prepare.sound import RATE, AudioFormat, read_sound, write_sound
from speechattn.data.prepare.synthetic import Cast, Reading, readings
from speechattn.errors import InputError

__all__ = ["Babble", "babble", "film", "prepare"]


@dataclass(frozen=True)
class Babble:
    """Noise made of `talkers` other utterances at once, `ratio_db` below the speech."""

    ratio_db: float
    talkers: int = 6

    def __post_init__(self) -> None:
        if not abs(self.ratio_db) <= 100 or self.talkers < 1:
            raise InputError(f"babble of {self.talkers} talkers at {self.ratio_db:g} dB: wanted at least one, and -100 "
                             "to 100 dB")  # fmt: skip


def digest(*parts: object) -> str:
    """A short name for whatever `parts` name."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def generator(*parts: object) -> np.random.Generator:
    """Lots of their own for whatever `parts` name, the same in every process."""
    return np.random.default_rng(int(digest(*parts), 16))


def film(spoken: Spoken, seed: int, name: str) -> Image:
    """Frames [T, 88, 88] of a mouth that says it, 25 a second, as many as it takes to cover the sound.

    Each shows the middle of its time. Face, movement, light and noise are lots of (seed, name).
    """
    times = (np.arange(ceil(len(spoken.samples) * FRAMES / RATE)) + 0.5) / FRAMES
    face = Face.drawn(generator(seed, name, "face"))
    return draw(movement(spoken.phones, times), face, FRAMES, generator(seed, name, "film"))


def babble(samples: Samples, others: Sequence[Samples], ratio_db: float, lots: np.random.Generator) -> Samples:
    """Samples [N] among `others`, alike loud, each from a random place on and repeated; `ratio_db` is speech to noise.

    Powers are those of whole clips. What would leave [-1, 1] is made softer as a whole.
    """
    total = np.zeros(len(samples), np.float32)
    for one in others:
        total += np.resize(np.roll(one, -lots.integers(len(one))), len(samples)) / np.sqrt(max(power(one), 1e-12))
    heard = mixed(samples, total, ratio_db)
    return heard / np.float32(max(1.0, np.abs(heard).max()))


def prepare(
    folder: Path, lines: Sequence[str], cast: Cast, *, split: str = "train", name: str = "avsynth",
    seed: int = 0, takes: int = 1, jobs: int = 1, audio_format: AudioFormat = "flac", noise: Babble | None = None,
) -> Written:  # fmt: skip
    """Read and film the lines that are not there yet, on `jobs` threads, and write the manifests.

    Every supervision has `custom.video`, the path of its video; with `noise` the sound is among babble of this part's
    other utterances, `custom.snr_db` says how loud, and the videos are those of the part without it.
    """
    pyav()
    mute = [voice.speaker for voice in cast.voices if not tells_times(voice)]
    if mute:
        raise InputError(f"voices that do not tell when they say what: {', '.join(mute)}; espeak and flite (but not "
                         f"kal16) do")  # fmt: skip
    plan = list(readings(lines, cast, seed=seed, takes=takes))
    wanted = [one for one in plan if isinstance(one, Reading)]
    options = {
        "audio_format": audio_format, "seed": seed, "takes": takes, "speeds": cast.speeds,
        "voices": [voice.speaker for voice in cast.voices],
        "readings": digest(*(one.key if isinstance(one, Reading) else one.id for one in plan)),
        "babble": None if noise is None else [noise.ratio_db, noise.talkers],
    }  # fmt: skip
    done = prepared(folder, name, split, options)
    if done is not None and all(film_path(folder, one, seed).is_file() for one in wanted[:1]):
        return done
    failed = record(folder, wanted, audio_format, seed, jobs)
    there = [one for one in wanted if one.key not in failed]
    heard = noisy(folder, there, audio_format, seed, noise)

    def utterances() -> Iterator[Utterance | Skipped]:
        for one in plan:
            if isinstance(one, Skipped):
                yield one
            elif one.key in failed:
                yield Skipped(one.key, failed[one.key])
            else:
                custom: dict[str, str | float] = {
                    "synthetic": one.voice.engine, "speed": one.speed, "video": str(film_path(folder, one, seed)),
                }  # fmt: skip
                yield Utterance(
                    identity(one), heard[one.key], one.text, one.voice.speaker, "en",
                    custom=custom if noise is None else {**custom, "snr_db": noise.ratio_db},
                )  # fmt: skip

    return write_manifests(
        folder, name, split, utterances(), audio_format=audio_format, options=options, total=len(plan)
    )


def identity(reading: Reading) -> str:
    """The id of an utterance."""
    return f"{reading.voice.speaker}-{reading.key}"


def film_path(folder: Path, reading: Reading, seed: int) -> Path:
    """Where its video is kept."""
    return folder.resolve() / "video" / str(seed) / reading.voice.speaker / reading.key[:2] / f"{reading.key}.mkv"


def record(
    folder: Path, wanted: Sequence[Reading], audio_format: AudioFormat, seed: int, jobs: int
) -> dict[str, str]:  # fmt: skip
    """Make sounds and videos that are not there; key -> reason for those that could not be made."""
    missing = [
        one for one in wanted
        if not (one.path(folder, audio_format).is_file() and film_path(folder, one, seed).is_file())
    ]  # fmt: skip
    with ThreadPoolExecutor(jobs) as pool:
        try:
            made = pool.map(partial(take, folder, audio_format, seed), missing)
            reasons = list(tqdm(made, total=len(missing), desc="clips", unit=" clips", disable=None))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {one.key: reason for one, reason in zip(missing, reasons, strict=True) if reason is not None}


def take(folder: Path, audio_format: AudioFormat, seed: int, one: Reading) -> str | None:
    """One clip; the reason where there is none."""
    try:
        spoken = speak(one.voice, one.text, one.speed)
    except InputError as error:
        return str(error)
    write_sound(one.path(folder, audio_format), spoken.samples, audio_format)
    path = film_path(folder, one, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        write_video(temporary, film(spoken, seed, identity(one)))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return None


def noisy(
    folder: Path, wanted: Sequence[Reading], audio_format: AudioFormat, seed: int, noise: Babble | None
) -> dict[str, Path]:  # fmt: skip
    """The sound of each utterance by its key; with `noise` a new one, named after all that is heard in it."""
    made = {one.key: one.path(folder, audio_format) for one in wanted}
    if noise is None:
        return made
    for one in tqdm(wanted, desc="babble", unit=" sounds", disable=None):
        lots = generator(seed, identity(one), "babble")
        others = company(one, wanted, noise.talkers, lots)
        heard = digest(seed, noise.ratio_db, one.key, *(other.key for other in others))
        path = folder / "babble" / heard[:2] / f"{heard}.{audio_format}"
        if not path.is_file():
            sounds = [read_sound(other.path(folder, audio_format)) for other in others]
            write_sound(path, babble(read_sound(made[one.key]), sounds, noise.ratio_db, lots), audio_format)
        made[one.key] = path
    return made


def company(one: Reading, wanted: Sequence[Reading], talkers: int, lots: np.random.Generator) -> list[Reading]:
    """So many readings of other lines, of other voices as far as there are; InputError where there are too few."""
    order = [wanted[i] for i in lots.permutation(len(wanted))]
    far = (other for other in order if other.text != one.text and other.voice != one.voice)
    near = (other for other in order if other.text != one.text and other.voice == one.voice)
    found = list(islice(chain(far, near), talkers))
    if len(found) < talkers:
        raise InputError(f"babble of {talkers} talkers needs as many utterances of other lines; there are {len(found)}")
    return found
