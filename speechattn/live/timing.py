"""When each token was said: a monotone path through where it looked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["token_spans"]


def token_spans(weights: NDArray[np.float32]) -> list[tuple[int, int]]:
    """`weights` [U, T] -> first and last-plus-one frame of each token.

    The path visits every token in order, at least one frame each, and collects the most weight (Viterbi); tokens that
    find no frame left share the last one.
    """
    rows, frames = weights.shape
    if frames < rows:
        return [(min(i, frames - 1), min(i, frames - 1) + 1) for i in range(rows)]
    best = np.full(rows, -np.inf, np.float32)
    moved = np.zeros((frames, rows), bool)
    best[0] = weights[0, 0]
    for t in range(1, frames):
        arrive = np.concatenate([[-np.inf], best[:-1]]).astype(np.float32)
        moved[t] = arrive > best
        best = np.maximum(best, arrive) + weights[:, t]
    spans, end, row = [], frames, rows - 1
    for t in range(frames - 1, 0, -1):
        if moved[t, row]:
            spans.append((t, end))
            end, row = t, row - 1
    spans.append((0, end))
    return spans[::-1]
