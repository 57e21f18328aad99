"""Pictures that wait for the sound they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil

import numpy as np
import torch

from speechattn.audio.resample import Samples
from speechattn.audio.vision import RATE, Image
from speechattn.errors import InputError
from speechattn.frames import Frames

__all__ = ["Pictures", "beside"]

BACKLOG_S = 60.0  # of pictures that may wait for sound


class Pictures:
    """Pictures of one stream, 25 a second, `size` pixels wide and high; number k belongs to samples 640 k and on.

    `count` is how many came, `late` how many of them when their time was over: nobody sees those.
    """

    def __init__(self, size: int) -> None:
        self.size, self.count, self.late = size, 0, 0
        self.waiting: Image = np.zeros((0, size, size), np.uint8)
        self.taken = 0  # the number of the first one that waits, or would

    def add(self, lips: object) -> None:
        """The next pictures [n, size, size]. InputError for others, and when too many wait already."""
        x = np.asarray(lips)
        if x.shape[1:] != (self.size, self.size) or x.dtype != np.uint8:
            raise InputError(f"pictures {list(x.shape)} of {x.dtype}: wanted bytes [n, {self.size}, {self.size}]")
        if len(self.waiting) > BACKLOG_S * RATE:
            raise InputError(f"more than {BACKLOG_S:g} s of pictures wait for their sound: feed both alike")
        late = min(len(x), max(0, self.taken - self.count))
        self.late, self.count = self.late + late, self.count + len(x)
        self.waiting = np.concatenate([self.waiting, x[late:]])

    def take(self, n: int) -> Frames:
        """The next `n` of the stream [1, n, size, size]; those that are not there yet are invalid."""
        x, self.waiting = self.waiting[:n], self.waiting[n:]
        self.taken += n
        values = np.concatenate([x, np.zeros((n - len(x), self.size, self.size), np.uint8)])
        return Frames(torch.from_numpy(values)[None], torch.arange(n)[None] < len(x))


def beside(blocks: Iterable[Samples], rate: int, lips: Image | None) -> Iterator[tuple[Samples, Image | None]]:
    """Each block [n] at `rate` Hz with the pictures that begin before it ends; those that remain go with no sound."""
    n = seen = 0
    for block in blocks:
        n += len(block)
        first, seen = seen, ceil(n * RATE / rate)
        yield block, None if lips is None else lips[first:seen]
    if lips is not None and seen < len(lips):
        yield np.zeros(0, np.float32), lips[seen:]
