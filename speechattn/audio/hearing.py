"""Sound that keeps coming, as features."""

from __future__ import annotations

from math import ceil

import numpy as np
import torch
from torch import Tensor

from speechattn import tree
from speechattn.audio.resample import Samples
from speechattn.frames import Frames
from speechattn.stream import Stream

__all__ = ["Hearing", "hear"]


class Hearing:
    """A piece of sound that grows at its end and may be cut at its front; the front-end reads every sample once.

    Law: `read` gives the same features however the sound was added and whatever was read before, and a cut changes
    none of those that remain: they keep what stood before them in sight.
    """

    def __init__(self, front_end: Stream) -> None:
        plan = front_end.plan()
        if plan.block is None or plan.left is None:
            raise ValueError(f"{type(front_end).__name__} is no front-end for live sound: it reads without bound")
        self.front_end, self.block, self.ratio = front_end, plan.block, plan.ratio
        # silence to add at the end: what sees sound reaches `left` behind it, and comes `latency` later
        self.behind = ceil(plan.left / plan.block) * plan.block + plan.latency
        self.pieces: list[Samples] = [np.zeros(0, np.float32)]  # not read yet
        self.skip = plan.delay  # outputs to come that nobody wants
        nothing = sound(self.pieces[0])
        self.state = front_end.init_state(nothing)
        self.features = front_end.step(nothing, tree.clone(self.state))[0].values

    def add(self, samples: Samples) -> None:
        """More sound [n] at the end."""
        self.pieces.append(samples)

    def read(self) -> Tensor:
        """Features [1, T, F] of the sound, and of the silence behind it as far as they see sound."""
        rest = self._advance()
        silence = np.zeros(-len(rest) % self.block + self.behind, np.float32)
        y, _ = self.front_end.step(sound(np.concatenate([rest, silence])), tree.clone(self.state))
        return torch.cat([self.features, y.values[:, self.skip :]], 1)

    def cut(self, samples: int) -> None:
        """Forget the features of the first `samples`; ValueError when that is not a whole number of them."""
        n = samples * self.ratio
        if n.denominator != 1:
            raise ValueError(f"{samples} samples are {float(n):g} frames: a whole number can be cut")
        self._advance()
        self.skip += max(0, int(n) - self.features.shape[1])
        self.features = self.features[:, int(n) :].clone()

    def _advance(self) -> Samples:
        """Read the whole blocks: at once, since many small steps are slower. Returns the rest."""
        waiting = np.concatenate(self.pieces)
        whole = len(waiting) // self.block * self.block
        if whole:
            y, self.state = self.front_end.step(sound(waiting[:whole]), self.state)
            self.features = torch.cat([self.features, y.values[:, self.skip :]], 1)
            self.skip = max(0, self.skip - y.mask.shape[1])
        self.pieces = [waiting[whole:].copy()]
        return self.pieces[0]


def sound(samples: Samples) -> Frames:
    """Samples [n] as frames [1, n]."""
    values = torch.from_numpy(samples)[None]
    return Frames(values, torch.ones(values.shape, dtype=torch.bool))


def hear(front_end: Stream, samples: Samples) -> Tensor:
    """Features [1, T, F] of a whole piece of sound [n], as `Hearing` reads them."""
    hearing = Hearing(front_end)
    hearing.add(samples)
    return hearing.read()
