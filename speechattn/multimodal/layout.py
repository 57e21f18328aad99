"""The sequence that a speech language model reads (Llama-AVSR, arXiv 2409.12319, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speechattn.frames import Frames

__all__ = ["BOS", "KINDS", "LIPS", "MARK", "NOTHING", "PROMPT", "SINK", "SOUND", "TEXT", "Laid", "laid"]

# Kinds of places.
NOTHING = 0
BOS = 1
MARK = 2
SOUND = 3
LIPS = 4
PROMPT = 5
TEXT = 6
SINK = 7
KINDS = ("nothing", "BOS", "mark", "sound", "lips", "prompt", "text", "sink")


@dataclass(frozen=True)
class Laid:
    """Embeddings `x` [B, S, D] and the kind of each place [B, S]; every row begins in front and ends in `NOTHING`."""

    x: Frames
    kinds: Tensor


def laid(parts: Sequence[tuple[Frames, int]]) -> Laid:
    """Parts [B, T, D], each of a kind, one behind the other; what is invalid in them takes no room."""
    x = Frames.cat([part for part, _ in parts])
    kinds = torch.cat([torch.full_like(part.mask, kind, dtype=torch.long) for part, kind in parts], 1)
    order = (~x.mask).byte().argsort(dim=1, stable=True)[:, : int(x.lengths.max()) if len(x.mask) else 0]
    rows = torch.arange(len(order), device=order.device)[:, None]
    mask = x.mask[rows, order]
    return Laid(Frames.of(x.values[rows, order], mask), kinds[rows, order] * mask)
