"""Normalisation of features."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechattn.frames import Frames
from speechattn.stream import Stream

__all__ = ["GlobalCMVN"]

LEAST = 1e-5  # a deviation below this share of the mean (or of 1) is rounding


class GlobalCMVN(Stream):
    """Features [B, T, D] minus the corpus `mean` [D], over its standard deviation `std` [D].

    Both are buffers and are saved with the weights. A feature that did not vary in the corpus becomes zero.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        if mean.dim() != 1 or mean.shape != std.shape:
            raise ValueError(f"mean {list(mean.shape)} and deviation {list(std.shape)}: wanted one number a feature")
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    @classmethod
    def unknown(cls, dim: int) -> GlobalCMVN:
        """For `dim` features: mean 0 and deviation 1, until statistics are loaded."""
        return cls(torch.zeros(dim), torch.ones(dim))

    @classmethod
    def estimate(cls, corpus: Iterable[Frames]) -> GlobalCMVN:
        """Statistics of the valid frames of all batches, merged as in Chan, Golub, LeVeque 1979, eq. 2.1."""
        count, mean, squares = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        kind = torch.get_default_dtype()
        for x in corpus:
            kind, values = x.values.dtype, x.values.detach()[x.mask].double()
            if not len(values):
                continue
            center = values.mean(0)
            mine = (values - center).square().sum(0)
            if not count:
                count, mean, squares = len(values), center, mine
                continue
            gap, total = center - mean, count + len(values)
            squares = squares + mine + gap.square() * (count * len(values) / total)
            mean, count = mean + gap * (len(values) / total), total
        if not count:
            raise ValueError("no valid frame to estimate a mean from")
        return cls(mean.to(kind), (squares / count).sqrt().to(kind))

    @classmethod
    def read(cls, path: str | Path) -> GlobalCMVN:
        """ESPnet's `feats_stats.npz` (count, sum, sum_square) or its Kaldi-like `.npy` [2, D + 1], the count last."""
        stats = np.load(path)
        if isinstance(stats, np.ndarray):
            count, total, squares = stats[0, -1], stats[0, :-1], stats[1, :-1]
        else:
            count, total, squares = (np.asarray(stats[name], np.float64) for name in ("count", "sum", "sum_square"))
        mean = torch.as_tensor(total / count, dtype=torch.float64)
        variance = torch.as_tensor(squares / count, dtype=torch.float64) - mean.square()
        return cls(mean.float(), variance.clamp(min=0).sqrt().float())

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        varies = self.std > LEAST * self.mean.abs().clamp(min=1.0)
        scale = torch.where(varies, 1 / self.std.where(varies, 1.0), 0.0)
        return Frames.of((x.values - self.mean) * scale, x.mask), state
