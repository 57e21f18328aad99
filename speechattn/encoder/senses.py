"""What was heard and what was seen, each in its own branch, side by side (arXiv 2102.06657)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from speechattn.audio.augment import SpecAugment
from speechattn.audio.lips import LipAugment
from speechattn.audio.vision import SIZE
from speechattn.encoder.layers import Subsample
from speechattn.frames import Frames
from speechattn.stream import Parallel, Pointwise, Serial, Stream

__all__ = ["Altered", "Ears", "Eyes", "Fusion", "Senses", "Unstack"]


class Part(Stream):
    """Of `features` those from `first` to `last`, valid where the one behind them says so; reshaped to `shape`."""

    def __init__(self, first: int, last: int, shape: tuple[int, ...], features: int) -> None:
        super().__init__()
        self.first, self.last, self.shape, self.features = first, last, shape, features

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        if x.values.shape[2] != self.features:
            raise ValueError(f"{x.values.shape[2]} features: sound, lips and their marks are {self.features} here")
        there = x.mask & (x.values[..., self.last] > 0.5)
        part = x.values[..., self.first : self.last]
        return Frames.of(part.reshape(*part.shape[:2], *self.shape), there), state


class Dropped(Stream):
    """Modality dropout: in training a row loses its sound with the probability `deaf`, else its lips with `blind`.

    Only one that has both. `heard` is the place of the mark of the sound; that of the lips is the last.
    """

    def __init__(self, heard: int, deaf: float, blind: float) -> None:
        super().__init__()
        if not (0 <= deaf <= 1 and 0 <= blind <= 1 and deaf + blind <= 1):
            raise ValueError(f"deaf {deaf}, blind {blind}: wanted probabilities, at most 1 together")
        self.heard, self.deaf, self.blind = heard, deaf, blind

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        if not self.training or not self.deaf + self.blind:
            return x, state
        marks = x.values[..., [self.heard, -1]] > 0.5
        both = marks.any(1).all(1)
        chance = torch.rand(len(both), device=both.device)
        lost = torch.stack([both & (chance < self.deaf), both & (chance >= 1 - self.blind)], 1)
        marks = marks & ~lost[:, None]
        values = x.values.clone()
        values[..., [self.heard, -1]] = marks.to(values.dtype)
        return Frames.of(values, x.mask & marks.any(-1)), state


class Sides(Parallel):
    """Two streams of which either may be missing: a frame is valid where one is, and zero on the side that is not."""

    def combine(self, first: Frames, second: Frames) -> Frames:
        return Frames(torch.cat([first.values, second.values], -1), first.mask | second.mask)


class Senses(Serial):
    """Frames of `AudioVisual` [B, T, F] -> what `sound` and `lips` make of them, side by side [B, T', D + D'].

    `sound` reads `heard` features a frame, `lips` pictures [B, T, H, W]; both must give as many frames. A frame is
    valid where either is, and zero on the side that is not. In training rows lose one of both, with the probabilities
    `deaf` and `blind` (modality dropout), so that the model knows what to do when one is missing.
    """

    def __init__(
        self, sound: Stream, lips: Stream, *, heard: int, size: int = SIZE, deaf: float = 0.0, blind: float = 0.0
    ) -> None:
        seen = heard + 1 + size * size
        ears = Serial(part=Part(0, heard, (heard,), seen + 1), branch=sound)
        eyes = Serial(part=Part(heard + 1, seen, (size, size), seen + 1), branch=lips)
        super().__init__(dropped=Dropped(heard, deaf, blind), sides=Sides(ears, eyes))


class Fusion(Pointwise):
    """Both senses [B, T, D + D'] -> one [B, T, dim], by an MLP (arXiv 2102.06657, section 3.2)."""

    def __init__(self, inputs: int, dim: int, inner: int = 8192) -> None:
        super().__init__(nn.Linear(inputs, inner), nn.LayerNorm(inner), nn.ReLU(), nn.Linear(inner, dim))


class Unstack(Stream):
    """Frames [B, T, n * D] -> [B, n * T, D]: what `Stack` put side by side, one behind the other."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.ratio = n, Fraction(n)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        rows, frames, width = x.values.shape
        values: Tensor = x.values.reshape(rows, frames * self.n, width // self.n)
        return Frames(values, x.mask.repeat_interleave(self.n, 1)), state


class Altered(Stream):
    """Frames as a module such as `SpecAugment` or `LipAugment` makes them in training; it knows what `eval()` means."""

    def __init__(self, change: nn.Module) -> None:
        super().__init__()
        self.change = change

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        y: Frames = self.change(x)
        return y, state


class Ears(Serial):
    """Log-mel of which `frames` stand side by side [B, T, frames * mels] -> [B, frames * T / factor, dim].

    A LayerNorm of each frame is all the normalisation there is; `augment` masks, in training.
    """

    def __init__(
        self, mels: int, dim: int, *, frames: int = 4, factor: int = 4, channels: int | None = None,
        augment: SpecAugment | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            apart=Unstack(frames),
            norm=Pointwise(nn.LayerNorm(mels)),
            augment=Altered(augment or nn.Identity()),
            subsample=Subsample(mels, dim, factor=factor, channels=channels),
        )


class Eyes(Serial):
    """Pictures of a mouth [B, T, H, W] -> [B, T, dim], by a `net` of `features`; `augment` acts in training."""

    def __init__(self, net: Stream, features: int, dim: int, *, augment: LipAugment | None = None) -> None:
        super().__init__(
            augment=Altered(augment or nn.Identity()), net=net, project=Pointwise(nn.Linear(features, dim))
        )
