"""One-pass beam over a weighted list of scorers, label by label; whole utterances, or block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from speechattn import tree
from speechattn.frames import Frames
from speechattn.search.beam import Beam, Prefixes, Search
from speechattn.search.phrases import PhraseScorer
from speechattn.search.scorer import Scorer
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["Bounded", "JointBeam", "JointState", "Timed"]

NONE = -torch.inf
WIDER = 1.5  # candidates of partial scorers, in beams ...
FEWEST = 8  # ... but a small beam, too, lets them have a say
LOST = -10.0  # an end that is so much less probable than the best one will not be followed by better ones ...
LENGTHS = 3  # ... when it is so for so many lengths


@runtime_checkable
class Timed(Protocol):
    """A scorer that knows when tokens are said."""

    def when(self, state: Any) -> Tensor:
        """The frame, counted since `start`, where the last token of each hypothesis begins [B, K]; -1 for none."""


@runtime_checkable
class Bounded(Protocol):
    """A scorer that can tell what follows of so many tokens, and of no more."""

    @property
    def longest(self) -> int:
        """The number."""


@node
class JointState:
    """What the scorers know, and `pending` frames that they have not read.

    `said` [B] counts the tokens of a hypothesis since the search began, `heard` [B] the frames that the scorers
    have read since then, `origin` [B] the frames of the stream before.
    """

    scorers: tuple[Any, ...]
    pending: Buffer
    said: Tensor
    heard: Tensor
    origin: Tensor


@node
class Endings:
    """The best hypotheses that have ended.

    `score` [B, K], -inf where there is none; `recent` [B, LENGTHS]: the best one that ended at each of the last
    lengths, the newest last.
    """

    said: Prefixes
    score: Tensor
    recent: Tensor

    @classmethod
    def none(cls, beam: Beam) -> Endings:
        """Nobody has ended."""
        never = torch.full_like(beam.score, NONE)
        said = Prefixes.empty(beam.said.log_probs, never.shape[1])
        return cls(said, never, never[:, :1].expand(-1, LENGTHS).clone())

    def joined_by(self, said: Prefixes, score: Tensor) -> Endings:
        """The best of these and of those that end now, which have a `score` [B, K]."""
        recent = torch.cat([self.recent[:, 1:], score.amax(1, keepdim=True)], 1)
        if not bool((score > NONE).any()):
            return replace(self, recent=recent)
        both: Prefixes = tree.map(lambda a, b: torch.cat([a, b], 1), self.said, said)
        best, order = torch.cat([self.score, score], 1).topk(score.shape[1])
        return Endings(both.select(order), best, recent)

    @property
    def settled(self) -> Tensor:
        """Ever longer texts have become ever less probable [B] (Watanabe et al., IEEE JSTSP 2017, eq. 50)."""
        return ((self.recent > NONE) & (self.recent < self.score[:, :1] + LOST)).all(1)


@node
class Choice:
    """The scores [B, K, C] of some `tokens`, and what the first scorer alone says of them; the scorers' states."""

    total: Tensor
    first: Tensor
    tokens: Tensor
    scorers: tuple[Any, ...]


class JointBeam(Search):
    """The `size` best texts by a weighted sum of log-probabilities (Hori et al., ACL 2017), label by label.

    Scorers that are not partial score every token; the others what is best by those, 1.5 times the beam and at least
    eight, and the end of the text. Tokens in `never` are not said; there are at most `most` for each frame, and no
    more than a scorer can take (`Bounded`: the positions of a decoder). The `log_probs` of tokens are what the first
    scorer gave; their spans are the frame where the first `Timed` scorer sees them begin, or without such a scorer
    the block in which they were found.

    Without a `block` all is read before the search begins, in `finish`. With one the search follows the input in
    blocks of so many valid frames (Tsunoo et al., arXiv 2006.14941): labels are added until some hypothesis ends, or
    says so many tokens in a row as `repeat` says (1 in the paper) that it has said before and that are not committed.
    Both are signs that it has run past what was heard: that step and the one before it are discarded. Where tokens
    recur in any text, as letters do, ask for more of them, or for ends alone (None).
    Law: when one block holds everything, it is the search without blocks.

    What was heard is kept, and hypotheses grow, committed or not: for hours, let the stream pause now and then, finish
    and commit, and go on with `start_at`, whose decoder begins with an empty text.
    """

    prompt = False

    def __init__(
        self, scorers: Sequence[tuple[float, Scorer]], size: int, *, eos: int, block: int | None = None,
        most: float = 1.0, repeat: int | None = None, never: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.scorers = [(weight, scorer) for weight, scorer in scorers if weight]
        if not self.scorers:
            raise ValueError("a beam without a scorer of any weight")
        if size < 1 or (block is not None and block < 1):
            raise ValueError(f"a beam of {size}, blocks of {block} frames: at least 1 is needed")
        self.size, self.eos, self.block, self.most, self.repeat = size, eos, block, most, repeat
        self.never = torch.tensor(sorted({*never}), dtype=torch.long)
        self.phrases = next((scorer.phrases for _, scorer in self.scorers if isinstance(scorer, PhraseScorer)), None)
        bounds = [scorer.longest for _, scorer in self.scorers if isinstance(scorer, Bounded)]
        self.longest = min(bounds, default=torch.iinfo(torch.long).max)
        self.timed = next((i for i, (_, scorer) in enumerate(self.scorers) if isinstance(scorer, Timed)), None)

    def start(self, x: Frames) -> Beam:
        x = x[:0]
        rows, device = len(x.mask), x.mask.device
        alone = torch.zeros(rows, self.size, dtype=torch.long, device=device)
        score = torch.full((rows, self.size), NONE, dtype=torch.float64, device=device)
        score[:, :1] = 0.0
        states = tuple(scorer.select(scorer.start(x), alone) for _, scorer in self.scorers)
        none = torch.zeros(rows, dtype=torch.long, device=device)
        state = JointState(states, Buffer(x.values, x.mask), none, none.clone(), none.clone())
        return Beam(Prefixes.empty(x.values, self.size), score, none.clone(), state)

    def start_at(self, x: Frames, heard: Tensor) -> Beam:
        beam = self.start(x)
        return replace(beam, frames=heard, state=replace(beam.state, origin=heard))

    @torch.inference_mode()
    def step(self, x: Frames, beam: Beam) -> Beam:
        x = x.front()
        old = beam.state.pending
        waiting = Frames.cat([Frames(old.values, old.mask), x]).front()  # no room for what others had waited for
        pending = Buffer(waiting.values, waiting.mask)
        beam = replace(beam, frames=beam.frames + x.lengths, state=replace(beam.state, pending=pending))
        while self.block is not None:
            ready = beam.state.pending.length >= self.block
            if not bool(ready.any()):
                break
            if bool(ready.all()):
                beam = self._block(beam, self.block)
            else:
                go, stay = ready.nonzero()[:, 0], (~ready).nonzero()[:, 0]
                both = tree.concat([self._block(tree.select(beam, go), self.block), tree.select(beam, stay)])
                beam = tree.select(both, torch.cat([go, stay]).argsort())
        return beam

    @torch.inference_mode()
    def finish(self, beam: Beam) -> Beam:
        beam = self._read(beam, beam.state.pending.mask.shape[1])
        return self._each(self._ending, (beam, Endings.none(beam)))

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        scorers = tuple(
            scorer.select(state, parents) for (_, scorer), state in zip(self.scorers, beam.state.scorers, strict=True)
        )
        return replace(beam, said=beam.said.select(parents), score=beam.score.gather(1, parents),
                       state=replace(beam.state, scorers=scorers))  # fmt: skip

    def bias(self, beam: Beam, root: int | Tensor) -> Beam:
        for i, (weight, scorer) in enumerate(self.scorers):
            if isinstance(scorer, PhraseScorer):
                states = list(beam.state.scorers)
                states[i], bonus = scorer.phrases.moved(states[i], root, beam.said.tokens, beam.said.length)
                state = replace(beam.state, scorers=tuple(states))
                moved = replace(beam, score=beam.score + weight * bonus, state=state)
                return self.select(moved, moved.score.sort(dim=1, descending=True, stable=True).indices)
        return super().bias(beam, root)

    def _read(self, beam: Beam, n: int) -> Beam:
        """Let the scorers read the next `n` frames that wait, or as many as there are."""
        x = Frames(beam.state.pending.values, beam.state.pending.mask).front()
        now, rest = x[:n], x[n:]
        states = tuple(
            scorer.read(now, state) for (_, scorer), state in zip(self.scorers, beam.state.scorers, strict=True)
        )
        state = replace(
            beam.state, scorers=states, pending=Buffer(rest.values, rest.mask), heard=beam.state.heard + now.lengths
        )
        return replace(beam, state=state)

    def _block(self, beam: Beam, n: int) -> Beam:
        """Read a block, and follow it as far as that is safe."""
        beam = self._read(beam, n)
        return self._each(self._following, (beam, beam))

    def _each(self, advance: Any, runs: Any) -> Beam:
        """Let `advance` go on, the rows that have not come to their end, until none is left."""
        rows = torch.arange(len(runs[0].score), device=runs[0].score.device)
        ends: list[Beam] = []
        order: list[Tensor] = []
        while len(rows):
            runs, done, result = advance(runs)
            if bool(done.all()) and not ends:
                return result  # type: ignore[no-any-return]
            if bool(done.any()):
                gone, left = done.nonzero()[:, 0], (~done).nonzero()[:, 0]
                ends.append(tree.select(result, gone))
                order.append(rows[gone])
                runs, rows = tree.select(runs, left), rows[left]
        if not ends:
            return runs[0]  # type: ignore[no-any-return]
        whole: Beam = tree.select(tree.concat(ends), torch.cat(order).argsort())
        return whole

    def _following(self, runs: tuple[Beam, Beam]) -> tuple[tuple[Beam, Beam], Tensor, Beam]:
        """One label more: the last two beams -> the next two, who must wait for input [B], and with what beam."""
        before, beam = runs
        after, tokens = self._label(beam, torch.zeros_like(beam.state.said, dtype=torch.bool))
        alive = after.score > NONE
        past = (alive & ((tokens == self.eos) | self._repeated(after.said))).any(1)
        done = past | ~alive.any(1) | (beam.state.said >= self._limit(beam.state))
        return (beam, after), done, before

    def _ending(self, runs: tuple[Beam, Endings]) -> tuple[tuple[Beam, Endings], Tensor, Beam]:
        """One label more, or the end."""
        beam, endings = runs
        after, tokens = self._label(beam, beam.state.said >= self._limit(beam.state))
        ends = tokens == self.eos
        endings = endings.joined_by(after.said, after.score.masked_fill(~ends, NONE))
        after = replace(after, score=after.score.masked_fill(ends, NONE))
        done = endings.settled | ~(after.score > NONE).any(1)
        result = replace(after, said=endings.said, score=endings.score) if bool(done.any()) else after
        return (after, endings), done, result

    def room(self, beam: Beam) -> Tensor:
        left: Tensor = 1 - beam.state.said / self.longest
        return left

    def _limit(self, state: JointState) -> Tensor:
        """The most tokens that may be said of what was heard [B]."""
        return (state.heard * self.most).long().clamp(max=self.longest)

    def _repeated(self, said: Prefixes) -> Tensor:
        """Whether the last `repeat` tokens were said before [B, K]."""
        n, cap = self.repeat, said.tokens.shape[2]
        if n is None or cap <= n:
            return torch.zeros_like(said.length, dtype=torch.bool)
        at = torch.arange(cap, device=said.length.device)
        found = at < (said.length - 1)[..., None]
        for back in range(n):
            last = said.tokens.gather(2, (said.length - 1 - back).clamp(min=0)[..., None])
            found = found & (said.tokens.roll(back, 2) == last) & (at >= back)
        return found.any(-1)

    def _label(self, beam: Beam, full: Tensor) -> tuple[Beam, Tensor]:
        """The best hypotheses with one label more, and which [B, K]; where `full` [B], they may but end."""
        choice = self._choice(beam.state.scorers)
        total = choice.total + beam.score[..., None]
        if bool(full.any()):
            total = total.masked_fill(full[:, None, None] & (choice.tokens != self.eos), NONE)
        score, best = total.flatten(1).topk(self.size)
        parents = torch.div(best, total.shape[2], rounding_mode="floor")
        tokens = choice.tokens.flatten(1).gather(1, best)
        states = tuple(
            scorer.extend(state, parents, tokens)
            for (_, scorer), state in zip(self.scorers, choice.scorers, strict=True)
        )
        state = replace(beam.state, scorers=states, said=beam.state.said + 1)
        starts, ends = self._spans(state, tokens)
        grows = (tokens != self.eos) & (score > NONE)
        log_probs = choice.first.flatten(1).gather(1, best)
        said = beam.said.select(parents).append(tokens, starts, ends, log_probs, grows)
        return replace(beam, said=said, score=score, state=state), tokens

    def _spans(self, state: JointState, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The first and last-plus-one frame of the last tokens [B, K]."""
        if self.timed is not None:
            scorer = self.scorers[self.timed][1]
            assert isinstance(scorer, Timed)
            starts = scorer.when(state.scorers[self.timed]).clamp(min=0) + state.origin[:, None]
            return starts, starts + 1
        ends = (state.origin + state.heard)[:, None].expand_as(tokens)
        heard = state.heard if self.block is None else state.heard.clamp(max=self.block)
        return ends - heard[:, None], ends

    def _choice(self, before: tuple[Any, ...]) -> Choice:
        """What every scorer says of the tokens that come into question."""
        states, total, first = list(before), None, None
        for i, (weight, scorer) in enumerate(self.scorers):
            if not scorer.partial:
                found, states[i] = scorer.score(before[i], None)
                total = weight * found if total is None else total + weight * found
                first = found if i == 0 else first
        tokens = None
        if total is not None:
            total, first, tokens = self._candidates(total, first)
        for i, (weight, scorer) in enumerate(self.scorers):
            if scorer.partial:
                found, states[i] = scorer.score(before[i], tokens)
                total = weight * found if total is None else total + weight * found
                first = found if i == 0 else first
        assert total is not None
        assert first is not None
        if tokens is None:
            total = self._without(total)
            tokens = torch.arange(total.shape[2], device=total.device).expand_as(total)
        return Choice(total, first, tokens, tuple(states))

    def _without(self, total: Tensor) -> Tensor:
        """Scores of all tokens, without those that are never said."""
        return total.index_fill(2, self.never.to(total.device), NONE) if len(self.never) else total

    def _candidates(self, total: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The tokens [B, K, C] that partial scorers are asked about, and the two scores for these."""
        total, wanted = self._without(total), max(int(WIDER * self.size), FEWEST)
        every = torch.arange(total.shape[2], device=total.device).expand_as(total)
        if wanted >= total.shape[2] or not any(scorer.partial for _, scorer in self.scorers):
            return total, first, every
        best, tokens = total.topk(wanted, sorted=False)
        ended = (tokens == self.eos).any(-1, keepdim=True)
        tokens = torch.cat([tokens, torch.full_like(tokens[..., :1], self.eos)], -1)
        best = torch.cat([best, total[..., self.eos : self.eos + 1].masked_fill(ended, NONE)], -1)
        return best, None if first is None else first.gather(2, tokens), tokens
