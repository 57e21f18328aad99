"""Searches over CTC log-probabilities: the best path, and prefixes with all of their paths."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from speechattn import tree
from speechattn.frames import Frames
from speechattn.search.beam import Beam, Prefixes, Search
from speechattn.search.ctc_paths import Spoken, extended, traced, written
from speechattn.search.phrases import Phrases
from speechattn.search.scorer import Scorer
from speechattn.tree import node

__all__ = ["CTCGreedy", "CTCPrefixBeam", "Predictions", "PrefixState"]

PIECE = 1 << 10  # frames whose paths are followed back at once
ROOT = 1442695040888963407  # the key of the prefix that says nothing


class CTCGreedy(Search):
    """The most probable path of log-probabilities [B, T, V], without repetitions and blanks.

    Its score is that of the path. A token's span is its run of frames, its log-probability the highest of the run.
    A frame where nothing is possible says nothing.
    """

    def __init__(self, *, blank: int = 0) -> None:
        self.blank = blank

    def start(self, x: Frames) -> Beam:
        rows, device = len(x.mask), x.mask.device
        at = torch.full((rows,), self.blank, device=device)  # where the path is
        score = torch.zeros(rows, 1, dtype=torch.float64, device=device)
        return Beam(Prefixes.empty(x.values, 1), score, torch.zeros_like(at), at)

    def step(self, x: Frames, beam: Beam) -> Beam:
        x = x.front()
        values, there = x.values, x.mask
        if not there.numel():
            return beam
        best, token = values.max(-1)
        live = there & (best > -torch.inf)
        at = torch.arange(token.shape[1], device=token.device)
        known = torch.where(live, at, -1).cummax(1).values  # the newest frame that says something
        now = torch.where(known < 0, beam.state[:, None], token.gather(1, known.clamp(min=0)))
        before = torch.cat([beam.state[:, None], now[:, :-1]], 1)
        label = live & (token != self.blank)
        said = Spoken(label, label & (token != before), token, best)
        score = beam.score + torch.where(live, best, 0).double().sum(1, keepdim=True)
        frames = beam.frames[:, None] + at
        return Beam(written(beam.said, Spoken(*(x[:, None] for x in said)), frames), score,
                    beam.frames + there.sum(1), now[:, -1])  # fmt: skip

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        return replace(beam, said=beam.said.select(parents), score=beam.score.gather(1, parents))


@node
class Predictions:
    """A language model behind each hypothesis: log-probabilities `ahead` [B, K, V], and K states of B rows."""

    ahead: Tensor
    states: tuple[Any, ...]


@node
class PrefixState:
    """What the K prefixes of each row are worth; all but `paths` and `lm` are [B, K].

    `label` and `blank`: log-probability of all paths that end in the last token, and in blank. `best_label` and
    `best_blank`: that of the best such path; what the two have said is in `paths`, hypotheses 2k and 2k + 1 of 2K.
    `bonus` ranks, and is no probability. `key` and `parent` stand for the prefix and for the one without its last
    token, committed tokens included.
    """

    label: Tensor
    blank: Tensor
    best_label: Tensor
    best_blank: Tensor
    bonus: Tensor
    key: Tensor
    parent: Tensor
    last: Tensor  # -1: nothing was said
    node: Tensor  # of `Phrases`
    paths: Prefixes
    lm: Predictions | tuple[()]

    @property
    def total(self) -> Tensor:
        """Log-probability of all paths [B, K]."""
        return torch.logaddexp(self.label, self.blank)

    @property
    def side(self) -> Tensor:
        """The better path of each [B, K]: 0 the one that ends in a token, 1 in blank."""
        return (self.best_blank > self.best_label).long()

    def said(self) -> Prefixes:
        """What the better paths have said."""
        at = torch.arange(self.last.shape[1], device=self.last.device)
        return self.paths.select(2 * at + self.side)


class CTCPrefixBeam(Search):
    """The K best prefixes of log-probabilities [B, T, V], each with the sum over all of its paths.

    The recursion over frames of Graves and Jaitly (ICML 2014) and Hannun et al. (arXiv 1408.2873, algorithm 1). Equal
    prefixes are one hypothesis, also where the parent had left the beam and came back. Law: a beam that holds every
    prefix gives the probability of each.

    The `candidates` most probable tokens of a frame may be said anew (None: all; where nothing but the frames ranks,
    2 K are as good). Hypotheses rank by log-probability, plus the bonus of `phrases`, plus `weight` times what `lm`
    gives to each token, plus `reward` for each; `end` is the token by which the model ends a text. `log_probs` of a
    beam are without all this. Spans are those of the best path. A frame where nothing is possible says nothing.

    `compiled` needs numba, and searches on the CPU without a language model by the same arithmetic, some fifty times
    faster; None: where numba is there.
    """

    def __init__(
        self, size: int = 10, *, blank: int = 0, candidates: int | None = 40, phrases: Phrases | None = None,
        lm: Scorer | None = None, weight: float = 0.3, reward: float = 0.0, end: int | None = None,
        compiled: bool | None = None,
    ) -> None:  # fmt: skip
        if size < 1 or (candidates is not None and candidates < 1):
            raise ValueError(f"a beam of {size} hypotheses with {candidates} candidates")
        if lm is not None and lm.partial:
            raise ValueError("the language model scores only candidates: a search over frames asks for every token")
        self.size, self.blank, self.candidates, self.phrases = size, blank, candidates, phrases
        self.lm, self.weight, self.reward, self.end = lm, weight, reward, end
        self.compiled = find_spec("numba") is not None if compiled is None else compiled
        self._known: tuple[Any, Any] | None = None
        if self.compiled and lm is None:  # before there is sound: the first time on a machine takes some ten seconds
            self.decode(Frames(torch.zeros(1, 1, blank + 2), torch.ones(1, 1, dtype=torch.bool)))

    def start(self, x: Frames) -> Beam:
        rows, device = len(x.mask), x.mask.device
        whole = torch.zeros(rows, self.size, dtype=torch.long, device=device)
        never = torch.full(whole.shape, -torch.inf, dtype=torch.float64, device=device)
        score = never.clone()
        score[:, 0] = 0
        at = whole.clone() if self.phrases is None else self.phrases.start(rows, self.size).to(device)
        state = PrefixState(
            never, score, never.clone(), score.clone(), whole.double(), whole + ROOT, whole.clone(), whole - 1, at,
            Prefixes.empty(x.values, 2 * self.size), () if self.lm is None else self._begun(self.lm, x),
        )  # fmt: skip
        return Beam(state.said(), score.clone(), whole[:, 0].clone(), state)

    def step(self, x: Frames, beam: Beam) -> Beam:
        x = x.front()
        values, there = x.values, x.mask
        state, frames = beam.state, beam.frames
        for at in range(0, there.shape[1], PIECE):
            piece, new = values[:, at : at + PIECE], there[:, at : at + PIECE]
            state, root, spoken = self._read(piece, new, state)
            times = frames[:, None] + torch.arange(new.shape[1], device=new.device)
            state = replace(state, paths=written(state.paths.select(root), spoken, times))
            frames = frames + new.sum(1)
        return Beam(state.said(), state.total + state.bonus, frames, state)

    def finish(self, beam: Beam) -> Beam:
        """Half-said phrases give back what they got, and the text ends; called once."""
        state = beam.state
        bonus = state.bonus
        if self.phrases is not None:
            bonus = bonus + self.phrases.finish(state.node)
        if self.end is not None and isinstance(state.lm, Predictions):
            bonus = bonus + self.weight * state.lm.ahead[..., self.end].double()
        return self._ranked(beam, bonus)

    def bias(self, beam: Beam, root: int | Tensor) -> Beam:
        if self.phrases is None:
            return super().bias(beam, root)
        state = beam.state
        at, bonus = self.phrases.moved(state.node, root, beam.said.tokens, beam.said.length)
        return self._ranked(replace(beam, state=replace(state, node=at)), state.bonus + bonus)

    def _ranked(self, beam: Beam, bonus: Tensor) -> Beam:
        state = replace(beam.state, bonus=bonus)
        score = state.total + bonus
        order = score.sort(dim=1, descending=True, stable=True).indices
        return self.select(replace(beam, score=score, state=state), order)

    def commit(self, beam: Beam, n: Tensor) -> Beam:
        kept = super().commit(beam, n)
        return replace(kept, state=replace(kept.state, paths=kept.state.paths.drop(n)))

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        """As `Search.select`; no hypothesis twice."""
        s, score = beam.state, beam.score.gather(1, parents)
        alive = score > -torch.inf

        def moved(x: Tensor) -> Tensor:
            return x.gather(1, parents)

        def worth(x: Tensor) -> Tensor:
            return torch.where(alive, moved(x), -torch.inf)

        both = torch.stack([2 * parents, 2 * parents + 1], 2).flatten(1)
        state = PrefixState(
            worth(s.label), worth(s.blank), worth(s.best_label), worth(s.best_blank), moved(s.bonus), moved(s.key),
            moved(s.parent), moved(s.last), moved(s.node), s.paths.select(both), self._followed(s.lm, parents),
        )  # fmt: skip
        return Beam(beam.said.select(parents), score, beam.frames, state)

    def log_probs(self, beam: Beam) -> Tensor:
        """What the frames alone say of each hypothesis [B, K]."""
        return beam.state.total  # type: ignore[no-any-return]

    def _read(self, x: Tensor, there: Tensor, state: PrefixState) -> tuple[PrefixState, Tensor, Spoken]:
        """Frames [B, T, V], valid where `there` [B, T] -> the state behind them, but for its paths, and these."""
        live = there & (x.amax(-1) > -torch.inf)
        if self.compiled and self.lm is None and x.device.type == "cpu":
            from speechattn.search import ctc_fast

            at = self._arcs()
            return ctc_fast.read(x, live, state, at, blank=self.blank, candidates=self.candidates, reward=self.reward)
        x = x.double()
        possible = x.index_fill(2, torch.tensor([self.blank], device=x.device), -torch.inf)
        ranked, tokens = possible.sort(dim=2, descending=True, stable=True)
        steps = []
        for t in range(x.shape[1]):
            new, source, first = self._frame(
                x[:, t], ranked[:, t, : self.candidates], tokens[:, t, : self.candidates], state
            )
            state = new if bool(live[:, t].all()) else tree.where(live[:, t], new, state)
            steps.append((source, first, state.last, x[:, t].gather(1, state.last.clamp(min=0))))
        return state, *traced(steps, live)

    def _arcs(self) -> Any:
        """The phrases for the compiled loop, made again when some were added or removed."""
        from speechattn.search.ctc_fast import Arcs

        version = None if self.phrases is None else self.phrases.version
        if self._known is None or self._known[0] != version:
            self._known = version, Arcs.of(self.phrases)
        return self._known[1]

    def _frame(self, x: Tensor, ranked: Tensor, tokens: Tensor, s: PrefixState) -> tuple[PrefixState, Tensor, Tensor]:
        """One frame [B, V], its best `tokens` [B, C] with log-probabilities `ranked`.

        -> the next state, the path [B, 2K] that each of its paths goes on with, where a token was said anew [B, K].
        """
        total, best, size = s.total, torch.maximum(s.best_label, s.best_blank), s.last.shape[1]
        again = torch.where(s.last < 0, -torch.inf, x.gather(1, s.last.clamp(min=0)))
        entry, best_entry, source, child = self._entries(s)
        label = torch.logaddexp(s.label, entry) + again
        blank = total + x[:, self.blank, None]
        # a token more; the same token as the last one only behind blank
        repeats = tokens[:, None] == s.last[..., None]
        known = (child[:, :, None] & (tokens[:, None, :, None] == s.last[:, None, None])).any(-1)
        new = torch.where(repeats, s.blank[..., None], total[..., None]) + ranked[:, None]
        new_best = torch.where(repeats, s.best_blank[..., None], best[..., None]) + ranked[:, None]
        nodes, gain = self._gains(s, tokens)
        bonus = (s.bonus[..., None] + gain).flatten(1)
        new = new.masked_fill(known, -torch.inf).flatten(1)
        rank = torch.cat([torch.logaddexp(label, blank) + s.bonus, new + bonus], 1)
        order = rank.sort(dim=1, descending=True, stable=True).indices[:, :size]
        stays, which = order < size, (order - size).clamp(min=0)
        width = tokens.shape[1]
        origin = torch.where(stays, order, which // width)
        last, was = s.last.gather(1, origin), tokens.gather(1, which % width)

        def chosen(old: Tensor, fresh: Tensor) -> Tensor:
            return torch.where(stays, old.gather(1, origin), fresh)

        never = torch.full_like(label, -torch.inf)
        key, side = s.key.gather(1, origin), s.side.gather(1, origin)
        state = PrefixState(
            chosen(label, new.gather(1, which)), chosen(blank, never),
            chosen(torch.maximum(s.best_label, best_entry) + again, new_best.flatten(1).gather(1, which)),
            chosen(best + x[:, self.blank, None], never), chosen(s.bonus, bonus.gather(1, which)),
            torch.where(stays, key, extended(key, was)), chosen(s.parent, key), chosen(s.last, was),
            chosen(s.node, nodes.flatten(1).gather(1, which)), s.paths, self._followed(s.lm, origin, was, ~stays),
        )  # fmt: skip
        label_source = chosen(source, 2 * origin + torch.where(was == last, 1, side))
        first = chosen(best_entry > s.best_label, ~stays)
        return state, torch.stack([label_source, 2 * origin + side], 2).flatten(1), first

    def _entries(self, s: PrefixState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where hypothesis j is hypothesis i and one token more (`child` [B, i, j]), paths of i enter j.

        -> log-probability of all that enter, of the best one, the path that j's label path goes on with [B, K]; child.
        """
        total, best = s.total, torch.maximum(s.best_label, s.best_blank)
        alive = total > -torch.inf
        child = (s.key[:, :, None] == s.parent[:, None]) & (s.last >= 0)[:, None]
        child = child & alive[:, :, None] & alive[:, None]
        same = s.last[:, :, None] == s.last[:, None]
        entry = torch.where(same, s.blank[..., None], total[..., None])
        best_entry = torch.where(same, s.best_blank[..., None], best[..., None])
        source = 2 * torch.arange(s.last.shape[1], device=s.last.device)
        entered, parent = torch.where(child, best_entry, -torch.inf).max(1)
        side = torch.where(same, 1, s.side[..., None]).gather(1, parent[:, None])[:, 0]
        source = torch.where(entered > s.best_label, 2 * parent + side, source)
        return torch.where(child, entry, -torch.inf).amax(1), entered, source, child

    def _gains(self, s: PrefixState, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes and bonus [B, K, C] of hypotheses that say one of `tokens` [B, C] more."""
        every = tokens[:, None].expand(-1, s.last.shape[1], -1)
        nodes, gain = s.node[..., None].expand(every.shape), torch.full(every.shape, self.reward, dtype=torch.float64)
        gain = gain.to(tokens.device)
        if self.phrases is not None:
            nodes, bonus = self.phrases.step(nodes, every)
            gain = gain + bonus
        if isinstance(s.lm, Predictions):
            gain = gain + self.weight * s.lm.ahead.gather(2, every).double()
        return nodes, gain

    def _begun(self, lm: Scorer, x: Frames) -> Predictions:
        """What the model says of the first token."""
        scores, state = lm.score(lm.start(x), None)
        return Predictions(scores.expand(-1, self.size, -1), (state,) * self.size)

    def _followed(
        self, lm: Predictions | tuple[()], origin: Tensor, tokens: Tensor | None = None, new: Tensor | None = None
    ) -> Predictions | tuple[()]:
        """Hypotheses go on from `origin` [B, K], those that are `new` by one of `tokens`: only these are computed."""
        if self.lm is None or not isinstance(lm, Predictions):
            return ()
        rows, size = origin.shape
        at = (origin * rows + torch.arange(rows, device=origin.device)[:, None]).T.flatten()  # hypotheses first
        states = tree.select(tree.concat(lm.states), at)
        ahead = lm.ahead.transpose(0, 1).flatten(0, 1)[at]
        if tokens is not None and new is not None and bool(new.any()):
            which = new.T.flatten().nonzero()[:, 0]
            said = tokens.T.flatten()[which, None]
            scores, after = self.lm.score(
                self.lm.extend(tree.select(states, which), torch.zeros_like(said), said), None
            )
            place = torch.arange(len(at), device=at.device)
            place[which] = len(at) + torch.arange(len(which), device=at.device)
            states = tree.select(tree.concat([states, after]), place)
            ahead = torch.cat([ahead, scores[:, 0]])[place]
        parts = tuple(tree.select(states, range(k * rows, (k + 1) * rows)) for k in range(size))
        return Predictions(ahead.view(size, rows, -1).transpose(0, 1), parts)
