"""One small training, and how its errors are counted."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torchaudio.functional import edit_distance
from tqdm import tqdm

from claim.strings import MELS, Recording, String, batch, load, tokenizer
from speechattn.audio.augment import SpecAugment
from speechattn.audio.spectrum import LogMel
from speechattn.frames import Frames
from speechattn.model import Recognizer
from speechattn.search import Search
from speechattn.stream import Pointwise, Stream
from speechattn.task.objectives import Heard, Objective, Said
from speechattn.task.optimizer import MuonAdamW

__all__ = ["Data", "Errors", "Trained", "count", "frames_of", "recogniser", "train"]


class Data:
    """The strings, made once in a process."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        spectrum = LogMel(mels=MELS, right=159)
        self.spectrum, self.quick = spectrum, quick
        self.train = [s for r in load(folder, "train", most=10 if quick else None) for s in r.joined(1, spectrum)]
        self.test: list[Recording] = load(folder, "test", most=2 if quick else None)

    def joined(self, n: int) -> list[String]:
        """The test recordings, `n` strings at a time."""
        return [s for r in self.test for s in r.joined(n, self.spectrum)]


def recogniser(encoder: Stream, heads: dict[str, nn.Module]) -> Recognizer:
    """A model of features."""
    return Recognizer(Pointwise(nn.Identity()), encoder, heads, tokenizer())


@dataclass(frozen=True)
class Trained:
    """Parameters, seconds of the training, its last loss."""

    parameters: int
    seconds: float
    loss: float


def batches(strings: Sequence[String], size: int, seed: int, joined: int) -> Iterator[list[String]]:
    """Endless; of like length, so that little is padded. Up to `joined` strings are put into one."""
    chance = random.Random(seed)
    while True:
        drawn = [
            String(torch.cat([s.features for s in parts]), sum((s.tokens for s in parts), ()))
            for parts in (chance.choices(strings, k=chance.randint(1, joined)) for _ in range(16 * size))
        ]
        drawn.sort(key=lambda s: len(s.features))
        groups = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        chance.shuffle(groups)
        yield from groups


def train(
    model: Recognizer, objectives: Sequence[Objective], data: Data, *, seed: int, steps: int = 800, size: int = 16,
    rate: float = 3e-3, joined: int = 1, alone: int = 0,
) -> Trained:  # fmt: skip
    """One cycle of the learning rate; in the first `alone` steps the first objective alone."""
    steps = 10 if data.quick else steps
    torch.manual_seed(seed)
    for objective in objectives:
        objective.fit(model)
    trained = nn.ModuleList([model, *objectives])
    optimizer = MuonAdamW(trained.named_parameters(), rate)
    schedule = OneCycleLR(optimizer, rate, steps, pct_start=0.15, cycle_momentum=False)
    augment = SpecAugment(time_masks=2, time_share=0.05, frequency_masks=1, frequency_width=6)
    trained.train()
    began, loss = time.perf_counter(), torch.zeros(())
    bar = tqdm(zip(range(steps), batches(data.train, size, seed, joined), strict=False), total=steps, mininterval=5)
    for step, group in bar:
        x, tokens, lengths = batch(group)
        x = augment(x)
        told = objectives[:1] if step < alone else objectives
        heard, said = Heard(x, x, model.encoder(x)), Said(tokens, lengths)
        each = [o.weight * o.losses(model, heard, said).sum() / lengths.sum() for o in told]
        loss = torch.stack(each).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=" ".join(f"{float(e.detach()):.3f}" for e in each))
    trained.eval()
    numbers = sum(p.numel() for p in model.parameters())
    return Trained(numbers, time.perf_counter() - began, float(loss.detach()))


@dataclass(frozen=True)
class Errors:
    """Edits, and words that were said."""

    edits: int
    words: int

    @property
    def rate(self) -> float:
        """Word error rate in %."""
        return 100 * self.edits / max(self.words, 1)


@torch.inference_mode()
def frames_of(model: Recognizer, strings: Sequence[String]) -> Frames:
    """Encoder frames [B, T, D] of a batch."""
    return model.encoder(batch(strings)[0])


@torch.inference_mode()
def count(model: Recognizer, search: Search, strings: Sequence[String], *, size: int = 16) -> Errors:
    """Words that the search gets wrong."""
    ordered, edits = sorted(strings, key=lambda s: len(s.features)), 0
    for i in range(0, len(ordered), size):
        group = ordered[i : i + size]
        for string, found in zip(group, search.decode(frames_of(model, group)), strict=True):
            edits += edit_distance(list(string.tokens), list(found[0].tokens) if found else [])
    return Errors(edits, sum(len(s.tokens) for s in strings))
