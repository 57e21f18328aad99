"""A beam over labels whose heads decide when there is enough to say the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from speechattn import tree
from speechattn.cross.monotonic import Monotonic, Place
from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Frames, Memory
from speechattn.search.attention import AttentionScorer, AttentionScores
from speechattn.search.beam import Beam, Prefixes, Search
from speechattn.search.draft import Draft
from speechattn.tree import node

__all__ = ["MonotonicBeam", "MonotonicState"]

NONE = -torch.inf


@node
class MonotonicState:
    """What the decoder knows of the frames and the hypotheses, and which of these have `ended` [B, K].

    `said` [B] counts the tokens of a living hypothesis since the search began, `heard` [B] the frames since then;
    `origin` [B] those before. No frame will follow where `finished` [B].
    """

    decoder: AttentionScores
    ended: Tensor
    said: Tensor
    heard: Tensor
    origin: Tensor
    finished: Tensor


class MonotonicBeam(Search):
    """The `size` best texts by a decoder with monotonic cross attention (MMA, arXiv 1909.12406), label by label.

    A row goes on with the next label when every head of every living hypothesis has stopped for it; else it waits for
    frames, and when there will be none, heads that find no stop see nothing. A hypothesis that says `eos` has ended,
    also before the sound has: what follows is not heard. It keeps its score, to which `bonus` was added for each
    token, and its place among the best; the row is done when all have ended. There are at most `most` tokens for each
    frame, and no more than the decoder's context can take; tokens in `never` are not said.

    A token's span reaches from the first to the last stop of the heads of all layers. Frames behind which every head
    has gone, with what they still look back at, are forgotten.

    With `hears` an utterance is over when the heads have not stopped for long: for models in which nothing else tells.

    Law: no decision looks at frames behind the stops that it follows, so the hypotheses are those of the whole
    utterance as soon as they are there, for any split.
    """

    def __init__(
        self, decoder: AttentionDecoder, size: int, *, sos: int, eos: int, bonus: float = 0.0, most: float = 1.0,
        never: Sequence[int] = (), hears: bool = False,
    ) -> None:  # fmt: skip
        if size < 1 or not most > 0:
            raise ValueError(f"a beam of {size}, {most} tokens for each frame: wanted at least 1, and more than 0")
        if wrong := [i for i, layer in enumerate(decoder.layers) if not isinstance(layer.cross, Monotonic)]:
            raise ValueError(f"cross attention in layers {wrong} is not monotonic: it never waits for frames")
        if decoder.memory_positions is not None:
            raise ValueError("memory positions would be counted anew behind the frames that this search forgets")
        self.size, self.eos, self.bonus, self.most, self.hears = size, eos, bonus, most, hears
        self.scorer = AttentionScorer(decoder, sos, eos)
        self.never = torch.tensor(sorted({*never} - {eos}), dtype=torch.long)

    def start(self, x: Frames) -> Beam:
        x = x[:0]
        rows, device = len(x.mask), x.mask.device
        alone = torch.zeros(rows, self.size, dtype=torch.long, device=device)
        score = torch.full((rows, self.size), NONE, dtype=torch.float64, device=device)
        score[:, :1] = 0.0
        none = alone.new_zeros(rows)
        decoder = self.scorer.select(self.scorer.start(x), alone)
        state = MonotonicState(decoder, alone > 0, none, none.clone(), none.clone(), none > 0)
        return Beam(Prefixes.empty(x.values, self.size), score, none.clone(), state)

    def start_at(self, x: Frames, heard: Tensor) -> Beam:
        beam = self.start(x)
        return replace(beam, frames=heard, state=replace(beam.state, origin=heard))

    @torch.inference_mode()
    def step(self, x: Frames, beam: Beam) -> Beam:
        x = x.front()
        beam = self._follow(self._read(x, beam, beam.state.finished))
        return replace(beam, frames=beam.frames + x.lengths)

    @torch.inference_mode()
    def finish(self, beam: Beam) -> Beam:
        finished = torch.ones_like(beam.state.finished)
        nothing = beam.state.decoder.caches[0].values.new_zeros(len(finished), 0, self.scorer.decoder.dim)
        return self._follow(self._read(Frames(nothing, finished[:, None][:, :0]), beam, finished))

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        state = replace(
            beam.state, decoder=self.scorer.select(beam.state.decoder, parents),
            ended=beam.state.ended.gather(1, parents),
        )  # fmt: skip
        return replace(beam, said=beam.said.select(parents), score=beam.score.gather(1, parents), state=state)

    def room(self, beam: Beam) -> Tensor:
        living = (beam.score > NONE) & ~beam.state.ended
        left: Tensor = (1 - beam.state.said / self.scorer.longest).where(living.any(1), 0.0)  # all done: none
        return left

    def waited(self, beam: Beam) -> Tensor:
        state = beam.state
        stop = torch.cat([place.at[:, 0] for place in places(state.decoder)], 1).amax(1)
        waited: Tensor = (state.heard - 1 - stop).clamp(min=0).where(state.said > 0, 0)
        return waited

    def looks(self, beam: Beam) -> list[Draft]:
        drafts = super().looks(beam)  # of tokens for which every head has stopped
        return [replace(draft, waiting=torch.zeros(len(draft.tokens), dtype=torch.bool)) for draft in drafts]

    def _read(self, x: Frames, beam: Beam, finished: Tensor) -> Beam:
        """The decoder reads the frames, and learns which rows have finished."""
        state, begin = beam.state, torch.zeros_like(beam.state.heard)
        cross = self.scorer.decoder.read(Memory(x, begin, begin, finished), self._needed(beam))
        decoder = replace(state.decoder, cross=cross, caches=tuple(c.trimmed() for c in state.decoder.caches))
        return replace(beam, state=replace(state, decoder=decoder, heard=state.heard + x.lengths, finished=finished))

    def _needed(self, beam: Beam) -> tuple[Any, ...]:
        """What was read, without the frames that no living hypothesis will look at."""
        state, kept = beam.state, []
        living = (beam.score > NONE) & ~state.ended
        for layer, cross, place in zip(self.scorer.decoder.layers, state.decoder.cross, state.decoder.places,
                                       strict=True):  # fmt: skip
            assert isinstance(layer.cross, Monotonic)
            if layer.cross.reach is None:
                kept.append(cross.trimmed())
                continue
            least = (place.at.amin(2) - layer.cross.reach).where(living, state.heard[:, None]).amin(1)
            kept.append(cross.forget(least))
        return tuple(kept)

    def _follow(self, beam: Beam) -> Beam:
        """Label by label as far as the frames reach, each row for itself."""
        rows = torch.arange(len(beam.score), device=beam.score.device)
        ends: list[Beam] = []
        order: list[Tensor] = []
        while len(rows):
            stays = self._idle(beam)
            after = beam
            if not bool(stays.any()):
                after, stays = self._label(beam)
            if bool(stays.any()):
                ends.append(tree.select(beam, stays.nonzero()[:, 0]))
                order.append(rows[stays])
                left = (~stays).nonzero()[:, 0]
                after, rows = tree.select(after, left), rows[left]
            beam = after
        if not ends:
            return beam
        whole: Beam = tree.select(tree.concat(ends), torch.cat(order).argsort())
        return whole

    def _full(self, state: MonotonicState) -> Tensor:
        """There is no room for another token behind what was heard [B]."""
        return state.said >= (state.heard * self.most).long().clamp(max=self.scorer.longest)

    def _idle(self, beam: Beam) -> Tensor:
        """The texts are complete, or as long as they may be before more is heard [B]."""
        living = (beam.score > NONE) & ~beam.state.ended
        done: Tensor = ~living.any(1) | (self._full(beam.state) & ~beam.state.finished)
        return done

    def _label(self, beam: Beam) -> tuple[Beam, Tensor]:
        """The best hypotheses with one label more; which rows [B] cannot have it yet, because a head waits."""
        state = beam.state
        living = (beam.score > NONE) & ~state.ended
        scores, decoder = self.scorer.score(state.decoder, None)
        waiting = torch.cat([place.waiting for place in places(decoder)], 2).any(2)
        stays = (waiting & living).any(1)
        total = self._ranked(scores, beam, self._full(state))
        score, best = total.flatten(1).topk(self.size)
        parents = torch.div(best, total.shape[2], rounding_mode="floor")
        tokens = best % total.shape[2]
        starts, stops = self._spans(decoder, state, parents)
        said = beam.said.select(parents).append(
            tokens, starts, stops, scores.flatten(1).gather(1, best), (tokens != self.eos) & (score > NONE)
        )  # fmt: skip
        state = replace(state, decoder=self.scorer.extend(decoder, parents, tokens), ended=tokens == self.eos,
                        said=state.said + 1)  # fmt: skip
        return replace(beam, said=said, score=score, state=state), stays

    def _ranked(self, scores: Tensor, beam: Beam, full: Tensor) -> Tensor:
        """What each label [B, K, V] makes of the hypotheses; those that have ended stay as they are, by `eos`."""
        ended = beam.state.ended[..., None]
        eos = torch.arange(scores.shape[2], device=scores.device) == self.eos
        total = beam.score[..., None] + scores + torch.where(eos, 0.0, self.bonus)
        total = total.where(eos | ~(full[:, None, None] | ended), NONE)
        total = total.index_fill(2, self.never.to(total.device), NONE) if len(self.never) else total
        return torch.where(eos & ended, beam.score[..., None], total)

    def _spans(self, decoder: AttentionScores, state: MonotonicState, parents: Tensor) -> tuple[Tensor, Tensor]:
        """The first and last-plus-one frame where heads of the `parents` [B, K] have stopped."""
        at = torch.cat([place.at for place in places(decoder)], 2)
        at = at.minimum(state.heard[:, None, None] - 1).clamp(min=0) + state.origin[:, None, None]
        return at.amin(2).gather(1, parents), at.amax(2).gather(1, parents) + 1


def places(decoder: AttentionScores) -> list[Place]:
    """Where the heads of each layer stand, all [B, K, ...]."""
    return [place for place in decoder.places if isinstance(place, Place)]
