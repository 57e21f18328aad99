"""Second pass: an attention decoder judges the hypotheses of another search (U2, arXiv 2012.05481, section 3.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Frames, Memory
from speechattn.search.beam import Beam, Search
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["Judge", "Rescored", "RescoredState"]


class Judge(Protocol):
    """A decoder that tells how probable whole texts are: `AttentionDecoder`, or `TwoWay`."""

    def log_prob(self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int) -> Tensor:
        """Of the first `lengths` [B * K] tokens of `targets` [B * K, U] and the end, K texts for each memory."""


@node
class RescoredState:
    """The state of the first search, the frames that it has read, and the tokens [B, N] that were committed."""

    first: Any
    heard: Buffer
    committed: Buffer


class Rescored(Search):
    """`search`, whose hypotheses are put in another order in `finish`.

    Their score becomes `weight` times that of the search plus the log-probability that the decoder gives to the whole
    text, what was committed included. Until then everything is as in the search, so that a stream shows its first
    pass, and the second one costs one look at all hypotheses, however long they are; the frames are kept for it.
    """

    def __init__(self, search: Search, decoder: Judge, *, sos: int, eos: int, weight: float = 0.5) -> None:
        self.first, self.decoder, self.size = search, decoder, search.size
        self.phrases, self.prompt = search.phrases, search.prompt
        self.sos, self.eos, self.weight = sos, eos, weight
        parts = decoder.modules() if isinstance(decoder, nn.Module) else ()
        self.longest = min((part.context - 1 for part in parts if isinstance(part, AttentionDecoder)), default=1 << 30)

    def start(self, x: Frames) -> Beam:
        return self._begun(self.first.start(x), x)

    def start_at(self, x: Frames, heard: Tensor) -> Beam:
        return self._begun(self.first.start_at(x, heard), x)

    def bias(self, beam: Beam, root: int | Tensor) -> Beam:
        return self._with(beam, self.first.bias(self._inner(beam), root))

    def _begun(self, beam: Beam, x: Frames) -> Beam:
        """With nothing beside it yet."""
        nothing = x.mask.new_zeros(len(x.mask), 0)
        state = RescoredState(beam.state, Buffer(x.values[:, :0], nothing), Buffer(nothing.long(), nothing))
        return replace(beam, state=state)

    def step(self, x: Frames, beam: Beam) -> Beam:
        heard = kept(beam.state.heard, x.values, x.mask)
        return self._with(beam, self.first.step(x, self._inner(beam)), heard=heard)

    @torch.inference_mode()
    def finish(self, beam: Beam) -> Beam:
        beam = self._with(beam, self.first.finish(self._inner(beam)))
        heard, before, said = beam.state.heard, beam.state.committed, beam.said
        rows, beams = said.length.shape
        tokens = torch.cat([before.values[:, None].expand(-1, beams, -1), said.tokens], 2)
        at = torch.arange(said.tokens.shape[2], device=tokens.device)
        there = torch.cat([before.mask[:, None].expand(-1, beams, -1), at < said.length[..., None]], 2)
        length = there.sum(2)
        most = int(length.max()) if rows else 0
        order = (~there).long().argsort(dim=2, stable=True)[..., :most]  # those that are there in front
        memory = Memory.of(Frames(heard.values, heard.mask), finished=True)
        found = self.decoder.log_prob(
            memory, tokens.gather(2, order).flatten(0, 1), length.flatten(), sos=self.sos, eos=self.eos
        )
        score = self.weight * beam.score + found.view(rows, beams)
        score, best = score.masked_fill(beam.score == -torch.inf, -torch.inf).sort(dim=1, descending=True)
        return replace(self.select(beam, best), score=score)

    def room(self, beam: Beam) -> Tensor:
        said = beam.state.committed.length + beam.said.length.amax(1)
        return torch.minimum(1 - said / self.longest, self.first.room(self._inner(beam)))

    def commit(self, beam: Beam, n: Tensor) -> Beam:
        new = self._with(beam, self.first.commit(self._inner(beam), n))
        at = torch.arange(beam.said.tokens.shape[2], device=n.device)
        committed = kept(beam.state.committed, beam.said.tokens[:, 0], at < n[:, None])
        return replace(new, state=replace(new.state, committed=committed))

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        return self._with(beam, self.first.select(self._inner(beam), parents))

    def _inner(self, beam: Beam) -> Beam:
        return replace(beam, state=beam.state.first)

    def _with(self, old: Beam, new: Beam, *, heard: Buffer | None = None) -> Beam:
        """The `new` beam of the search with what stands beside it in the `old` one."""
        heard = old.state.heard if heard is None else heard
        return replace(new, state=replace(old.state, first=new.state, heard=heard))


def kept(buffer: Buffer, values: Tensor, mask: Tensor) -> Buffer:
    """What is there of the buffer and of `values` [B, T, ...], without holes: rows that begin anew leave some."""
    x = Frames.cat([Frames(buffer.values, buffer.mask), Frames(values, mask)]).front()
    return Buffer(x.values, x.mask)
