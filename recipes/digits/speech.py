"""What is said, and who says it: texts of digits, commands and names, and synthetic voices that speak them.

Everything here is synthetic speech: flite (unit selection and statistical voices) and espeak-ng (formants).
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import soxr

__all__ = ["COMMON", "DIGITS", "NAMES", "RARE", "RATE", "Spoken", "Voice", "draw_text", "joined", "require", "speak"]

RATE = 16000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = ("john", "mark", "aaron", "anna", "hannah")
RARE = {"jon": "john", "marc": "mark", "erin": "aaron"}  # sounds like a frequent name: what biasing is for
COMMON = ("yes", "no", "stop", "go on", "go left", "turn right", "left", "right", "please", "thank you", "play", "call")


@dataclass(frozen=True)
class Voice:
    """`engine` is flite or espeak-ng; `stretch` multiplies durations, `pitch` the voice's own pitch."""

    engine: str
    name: str
    stretch: float = 1.0
    pitch: float = 1.0

    def __str__(self) -> str:
        return f"{self.engine} {self.name} x{self.stretch:g} pitch {self.pitch:g}"


@dataclass(frozen=True)
class Spoken:
    """16 kHz samples [N] int16; start and end of each word in seconds, or None where the engine does not tell."""

    samples: np.ndarray
    text: str
    voice: Voice
    words: tuple[tuple[float, float], ...] | None


PITCH = {"slt": 175.0, "rms": 100.0, "awb": 130.0, "kal16": 105.0}  # flite's voices, in Hz


def require() -> None:
    """SystemExit that says what is missing."""
    missing = [name for name in ("flite", "espeak-ng") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not found: install with `apt-get install {' '.join(missing)}`")


def draw_text(chance: random.Random, *, rare: float = 0.02) -> str:
    """One to six words: digits, commands, and calls of names, of which a share `rare` is a rare one."""
    words: list[str] = []
    count = chance.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))
    while len(words) < count:
        kind = chance.random()
        if kind < 0.5:
            words += [chance.choice(DIGITS)]
        elif kind < 0.8:
            words += chance.choice(COMMON).split()
        else:
            name = chance.choice(sorted(RARE)) if chance.random() < rare else chance.choice(NAMES)
            words += ["call", name] if chance.random() < 0.6 else [name]
    return " ".join(words[:6])


def with_pauses(text: str, chance: random.Random, share: float = 0.25) -> str:
    """Commas behind a share of the words: the engines pause there."""
    words = text.split()
    return " ".join(w + "," if i + 1 < len(words) and chance.random() < share else w for i, w in enumerate(words))


def speak(text: str, voice: Voice, *, chance: random.Random | None = None) -> Spoken:
    """`text` with a pause at each comma, or with `chance` here and there. CalledProcessError when the engine fails."""
    said = with_pauses(text, chance) if chance else text
    text = said.replace(",", "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "said.wav")
        if voice.engine == "flite":
            command = [
                "flite", "-voice", voice.name, "--setf", f"duration_stretch={voice.stretch}", "-psdur",
                "--setf", f"int_f0_target_mean={PITCH[voice.name] * voice.pitch}", "-t", said, "-o", str(path),
            ]  # fmt: skip
        else:
            pace, tone = round(165 / voice.stretch), round(50 * voice.pitch)
            command = ["espeak-ng", "-v", voice.name, "-s", str(pace), "-p", str(tone), "-w", str(path), said]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        sound, rate = soundfile.read(path, dtype="float32")
    samples = (np.clip(soxr.resample(sound, rate, RATE), -1, 1) * 32767).astype(np.int16)
    words = flite_words(done.stdout, text, voice.name) if voice.engine == "flite" else None
    return Spoken(samples, text, voice, words)


PHONES: dict[str, int] = {}


def phones(word: str) -> int:
    """How many phones flite says for a word on its own."""
    if word not in PHONES:
        command = ["flite", "-voice", "slt", "-ps", "-t", word, "-o", "none"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        PHONES[word] = sum(p != "pau" for p in said)
    return PHONES[word]


def flite_words(printed: str, text: str, voice: str) -> tuple[tuple[float, float], ...] | None:
    """Word times from the phones and their ends; None when the phones of a word changed in this company."""
    ends = [(name, float(end)) for name, end in re.findall(r"(\S+):([\d.]+)", printed)]
    starts = [0.0, *(end for _, end in ends)]
    sounding = [(starts[i], end) for i, (name, end) in enumerate(ends) if name != "pau"]
    words, sizes = [], [phones(word) for word in text.split()]
    if sum(sizes) != len(sounding):
        return None
    for size in sizes:
        words.append((round(sounding[0][0], 3), round(sounding[size - 1][1], 3)))
        sounding = sounding[size:]
    return tuple(words)


def trimmed(samples: np.ndarray, level: float = 0.01) -> np.ndarray:
    """Without what is softer than `level` of the loudest sample, at both ends."""
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > level * np.abs(samples.astype(np.int32)).max())
    return samples[loud[0] : loud[-1] + 1]


def joined(text: str, voice: Voice, *, chance: random.Random) -> Spoken:
    """Words that were spoken one by one, with pauses of 30 to 400 ms: their times are known whatever the engine."""
    parts, words, at = [], [], 0
    for word in text.split():
        pause = np.zeros(int(chance.uniform(0.03, 0.4) * RATE), np.int16)
        sound = trimmed(speak(word, voice).samples)
        start = at + len(pause)
        at = start + len(sound)
        parts += [pause, sound]
        words.append((round(start / RATE, 3), round(at / RATE, 3)))
    parts.append(np.zeros(int(chance.uniform(0.1, 0.3) * RATE), np.int16))
    return replace(Spoken(np.concatenate(parts), text, voice, None), words=tuple(words))
