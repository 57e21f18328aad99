"""The hypotheses of a transducer search on their way through a frame.

B rows have K hypotheses each; between the steps of a search they are K trees of B rows, inside of one a tree of B * K.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn import tree
from speechattn.search.beam import Beam, Prefixes
from speechattn.tree import node

__all__ = [
    "Active",
    "Heard",
    "Outlook",
    "TransducerState",
    "Walk",
    "best",
    "folded",
    "hashed",
    "merged",
    "placed",
    "unfolded",
]


@node
class Heard:
    """What the label encoder, the phrases and the language model made of a hypothesis; N hypotheses, one a row.

    `labels` [N, J] is projected for the joint network, `recent` [N, C] the last symbols where the label encoder
    forgets what lies before, `ahead` [N, V] what phrases and language model add to each next label, `phrase` [N] the
    node of the phrases. What a search has not is an empty tuple: it costs nothing to move.
    """

    labels: Tensor
    recent: Any
    predictor: Any
    ahead: Any
    phrase: Any
    lm: Any


@node
class TransducerState:
    """`bonus` [B, K]: what phrases and language model gave so far; `key` [B, K] tells label sequences apart.

    `heard` has one tree for each of the K hypotheses, with B rows.
    """

    bonus: Tensor
    key: Tensor
    heard: tuple[Heard, ...]


def unfolded(parts: tuple[Any, ...]) -> Any:
    """K trees of B rows -> one of B * K, the hypotheses of a row together."""
    return tree.map(lambda *leaves: torch.stack(leaves, 1).flatten(0, 1), *parts)


def folded(whole: Any, size: int) -> tuple[Any, ...]:
    """The way back."""
    return tuple(tree.map(lambda leaf, k=k: leaf.unflatten(0, (-1, size))[:, k], whole) for k in range(size))


@dataclass(frozen=True)
class Walk:
    """The hypotheses [B, S] on their way through the frames of a step, in any order; `heard` has B * S rows.

    There is room for twice as many as a beam keeps: those that ended a frame beside those that did not yet.
    """

    said: Prefixes
    score: Tensor
    bonus: Tensor
    key: Tensor
    heard: Heard

    def select(self, parents: Tensor) -> Walk:
        """Hypothesis j of each row becomes what `parents` [B, S'] says it was."""
        slots = (parents + torch.arange(len(parents), device=parents.device)[:, None] * self.score.shape[1]).flatten()
        score, bonus, key = (x.gather(1, parents) for x in (self.score, self.bonus, self.key))
        return Walk(self.said.select(parents), score, bonus, key, tree.select(self.heard, slots))

    @classmethod
    def of(cls, beam: Beam) -> Walk:
        """From a beam, with as many empty places."""
        state, (rows, size) = beam.state, beam.score.shape
        walk = cls(beam.said, beam.score, state.bonus, state.key, unfolded(state.heard))
        parents = torch.arange(2 * size, device=state.key.device)
        walk = walk.select(torch.where(parents < size, parents, 0).expand(rows, -1))
        return replace(walk, score=walk.score.masked_fill(parents >= size, -torch.inf))

    def beam(self, frames: Tensor, size: int) -> Beam:
        """The best, in order; `frames` [B] were read."""
        order = self.score.sort(dim=1, descending=True, stable=True).indices[:, :size]
        best = self.select(order)
        return Beam(best.said, best.score, frames, TransducerState(best.bonus, best.key, folded(best.heard, size)))


@dataclass(frozen=True)
class Active:
    """Those n of the B * S hypotheses that have not ended the frame yet, and what happened in it.

    `slots` [n] are their places, `source` [n] and `at` [B * S] the rows of `heard` that belong to them and to all.
    `heard` begins with what the B * S hypotheses of the frame's beginning heard, whose hashes were `keys` [B, S]. What
    was said in the frame is written down at its end, once: `origin` [B, S] is the hypothesis of the beginning that
    each goes on from, `steps` are the labels (token, log-probability, whether one was said; [B, S]).
    """

    slots: Tensor
    source: Tensor
    at: Tensor
    heard: Heard
    keys: Tensor
    origin: Tensor
    steps: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()

    @classmethod
    def of(cls, walk: Walk, there: Tensor) -> Active:
        """All hypotheses of the rows that are `there` [B]."""
        rows, size = walk.score.shape
        slots = (there[:, None] & (walk.score > -torch.inf)).flatten().nonzero()[:, 0]
        every = torch.arange(rows * size, device=slots.device)
        return cls(slots, slots, every, walk.heard, walk.key, every[:size].expand(rows, size))

    def rank(self, slots: Tensor) -> Tensor:
        """Where some of `slots` stand among them."""
        place = torch.zeros_like(self.at)
        place[self.slots] = torch.arange(len(self.slots), device=slots.device)
        return place[slots]

    def known(self, born: Tensor, key: Tensor) -> Tensor:
        """Rows of `heard` [n] for the places `born` with the hashes `key`; -1 where nobody said the same before.

        Who goes on from a shorter hypothesis mostly says what another one has said in an earlier frame.
        """
        size = self.keys.shape[1]
        row = born // size
        same = self.keys[row] == key[:, None]
        return torch.where(same.any(1), row * size + same.byte().argmax(1), -1)

    def next(
        self, parents: Tensor, slots: Tensor, born: Tensor, source: Tensor, heard: Heard,
        step: tuple[Tensor, Tensor, Tensor],
    ) -> Active:  # fmt: skip
        """Hypotheses become what `parents` [B, S] were, whose places were `slots` [B * S]; those `born` are active."""
        steps = tuple((a.gather(1, parents), b.gather(1, parents), c.gather(1, parents)) for a, b, c in self.steps)
        at = self.at[slots]
        at[born] = source
        return Active(born, source, at, heard, self.keys, self.origin.gather(1, parents), (*steps, step))

    def back(self, walk: Walk, times: Tensor, size: int) -> Walk:
        """The end of the frame, which is that of `times` [B]: the best `size` of each row stay."""
        if not self.steps:
            return walk
        walk = replace(walk, score=walk.score.masked_fill(walk.score < best(walk.score, size)[0][:, -1:], -torch.inf))
        said, time = walk.said.select(self.origin), times[:, None].expand_as(self.origin)
        for token, log_prob, new in self.steps:
            said = said.append(token, time, time + 1, log_prob, new)
        return replace(walk, said=said, heard=tree.select(self.heard, self.at))


@dataclass(frozen=True)
class Outlook:
    """What the joint network says of the frames from `begin` on, as long as nobody says anything new.

    `log_probs` [n, W, V] and of them the `blank` and the `highest` gain of a label [n, W]; `rows` [B * S] are the
    places' rows in these, -1 where there is none.
    """

    begin: int
    log_probs: Tensor
    blank: Tensor
    highest: Tensor
    rows: Tensor

    @property
    def end(self) -> int:
        """The first frame behind it."""
        return self.begin + self.blank.shape[1]

    def moved(self, at: Tensor, score: Tensor) -> Outlook | None:
        """Place j has become what place `at` [B * S] was; None where there is anyone new among the living."""
        rows = torch.where(at < len(self.rows), self.rows[at.clamp(max=len(self.rows) - 1)], -1)
        if bool(((rows < 0) & (score.flatten() > -torch.inf)).any()):
            return None
        return replace(self, rows=rows)

    def passed(self, t: int, score: Tensor, there: Tensor, size: int) -> tuple[int, Tensor]:
        """How many frames from `t` on end with nothing but blanks among the best `size`, and the scores [B, S] then.

        `there` [B, T] says which frames a row has.
        """
        room, first = score.shape[1], t - self.begin
        slots = (score > -torch.inf).flatten().nonzero()[:, 0]
        rows, mine = slots // room, self.rows[slots]
        here, now = there[rows, t : self.end], score.flatten()[slots, None]
        blank = torch.where(here, self.blank[mine, first:], 0)
        ended = now + blank.cumsum(1)
        longer = torch.where(here, ended - blank + self.highest[mine, first:], -torch.inf)
        every = score.new_full((score.numel(), blank.shape[1]), -torch.inf)
        every[slots] = ended
        floor = every.view(len(score), room, blank.shape[1]).topk(size, 1).values[:, -1]
        spoken = (longer > floor[rows]).any(0).tolist()
        n = spoken.index(True) if True in spoken else len(spoken)
        return n, every[:, n - 1].view_as(score) if n else score


def best(score: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` highest of each row and where they stand [B, size]; what there is not has -inf."""
    n = min(size, score.shape[1])
    values, places = score.topk(n)
    if n == size:
        return values, places
    return F.pad(values, [0, size - n], value=-torch.inf), F.pad(places, [0, size - n])


def placed(old: Any, new: Any, rows: Tensor) -> Any:
    """`old` with other `rows` [n]: those of `new`."""
    size = len(tree.leaves(old)[0])
    if len(rows) == size:
        return new
    which = torch.arange(size, device=rows.device)
    which[rows] = size + torch.arange(len(rows), device=rows.device)
    return tree.select(tree.concat([old, new]), which)


def hashed(key: Tensor, token: Tensor) -> Tensor:
    """The hash of a sequence that goes on with `token`; not linear, so that no two orders cancel."""
    key = (key ^ (token + 1)) * -7046029254386353131
    return key ^ (key >> 29)


def merged(score: Tensor, key: Tensor) -> Tensor:
    """Hypotheses [B, S] that say the same become one, the best of them, with the sum of their probabilities."""
    alive = score > -torch.inf
    same = (key[:, :, None] == key[:, None]) & alive[:, None] & alive[:, :, None]
    if int(same.sum()) == int(alive.sum()):  # each with itself only
        return score
    both = torch.where(same, score[:, None], -torch.inf)
    first = both.argmax(-1) == torch.arange(key.shape[1], device=key.device)
    return torch.where(first, both.logsumexp(-1), -torch.inf)
