"""A reward for every token, against beams that prefer short texts."""

from __future__ import annotations

import torch
from torch import Tensor

from speechattn.frames import Frames

__all__ = ["LengthBonus"]


class LengthBonus:
    """1 for each of `vocab` tokens, the end of the text included, so that it decides nothing between equal lengths.

    The state [B, K] is empty but for its shape.
    """

    partial = False

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def start(self, x: Frames) -> Tensor:
        return x.values.new_zeros(len(x.mask), 1)

    def read(self, x: Frames, state: Tensor) -> Tensor:
        return state

    def score(self, state: Tensor, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ones_like(state)[..., None].expand(-1, -1, self.vocab), state

    def extend(self, state: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        return self.select(state, parents)

    def select(self, state: Tensor, parents: Tensor) -> Tensor:
        return state.gather(1, parents)
