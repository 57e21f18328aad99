"""Voices that tell when they say what: espeak-ng in IPA, flite in the phones of the CMU dictionary."""

# ruff: noqa: RUF001 (letters of IPA look like others)

from __future__ import annotations

import json
import sys
import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from speechattn.audio.resample import Samples
from speechattn.data.prepare import espeak_times
from speechattn.data.prepare.sound import RATE, read_sound
from speechattn.data.prepare.voices import PACE, Espeak, Flite, Voice, program
from speechattn.errors import InputError

__all__ = ["PHONES", "TIMED_FLITE", "Phone", "Spoken", "speak", "tells_times"]

TIMED_FLITE = ("slt", "rms", "awb")  # kal16 prints the times that it was asked for, not those of its sound
FARTHEST_S = 0.03  # between the end of the last phone that flite names and the end of its sound

# Both alphabets in one: the CMU phones, and each letter of IPA (in English) as one of them.
PHONES = ("aa", "ae", "ah", "ao", "ax", "b", "ch", "d", "dh", "eh", "er", "f", "g", "hh", "ih", "iy", "jh", "k", "l",
          "m", "n", "ng", "p", "pau", "r", "s", "sh", "t", "th", "uh", "uw", "v", "w", "y", "z", "zh")  # fmt: skip
TWO = {"ay": ("aa", "ih"), "aw": ("aa", "uh"), "ey": ("eh", "ih"), "ow": ("ao", "uh"), "oy": ("ao", "ih")}
LETTERS = {
    "a": "aa", "b": "b", "d": "d", "e": "eh", "f": "f", "g": "g", "h": "hh", "i": "iy", "j": "y", "k": "k", "l": "l",
    "m": "m", "n": "n", "o": "ao", "p": "p", "r": "r", "s": "s", "t": "t", "u": "uw", "v": "v", "w": "w", "x": "k",
    "z": "z", "æ": "ae", "ð": "dh", "ŋ": "ng", "ɐ": "ax", "ɑ": "aa", "ɒ": "ao", "ɔ": "ao", "ə": "ax", "ɚ": "er",
    "ɛ": "eh", "ɜ": "er", "ɝ": "er", "ɡ": "g", "ɪ": "ih", "ɫ": "l", "ɬ": "l", "ɹ": "r", "ɾ": "d", "ʃ": "sh",
    "ʊ": "uh", "ʌ": "ah", "ʍ": "w", "ʒ": "zh", "ʔ": "hh", "θ": "th", "ᵻ": "ih", "ɨ": "ih", "ʉ": "uw",
}  # fmt: skip


@dataclass(frozen=True)
class Phone:
    """One of `PHONES` (pau: nobody speaks) and its time in seconds."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Spoken:
    """Samples [N] at 16 kHz, and the phones, one behind the other from 0 to the end."""

    samples: Samples
    phones: tuple[Phone, ...]


def tells_times(voice: Voice) -> bool:
    """Whether `speak` can ask this voice."""
    return isinstance(voice, Espeak) or (isinstance(voice, Flite) and voice.name in TIMED_FLITE)


def speak(voice: Voice, text: str, speed: float) -> Spoken:
    """As `voice.say`, with times; the same samples and times whenever it is asked. InputError where there are none."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        if isinstance(voice, Espeak):
            pace = str(round(PACE * speed))
            told = program(sys.executable, "-I", espeak_times.__file__, voice.name, pace, str(path), told=text)
            samples = read_sound(path)
            said = of_espeak(json.loads(told), len(samples) / RATE)
        elif isinstance(voice, Flite) and tells_times(voice):
            told = program("flite", "-voice", voice.name, "--setf", f"duration_stretch={1 / speed:.4f}", "-psdur", "-t",
                           text, "-o", str(path))  # fmt: skip
            samples = read_sound(path)
            said = of_flite(told, len(samples) / RATE)
        else:
            raise InputError(f"the voice {voice.speaker} does not tell when it says what; espeak and flite "
                             f"({', '.join(TIMED_FLITE)}) do")  # fmt: skip
    if all(phone.name == "pau" for phone in said):
        raise InputError("the voice has no sounds for it")
    return Spoken(samples, said)


def of_espeak(said: list[tuple[str, float]], duration_s: float) -> tuple[Phone, ...]:
    """Starts of phonemes in IPA -> phones; a phoneme of several letters shares its time among them."""
    marks = [("", 0.0), *((name, min(start, duration_s)) for name, start in said), ("", duration_s)]
    phones = [
        phone for (name, start), (_, end) in pairwise(marks) if end > start
        for phone in shared(of_ipa(name), start, end)
    ]  # fmt: skip
    return tuple(phones)


def of_ipa(name: str) -> tuple[str, ...]:
    """The phones that letters of IPA stand for; marks of length, stress and the like are no letters."""
    letters = [c for c in unicodedata.normalize("NFD", name) if unicodedata.category(c) in ("Ll", "Lo")]
    unknown = [letter for letter in letters if letter not in LETTERS]
    if unknown:
        raise InputError(f"the phoneme {name} has no mouth here: only those of English have")
    return tuple(LETTERS[letter] for letter in letters) or ("pau",)


def of_flite(told: str, duration_s: float) -> tuple[Phone, ...]:
    """`phone:end` after `phone:end` -> phones."""
    phones: list[Phone] = []
    start = 0.0
    for name, _, end in (one.partition(":") for one in told.split()):
        if name not in PHONES and name not in TWO:
            raise InputError(f"flite's phone {name} has no mouth here: only those of English have")
        phones += shared(TWO.get(name, (name,)), start, float(end))
        start = float(end)
    if abs(start - duration_s) > FARTHEST_S:
        raise InputError(f"flite tells times up to {start:.2f} s, but spoke for {duration_s:.2f} s")
    return tuple(phones)


def shared(names: tuple[str, ...], start: float, end: float) -> list[Phone]:
    """Phones that share a stretch of time alike."""
    step = (end - start) / len(names)
    return [Phone(name, start + i * step, start + (i + 1) * step) for i, name in enumerate(names)]
