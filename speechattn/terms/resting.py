"""A retriever whose tokens need not look at the sound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.cross import chosen
from speechattn.cross.soft import Soft, SoftState
from speechattn.frames import Frames
from speechattn.stream import Stream
from speechattn.terms.retriever import Queries, Retriever, Running, averaged

__all__ = ["RestingRetriever"]

FAR = 6.0  # the score of rest before anything is learnt: sound of some seconds without a match is less
SURE = 2.0  # what looking at the sound says for presence, in each head, before anything is learnt


class Apart(Soft):
    """Soft attention with one place more, which says nothing: its score is `rest` [H], a number for each head that all
    tokens share (the learned bias of the softmax's denominator of gpt-oss, arXiv 2508.10925).

    A place with a key would not do: tokens whose queries have no part in common cannot have one score with it.
    """

    def __init__(self, dim: int, heads: int, *, rest: float) -> None:
        super().__init__(dim, heads)
        self.rest = nn.Parameter(torch.full((heads,), rest))

    def _looked(self, q: Tensor, read: SoftState, heads: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        scores = (q / sqrt(q.shape[-1])) @ read.key.mT
        rest = self.rest.view(-1, 1, 1).expand(*scores.shape[:3], 1)
        weights = self.weigh(torch.cat([rest, scores], -1), F.pad(read.mask, [1, 0], value=True)[:, None, None])
        return weights[..., 1:] @ read.value, chosen(weights[..., 1:], heads)


class RestingRetriever(Retriever):
    """The released formulation with a place to look at that belongs to no frame (`Apart`).

    Weights over frames alone sum to one, so a token that was not said looks somewhere all the same, and how well it
    fits there is lost. With a place of rest the weight on the sound says that.
    """

    cross: Apart

    def __init__(self, frames: Stream, spelling: nn.Module, dim: int, heads: int, *, rest: float = FAR) -> None:
        super().__init__(frames, spelling, dim, heads, cross=partial(Apart, rest=rest))
        with torch.no_grad():
            use = (self.cross.out.weight.T @ (self.out.weight[1] - self.out.weight[0])).view(heads, -1)
            self.cross.value.bias.copy_((SURE * use / use.square().sum(-1, keepdim=True)).flatten())

    def start(self, rows: int, bank: Queries) -> Running:
        """Only rest was looked at."""
        state = super().start(rows, bank)
        return Running(self.cross.rest[:, None].expand_as(state.most), torch.ones_like(state.total), state.value)

    def present(self, x: Frames, bank: Queries) -> Tensor:
        """Frames [B, T, D] of `self.frames` -> log-odds that each term was said [B, N]."""
        return self.judged(self.step(x, self.start(len(x.mask), bank), bank), bank)

    def alike(self, x: Frames, bank: Queries) -> Tensor:
        """Log-odds that a token looks at the sound and does not rest, the mean over heads and tokens [B, N]."""
        state = self.step(x, Retriever.start(self, len(x.mask), bank), bank)
        looks = state.most + state.total.clamp(min=1e-30).log() - self.cross.rest[:, None]
        return averaged(looks.mean(1), bank)
