"""Triggered attention: a beam over frames whose labels are also scored by a decoder that hears little further."""

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
from speechattn.decoder.ctc import CTC
from speechattn.frames import Frames, Memory
from speechattn.search.beam import Beam
from speechattn.search.ctc import CTCPrefixBeam, Predictions, PrefixState
from speechattn.search.ctc_paths import traced, written
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["Listeners", "TriggeredBeam"]

NONE = -torch.inf


@node
class Listeners:
    """The decoder's side of K hypotheses of each row, which may be of different lengths.

    `values` has keys and values of each layer [B, K, N, 2, H, D/H], the newest token at the end, of which `there`
    [B, K, N] are there; `last` [B, K] was said and is not read yet.
    """

    values: tuple[Tensor, ...]
    there: Tensor
    last: Tensor

    @staticmethod
    def align(many: Sequence[Listeners]) -> list[Listeners]:
        """The same in one capacity."""
        most = max(one.there.shape[2] for one in many)
        return [one.padded(most - one.there.shape[2]) for one in many]

    def padded(self, room: int) -> Listeners:
        """With space in front."""
        if not room:
            return self
        values = tuple(F.pad(x, [*[0] * 6, room, 0]) for x in self.values)
        return replace(self, values=values, there=F.pad(self.there, [room, 0]))

    def trimmed(self) -> Listeners:
        """Without the space in front that every hypothesis has."""
        free = int((~self.there.flatten(0, 1).any(0)).sum()) if self.there.numel() else 0
        if not free:
            return self
        values = tuple(x[:, :, free:].clone() for x in self.values)
        return replace(self, values=values, there=self.there[:, :, free:].clone())

    def select(self, parents: Tensor) -> Listeners:
        """Hypothesis j of a row becomes what `parents` [B, K'] says it was."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        return Listeners(tuple(x[rows, parents] for x in self.values), self.there[rows, parents],
                         self.last.gather(1, parents))  # fmt: skip

    def chosen(self, new: Tensor, other: Listeners) -> Listeners:
        """`other` where `new` [B, K]."""
        a, b = Listeners.align([self, other])
        values = tuple(torch.where(new[..., None, None, None, None], y, x)
                       for x, y in zip(a.values, b.values, strict=True))  # fmt: skip
        return Listeners(values, torch.where(new[..., None], b.there, a.there), torch.where(new, b.last, a.last))


@node
class Heard:
    """What all hypotheses share: `cross` of the decoder, and log-probabilities [B, ahead, V] that wait at the end."""

    cross: tuple[Any, ...]
    waiting: Frames


class TriggeredBeam(CTCPrefixBeam):
    """The K best prefixes of frames [B, T, D] by CTC and by triggered attention (Moritz et al., arXiv 2001.02674).

    CTC's prefix beam, `ahead` frames late. The frame in which it says a label triggers the decoder, which has read the
    frames up to this one and `ahead` more. What it gives to the label then is kept; where the best path of a prefix
    comes to say its last label later than before, the decoder is asked again. Hypotheses rank, and are scored, by
    weight * log p(prefix by CTC) + (1 - weight) * (log p of each label, and of the end in `finish`, by the decoder).

    Laws: a label's score does not know frames behind its trigger and `ahead` more; with a weight of 1 it is CTC's
    prefix beam. The decoder is asked only about hypotheses that may grow into the beam by what CTC says of them.
    """

    prompt = False  # it waits for its look-ahead

    def __init__(
        self, ctc: CTC, decoder: AttentionDecoder, size: int = 10, *, sos: int, eos: int, ahead: int = 6,
        weight: float = 0.3, candidates: int | None = 40,
    ) -> None:  # fmt: skip
        super().__init__(size, blank=ctc.blank, candidates=candidates, compiled=False)
        if not 0 < weight <= 1 or ahead < 0:
            raise ValueError(f"{ahead} frames ahead, and a weight of {weight} for CTC, which has a say in what is said")
        self.ctc, self.decoder, self.sos, self.eos = ctc, decoder, sos, eos
        self.nowhere = tuple(layer.cross.place(decoder.embed.weight[:1]) for layer in decoder.layers)
        if tree.leaves(self.nowhere):
            raise ValueError("the triggered search needs cross attention that remembers no place")
        self.ahead, self.share = ahead, weight
        self.other = (1 - weight) / weight  # what `bonus` counts; a score is `share` times total and bonus

    @property
    def longest(self) -> int:
        """Tokens that fit into the decoder's context behind `sos`."""
        return self.decoder.context - 1

    def start(self, x: Frames) -> Beam:
        logs = self.ctc(x[:0])
        beam = super().start(logs)
        rows, device = beam.score.shape[0], beam.score.device
        begun = self.decoder.start(Memory.of(x[:0]))
        values = tuple(c.past.values[:, None].expand(-1, self.size, *[-1] * 4) for c in begun.cache)
        there = begun.cache[0].past.mask[:, None].expand(-1, self.size, -1)
        listeners = Listeners(values, there, torch.full((rows, self.size), self.sos, device=device))
        heard = Heard(begun.cross, logs.pad(self.ahead))
        return self._with(beam, listeners, heard)

    @torch.inference_mode()
    def step(self, x: Frames, beam: Beam) -> Beam:
        x = x.front()
        heard = beam.state.lm.states[1]
        late = heard.waiting.lengths
        both = Frames.cat([heard.waiting, self.ctc(x)])
        # a frame's turn comes with the one that is `ahead` of it; none is there before the first
        now = both.mask[:, : x.mask.shape[1]] & x.mask
        times = (beam.frames - late)[:, None] + now.cumsum(1) - 1
        beam = self._triggered(beam, Frames.of(both.values[:, : x.mask.shape[1]], now), times, x)
        at = x.lengths[:, None] + torch.arange(self.ahead, device=now.device)
        rows = torch.arange(len(at), device=at.device)[:, None]
        waiting = Frames(both.values[rows, at], both.mask[rows, at])
        listeners, heard = beam.state.lm.states
        return replace(self._with(beam, listeners, replace(heard, waiting=waiting)), frames=beam.frames + x.lengths)

    @torch.inference_mode()
    def finish(self, beam: Beam) -> Beam:
        """The last frames have nothing ahead; then the text ends. Called once."""
        waiting = beam.state.lm.states[1].waiting
        times = (beam.frames - waiting.lengths)[:, None] + waiting.mask.cumsum(1) - 1
        beam = self._triggered(beam, waiting, times, None)
        listeners, heard = beam.state.lm.states
        beam = self._with(beam, listeners, replace(heard, waiting=Frames.of(waiting.values, waiting.mask & False)))
        if not self.other:
            return self._ranked(beam, beam.state.bonus)
        ends, _ = self._listen(listeners, heard.cross)
        return self._ranked(beam, beam.state.bonus + self.other * ends[..., self.eos].double())

    def room(self, beam: Beam) -> Tensor:
        if not self.other:
            return super().room(beam)
        return 1 - beam.state.lm.states[0].there.sum(2).amax(1) / self.longest  # type: ignore[no-any-return]

    def _ranked(self, beam: Beam, bonus: Tensor) -> Beam:
        ranked = super()._ranked(beam, bonus)
        return replace(ranked, score=self.share * ranked.score)

    def _with(self, beam: Beam, *states: Any) -> Beam:
        lm = Predictions(beam.score[..., None][..., :0], states)
        return replace(beam, state=replace(beam.state, lm=lm))

    def _triggered(self, beam: Beam, logs: Frames, times: Tensor, x: Frames | None) -> Beam:
        """CTC's next frames `logs` [B, T, V] with their `times` [B, T], each when the decoder may read that of `x`."""
        listeners, heard = beam.state.lm.states
        state = self._with(beam, listeners).state
        cross, frames = tuple(c.trimmed() if hasattr(c, "trimmed") else c for c in heard.cross), 0
        live = logs.mask & (logs.values.amax(-1) > NONE)
        values = logs.values.double()
        possible = values.index_fill(2, torch.tensor([self.blank], device=values.device), NONE)
        ranked, tokens = (y[..., : self.candidates] for y in possible.sort(dim=2, descending=True, stable=True))
        steps = []
        turns = live.any(0).nonzero()[:, 0]
        for t in turns.tolist():
            need, moved, parent = self._needed(values[:, t], ranked[:, t], live[:, t], state)
            asked = state
            if bool(need.any()):
                if x is not None:  # read as late as possible, in pieces as large as possible
                    cross, frames = self.decoder.read(Memory.of(x[frames : t + 1]), cross), t + 1
                asked = self._asked(state, need, moved, parent, cross)
            new, source, first = self._frame(values[:, t], ranked[:, t], tokens[:, t], asked)
            new = possible_only(new)
            state = new if bool(live[:, t].all()) else tree.where(live[:, t], new, state)
            steps.append((source, first, state.last, values[:, t].gather(1, state.last.clamp(min=0))))
        if x is not None:
            cross = self.decoder.read(Memory.of(x[frames:]), cross)
        if steps:
            root, spoken = traced(steps, live[:, turns])
            state = replace(state, paths=written(state.paths.select(root), spoken, times[:, turns].clamp(min=0)))
        assert isinstance(state.lm, Predictions)
        score = self.share * (state.total + state.bonus)
        beam = replace(beam, said=state.said(), score=score, state=state)
        return self._with(beam, state.lm.states[0].trimmed(), replace(heard, cross=cross))

    def _needed(self, x: Tensor, ranked: Tensor, live: Tensor, s: PrefixState) -> tuple[Tensor, Tensor, Tensor]:
        """Which hypotheses [B, K] the decoder is asked about in a frame [B, V] whose best labels are `ranked` [B, C].

        Also those whose best path says the last label anew here, and behind which hypothesis.
        """
        if not self.other or not ranked.shape[1]:
            none = torch.zeros_like(s.last, dtype=torch.bool)
            return none, none, torch.zeros_like(s.last)
        again = torch.where(s.last < 0, NONE, x.gather(1, s.last.clamp(min=0)))
        entry, best_entry, source, _ = self._entries(s)
        silent = torch.maximum(s.best_label, s.best_blank) + x[:, self.blank, None]
        moved = live[:, None] & (best_entry > s.best_label) & (best_entry + again > silent)
        parent = source // 2
        stays = torch.logaddexp(torch.logaddexp(s.label, entry) + again, s.total + x[:, self.blank, None]) + s.bonus
        least = stays.masked_fill(moved, NONE).amin(1, keepdim=True)
        grows = live[:, None] & (s.total + s.bonus + ranked[:, :1] > least)  # the decoder's gain is never above 0
        asked = torch.zeros_like(s.last).scatter_add(1, parent, moved.long()) > 0
        return grows | asked, moved, parent

    def _asked(
        self, s: PrefixState, need: Tensor, moved: Tensor, parent: Tensor, cross: tuple[Any, ...]
    ) -> PrefixState:
        """The decoder's answers where there is `need`; the last labels that have `moved` are worth what it says now."""
        assert isinstance(s.lm, Predictions)
        listeners = s.lm.states[0]
        most = int(need.sum(1).max())
        order = (~need).byte().argsort(dim=1, stable=True)
        place = order.argsort(1).clamp(max=most - 1)
        some, after = self._listen(listeners.select(order[:, :most]), cross)
        rows = torch.arange(len(place), device=place.device)[:, None]
        full = listeners.there.sum(2) >= self.longest
        ahead = some[rows, place].double().masked_fill((~need | full)[..., None], NONE)
        after = after.select(place)
        bonus = s.bonus
        if bool(moved.any()):
            said = ahead[rows, parent].gather(2, s.last.clamp(min=0)[..., None])[..., 0]
            bonus = torch.where(moved, s.bonus.gather(1, parent) + self.other * said, bonus)
            listeners = listeners.chosen(moved, replace(after.select(parent), last=listeners.last))
        return replace(s, bonus=bonus, lm=Predictions(ahead, (listeners, after, s.bonus)))

    def _listen(self, listeners: Listeners, cross: tuple[Any, ...]) -> tuple[Tensor, Listeners]:
        """Log-probabilities of the next token [B, K, V], and the hypotheses that have read their last one."""
        rows, beam = listeners.last.shape
        there = listeners.there.flatten(0, 1)
        waiting = listeners.values[0].new_zeros(rows * beam, 0, self.decoder.dim)
        past = tuple(
            AttentionState(waiting, Buffer(x.flatten(0, 1), there), Buffer(waiting, there[:, :0]))
            for x in listeners.values
        )
        hidden, _, behind = self.decoder.step(listeners.last.view(-1, 1), DecoderState(past, cross, self.nowhere))
        scores = self.decoder.logits(hidden[:, 0])
        scores = scores.log_softmax(-1, torch.promote_types(scores.dtype, torch.float32))

        def apart(x: Tensor) -> Tensor:
            return x.view(rows, beam, *x.shape[1:])

        values = tuple(apart(c.past.values) for c in behind.cache)
        return apart(scores), Listeners(values, apart(behind.cache[0].past.mask), listeners.last)

    def _gains(self, s: PrefixState, tokens: Tensor) -> tuple[Tensor, Tensor]:
        every = tokens[:, None].expand(-1, s.last.shape[1], -1)
        nodes, gain = s.node[..., None].expand(every.shape), s.bonus.new_zeros(every.shape)
        if not self.other:
            return nodes, gain
        assert isinstance(s.lm, Predictions)
        if not s.lm.ahead.shape[2]:  # nobody was asked, because nothing new can come into the beam
            return nodes, gain + NONE
        # behind a last label that has moved here nothing is said yet: what grows now goes on from where it was before
        before = torch.where(s.bonus > NONE, s.lm.states[2] - s.bonus, 0)
        return nodes, self.other * s.lm.ahead.gather(2, every) + before[..., None]

    def _followed(
        self, lm: Predictions | tuple[()], origin: Tensor, tokens: Tensor | None = None, new: Tensor | None = None
    ) -> Predictions | tuple[()]:
        """Hypotheses go on from `origin` [B, K], those that are `new` by one of `tokens`."""
        assert isinstance(lm, Predictions)
        listeners, *rest = lm.states
        moved = listeners.select(origin)
        if tokens is None or new is None:
            return Predictions(lm.ahead, (moved, *rest))
        if rest and bool(new.any()):
            moved = moved.chosen(new, replace(rest[0].select(origin), last=tokens))
        return Predictions(lm.ahead[..., :0], (moved,))


def possible_only(s: PrefixState) -> PrefixState:
    """Hypotheses that the decoder does not allow are none, and in nobody's way."""
    lost = s.bonus == NONE
    if not bool(lost.any()):
        return s
    label, blank, best_label, best_blank = (
        x.masked_fill(lost, NONE) for x in (s.label, s.blank, s.best_label, s.best_blank)
    )
    bonus = s.bonus.masked_fill(lost, 0)
    return replace(s, label=label, blank=blank, best_label=best_label, best_blank=best_blank, bonus=bonus)
