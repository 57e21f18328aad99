"""Sound and lips of the same stretch of time, and a front-end that brings both to one clock."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from speechattn.audio.lips import Grey
from speechattn.audio.vision import RATE, SIZE
from speechattn.frames import Frames
from speechattn.stream import Join, Pair, Plan, Planned, Pointwise, Serial, Stream
from speechattn.tree import node

__all__ = ["EVERY", "SOUND_RATE", "AudioVisual", "Clip", "eyes"]

SOUND_RATE = 16000  # samples a second
EVERY = SOUND_RATE // RATE  # samples for each picture


@node
class Clip(Frames):
    """Samples `values` [B, N] at 16 kHz and the pictures `lips` [B, N / 640, H, W] of the same time, rounded up.

    What is missing of either is invalid; whoever takes `Frames` of samples may be given a clip.
    """

    lips: Frames

    @classmethod
    def together(cls, sound: Frames, lips: Frames) -> Clip:
        """Sound [B, N] and lips [B, T, H, W] that begin together; the shorter of them ends in invalid frames."""
        samples = max(sound.mask.shape[1], EVERY * lips.mask.shape[1])
        sound = sound.pad(samples - sound.mask.shape[1])
        return cls(sound.values, sound.mask, lips.pad(ceil(samples / EVERY) - lips.mask.shape[1]))

    @classmethod
    def blind(cls, sound: Frames, size: int = SIZE) -> Clip:
        """Sound [B, N] of which no picture is there."""
        rows, n = len(sound.mask), ceil(sound.mask.shape[1] / EVERY)
        black = sound.mask.new_zeros(rows, n, size, size, dtype=torch.uint8)
        return cls(sound.values, sound.mask, Frames(black, sound.mask.new_zeros(rows, n)))

    @property
    def sound(self) -> Frames:
        """The samples alone."""
        return Frames(self.values, self.mask)

    def __getitem__(self, span: slice) -> Clip:
        """ValueError for a stretch that begins within a picture."""
        start, stop, _ = span.indices(self.mask.shape[1])
        if start % EVERY:
            raise ValueError(f"sample {start} lies within a picture: wanted a multiple of {EVERY}")
        return Clip(self.values[:, span], self.mask[:, span], self.lips[start // EVERY : ceil(stop / EVERY)])

    def pad(self, n: int) -> Clip:
        """`n` invalid samples more at the end, and their pictures."""
        sound = self.sound.pad(n)
        more = ceil(sound.mask.shape[1] / EVERY) - self.lips.mask.shape[1]
        return Clip(sound.values, sound.mask, self.lips.pad(more))


class Marked(nn.Module):
    """One feature more behind those of a frame, a one; where nothing is valid it is zero like all others."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, T, ...] -> [B, T, D + 1]."""
        return torch.cat([x.flatten(2), x.new_ones(*x.shape[:2], 1)], -1)


class AudioVisual(Planned):
    """A `Clip`, or sound [B, N] alone -> features of sound and pixels of lips, 25 a second [B, T, D + H * W + 2].

    `sound` makes 25 frames a second of D features, `lips` grey pixels. Behind each of both stands a one where it is
    there; a frame is valid where either is. Both are told apart again by `speechattn.encoder.senses.Senses`.
    """

    def __init__(self, sound: Stream, lips: Stream | None = None, *, size: int = SIZE) -> None:
        super().__init__()
        self.size = size
        heard, seen = Serial(sound, Pointwise(Marked())), Serial(lips or Grey(), Pointwise(Marked()))
        self.join = Join(heard, seen, rates=(SOUND_RATE, RATE))

    def plan(self) -> Plan:
        a, b, delay = self.join.first.plan(), self.join.second.plan(), self.join.delay
        waits = [p.latency + int((delay - p.delay) / p.ratio) for p in (a, b)]
        first = self.earliest(0)
        left = None if first is None else -first
        return Plan(self.join.blocks[0], a.ratio, max(waits[0], EVERY * waits[1]), left, delay)

    def earliest(self, output: int) -> int | None:
        a, b = self.join.first.earliest(output), self.join.second.earliest(output)
        return None if a is None or b is None else min(a, EVERY * b)

    def pair(self, x: Frames) -> Pair:
        """Both clocks. ValueError for pictures of another size."""
        clip = x if isinstance(x, Clip) else Clip.blind(x, self.size)
        if clip.lips.values.shape[2:] != (self.size, self.size):
            found = " x ".join(map(str, clip.lips.values.shape[2:]))
            raise ValueError(f"pictures of {found} pixels: this model sees {self.size} x {self.size}")
        return Pair(clip.sound, clip.lips)

    def init_state(self, x: Frames) -> Any:
        return self.join.init_state(self.pair(x[:0]))

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        return self.join.step(self.pair(x), state)


def eyes(stream: nn.Module) -> AudioVisual | None:
    """What a model sees with, that listens by this stream; None where it hears sound alone."""
    return next((part for part in stream.modules() if isinstance(part, AudioVisual)), None)
