"""Tiny stand-ins in the exact folder layouts of public corpora: synthetic sound, invented text."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import soundfile

__all__ = [
    "ENGLISH",
    "FOREIGN",
    "RATE",
    "damaged",
    "make_librispeech",
    "make_must_c",
    "murmur",
    "sentence",
    "translate",
]

RATE = 16000

ENGLISH = "the old ship went out to sea at night and nobody saw it leave but a boy who could not sleep"
FOREIGN = {
    "de": "das alte schiff fuhr bei nacht hinaus und niemand sah es gehen nur ein kind",
    "es": "el viejo barco se fue de noche y nadie lo vio salir solo un niño",
}


def damaged(content: bytes) -> bytes:
    """A gzip file with its data overwritten in the middle, as a bad disk leaves it."""
    packed = gzip.compress(content)
    return packed[:10] + b"\xff" * 8 + packed[18:]


def sentence(rng: np.random.Generator, shortest: int = 3, longest: int = 9) -> str:
    """A few English words in any order."""
    return " ".join(rng.choice(ENGLISH.split(), int(rng.integers(shortest, longest + 1))))


def translate(text: str, language: str) -> str:
    """Word by word, so that a small model can learn it."""
    english, foreign = sorted(set(ENGLISH.split())), FOREIGN[language].split()
    words = [foreign[english.index(word) % len(foreign)] for word in text.lower().strip(".").split()]
    return " ".join(words).capitalize() + "."


def murmur(rng: np.random.Generator, text: str) -> np.ndarray:
    """Something a small model can learn: every word has two tones of its own for 0.2 s; a little noise. Float32 [N]."""
    time = np.arange(3200) / RATE
    pieces = [rng.standard_normal(RATE // 5)]
    for word in text.lower().strip(".").split():
        low, high = (300 + crc32(f"{word} {n}".encode()) % 3000 for n in range(2))
        pieces.append(30 * np.hanning(3200) * (np.sin(2 * np.pi * low * time) + np.sin(2 * np.pi * high * time)))
    pieces.append(rng.standard_normal(RATE // 5))
    sound = np.concatenate(pieces)
    return (0.005 * (sound + rng.standard_normal(len(sound)))).astype(np.float32)


def make_librispeech(
    folder: Path, parts: Sequence[str] = ("train-clean-5", "dev-clean-2"), *, readers: int = 2, chapters: int = 2,
    lines: int = 3, seed: int = 0,
) -> Path:  # fmt: skip
    """`FOLDER/LibriSpeech/PART/READER/CHAPTER/READER-CHAPTER-NNNN.flac` and `.trans.txt`; `FOLDER/LibriSpeech`."""
    rng = np.random.default_rng(seed)
    root = folder / "LibriSpeech"
    for p, part in enumerate(parts):
        for reader in range(readers):
            for chapter in range(chapters):
                name = f"{100 * (p + 1) + reader}-{1000 * (p + 1) + 10 * reader + chapter}"
                place = root / part / name.replace("-", "/")
                place.mkdir(parents=True)
                rows = []
                for line in range(lines):
                    text = sentence(rng).upper()
                    soundfile.write(place / f"{name}-{line:04d}.flac", murmur(rng, text), RATE)
                    rows.append(f"{name}-{line:04d} {text}\n")
                (place / f"{name}.trans.txt").write_text("".join(rows), encoding="utf-8")
    speakers = [
        f"{path.name} | F | {path.parent.name} | 1.00 | Reader {path.name}\n" for path in sorted(root.glob("*/*"))
    ]
    (root / "SPEAKERS.TXT").write_text(";ID | SEX | SUBSET | MINUTES | NAME\n" + "".join(speakers), encoding="utf-8")
    return root


def make_must_c(
    folder: Path, language: str = "de", splits: Sequence[str] = ("train", "dev", "tst-COMMON", "tst-HE"), *,
    talks: int = 2, segments: int = 4, seed: int = 0,
) -> Path:  # fmt: skip
    """`FOLDER/en-XX/data/SPLIT/wav/ted_N.wav` and `txt/SPLIT.{yaml,en,XX}`, as MuST-C v1 has them; returns `FOLDER`."""
    rng = np.random.default_rng(seed)
    for s, split in enumerate(splits):
        place = folder / f"en-{language}" / "data" / split
        (place / "wav").mkdir(parents=True)
        (place / "txt").mkdir()
        rows, said, translated = [], [], []
        for talk in range(talks):
            wav = f"ted_{100 * (s + 1) + talk}.wav"
            sounds = [np.zeros(RATE // 2, np.float32)]
            for _ in range(segments):
                text = sentence(rng).capitalize() + "."
                sounds.append(murmur(rng, text))
                offset, duration = sum(map(len, sounds[:-1])) / RATE, len(sounds[-1]) / RATE
                rows.append(
                    f"- {{duration: {duration:.6f}, offset: {offset:.6f}, rW: {len(text.split())}, uW: 0, "
                    f"speaker_id: spk.{100 * (s + 1) + talk}, wav: {wav}}}\n"
                )
                said.append(text + "\n")
                translated.append(translate(text, language) + "\n")
                sounds.append(np.zeros(RATE // 3, np.float32))
            soundfile.write(place / "wav" / wav, np.concatenate(sounds), RATE, subtype="PCM_16")
        (place / "txt" / f"{split}.yaml").write_text("".join(rows), encoding="utf-8")
        (place / "txt" / f"{split}.en").write_text("".join(said), encoding="utf-8")
        (place / "txt" / f"{split}.{language}").write_text("".join(translated), encoding="utf-8")
    return folder
