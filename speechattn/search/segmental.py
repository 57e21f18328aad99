"""Searches for labels and for where they end, with a segmental head (arXiv 2210.14742)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn import tree
from speechattn.cross.segmental import Segments
from speechattn.cross.soft import SoftState
from speechattn.decoder.segmental import Segmental
from speechattn.frames import Frames, Memory
from speechattn.search.beam import Beam, Prefixes, Search
from speechattn.search.transducer_walk import hashed
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["SegmentalBeam", "TimeSynchronousBeam"]

NONE = -torch.inf


@node
class Open:
    """The segments that the hypotheses [B, K] are in.

    `begun`: frames since the stream began before it; `key`: a hash of all labels; the first `count` of `recent`
    [B, K, N] are the last labels, and `asked` [B, K, D] is what these ask for.
    """

    begun: Tensor
    key: Tensor
    recent: Tensor
    count: Tensor
    asked: Tensor


@node
class SegmentalState:
    """`open` segments; the last frames that were looked at (`past`) and those that wait for look-ahead.

    `now` [B] counts the frames that were looked at since the stream began.
    """

    open: Open
    past: Buffer
    waiting: Buffer
    now: Tensor


class Said(NamedTuple):
    """Labels that end their segments in this frame [B, K]: scores, whose hypothesis goes on, labels, log p(label)."""

    score: Tensor
    parents: Tensor
    labels: Tensor
    log_probs: Tensor


class SegmentalSearch(Search):
    """What both searches share: hypotheses with an open segment, which in a frame goes on or ends with a label.

    A hypothesis counts `length` times what the length model says of its segments, and `label` times log p(labels).
    Segments longer than `longest`, what the boundary and the length model can tell apart, are alike: of hypotheses in
    such segments that say the same one is kept, the best. So memory and the cost of a frame are bounded. In `finish`
    what is left of the frames has to say that the text ends. `log_probs` are those of labels, spans their segments.
    """

    width: int  # hypotheses in a beam

    def __init__(
        self, head: Segmental, size: int, *, sos: int, eos: int, never: tuple[int, ...] = (), length: float = 1.0,
        label: float = 1.0,
    ) -> None:  # fmt: skip
        boundary = head.cross.boundary
        if size < 1 or length < 0 or label <= 0:
            raise ValueError(f"a beam of {size}, length times {length}, label times {label}: nothing can be found")
        if boundary.reach is None or boundary.back is None:
            raise ValueError("segments without a bound cannot be searched for: give Within its longest")
        self.head, self.size, self.sos, self.eos = head, size, sos, eos
        self.back, self.ahead = boundary.back, boundary.ahead
        self.prompt = not self.ahead
        self.longest = max(boundary.reach, head.length.reach)
        self.scales = length, label
        self.never = torch.tensor(sorted({*never, eos}))

    def _alike(self, score: Tensor, capped: Tensor) -> Tensor:
        """Scores [B, K] before a frame, where those that are `capped` are in segments of `longest` frames and more."""
        return score

    def _kept(self, score: Tensor) -> Tensor:
        """Scores of hypotheses [B, N] after a frame, -inf for those that are given up."""
        raise NotImplementedError

    def _worth(self, score: Tensor, going: Tensor, end: Tensor) -> Tensor:
        """Which hypotheses [B, K] may end here: their score so far, that of going on, log p(end)."""
        raise NotImplementedError

    @torch.no_grad()
    def start(self, x: Frames) -> Beam:
        rows, device = len(x.mask), x.mask.device
        score = torch.full((rows, self.width), NONE, dtype=torch.float64, device=device)
        score[:, 0] = 0
        none = torch.zeros_like(score).long()
        recent = none[..., None].expand(-1, -1, self.head.history).clone()
        recent[..., 0] = self.sos
        asked = self.head.asked_last(recent[:, 0], none[:, 0] + 1)[:, None].repeat(1, self.width, 1)
        now = torch.zeros(rows, dtype=torch.long, device=device)
        past = Buffer.empty(x.values, self.back)
        state = SegmentalState(Open(none, none.clone(), recent, none + 1, asked), past, Buffer.empty(x.values), now)
        return Beam(Prefixes.empty(x.values, self.width), score, now.clone(), state)

    def start_at(self, x: Frames, heard: Tensor) -> Beam:
        beam = super().start_at(x, heard)
        open_ = replace(beam.state.open, begun=heard[:, None].expand_as(beam.score).clone())
        return replace(beam, state=replace(beam.state, open=open_, now=heard.clone()))

    @torch.no_grad()
    def step(self, x: Frames, beam: Beam) -> Beam:
        beam = replace(beam, frames=beam.frames + x.lengths)
        return self._heard(x, beam, self.ahead)

    @torch.no_grad()
    def finish(self, beam: Beam) -> Beam:
        """The text has to end: called once."""
        none = Frames(beam.state.past.values[:, :0], beam.state.past.mask[:, :0])
        beam = self._heard(none, beam, 0)
        state = beam.state
        read = self.head.cross.read(Memory.of(Frames(state.past.values, state.past.mask)))
        size = (state.now[:, None] - state.open.begun).clamp(max=self.longest)
        said = self._log_probs(state.open.asked, size, read, state.past.length)[..., self.eos]
        score = distinct(beam.score + self.scales[1] * said, state.open.key, beam.score > NONE)
        score, order = score.sort(dim=1, descending=True, stable=True)
        score = score.index_fill(1, torch.arange(self.size, self.width, device=score.device), NONE)
        return replace(self.select(beam, order), score=score)

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        open_ = tree.map(lambda leaf: leaf[rows, parents], beam.state.open)
        return replace(beam, said=beam.said.select(parents), score=beam.score.gather(1, parents),
                       state=replace(beam.state, open=open_))  # fmt: skip

    def _heard(self, x: Frames, beam: Beam, late: int) -> Beam:
        """Look at what waits and the frames `x`, but for the last `late` ones."""
        state = beam.state
        new = Frames.cat([Frames(state.waiting.values, state.waiting.mask), x]).front()
        ready = (new.lengths - late).clamp(min=0)
        whole = Frames.cat([Frames(state.past.values, state.past.mask), new.pad(self.ahead)])
        read = self.head.cross.read(Memory.of(whole))
        for t in range(int(ready.max()) if len(ready) else 0):
            live = t < ready
            seen = slice(t + 1, t + 1 + self.back + self.ahead)
            near = SoftState(read.key[:, :, seen], read.value[:, :, seen], read.mask[:, seen])
            after = self._frame(whole.values[:, t + self.back], near, beam)
            beam = after if bool(live.all()) else tree.where(live, after, beam)
        at = ready[:, None] + torch.arange(self.back, device=ready.device)
        rows = torch.arange(len(ready), device=ready.device)[:, None]
        past = Buffer(whole.values[rows, at], whole.mask[rows, at])
        behind = torch.arange(new.mask.shape[1], device=ready.device) >= ready[:, None]
        left = Frames.of(new.values, new.mask & behind).front()
        state = replace(beam.state, past=past, waiting=Buffer(left.values, left.mask))
        order = beam.score.sort(dim=1, descending=True, stable=True).indices
        return self.select(replace(beam, state=state), order)

    def _log_probs(self, asked: Tensor, size: Tensor, read: SoftState, end: Tensor) -> Tensor:
        """log p(label) [B, K, V] of segments of `size` [B, K] that end behind the first `end` [B] frames of `read`."""
        rows, beam = size.shape
        place = Segments((end[:, None] - size).view(-1, 1), end[:, None].expand(-1, beam).reshape(-1, 1))
        found = self.head.log_probs(asked.flatten(0, 1)[:, None], read, place)
        return found.view(rows, beam, found.shape[-1]).double()

    def _frame(self, x: Tensor, read: SoftState, beam: Beam) -> Beam:
        """All rows look at their next frame [B, D], around which `read` was read."""
        state, open_ = beam.state, beam.state.open
        now = state.now + 1
        size = (now[:, None] - open_.begun).clamp(max=self.longest)
        capped = size == self.longest
        score = self._alike(distinct(beam.score, open_.key, capped), capped)
        last = open_.recent.gather(2, open_.count[..., None] - 1)[..., 0]
        wait, end = self.head.length(x[:, None], last, size)
        going, end = score + self.scales[0] * wait.double(), end.double()
        worth = self._worth(score, going, end.amax(-1)) & (score > NONE)
        beam = replace(beam, score=going, state=replace(state, now=now))
        if bool(worth.any()):
            said = self._said(beam, score, end, size, worth, read)
            beam = self._joined(beam, said)
        score = self._kept(beam.score)
        beam = replace(beam, score=score)
        return beam if score.shape[1] == self.width else self.select(beam, score.topk(self.width).indices)

    def _said(
        self, beam: Beam, score: Tensor, end: Tensor, size: Tensor, worth: Tensor, read: SoftState
    ) -> Said:  # fmt: skip
        """The best `size` longer texts of those hypotheses for which it is `worth` looking."""
        most = int(worth.sum(1).max())
        some = (~worth).byte().argsort(dim=1, stable=True)[:, :most]
        rows = torch.arange(len(some), device=some.device)[:, None]
        open_ = beam.state.open
        count = read.mask[:, : self.back].sum(1)
        labels = self._log_probs(open_.asked[rows, some], size[rows, some], read, count)
        total = score[rows, some][..., None] + self.scales[0] * end[rows, some] + self.scales[1] * labels
        total = total.masked_fill(~worth[rows, some][..., None], NONE).index_fill(2, self.never.to(some.device), NONE)
        key = open_.key[rows, some]
        group = (key[:, :, None] == key[:, None]).byte().argmax(2)  # the first that says the same
        best = torch.full_like(total, NONE).scatter_reduce(1, group[..., None].expand_as(total), total, "amax")
        best, chosen = best.flatten(1).topk(min(self.size, most * total.shape[2]))
        mine, label = chosen // total.shape[2], chosen % total.shape[2]
        each = total.gather(2, label[:, None].expand(-1, most, -1))
        parent = each.masked_fill(group[..., None] != mine[:, None], NONE).argmax(1)
        log_probs = labels[rows, parent, label]
        return Said(best, some.gather(1, parent), label, log_probs)

    def _joined(self, beam: Beam, said: Said) -> Beam:
        """The hypotheses of a beam, and behind them those that have said a label."""
        new, now = self.select(beam, said.parents), beam.state.now[:, None].expand_as(said.labels)
        grows, old = said.score > NONE, new.state.open
        texts = new.said.append(said.labels, old.begun, now, said.log_probs.to(beam.said.log_probs.dtype), grows)
        history = self.head.history
        full = (old.count == history)[..., None]
        recent = torch.where(full, F.pad(old.recent[..., 1:], [0, 1]), old.recent)
        count = (old.count + 1).clamp(max=history)
        recent = recent.scatter(2, count[..., None] - 1, said.labels[..., None])
        asked = self.head.asked_last(recent.flatten(0, 1), count.flatten()).view(old.asked.shape)
        open_ = Open(now, hashed(old.key, said.labels), recent, count, asked)
        score = torch.cat([beam.score, said.score], 1)
        texts, open_ = tree.map(lambda a, b: torch.cat([a, b], 1), (beam.said, beam.state.open), (texts, open_))
        return replace(beam, said=texts, score=score, state=replace(beam.state, open=open_))


def distinct(score: Tensor, key: Tensor, among: Tensor) -> Tensor:
    """Of hypotheses [B, K] `among` these that say the same all but the best become -inf."""
    same = (key[:, :, None] == key[:, None]) & (among & (score > NONE))[:, None]
    best = score[:, None].masked_fill(~same, NONE).argmax(2)
    worse = among & (best != torch.arange(key.shape[1], device=key.device))
    return score.masked_fill(worse, NONE)


class TimeSynchronousBeam(SegmentalSearch):
    """The `size` best hypotheses after each frame, whether they go on or have just ended a segment.

    The decoder is asked only where the length model ends a segment with a probability above `threshold`.
    """

    def __init__(
        self, head: Segmental, size: int = 4, *, sos: int, eos: int, never: tuple[int, ...] = (), length: float = 1.0,
        label: float = 1.0, threshold: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(head, size, sos=sos, eos=eos, never=never, length=length, label=label)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold {threshold}: wanted a probability below 1")
        self.threshold, self.width = threshold, size

    def _worth(self, score: Tensor, going: Tensor, end: Tensor) -> Tensor:
        return end.exp() > self.threshold

    def _kept(self, score: Tensor) -> Tensor:
        best = score.topk(self.size).values[:, -1:]
        return score.masked_fill(score < best, NONE)


class SegmentalBeam(SegmentalSearch):
    """Hypotheses compete where they have just ended a segment: the `size` best label sequences for each boundary.

    For each end Q(t, a) = max over starts t' of Q(t', a without its last label) + length + label. Hypotheses in
    segments of `longest` frames and more compete with each other. What is worse than the best by `margin` is given up.
    Laws: the cost grows with the number of frames alone; a beam that holds everything finds the best text and segments.
    """

    def __init__(
        self, head: Segmental, size: int = 4, *, sos: int, eos: int, never: tuple[int, ...] = (), length: float = 1.0,
        label: float = 1.0, margin: float = 15.0,
    ) -> None:  # fmt: skip
        super().__init__(head, size, sos=sos, eos=eos, never=never, length=length, label=label)
        if not margin > 0:
            raise ValueError(f"margin {margin}: wanted more than 0")
        self.margin, self.width = margin, size * (self.longest + 1)

    def _worth(self, score: Tensor, going: Tensor, end: Tensor) -> Tensor:
        return score + self.scales[0] * end >= going.amax(1, keepdim=True) - self.margin

    def _alike(self, score: Tensor, capped: Tensor) -> Tensor:
        least = score.masked_fill(~capped, NONE).topk(self.size).values[:, -1:]
        return score.masked_fill(capped & (score < least), NONE)

    def _kept(self, score: Tensor) -> Tensor:
        return score.masked_fill(score < score.amax(1, keepdim=True) - self.margin, NONE)
