"""An attention decoder as a part of a label-synchronous beam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn import tree
from speechattn.attention.self_attention import AttentionState
from speechattn.decoder.attention import AttentionDecoder, DecoderState
from speechattn.frames import Frames, Memory
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["AttentionScorer", "AttentionScores", "Caches"]


@node
class Caches:
    """Keys and values that the decoder made of the tokens of each hypothesis: `values` [B, K, N, 2, H, D/H].

    The newest token is at the end; of the N, `mask` [B, N] are there, as many in each hypothesis of a row.
    """

    values: Tensor
    mask: Tensor

    @staticmethod
    def align(caches: Sequence[Caches]) -> list[Caches]:
        """The same in one capacity."""
        most = max(cache.mask.shape[1] for cache in caches)
        return [
            Caches(F.pad(c.values, [*[0] * 6, room, 0]), F.pad(c.mask, [room, 0])) if room else c
            for c in caches
            for room in (most - c.mask.shape[1],)
        ]

    def trimmed(self) -> Caches:
        """Without the tokens in front that no row has."""
        if not self.mask.numel() or bool(self.mask[:, 0].any()):
            return self
        first = int((~self.mask.any(0)).sum())
        return Caches(self.values[:, :, first:].clone(), self.mask[:, first:].clone())


@node
class AttentionScores:
    """What the decoder has read, of the frames (`cross`) and of the tokens (`caches`); `last` [B, K] is to be read.

    `cross` has one row for the K hypotheses; `places` [B, K, ...] is where they stand in it.
    """

    cross: tuple[Any, ...]
    places: tuple[Any, ...]
    caches: tuple[Caches, ...]
    last: Tensor


class AttentionScorer:
    """Log-probabilities of the next token, or of the end `eos`, behind `sos` and what was said.

    With frames that are new the last token is read again; the tokens before it keep what they made of the frames that
    were there.
    """

    partial = False

    def __init__(self, decoder: AttentionDecoder, sos: int, eos: int) -> None:
        self.decoder, self.sos, self.eos = decoder, sos, eos

    @property
    def longest(self) -> int:
        """Tokens that fit into the decoder's context behind `sos`."""
        return self.decoder.context - self.decoder.opened - 1

    def start(self, x: Frames) -> AttentionScores:
        begun = self.decoder.start(Memory.of(x[:0]))
        caches = tuple(Caches(c.past.values[:, None], c.past.mask) for c in begun.cache)
        last = torch.full((len(x.mask), 1), self.sos, dtype=torch.long, device=x.mask.device)
        places = tree.map(lambda leaf: leaf[:, None], begun.place)
        return AttentionScores(begun.cross, places, caches, last)

    def read(self, x: Frames, state: AttentionScores) -> AttentionScores:
        old = tuple(cross.trimmed() if hasattr(cross, "trimmed") else cross for cross in state.cross)
        caches = tuple(cache.trimmed() for cache in state.caches)
        return replace(state, cross=self.decoder.read(Memory.of(x), old), caches=caches)

    def score(self, state: AttentionScores, candidates: Tensor | None) -> tuple[Tensor, AttentionScores]:
        rows, beam = state.last.shape
        there = state.caches[0].mask[:, None].expand(-1, beam, -1).flatten(0, 1)
        waiting = state.caches[0].values.new_zeros(rows * beam, 0, self.decoder.dim)
        sinks = Buffer(waiting, there[:, :0])
        past = tuple(AttentionState(waiting, Buffer(c.values.flatten(0, 1), there), sinks) for c in state.caches)
        place = tree.map(lambda leaf: leaf.flatten(0, 1), state.places)
        hidden, _, after = self.decoder.step(state.last.view(-1, 1), DecoderState(past, state.cross, place))
        scores = self.decoder.logits(hidden[:, 0])
        mask = F.pad(state.caches[0].mask, [0, 1], value=True)
        caches = tuple(Caches(c.past.values.view(rows, beam, *c.past.values.shape[1:]), mask) for c in after.cache)
        scores = scores.log_softmax(-1, torch.promote_types(scores.dtype, torch.float32))
        places = tree.map(lambda leaf: leaf.unflatten(0, (rows, beam)), after.place)
        return scores.view(rows, beam, -1), replace(state, places=places, caches=caches)

    def extend(self, state: AttentionScores, parents: Tensor, tokens: Tensor) -> AttentionScores:
        return replace(self.select(state, parents), last=tokens)

    def select(self, state: AttentionScores, parents: Tensor) -> AttentionScores:
        rows, beam = state.last.shape
        at = parents + beam * torch.arange(rows, device=parents.device)[:, None]

        def picked(values: Tensor) -> Tensor:
            return values.flatten(0, 1).index_select(0, at.view(-1)).view(*at.shape, *values.shape[2:])

        caches = tuple(replace(cache, values=picked(cache.values)) for cache in state.caches)
        places = tree.map(picked, state.places)
        return replace(state, places=places, caches=caches, last=state.last.gather(1, parents))
