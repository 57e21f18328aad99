"""Listening with a model that streams: encoder chunk -> search -> what is certain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, exp

import numpy as np
import torch
from torch import Tensor

from speechattn import tree
from speechattn.audio.clip import EVERY, Clip, eyes
from speechattn.audio.resample import Samples
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.live.endings import Glimpse, Limits, StreamSettings
from speechattn.live.events import Trace, Word
from speechattn.live.heard import SourceWords, nothing_said, room_left, shown
from speechattn.live.lips import Pictures
from speechattn.live.listener import Decision, StreamModel
from speechattn.live.preferred import Preferred
from speechattn.live.rows import Place, Row, Rows, joined
from speechattn.live.suited import suited
from speechattn.live.terms import Terms
from speechattn.policy import Policy, Source
from speechattn.policy.retranslation import Retranslation
from speechattn.search import Beam, Draft, Hypothesis, Search

__all__ = ["Streaming", "listen"]

NOTHING = Hypothesis((), 0.0, (), ())
DISAGREE, OVER = "hypotheses disagree on it", "it belongs to the next utterance"  # why words wait
INCOMPLETE, FEW = "incomplete word", "too little was heard"
# Attention says something of any sound ("you" of silence), so some frames must have been heard before it may: in six
# minutes of silence and music utterances had 1 or 2 such frames, in 60 clips of speech 2 (one), 3 (one), 5 or more.
HEARD = 3


class Streaming:
    """A `Listener`: what enough of the beam agrees on, or a policy accepts, is committed in whole words."""

    def __init__(
        self, model: StreamModel, *, policy: Policy | None = None, settings: StreamSettings | None = None,
        search: Search | None = None, terms: Terms | None = None, trace: bool = False,
    ) -> None:  # fmt: skip
        self.search = search or (model.search() if terms is None else model.search(phrases=[]))
        self.trace = trace
        self.model, self.policy = model, suited(policy, self.search)
        self.settings, self.least = settings or StreamSettings(), HEARD if self.search.heads else 1
        self.frame_s = model.frame_s  # which takes a while to work out
        self.limits = Limits.of(self.settings, self.frame_s)
        self.state, self.words = None if self.policy is None else self.policy.initial(), SourceWords(self.policy)
        self.patient = isinstance(self.policy, Retranslation) or (self.search.reorders and self.policy is not None)
        plan = model.listening.plan()
        if plan.block is None:
            raise InputError("the encoder of this model needs the whole utterance: it cannot listen live")
        self.block, self.latency = plan.block, plan.latency
        seeing = eyes(model.listening)
        self.lips = None if seeing is None else Pictures(seeing.size)
        self.waiting: Samples = np.zeros(0, np.float32)  # NaN where no sound is there
        self.silent = 0  # invalid samples at the end of what waits
        self.heard = self.first = 0  # samples; tokens that were committed
        self.begun = 0  # frames of the stream before the search began
        self.tail = ""
        self.place: Place | None = None
        self.preferred = Preferred(
            self.search.phrases, model.tokenizer, spaceless=model.spaceless, terms=terms,
            translates=self.search.reorders,
        )  # fmt: skip
        self.until = 0.0  # where the last word ends

    def prefer(self, phrases: Sequence[str]) -> None:
        """From now on these phrases are preferred, and no others; the report begins anew.

        InputError for phrases that the vocabulary cannot spell, and for a search that takes none.
        """
        before = self.preferred.prefer(phrases)
        if self.place is not None:
            row = self.place.row
            biased = self.search.bias(row.beam, self.preferred.root or 0)
            self.place = Place(Rows(replace(row, beam=biased), 1), 0)
        self.preferred.drop(before)

    @property
    def ready(self) -> bool:
        """A block of sound waits."""
        return len(self.waiting) + self.silent >= self.block

    def add(self, samples: Samples) -> None:
        """More sound [n]."""
        self.waiting = np.concatenate([self.waiting, samples])

    def see(self, lips: object) -> None:
        """More pictures [n, H, W], which wait for their sound. InputError for a model that sees none."""
        if self.lips is None:
            raise InputError("this model sees no lips: it takes sound alone")
        self.lips.add(lips)

    def end(self) -> None:
        """No more sound: what pushes the last frames out of the encoder follows."""
        if self.lips is not None:
            deaf = EVERY * self.lips.count - self.heard - len(self.waiting)
            self.add(np.full(max(0, deaf), np.nan, np.float32))
        n = self.heard + len(self.waiting)
        total = ceil((n + self.latency) / self.block) * self.block if n else 0
        self.silent = total - n

    def take(self) -> Frames:
        """The next block of sound [1, N]."""
        samples, self.waiting = self.waiting[: self.block], self.waiting[self.block :]
        missing = self.block - len(samples)
        self.silent -= missing
        self.heard += len(samples)
        samples = np.pad(samples, [0, missing], constant_values=np.nan)
        there = ~np.isnan(samples)
        values = self.model.sound(np.where(there, samples, np.float32(0)))
        mask = torch.from_numpy(there)[None].to(values.device)
        if self.lips is None:
            return Frames(values, mask)
        return Clip(values, mask, tree.map(lambda x: x.to(values.device), self.lips.take(self.block // EVERY)))

    def hear(self, samples: Samples) -> Iterator[Decision | None]:
        """More sound: every whole block is a step."""
        self.add(samples)
        yield from self._steps()

    def finish(self) -> Iterator[Decision | None]:
        """The frames that the encoder still holds, and all words."""
        self.end()
        yield from self._steps()
        yield self.last()

    def _steps(self) -> Iterator[Decision | None]:
        while self.ready:
            decisions: list[Decision | None] = [*listen([self])[0]]
            yield from decisions or [None]
        self.waiting = self.waiting.copy()  # let go of what was heard

    @torch.inference_mode()
    def last(self) -> Decision | None:
        """The end of the stream: everything is decided."""
        if self.place is None:
            return None
        row, self.place = self.place.row, None
        spoke = int(row.spoke[0]) >= self.least
        best = answers(self.search, self.search.finish(row.beam))[0] if spoke else NOTHING
        return self.closing(best, spoke)

    def closing(self, best: Hypothesis, spoke: bool) -> Decision | None:
        """All of the hypothesis is certain, and the utterance ends; None where there was none."""
        words, terms = self._words(best, len(best.tokens))
        self.first += len(best.tokens)
        before, self.tail = self.tail, ""
        self.state = None if self.policy is None else self.policy.initial()
        self.words.anew()
        self.preferred.anew()
        trace = self._traced(best, len(best.tokens))
        return Decision(words, final=True, trace=trace, terms=terms) if words or spoke or before else None

    def safe(
        self, best: Hypothesis, agreed: int, glimpse: Glimpse, draft: Draft | None = None, ahead: Sequence[int] = ()
    ) -> tuple[int, str]:
        """Tokens of the best hypothesis that may be committed now, whole words; and for a trace why the next waits.

        Without a policy those that are `agreed` upon; else what it says of the same as a `draft`, with labels `ahead`.
        """
        frames, paused, n = glimpse.frames, glimpse.quiet >= self.limits.pause and self.search.prompt, len(best.tokens)
        paused = paused and not self.search.reorders  # what follows the pause may change what is said before it
        why = always(DISAGREE)
        if self.policy is not None:
            assert draft is not None
            draft, before = replace(draft, first=self.first), self.state
            source = Source(frames - self.begun, self.frame_s, False, paused, self.words.count(ahead))
            agreed, self.state = self.policy.accept(draft, source, before)
            why = partial(self.policy.why, draft, source, before)
        if not self.patient:
            old = (i for i, (_, end) in enumerate(best.spans) if end > frames - self.limits.patience)
            agreed = max(agreed, next(old, n))
        if glimpse.end is not None:  # what comes then belongs to another utterance
            over = next((i for i, (a, _) in enumerate(best.spans) if a >= glimpse.end), n)
            agreed, why = (over, always(OVER)) if over < agreed else (agreed, why)
        if paused and agreed == n:
            return agreed, ""
        more = self.policy is not None and bool(self.policy.heads)  # the next token, where it looks, ends a word
        read = best.tokens[: agreed + more]
        sizes = self._sizes(read)
        whole = len(read) - (sizes[-1] if sizes else 0)
        if not self.trace or whole == n:
            return whole, ""
        reason = why(agreed) if agreed < n else ""
        return whole, reason if reason and (whole == agreed or more) else ": ".join(filter(None, [INCOMPLETE, reason]))

    def decide(self, best: Hypothesis, n: int, why: str = "") -> Decision | None:
        """The first `n` tokens are committed; None where there is nothing new to say, and no trace of a draft."""
        (words, terms), trace = self._words(best, n), self._traced(best, n, why)
        self.first += n
        tail = shown(self.policy, best.tokens[n:], self._sizes)
        before, self.tail = self.tail, self._text(tail) if tail else ""
        return Decision(words, self.tail, trace=trace, terms=terms) if words or self.tail != before or trace else None

    def _traced(self, best: Hypothesis, n: int, why: str = "") -> Trace | None:
        """What became of a draft, if anybody asks and there was one."""
        if not self.trace or not best.tokens:
            return None
        sizes = self._sizes(best.tokens[n:])
        at = self._text(best.tokens[n : n + sizes[0]]) if sizes else ""
        return Trace(self._text(best.tokens), len(best.tokens), n, at, why if sizes else "")

    def _sizes(self, tokens: Sequence[int]) -> list[int]:
        return self.model.tokenizer.words(tokens, spaceless=self.model.spaceless)

    def _text(self, tokens: Sequence[int]) -> str:
        text = self.model.tokenizer.decode(tokens)
        return text if not text or self.model.spaceless or text.startswith(" ") else f" {text}"

    def _words(self, best: Hypothesis, n: int) -> tuple[tuple[Word, ...], tuple[str, ...]]:
        """The words of the first `n` tokens, with times and confidence, and the retrieved terms that they complete."""
        words, at, step = [], 0, self.frame_s
        for size in self._sizes(best.tokens[:n]):
            part = slice(at, at + size)
            first, last = min(begin for begin, _ in best.spans[part]), max(end for _, end in best.spans[part])
            at += size
            end = min(last * step, self.heard / self.model.sample_rate)  # the last frame may reach beyond the sound
            start = min(first * step if self.search.reorders else max(first * step, self.until), end)
            self.until = max(self.until, end)
            if text := self._text(best.tokens[part]):  # else it is a mark of a word that did not come
                words.append(Word(text, start, end, exp(sum(best.log_probs[part]))))
        return tuple(words), self.preferred.add(words)


@torch.inference_mode()
def listen(listeners: Sequence[Streaming]) -> list[list[Decision]]:
    """One step of those that are ready, which share model and search, as one batch."""
    model = listeners[0].model
    sound = [one.take() for one in listeners]
    row = joined([one.place or Place(Rows(begin(one, x), 1), 0) for one, x in zip(listeners, sound, strict=True)])
    x = tree.concat(sound)
    frames, stream = model.listening.step(x, row.stream)
    decisions = [list[Decision]() for _ in listeners]
    row = replace(search_on(listeners, frames, model.listening.ahead(stream), row, decisions), stream=stream)
    rows = Rows(row, len(listeners))
    for i, one in enumerate(listeners):
        one.place = Place(rows, i)
    return decisions


def begin(one: Streaming, x: Frames) -> Row:
    """The state before the first block [1, N] of a stream."""
    state = one.model.listening.init_state(x)
    frames, _ = one.model.listening.step(x[:0], tree.clone(state))
    nothing = torch.zeros(1, dtype=torch.long, device=x.mask.device)
    return Row(state, started([one], frames, nothing), nothing, nothing.clone(), nothing.clone())


def started(listeners: Sequence[Streaming], frames: Frames, heard: Tensor) -> Beam:
    """The search before the first frame, `heard` [B] frames behind the beginning of the stream."""
    search = listeners[0].search
    beam = search.start_at(frames, heard)
    if search.phrases is None or all(one.preferred.root is None for one in listeners):
        return beam
    return search.bias(beam, roots(listeners, heard.device))


def roots(listeners: Sequence[Streaming], device: torch.device) -> Tensor:
    """The set of phrases [B] of each."""
    phrases = listeners[0].search.phrases
    assert phrases is not None
    each = [one.preferred.root for one in listeners]
    return torch.tensor([phrases.root if root is None else root for root in each], device=device)


def search_on(
    listeners: Sequence[Streaming], frames: Frames, ahead: Frames | None, row: Row, decisions: list[list[Decision]]
) -> Row:  # fmt: skip
    """The search goes on over frames [B, T, D], with a glimpse of those ahead [B, T', D].

    Where an utterance ends between them it begins anew.
    """
    model, search, beam = listeners[0].model, listeners[0].search, row.beam
    counts = torch.stack([row.quiet, row.since, row.spoke], 1).tolist()
    nothing, valid = nothing_said(model, search, frames), frames.mask.tolist()
    ahead = frames[:0] if ahead is None or not search.peeks else ahead
    silent, there = nothing_said(model, search, ahead), ahead.mask.tolist()
    labels, more = (listeners[0].words.labels(x) for x in (frames, ahead))
    at, stop = [0] * len(listeners), [0] * len(listeners)
    over = fresh = [True] * len(listeners)
    while any(over):
        over = []
        for i, one in enumerate(listeners):
            stop[i], end = one.limits.until_end(nothing[i], valid[i], at[i], counts[i])
            one.words.hear(labels[i][at[i] : stop[i]])
            over.append(end)
        beam = retrieved(listeners, frames, at, stop, beam)
        sees = torch.tensor([new and not end for new, end in zip(fresh, over, strict=True)], device=ahead.mask.device)
        beam = search.peek(between(frames, at, stop), Frames.of(ahead.values, ahead.mask & sees[:, None]), beam)
        at, fresh = list(stop), over
        if any(over):
            beam = restarted(listeners, frames, beam, over, counts, decisions)
    best, room = answers(search, beam), room_left(search, beam, [one.limits for one in listeners])
    glimpses = [
        one.limits.glimpse(*each)
        for one, *each in zip(listeners, beam.frames.tolist(), silent, there, counts, strict=True)
    ]
    agreed = beam.agreed(listeners[0].settings.certainty).tolist()
    asked = any(one.policy is not None for one in listeners)
    drafts = search.looks(beam) if asked else [None] * len(listeners)
    n = []
    for i, one in enumerate(listeners):
        best[i] = best[i] if glimpses[i].spoke >= one.least else NOTHING
        enough = counts[i][2] >= one.least
        safe, why = one.safe(best[i], agreed[i], glimpses[i], drafts[i], more[i]) if enough else (0, FEW)
        n.append(safe)
        decision = one.decide(best[i], safe, why)
        decisions[i] += [] if decision is None else [decision]
        counts[i][1] = max(counts[i][1], one.limits.weary(room[i]))
    quiet, since, spoke = torch.tensor(counts, device=frames.mask.device).unbind(1)
    return Row(row.stream, search.commit(beam, torch.tensor(n, device=quiet.device)), quiet, since, spoke)


def retrieved(
    listeners: Sequence[Streaming], frames: Frames, first: Sequence[int], last: Sequence[int], beam: Beam
) -> Beam:  # fmt: skip
    """Those who watch for terms hear their frames from `first` [B] to before `last` [B], and prefer what they find."""
    before = dict[int, int | None]()
    for i, one in enumerate(listeners):
        watch = one.preferred.watch
        if watch is not None and watch.hear(valid(frames, i, first[i], last[i])):
            before[i] = one.preferred.turn()
    if not before:
        return beam
    search = listeners[0].search
    changed = torch.tensor([i in before for i in range(len(listeners))], device=frames.mask.device)
    biased = search.bias(beam, roots(listeners, frames.mask.device))
    beam = tree.where(changed, biased, beam)  # the others stay inside the phrases in which they are
    for i, root in before.items():
        listeners[i].preferred.drop(root)
    return beam


def valid(frames: Frames, i: int, first: int, last: int) -> Frames:
    """The valid frames of row `i` from `first` to before `last`, by themselves [1, T, D]."""
    there = frames.mask[i, first:last]
    values = frames.values[i, first:last][there][None]
    return Frames(values, there.new_ones(1, values.shape[1]))


def always(reason: str) -> Callable[[int], str]:
    """The same for every token."""
    return lambda _: reason


def answers(search: Search, beam: Beam) -> list[Hypothesis]:
    """The best hypothesis of each row; one that says nothing where there is none."""
    return [best[0] if best else NOTHING for best in search.hypotheses(beam)]


def between(frames: Frames, first: Sequence[int], last: Sequence[int]) -> Frames:
    """The frames from `first` [B] to before `last` [B] of each row; the others are not there."""
    low, high = torch.tensor([first, last], device=frames.mask.device)[..., None]
    at = torch.arange(frames.mask.shape[1], device=frames.mask.device)
    inside = (at >= low) & (at < high)
    return Frames.of(frames.values, frames.mask & inside)


def restarted(
    listeners: Sequence[Streaming], frames: Frames, beam: Beam, over: list[bool], counts: list[list[int]],
    decisions: list[list[Decision]],
) -> Beam:  # fmt: skip
    """Rows whose utterance is over say all of it, and their search begins anew."""
    search, rows = listeners[0].search, [i for i, end in enumerate(over) if end]
    spoke, heard = [i for i in rows if counts[i][2] >= listeners[i].least], beam.frames.tolist()
    best = dict(zip(spoke, answers(search, search.finish(tree.select(beam, spoke))), strict=True)) if spoke else {}
    for i in rows:
        decision = listeners[i].closing(best.get(i, NOTHING), i in best)
        listeners[i].begun = heard[i]
        decisions[i] += [] if decision is None else [decision]
        counts[i][1:] = 0, 0
    fresh: Beam = tree.where(
        torch.tensor(over, device=frames.mask.device), started(listeners, frames, beam.frames), beam
    )
    return fresh
