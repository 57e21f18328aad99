"""Where alignment heads looked, and when a token was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from speechattn.tree import node

__all__ = ["Looked", "apart", "around", "farthest", "grown", "monotone", "narrowed"]

FOCUS_SHARE = 0.25  # a token is said while its attention is above this share of its peak


@node
class Looked:
    """Where alignment heads looked to say the newest tokens: `values` [B, R, N, T], frames since the search began.

    The first `first` [B] rows are of committed tokens, the next of the draft, and one of what follows that.
    """

    values: Tensor
    first: Tensor

    @staticmethod
    def align(parts: Sequence[Looked]) -> list[Looked]:
        """The same with one number of rows and of frames."""
        rows, frames = (max(p.values.shape[i] for p in parts) for i in (1, 3))
        return [replace(p, values=grown(p.values, rows, frames)) for p in parts]


def grown(values: Tensor, rows: int, frames: int) -> Tensor:
    """[B, R, N, T] with zeros for what is not there."""
    more = [0, frames - values.shape[3], 0, 0, 0, rows - values.shape[1]]
    return F.pad(values, more) if any(more) else values


def farthest(looked: Looked) -> Tensor:
    """The last frame where a committed token had its peak [B]; 0 where there is none."""
    _, rows, _, frames = looked.values.shape
    if not rows or not frames:
        return torch.zeros_like(looked.first)
    committed = torch.arange(rows, device=looked.first.device) < looked.first[:, None]
    peaks: Tensor = looked.values.float().mean(2).argmax(2).where(committed, 0).amax(1)
    return peaks


def monotone(weights: NDArray[np.float32]) -> list[tuple[int, int]]:
    """`weights` [U, T] -> first and last-plus-one frame of each token.

    The path through all frames that visits every token in order, at least one frame each, and collects the most
    weight: best[i, t] = S[i, t] + max over s < t of best[i - 1, s] - S[i, s], where S are sums up to frame t.
    """
    rows, frames = weights.shape
    if frames < rows:
        return [(min(i, frames - 1), min(i, frames - 1) + 1) for i in range(rows)]
    sums = np.concatenate([np.zeros((rows, 1)), weights.cumsum(1, dtype=np.float64)], 1)
    best, enter = sums[0].copy(), []
    best[0] = -np.inf
    for i in range(1, rows):
        enter.append(best - sums[i])
        best = np.full(frames + 1, -np.inf)
        best[1:] = sums[i, 1:] + np.maximum.accumulate(enter[-1])[:-1]
    spans, end = [], frames
    for each in reversed(enter):
        start = int(each[:end].argmax())
        spans.append((start, end))
        end = start
    return [(0, end), *reversed(spans)]


def narrowed(weights: NDArray[np.float32]) -> list[tuple[int, int]]:
    """`weights` [U + 1, T] -> spans of the first U tokens, where each really looked; the last row takes the rest."""
    spans = []
    for row, (start, end) in zip(weights[:-1], monotone(weights)[:-1], strict=True):
        inside = row[start:end]
        loud = np.flatnonzero(inside >= FOCUS_SHARE * inside.max())
        spans.append((start + int(loud[0]), start + int(loud[-1]) + 1) if len(loud) else (start, end))
    return spans


def around(row: NDArray[np.float32]) -> tuple[int, int]:
    """First and last-plus-one frame of the stretch around the peak of `row` [T] that is not far below it."""
    peak = int(row.argmax())
    quiet = np.flatnonzero(row < FOCUS_SHARE * row[peak])
    at = int(np.searchsorted(quiet, peak))
    return (int(quiet[at - 1]) + 1 if at else 0), (int(quiet[at]) if at < len(quiet) else len(row))


def apart(weights: NDArray[np.float32]) -> list[tuple[int, int]]:
    """`weights` [U + 1, T] -> spans of the first U tokens, each where it looked, in any order."""
    return [around(row) for row in weights[:-1]]
