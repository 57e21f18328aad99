"""Searches of a transducer: frame by frame, as many labels in a frame as it wants, up to a cap."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from speechattn import tree
from speechattn.decoder.transducer import FactoredJoint, Transducer
from speechattn.frames import Frames
from speechattn.search.beam import Beam, Prefixes, Search
from speechattn.search.phrases import Phrases
from speechattn.search.scorer import Scorer
from speechattn.search.transducer_walk import (
    Active,
    Heard,
    Outlook,
    TransducerState,
    Walk,
    best,
    folded,
    hashed,
    merged,
    placed,
    unfolded,
)

__all__ = ["TransducerBeam", "TransducerGreedy"]

WINDOW = 8  # frames that the greedy search looks through at once
ROWS = 64  # pairs of a frame and a hypothesis that the beam looks at ahead of time


class TransducerSearch(Search):
    """What greedy search and beam share."""

    def __init__(self, decoder: Transducer, *, max_symbols: int) -> None:
        if max_symbols < 1:
            raise ValueError(f"at most {max_symbols} labels in a frame: nothing could be said")
        self.decoder, self.max_symbols = decoder, max_symbols

    @torch.no_grad()
    def start(self, x: Frames) -> Beam:
        rows, device = len(x.mask), x.mask.device
        score = torch.full((rows, self.size), -torch.inf, dtype=torch.float64, device=device)
        score[:, 0] = 0
        heard = tree.select(self._begun(x), [0] * rows)
        state = TransducerState(torch.zeros_like(score), torch.zeros_like(score).long(), (heard,) * self.size)
        return Beam(Prefixes.empty(x.values, self.size), score, torch.zeros_like(x.lengths), state)

    def _begun(self, x: Frames) -> Heard:
        """One hypothesis that says nothing, on the device of `x`."""
        predictor, device = self.decoder.predictor, x.mask.device
        recent = torch.full((1, predictor.context), predictor.blank, device=device) if predictor.context else ()
        nothing = Heard(x.values.new_zeros(1, 0), recent, predictor.init_state(1), (), (), ())
        return self._read(torch.full((1,), predictor.blank, device=device), nothing)

    def _read(self, tokens: Tensor, heard: Heard) -> Heard:
        """The label encoder reads one symbol [N] more of each hypothesis.

        Those with the same last symbols have one state if it forgets the others: it reads them once.
        """
        predictor, joint, recent = self.decoder.predictor, self.decoder.joint, heard.recent
        if isinstance(recent, tuple):
            g, state = predictor.step(tokens, heard.predictor)
            return replace(heard, labels=joint.labels(g), predictor=state)
        recent = torch.cat([recent[:, 1:], tokens[:, None]], 1)
        first = (recent[:, None] == recent).all(-1).byte().argmax(1)  # of those that are alike
        one, which = torch.unique(first, return_inverse=True)
        g, state = predictor.step(tokens[one], tree.select(heard.predictor, one))
        labels, state = tree.select((joint.labels(g), state), which)
        return replace(heard, labels=labels, predictor=state, recent=recent)

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        state, (rows, size) = beam.state, beam.score.shape
        at = (torch.arange(rows, device=parents.device)[:, None] * size + parents).flatten()
        heard = folded(tree.select(unfolded(state.heard), at), parents.shape[1])
        state = TransducerState(state.bonus.gather(1, parents), state.key.gather(1, parents), heard)
        return Beam(beam.said.select(parents), beam.score.gather(1, parents), beam.frames, state)

    def log_probs(self, beam: Beam) -> Tensor:
        """What the transducer alone says of each hypothesis [B, K]."""
        found: Tensor = beam.score - beam.state.bonus
        return found


class TransducerGreedy(TransducerSearch):
    """The most probable symbol, again and again; a blank goes on to the next frame, and so do `max_symbols` labels.

    Law: a beam of one. Nothing changes between two labels, so several frames are looked at together, each row at its
    own place, up to the first that is no blank. The score is that of the one alignment, its blanks included.
    """

    def __init__(self, decoder: Transducer, *, max_symbols: int = 5) -> None:
        super().__init__(decoder, max_symbols=max_symbols)

    @torch.no_grad()
    def step(self, x: Frames, beam: Beam) -> Beam:
        count, values = x.lengths, x.front().values
        blank, joint = self.decoder.blank, self.decoder.joint
        frames, rows = joint.frames(values), torch.arange(len(count), device=count.device)
        score, said, heard = beam.score[:, 0], beam.said, beam.state.heard[0]
        at, symbols = torch.zeros_like(count), torch.zeros_like(count)  # the frame, and labels said in it
        window = torch.arange(min(WINDOW, values.shape[1]), device=count.device)
        while bool((at < count).any()):
            place = at[:, None] + window
            near = frames[rows[:, None], place.clamp(max=frames.shape[1] - 1)]
            log_probs = joint.log_probs(near, heard.labels[:, None])
            best, token = log_probs.max(-1)
            full = (symbols == self.max_symbols)[:, None] & (window == 0)
            silent = (token == blank) | full
            quiet = (silent | (place >= count[:, None])).long().cumprod(1)
            passed = quiet.bool() & (place < count[:, None])
            score = score + log_probs[..., blank].double().where(passed, 0).sum(1)
            skip = passed.sum(1)
            found = quiet.sum(1)  # the first that is no blank; the window's end if there is none
            grows = found < len(window)
            here = found.clamp(max=len(window) - 1)[:, None]
            token, best = token.gather(1, here)[:, 0], best.gather(1, here)[:, 0]
            at, symbols = at + skip, torch.where(skip > 0, 0, symbols) + grows
            if bool(grows.any()):
                score = torch.where(grows, score + best.double(), score)
                time = (beam.frames + at)[:, None]
                said = said.append(token[:, None], time, time + 1, best[:, None], grows[:, None])
                some = grows.nonzero()[:, 0]
                new = self._read(token[some], tree.select(heard, some))
                heard = placed(heard, new, some)
        return Beam(said, score[:, None], beam.frames + count, replace(beam.state, heard=(heard,)))


class TransducerBeam(TransducerSearch):
    """The `size` best label sequences, each with the sum over the alignments that were followed.

    Breadth first: all hypotheses that are in a frame end it with a blank, and say one label more. The best `size` of
    the longer ones go on as far as they are better than the `size`-th best of those that have ended the frame; where
    that many go on, that one is dropped. After `max_symbols` labels at the latest, the next frame begins with the best
    `size`. Who says the same is one. So greedy search is a beam of one, and a beam that holds everything gives the
    exact sum over all alignments with no more than `max_symbols` labels in a frame. All rows and hypotheses go through
    the networks together.

    Hypotheses rank by log-probability, plus the bonus of `phrases`, plus `weight` times what `lm` gives to each
    label, minus `internal` times what the transducer's own language model gives to it (FactoredJoint), plus `reward`
    for each. What is worse than the best by `margin` says nothing more in a frame. Label sequences are compared by a
    64-bit hash.

    `log_probs` of a hypothesis are those of its labels in the best alignment that was followed; spans are the frames
    where they were said.
    """

    def __init__(
        self, decoder: Transducer, size: int = 10, *, max_symbols: int = 5, margin: float = float("inf"),
        phrases: Phrases | None = None, lm: Scorer | None = None, weight: float = 0.3, internal: float = 0.0,
        reward: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(decoder, max_symbols=max_symbols)
        if size < 1 or margin < 0:
            raise ValueError(f"a beam of {size} hypotheses, within {margin} of the best")
        if lm is not None and lm.partial:
            raise ValueError("the language model scores only candidates: a transducer asks for every label")
        if internal and not isinstance(decoder.joint, FactoredJoint):
            raise ValueError(f"internal = {internal}: {type(decoder.joint).__name__} has no language model of its own")
        self.size, self.margin, self.phrases, self.lm = size, margin, phrases, lm
        self.weight, self.internal, self.reward = weight, internal, reward
        self.fused = phrases is not None or lm is not None or bool(internal) or bool(reward)

    def _begun(self, x: Frames) -> Heard:
        heard = super()._begun(x)
        if self.phrases is not None:
            heard = replace(heard, phrase=self.phrases.start(1, 1)[:, 0].to(x.mask.device))
        if self.lm is not None:
            heard = replace(
                heard, lm=self.lm.start(Frames(x.values.new_zeros(1, 0, x.values.shape[2]), x.mask.new_zeros(1, 0)))
            )
        return self._ahead(heard)

    def _listened(self, tokens: Tensor, heard: Heard) -> Heard:
        """Hypotheses say one label [N] more: everybody reads it."""
        heard = self._read(tokens, heard)
        if self.phrases is not None:
            heard = replace(heard, phrase=self.phrases.step(heard.phrase, tokens)[0])
        if self.lm is not None:
            heard = replace(heard, lm=self.lm.extend(heard.lm, torch.zeros_like(tokens)[:, None], tokens[:, None]))
        return self._ahead(heard)

    def _ahead(self, heard: Heard) -> Heard:
        """What each next label would add."""
        if not self.fused:
            return heard
        joint, lm = self.decoder.joint, heard.lm
        ahead = heard.labels.new_full((len(heard.labels), joint.out.out_features), self.reward)
        if self.phrases is not None:
            ahead = ahead + self.phrases.scores(heard.phrase)
        if self.lm is not None:
            scores, lm = self.lm.score(lm, None)
            ahead = ahead + self.weight * scores[:, 0]
        if self.internal and isinstance(joint, FactoredJoint):
            ahead = ahead - self.internal * joint.internal(heard.labels)
        return replace(heard, ahead=ahead, lm=lm)

    @torch.no_grad()
    def step(self, x: Frames, beam: Beam) -> Beam:
        frames = self.decoder.joint.frames(x.values)
        times = beam.frames[:, None] + x.mask.long().cumsum(1) - 1
        walk = Walk.of(beam)
        t, total, outlook = 0, x.mask.shape[1], None
        while t < total:
            if outlook is None or t == outlook.end:
                outlook = self._outlook(frames, t, walk)
            n, score = outlook.passed(t, walk.score, x.mask, self.size)
            walk, t = replace(walk, score=score), t + n
            if t < outlook.end:
                walk, active = self._frame(frames, t, x.mask, times, walk, outlook)
                outlook, t = outlook.moved(active.at, walk.score), t + 1
        return walk.beam(beam.frames + x.lengths, self.size)

    def _outlook(self, frames: Tensor, t: int, walk: Walk) -> Outlook:
        """The next frames [B, T, J] from `t` on, as many as are cheap to look at, for whoever is alive."""
        slots = (walk.score > -torch.inf).flatten().nonzero()[:, 0]
        heard, near = walk.heard, frames[:, t : t + max(1, ROWS // max(1, len(slots)))]
        log_probs = self.decoder.joint.log_probs(near[slots // walk.score.shape[1]], heard.labels[slots, None])
        blank, gain = log_probs[..., self.decoder.blank].double(), log_probs
        if self.fused:
            gain = gain + heard.ahead[slots, None]
        label = torch.arange(gain.shape[2], device=gain.device) != self.decoder.blank
        highest = gain.where(label, -torch.inf).amax(2).double()
        rows = torch.full_like(walk.key.flatten(), -1)
        rows[slots] = torch.arange(len(slots), device=slots.device)
        return Outlook(t, log_probs, blank, highest, rows)

    def _frame(
        self, frames: Tensor, t: int, there: Tensor, times: Tensor, walk: Walk, outlook: Outlook
    ) -> tuple[Walk, Active]:
        """Frame `t` of [B, T, J], which the rows where it is `there` [B, T] have; the `outlook` has seen it."""
        active, room = Active.of(walk, there[:, t]), walk.score.shape[1]
        log_probs = outlook.log_probs[outlook.rows[active.slots], t - outlook.begin]
        for symbols in range(self.max_symbols + 1):
            rows = active.slots // room
            if symbols:
                log_probs = self.decoder.joint.log_probs(frames[rows, t], active.heard.labels[active.source])
            scores = walk.score.flatten()
            ended = scores.index_add(0, active.slots, log_probs[:, self.decoder.blank].double()).view_as(walk.score)
            ended = merged(ended, walk.key) if symbols else ended
            more = None if symbols == self.max_symbols else self._more(scores[active.slots], log_probs, ended, active)
            if more is None:
                walk = replace(walk, score=ended)
                break
            walk, active = self._chosen(walk, active, ended, more, log_probs)
        return active.back(walk, times[:, t], self.size), active

    def _more(self, scores: Tensor, log_probs: Tensor, ended: Tensor, active: Active) -> Tensor | None:
        """Scores of the open hypotheses [n] with one label more [n, V]; None where none of them can go on."""
        more = scores[:, None] + log_probs
        if self.fused:
            more += active.heard.ahead[active.source]
        more[:, self.decoder.blank] = -torch.inf
        rows, highest = active.slots // ended.shape[1], more.amax(1)
        floor = best(ended, self.size)[0][:, -1]
        if self.margin < float("inf"):
            top = ended.amax(1).scatter_reduce(0, rows, highest, "amax")
            more = more.masked_fill(more < (top - self.margin)[rows, None], -torch.inf)
        if not bool((highest > floor[rows]).any()):
            return None
        return more.masked_fill(more <= floor[rows, None], -torch.inf)

    def _chosen(
        self, walk: Walk, active: Active, ended: Tensor, more: Tensor, log_probs: Tensor
    ) -> tuple[Walk, Active]:
        """The best of those that have `ended` the frame [B, S] and of those that said `more` in it [n, V]."""
        (rows, room), vocab, size = ended.shape, more.shape[1], self.size
        table = more.new_full((rows * room, vocab), -torch.inf)
        table[active.slots] = more
        score, chosen = best(table.view(rows, -1), size)
        closed, stay = best(ended, size)
        closed[:, -1].masked_fill_(score[:, -1] > -torch.inf, -torch.inf)
        score, new = (
            torch.cat([closed, score], 1),
            torch.cat([torch.zeros_like(stay, dtype=torch.bool), score > -torch.inf], 1),
        )
        parents, token = torch.cat([stay, chosen // vocab], 1), torch.cat([stay, chosen % vocab], 1)
        slots = (parents + torch.arange(rows, device=parents.device)[:, None] * room).flatten()
        born = new.flatten().nonzero()[:, 0]
        said, origin = token.flatten()[born], active.rank(slots[born])
        gained = log_probs.new_zeros(rows * room)
        gained[born] = log_probs[origin, said]
        bonus = walk.bonus.gather(1, parents)
        if self.fused:
            bonus.view(-1)[born] += active.heard.ahead[active.source[origin], said].double()
        key = walk.key.gather(1, parents)
        key = torch.where(new, hashed(key, token), key)
        active = self._heard(active, parents, slots, born, said, origin, key, (token, gained.view_as(score), new))
        return replace(walk, score=score, bonus=bonus, key=key), active

    def _heard(
        self, active: Active, parents: Tensor, slots: Tensor, born: Tensor, said: Tensor, origin: Tensor, key: Tensor,
        step: tuple[Tensor, Tensor, Tensor],
    ) -> Active:  # fmt: skip
        """Those `born` [n] say their label: who is not known yet must be read."""
        source, heard = active.known(born, key.flatten()[born]), active.heard
        fresh = (source < 0).nonzero()[:, 0]
        if len(fresh):
            before = len(heard.labels)
            listened = self._listened(said[fresh], tree.select(heard, active.source[origin[fresh]]))
            heard = tree.concat([heard, listened])
            source[fresh] = before + torch.arange(len(fresh), device=fresh.device)
        return active.next(parents, slots, born, source, heard, step)

    def finish(self, beam: Beam) -> Beam:
        """What phrases half said got is given back; called once."""
        if self.phrases is None:
            return beam
        bonus = self.phrases.finish(phrases_of(beam)).double()
        state = replace(beam.state, bonus=beam.state.bonus + bonus)
        return self._ranked(replace(beam, score=beam.score + bonus, state=state))

    def bias(self, beam: Beam, root: int | Tensor) -> Beam:
        """The hypotheses of every row, or of row b by `root` [B], go over to another set of phrases."""
        if self.phrases is None:
            raise ValueError("a search without phrases")
        state, nodes = beam.state, phrases_of(beam)
        at, bonus = self.phrases.moved(nodes, root, beam.said.tokens, beam.said.length)
        change = self.phrases.scores(at) - self.phrases.scores(nodes)
        heard = tuple(replace(h, phrase=at[:, k], ahead=h.ahead + change[:, k]) for k, h in enumerate(state.heard))
        state = replace(state, bonus=state.bonus + bonus, heard=heard)
        return self._ranked(replace(beam, score=beam.score + bonus, state=state))

    def _ranked(self, beam: Beam) -> Beam:
        order = beam.score.sort(dim=1, descending=True, stable=True).indices
        if torch.equal(order, torch.arange(order.shape[1], device=order.device).expand_as(order)):
            return beam
        return self.select(beam, order)


def phrases_of(beam: Beam) -> Tensor:
    """The node of each hypothesis [B, K]."""
    return torch.stack([heard.phrase for heard in beam.state.heard], 1)
