"""Utterances of any length in one batch that is always full."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch

from speechattn import tree
from speechattn.frames import Frames
from speechattn.stream.contract import Stream, flush

__all__ = ["packed", "stacked"]


def packed(stream: Stream, utterances: Sequence[Frames], *, rows: int = 16, piece: int | None = None) -> list[Frames]:
    """`stream(x)` for each x [1, T, ...], computed in a batch of `rows` chunks of different utterances.

    A row that has read its utterance starts the next one, and the batch shrinks when none is left: the cost follows
    the total duration, not the longest utterance. (ChunkFormer, arXiv 2502.14673, packs chunks in this way; here every
    row carries the stream's own state, so nothing is approximated.) `piece` input frames are read at once, by default
    as many blocks as hold 64. Gradients flow. ValueError for a stream whose history is not bounded.
    """
    plan = stream.plan()
    if plan.block is None or plan.left is None:
        raise ValueError(f"{type(stream).__name__} needs all that came before: its utterances cannot share a batch")
    if any(len(x.mask) != 1 for x in utterances):
        raise ValueError("packed utterances come one by one, as batches of one row")
    if not utterances:
        return []
    piece = ceil((piece or 64) / plan.block) * plan.block
    inputs = [flush(x, stream) for x in utterances]
    inputs = [x.pad(max(piece, ceil(x.mask.shape[1] / piece) * piece) - x.mask.shape[1]) for x in inputs]
    waiting = sorted(range(len(inputs)), key=lambda i: inputs[i].mask.shape[1])  # the longest begin
    slots = [waiting.pop() for _ in range(min(rows, len(inputs)))]
    at = dict.fromkeys(range(len(inputs)), 0)
    parts: list[list[Frames]] = [[] for _ in inputs]
    fresh = stream.init_state(stacked([inputs[i][:0] for i in slots]))
    state = tree.clone(fresh)
    while slots:
        y, state = stream.step(stacked([inputs[i][at[i] : at[i] + piece] for i in slots]), state)
        for row, i in enumerate(slots):
            parts[i].append(Frames(y.values[row : row + 1], y.mask[row : row + 1]))
            at[i] += piece
        over = [at[i] >= inputs[i].mask.shape[1] for i in slots]
        slots = [i if not done else waiting.pop() if waiting else -1 for i, done in zip(slots, over, strict=True)]
        if any(over):
            state = tree.where(torch.tensor(over, device=y.mask.device), fresh, state)
        if -1 in slots:
            rest = [row for row, i in enumerate(slots) if i >= 0]
            state, fresh, slots = tree.select(state, rest), tree.select(fresh, rest), [slots[row] for row in rest]
    ends = [plan.delay + ceil(x.mask.shape[1] * plan.ratio) for x in utterances]
    return [Frames.cat(pieces)[plan.delay : end] for pieces, end in zip(parts, ends, strict=True)]


def stacked(rows: Sequence[Frames]) -> Frames:
    """One batch of rows."""
    whole: Frames = tree.concat(rows)
    return whole
