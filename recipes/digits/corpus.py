"""Utterances of the cache, and what training makes of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speechattn.frames import Frames
from speechattn.text.pieces import Pieces

__all__ = ["Batch", "Corpus", "TrainingData", "padded"]

RATE, FRAME = 16000, 640
DELAY = 800  # samples by which the encoder may be late: so much it hears behind a sound, at least


@dataclass(frozen=True)
class Batch:
    """Samples [B, N]; `targets` [B, U], of which the first `lengths` [B] are tokens.

    `said` [B, T] is about what each frame of 40 ms says, -1 where nobody knows.
    """

    sound: Frames
    targets: Tensor
    lengths: Tensor
    said: Tensor


@dataclass(frozen=True)
class Utterance:
    """Samples [N], text, and start and end of each word in samples [words, 2]; not a number where nobody knows."""

    sound: np.ndarray
    text: str
    words: np.ndarray


class Corpus:
    """One split of what `synthesise.py` wrote."""

    def __init__(self, cache: Path, split: str) -> None:
        self.samples = np.load(cache / f"{split}.npy")
        self.entries = json.loads((cache / f"{split}.json").read_text())

    def __len__(self) -> int:
        return len(self.entries)

    def sound(self, i: int) -> np.ndarray:
        """Samples [N] in [-1, 1)."""
        entry = self.entries[i]
        return self.samples[entry["start"] : entry["end"]].astype(np.float32) / 32768

    def text(self, i: int) -> str:
        return str(self.entries[i]["text"])

    def words(self, i: int) -> np.ndarray:
        """Start and end of each word in samples [words, 2]; not a number where the engine did not tell."""
        times = self.entries[i]["words"]
        return np.full((len(self.text(i).split()), 2), np.nan) if times is None else np.array(times) * RATE


def padded(sounds: Sequence[np.ndarray]) -> Frames:
    """Recordings as rows of a batch."""
    lengths = torch.tensor([len(sound) for sound in sounds])
    values = torch.zeros(len(sounds), int(lengths.max()))
    for row, sound in zip(values, sounds, strict=True):
        row[: len(sound)] = torch.from_numpy(sound)
    return Frames.from_lengths(values, lengths)


def coloured(slope: float, seconds: float, seed: int) -> np.ndarray:
    """Noise of power 1 / f^slope above 1 Hz or so and deviation 1."""
    n = int(seconds * RATE)
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(n))
    noise = np.fft.irfft(spectrum / np.maximum(np.arange(n // 2 + 1), 20.0) ** (slope / 2), n)
    return (noise / noise.std()).astype(np.float32)


class TrainingData:
    """Endless batches: utterances joined, stretched, at another level, and in noise; short and clean ones first.

    CTC finds its first alignments several times sooner in one or two words. `total` utterances are the whole training.
    """

    def __init__(self, corpus: Corpus, tokenizer: Pieces, *, total: int, seed: int = 0) -> None:
        self.corpus, self.tokenizer, self.total, self.drawn = corpus, tokenizer, total, 0
        self.chance = random.Random(seed)
        self.noises = [coloured(slope, 30, i) for i, slope in enumerate((0.0, 0.5, 1.0, 2.0))]
        words = [len(corpus.text(i).split()) for i in range(len(corpus))]
        self.at_most = {n: [i for i, k in enumerate(words) if k <= n] for n in (2, 4, 6)}

    @property
    def progress(self) -> float:
        """Share of the training that is done."""
        return self.drawn / self.total

    def utterance(self) -> Utterance:
        """No, one, two or three utterances with silence around them."""
        chance, done = self.chance, self.progress
        count = chance.choices((0, 1, 2, 3), (0.02, 0.83, 0.1, 0.05) if done > 0.5 else (0.01, 0.99, 0, 0))[0]
        known = self.at_most[2 if done < 0.2 else 4 if done < 0.4 else 6]
        parts, texts, words = [np.zeros(RATE // 10, np.float32), self.silence(0.3)], list[str](), [np.zeros((0, 2))]
        for _ in range(count):
            i = chance.choice(known)
            pace = chance.uniform(0.9, 1.12) if chance.random() < 0.5 else 1.0
            words.append(self.corpus.words(i) / pace + sum(map(len, parts)))
            parts += [self.varied(self.corpus.sound(i), pace), self.silence(1.0 if count > 1 else 0.5)]
            texts.append(self.corpus.text(i))
        sound = np.concatenate(parts)
        if chance.random() < (0.3 if done < 0.2 else 0.5):
            noise = chance.choice(self.noises)
            begin = chance.randrange(len(noise) - len(sound))
            level = max(float(sound.std()), 0.02) * 10 ** (-chance.uniform(10, 40) / 20)
            sound = sound + level * noise[begin : begin + len(sound)]
        sound = (sound * 10 ** (chance.uniform(-20, 3) / 20)).astype(np.float32)
        return Utterance(sound, " ".join(texts), np.concatenate(words))

    def varied(self, sound: np.ndarray, pace: float) -> np.ndarray:
        """`pace` times as fast and as high, and softer."""
        if pace != 1.0:
            sound = np.interp(np.arange(0, len(sound) - 1, pace), np.arange(len(sound)), sound)
        return (sound * self.chance.uniform(0.5, 1.0)).astype(np.float32)

    def silence(self, most_s: float) -> np.ndarray:
        """Of 0 to `most_s` seconds, more often short."""
        return np.zeros(int(self.chance.random() ** 1.5 * most_s * RATE), np.float32)

    def batches(self, size: int, *, pool: int = 16) -> Iterator[Batch]:
        """`pool` batches are drawn at once and sorted by length, so that little is padded."""
        while True:
            drawn = sorted((self.utterance() for _ in range(size * pool)), key=lambda one: len(one.sound))
            self.drawn += len(drawn)
            groups = [drawn[i : i + size] for i in range(0, len(drawn), size)]
            self.chance.shuffle(groups)
            for group in groups:
                yield self.batch(group)

    def batch(self, group: Sequence[Utterance]) -> Batch:
        tokens = [torch.tensor(self.tokenizer.encode(one.text), dtype=torch.long) for one in group]
        said = [torch.from_numpy(self.said(one)) for one in group]
        return Batch(
            padded([one.sound for one in group]),
            torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True),
            torch.tensor([len(row) for row in tokens]),
            torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=-1),
        )

    def said(self, one: Utterance) -> np.ndarray:
        """What each frame says, were the pieces of a word equally long [T]; `DELAY` late, blank between the words."""
        frames = np.zeros(len(one.sound) // FRAME + 1, np.int64)
        if np.isnan(one.words).any():
            return frames - 1
        for word, (start, end) in zip(one.text.split(), (one.words + DELAY) / FRAME, strict=True):
            pieces = np.array(self.tokenizer.encode(word))
            at = np.arange(round(start), min(round(end), len(frames)))
            frames[at] = pieces[np.clip((at - start) / (end - start) * len(pieces), 0, len(pieces) - 1).astype(int)]
        return frames
