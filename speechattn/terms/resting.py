"""A retriever whose tokens need not look at the sound."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from speechattn.cross.soft import Resting
from speechattn.frames import Frames
from speechattn.stream import Stream
from speechattn.terms.retriever import Queries, Retriever, Running

__all__ = ["RestingRetriever"]

SURE = 2.0  # what looking at the sound says for presence before anything is learnt, and at rest against it


class RestingRetriever(Retriever):
    """The released formulation with `rest` places to look at that belong to no frame (`cross.soft.Resting`).

    Weights over frames alone sum to one, so a token that was not said looks somewhere all the same, and how well it
    fits there is lost. With a place of rest the weight on the sound says that.
    """

    cross: Resting

    def __init__(self, frames: Stream, spelling: nn.Module, dim: int, heads: int, *, rest: int = 1) -> None:
        super().__init__(frames, spelling, dim, heads, cross=partial(Resting, rest=rest))
        with torch.no_grad():
            use = (self.cross.out.weight.T @ (self.out.weight[1] - self.out.weight[0])).view(heads, 1, -1)
            speaking = SURE * use / use.square().sum(-1, keepdim=True)
            self.cross.value.bias.copy_(speaking.flatten())
            self.cross.rest_value.copy_(-speaking.expand_as(self.cross.rest_value))
            self.cross.rest_key.zero_()

    def places(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `heard`: keys [B, H, R, D/H], what they say [B, H, R], and that they are there [B, R]."""
        use = self.cross.out.weight.T @ (self.out.weight[1] - self.out.weight[0])
        say = (self.cross.rest_value @ use.view(self.heads, -1, 1))[..., 0]
        there = torch.ones(rows, say.shape[1], dtype=torch.bool, device=say.device)
        return self.cross.rest_key.expand(rows, -1, -1, -1), say.expand(rows, -1, -1), there

    def at_once(self, x: Frames) -> tuple[Tensor, Tensor, Tensor]:
        """The places, and behind them the frames."""
        key, say, mask = zip(self.places(len(x.mask)), self.heard(x), strict=True)
        return torch.cat(key, 2), torch.cat(say, 2), torch.cat(mask, 1)

    def start(self, rows: int, bank: Queries) -> Running:
        """Only the places were looked at."""
        return self.further(self.places(rows), super().start(rows, bank), bank)
