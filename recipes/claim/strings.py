"""Strings of digits by synthetic voices, in noise: what the claims are tried on.

A recording is twenty strings of two to seven digits by one voice, in one noise.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from digits.speech import DIGITS, Spoken, Voice, require, speak
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from speechattn.audio.spectrum import LogMel
from speechattn.frames import Frames
from speechattn.text.pieces import BLANK, END, Pieces

__all__ = ["DIGITS", "MELS", "Recording", "String", "batch", "load", "synthesise", "tokenizer"]

FLITE = ("slt", "rms", "awb", "kal16")
ESPEAK = tuple(f"{accent}+{kind}" for accent in ("en-us", "en-gb") for kind in ("m1", "m3", "m7", "f2", "f4", "f5"))
RECORDINGS = {"train": 150, "test": 20}
STRINGS = 20
MELS = 40


def one(split: str, recording: int, number: int) -> Spoken:
    """A string; it depends on nothing else."""
    chance = random.Random(f"{split} {recording}")
    stretch, pitch = chance.choice((0.9, 1.0, 1.1, 1.25, 1.4)), chance.choice((0.85, 1.0, 1.15))
    name = chance.choice(FLITE) if chance.random() < 0.67 else chance.choice(ESPEAK)
    voice = Voice("flite" if name in FLITE else "espeak-ng", name, stretch, pitch)
    chance = random.Random(f"{split} {recording} {number}")
    return speak(" ".join(chance.choice(DIGITS) for _ in range(chance.randint(2, 7))), voice)


def synthesise(folder: Path, *, jobs: int = 2) -> None:
    """Write SPLIT.npy (all samples in a row) and SPLIT.json, as far as they are not there yet."""
    for split, size in RECORDINGS.items():
        if (folder / f"{split}.json").exists():
            continue
        require()
        folder.mkdir(parents=True, exist_ok=True)
        asked = [(recording, number) for recording in range(size) for number in range(STRINGS)]
        with ThreadPoolExecutor(jobs) as pool:
            made = pool.map(lambda at, split=split: one(split, *at), asked)
            spoken = list(tqdm(made, total=len(asked), desc=f"{split}: synthetic speech"))
        np.save(folder / f"{split}.npy", np.concatenate([s.samples for s in spoken]))
        entries = [{"samples": len(s.samples), "text": s.text, "voice": str(s.voice), "words": s.words} for s in spoken]
        (folder / f"{split}.json").write_text(json.dumps(entries))


def tokenizer() -> Pieces:
    """A token for each digit."""
    return Pieces([BLANK, *(f"▁{digit}" for digit in DIGITS), END])


@dataclass(frozen=True)
class String:
    """Log-mel `features` [T, 40] at 10 ms, the tokens of what is said, and where each ends in seconds, if known."""

    features: Tensor
    tokens: tuple[int, ...]
    ends_s: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Recording:
    """Samples of its strings, with noise, their tokens, and where words end, which flite tells and espeak-ng not."""

    sounds: tuple[np.ndarray, ...]
    tokens: tuple[tuple[int, ...], ...]
    ends_s: tuple[tuple[float, ...] | None, ...]

    def joined(self, n: int, spectrum: LogMel) -> list[String]:
        """Its strings, `n` at a time as one utterance."""
        return [
            String(
                heard(np.concatenate(self.sounds[at : at + n]), spectrum), sum(self.tokens[at : at + n], ()),
                self.ends_s[at] if n == 1 else None,
            )
            for at in range(0, len(self.sounds) - n + 1, n)
        ]  # fmt: skip


def heard(sound: np.ndarray, spectrum: LogMel) -> Tensor:
    """Samples [N] -> normalised log-mel [T, 40]."""
    with torch.inference_mode():
        x = torch.from_numpy(sound)[None]
        values = spectrum(Frames(x, torch.ones_like(x, dtype=torch.bool))).values[0]
    return ((values + 7.0) / 4.0).clone()


def noisy(sound: np.ndarray, snr: float, slope: float, seed: int) -> np.ndarray:
    """With noise of power 1 / f^slope, so many dB below the sound."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(len(sound)))
    noise = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 20.0) ** (slope / 2), len(sound))
    level = max(float(sound.std()), 0.01) * 10 ** (-snr / 20) / noise.std()
    return (sound + level * noise).astype(np.float32)


def load(folder: Path, split: str, *, most: int | None = None) -> list[Recording]:
    """The recordings of a split, each in noise of its own, 0 to 20 dB below the speech."""
    samples, entries = np.load(folder / f"{split}.npy"), json.loads((folder / f"{split}.json").read_text())
    pieces, recordings, at = tokenizer(), list[Recording](), 0
    for i in range(0, len(entries), STRINGS):
        chance = random.Random(f"{split} noise {i}")
        snr, slope = chance.uniform(0, 20), chance.uniform(0, 2)
        sounds, tokens, ends = [], [], []
        for j, entry in enumerate(entries[i : i + STRINGS]):
            sound = samples[at : at + entry["samples"]].astype(np.float32) / 32768
            at += entry["samples"]
            sounds.append(noisy(sound, snr, slope, i + j))
            tokens.append(tuple(pieces.encode(entry["text"])))
            ends.append(None if entry["words"] is None else tuple(end for _, end in entry["words"]))
        recordings.append(Recording(tuple(sounds), tuple(tokens), tuple(ends)))
    return recordings[:most]


def batch(strings: Sequence[String]) -> tuple[Frames, Tensor, Tensor]:
    """Features [B, T, 40]; tokens [B, U] and how many [B]."""
    lengths = torch.tensor([len(s.features) for s in strings])
    features = Frames.from_lengths(pad_sequence([s.features for s in strings], batch_first=True), lengths)
    tokens = pad_sequence([torch.tensor(s.tokens) for s in strings], batch_first=True)
    return features, tokens, torch.tensor([len(s.tokens) for s in strings])
