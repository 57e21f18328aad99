"""Greedy search of a head that reads and writes in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from speechattn import tree
from speechattn.decoder.in_turns import InTurns
from speechattn.frames import Frames
from speechattn.search.beam import Beam, Prefixes, Search
from speechattn.tree import node

__all__ = ["Turns", "TurnsState"]


@node
class TurnsState:
    """The caches of the `decoder`; the token `last` [B], which is read next; how many were `said` [B].

    `turns` [B] are the tokens of the schedule that have gone by, `heard` [B] the frames since the search began and
    `origin` [B] those before; the text has `ended` [B]; no frame will follow where `finished` [B].
    """

    decoder: Any
    last: Tensor
    said: Tensor
    turns: Tensor
    heard: Tensor
    origin: Tensor
    ended: Tensor
    finished: Tensor


class Turns(Search):
    """The most probable token whenever the schedule of the `decoder` says that enough has been read for it.

    It sees as many frames as the schedule wants, also where more are there (of one that `forgets` no more are read
    before). A text does not end before its source:
    where `eos` is the most probable, one turn of the schedule goes by without a token (after more frames the same token
    is asked for again). At most `most` tokens a frame are said, and none of `never`. After `memory` frames nothing more
    is heard: `room` tells before. A token's span are the frames that were read for it and for none before.

    Law: for any split of the frames the text is the same.
    """

    def __init__(
        self, decoder: InTurns, *, sos: int, eos: int, never: Sequence[int] = (), most: float = 2.0,
        memory: int = 1500,
    ) -> None:  # fmt: skip
        if memory < 1 or not most > 0:
            raise ValueError(f"memory {memory}, {most} tokens for each frame: wanted at least 1, and more than 0")
        self.decoder, self.sos, self.eos, self.most, self.memory = decoder, sos, eos, most, memory
        self.never = torch.tensor(sorted({*never} - {eos}), dtype=torch.long)

    def start(self, x: Frames) -> Beam:
        none = torch.zeros(len(x.mask), dtype=torch.long, device=x.mask.device)
        said, turns, heard, origin = (none.clone() for _ in range(4))
        state = TurnsState(
            self.decoder.start(len(none)), none + self.sos, said, turns, heard, origin, none > 0, none > 0
        )
        like = self.decoder.embed(state.last[:, None]).new_zeros(len(none), 0)  # frames may be tokens themselves
        return Beam(Prefixes.empty(like, 1), like.new_zeros(len(none), 1, dtype=torch.float64), none.clone(), state)

    def start_at(self, x: Frames, heard: Tensor) -> Beam:
        beam = self.start(x)
        return replace(beam, frames=heard, state=replace(beam.state, origin=heard))

    @torch.inference_mode()
    def step(self, x: Frames, beam: Beam) -> Beam:
        x, state = x.front(), beam.state
        room = (self.memory - state.heard)[:, None]
        rest = Frames.of(x.values, x.mask & (x.mask.cumsum(1) <= room)).front()
        beam = replace(beam, frames=beam.frames + x.lengths)
        while True:
            state = beam.state
            heard, rest = self._next(rest, state)
            _, decoder = self.decoder.read(heard, state.decoder)
            state = replace(state, decoder=decoder, heard=state.heard + heard.lengths)
            beam = self._follow(replace(beam, state=state))
            if not rest.mask.shape[1]:
                return beam

    def _next(self, x: Frames, state: TurnsState) -> tuple[Frames, Frames]:
        """Of frames that came, in front of each row: those to be read before the next token, and the rest."""
        if not self.decoder.forgets:
            return x, x[:0]
        wanted = (self.decoder.schedule.needed(state.turns) - state.heard).clamp(min=1)[:, None]
        now = torch.arange(x.mask.shape[1], device=x.mask.device) < wanted
        return Frames.of(x.values, x.mask & now).front(), Frames.of(x.values, x.mask & ~now).front()

    @torch.inference_mode()
    def finish(self, beam: Beam) -> Beam:
        decoder, finished = self.decoder.finish(beam.state.decoder), torch.ones_like(beam.state.finished)
        return self._follow(replace(beam, state=replace(beam.state, decoder=decoder, finished=finished)))

    def room(self, beam: Beam) -> Tensor:
        left: Tensor = 1 - beam.state.heard / self.memory
        return left

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        return replace(beam, said=beam.said.select(parents), score=beam.score.gather(1, parents))

    def _waits(self, state: TurnsState) -> Tensor:
        """The text is complete, or as long as it may be before more is heard [B]."""
        needed = self.decoder.schedule.needed(state.turns)
        full = torch.where(state.finished, state.said, state.turns) >= (state.heard * self.most).long()
        waits: Tensor = state.ended | full | ((needed > state.heard) & ~state.finished)
        return waits

    def _follow(self, beam: Beam) -> Beam:
        """Token by token as far as the frames reach, each row for itself, so that no cache has gaps for the others."""
        rows, done, order = torch.arange(len(beam.score), device=beam.score.device), list[Beam](), list[Tensor]()
        while len(rows):
            waits = self._waits(beam.state)
            if bool(waits.any()):
                done.append(tree.select(beam, waits.nonzero()[:, 0]))
                order.append(rows[waits])
                left = (~waits).nonzero()[:, 0]
                beam, rows = tree.select(beam, left), rows[left]
            if len(rows):
                beam = self._token(beam)
        if not done:
            return beam
        whole: Beam = tree.select(tree.concat(done), torch.cat(order).argsort())
        return whole

    def _token(self, beam: Beam) -> Beam:
        """One turn of every row: a token, or none where the text would end before its source."""
        state, schedule = beam.state, self.decoder.schedule
        read = state.heard if self.decoder.forgets else schedule.needed(state.turns).minimum(state.heard)
        there = torch.ones_like(read, dtype=torch.bool)[:, None]
        hidden, after = self.decoder.write(Frames(state.last[:, None], there), state.decoder, read=read[:, None])
        scores = self.decoder.logits(hidden[:, 0])
        scores = scores.log_softmax(-1, torch.promote_types(scores.dtype, torch.float32))
        best, token = scores.index_fill(1, self.never.to(scores.device), -torch.inf).max(1)
        ends, held = token == self.eos, (token == self.eos) & ~state.finished
        before = schedule.needed((state.turns - 1).clamp(min=0)).minimum(read).where(state.turns > 0, 0)
        start = before.minimum(read - 1).clamp(min=0) + state.origin
        stop = (read + state.origin).maximum(start + 1)
        said = beam.said.append(*(x[:, None] for x in (token, start, stop, best, ~ends)))
        state = replace(
            state, decoder=tree.where(held, state.decoder, after), last=token.where(~held, state.last),
            said=state.said + ~ends, turns=state.turns + 1, ended=ends & ~held,
        )  # fmt: skip
        return replace(beam, said=said, score=beam.score + best.where(~held, 0.0)[:, None], state=state)
