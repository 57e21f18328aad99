"""Presence from raw attention scores."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor, nn

from speechattn.cross.soft import Soft
from speechattn.frames import Frames
from speechattn.stream import Stream
from speechattn.terms.retriever import Queries, Retriever, Running, averaged, mean

__all__ = ["RawRetriever"]


class RawRetriever(Retriever):
    """The variant that believes the attention itself: no softmax, and nothing is weighed by it.

    A token was said as much as its largest score of all frames says, each head with a weight of its own; a term as much
    as its tokens on average. There are no values, so the other parts of the attention are not there.
    """

    def __init__(
        self, frames: Stream, spelling: nn.Module, dim: int, heads: int, *,
        cross: Callable[[int, int], Soft] = Soft,
    ) -> None:  # fmt: skip
        super().__init__(frames, spelling, dim, heads, cross=cross)
        del self.cross.value, self.cross.out
        self.out = nn.Linear(heads, 1)
        nn.init.constant_(self.out.weight, 1 / heads)
        nn.init.zeros_(self.out.bias)

    def queries(self, ids: Tensor, mask: Tensor) -> Queries:
        """Of tokens [N, U]; all terms have the same prior."""
        w, there = self.spelling(ids, mask)
        word = self.word(w)[there]
        term = there.nonzero()[:, 0]
        share = (1 / there.sum(1).to(word.dtype))[term]
        query = self.cross.query(word) / sqrt(self.dim // self.heads)
        return Queries(query, term, share, self.out.bias.expand(len(ids)))

    def present(self, x: Frames, bank: Queries) -> Tensor:
        """Frames [B, T, D] of `self.frames` -> log-odds that each term was said [B, N]."""
        return self.judged(self.step(x, self.start(len(x.mask), bank), bank), bank)

    def step(self, x: Frames, state: Running, bank: Queries) -> Running:
        """More frames [B, T, D]: only `most` is kept."""
        n, t = x.mask.shape
        if not t or not len(bank.query):
            return state
        key = self.cross.key(x.values).view(n, t, self.heads, -1).transpose(1, 2)
        hidden = ~x.mask[:, None, None]
        parts = [(query @ key.mT).masked_fill(hidden, -torch.inf).amax(-1) for query in self.pieces(bank)]
        return Running(torch.maximum(state.most, torch.cat(parts, 2)), state.total, state.value)

    def judged(self, state: Running, bank: Queries) -> Tensor:
        """Log-odds [B, N]; those of a row that heard nothing are the prior."""
        seen = state.most.masked_fill(state.most == -torch.inf, 0.0)
        return bank.prior + averaged((seen * self.out.weight.view(-1, 1)).sum(1), bank)

    def reference(self, x: Frames, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, N, 2] of absence (always 0) and presence, with all scores at once."""
        heard = self.frames(x)
        w, there = self.spelling(ids, mask)
        read = heard.values.shape[:2]
        key = self.cross.key(heard.values).view(*read, self.heads, -1)
        query = self.cross.query(self.word(w)).unflatten(2, (self.heads, -1))
        scores = torch.einsum("nlhd,bthd->bnlht", query, key) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~heard.mask[:, None, None, None], -torch.inf)
        most = scores.amax(-1) if read[1] else scores.sum(-1)
        present = self.out(mean(most.masked_fill(most == -torch.inf, 0.0), there))
        return torch.cat([torch.zeros_like(present), present], -1)
