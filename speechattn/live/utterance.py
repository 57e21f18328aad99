"""The piece of sound that is being listened to, and what has been committed of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import ceil, exp
from typing import Any

import numpy as np
import torch

from speechattn.audio.hearing import Hearing
from speechattn.audio.resample import Samples
from speechattn.live.events import Trace, Word
from speechattn.live.heard import SourceWords, shown
from speechattn.live.listener import Decision, WindowModel
from speechattn.live.preferred import Preferred
from speechattn.live.timing import token_spans
from speechattn.policy import Policy, Source
from speechattn.policy.align_att import AlignAtt, focus
from speechattn.policy.stream_att import TextHistory, earliest, kept
from speechattn.search import Draft
from speechattn.search.looks import apart
from speechattn.search.loops import loop_start

__all__ = ["Utterance"]

TOKENS_PER_S, TOKENS_AT_LEAST = 8, 10  # more than anybody says: a draft that needs more is a loop
FOCUS_SHARE = 0.25  # a token is said while its attention is above this share of its peak
LEAST_CUT_S = 1.0  # forgetting less is not worth it
FULL_SPARE_S = 2.0  # the newest sound of a full window may hold half a word
MARGIN_S = 0.1  # sound kept before the first word that is kept
LOOP, CUT = "a loop begins here", "incomplete word: the draft was cut inside it"


@dataclass(frozen=True)
class Committed:
    """A committed word: its tokens, its text, and the first encoder frame of the window that it looked at."""

    tokens: tuple[int, ...]
    text: str
    frame: int


@dataclass(frozen=True)
class Look:
    """The last look at a window: the draft, the committed tokens before it, and how many were `done` with it."""

    draft: Draft
    before: int
    done: int


class Utterance:
    """A window of sound, re-encoded at every look, and the committed words that it still covers.

    `start` is the sample at which the window begins, `first` the tokens that were committed before it. With `trace`
    decisions say why they committed no more. What is `preferred` is said rather than other words, or the decoder is
    `prompted` with it.
    """

    def __init__(
        self, model: WindowModel, policy: Policy, *, start: int, first: int, context: Sequence[int] = (),
        trace: bool = False, preferred: Preferred | None = None, prompted: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.policy, self.start, self.first, self.trace = model, policy, start, first, trace
        self.preferred, self.prompted = preferred, prompted
        self.context = list(context)
        self.heads = tuple(dict.fromkeys([*model.alignment_heads, *policy.heads]))
        self.state: Any = policy.initial()
        self.hearing = Hearing(model.front_end)
        self.size = 0  # samples
        self.words: list[Committed] = []
        self.tail: list[int] = []
        self.forgotten = 0  # frames, since the state of the policy began
        self.heard = SourceWords(policy)
        self.last: Look | None = None

    def add(self, samples: Samples) -> None:
        """More sound at the end."""
        self.hearing.add(samples)
        self.size += len(samples)

    @property
    def seconds(self) -> float:
        """Length of the window."""
        return self.size / self.model.sample_rate

    @property
    def tokens(self) -> list[int]:
        """Committed tokens that the window covers."""
        return [token for word in self.words for token in word.tokens]

    def decide(self, *, finished: bool, paused: bool = False, full: bool = False) -> Decision:
        """Encode the window, draft, and commit what the policy calls safe, in whole words; all when finished.

        A `full` window can take no more sound: what was said more than `FULL_SPARE_S` before its end is committed
        whatever the policy says, and the window starts again behind it.

        From the second round of a loop on nothing is committed: it stays out of the tail too, and where the window
        ends it is given back as withheld.
        """
        frames = ceil(self.seconds / self.model.frame_s)
        memory = self.model.encode(self.hearing.read(), samples=self.size, start=self.start, finished=finished)
        leaning, prompt = None, list[int]()
        if self.preferred is not None:
            self.preferred.look(memory.frames[:frames])
            if self.prompted:
                prompt = self.preferred.prompt()
            else:
                leaning = self.preferred.leaning(self.tokens)
        draft = self.model.draft(
            memory, self.tokens, guess=self.tail, context=[*prompt, *self.context], heads=self.heads, frames=frames,
            max_tokens=TOKENS_AT_LEAST + ceil(TOKENS_PER_S * self.seconds), first=self.first, leaning=leaning,
        )  # fmt: skip
        paused = paused and not self.model.translates
        heard, before = self.heard.window(memory.frames), self.state
        source = Source(self.forgotten + frames, self.model.frame_s, finished, paused, heard)
        safe, self.state = self.policy.accept(draft, source, before)
        tokens = draft.tokens.tolist()
        loop = loop_start([*self.tokens, *tokens])
        sane = len(tokens) if loop is None else max(0, loop - len(self.tokens))
        sizes = self.model.tokenizer.words(tokens, spaceless=self.model.spaceless)
        whole = sizes if draft.ended or finished else sizes[:-1]  # else it was cut inside its last word
        spans, limit = self._spans(draft) if tokens else [], safe
        if full:
            end = frames - round(FULL_SPARE_S / self.model.frame_s)
            limit = max(safe, next((i for i, span in enumerate(spans) if span[1] > end), len(tokens)))
        words = self._words(draft, tokens, whole, spans, min(limit, sane))
        done = sum(len(word.tokens) for word, _ in words)
        self.last = Look(draft, len(self.tokens), done)
        self.tail = tokens[done:sane]
        self.words += [word for word, _ in words]
        self.first += done
        why = partial(self.policy.why, draft, source, before)
        trace = self._traced(tokens, sizes, done, sane, safe, why) if self.trace and tokens else None
        if full:
            ends = [end for _, end in spans[:done]]
            self._restart(max(ends) if ends else frames - round(FULL_SPARE_S / self.model.frame_s))
        decode = self.model.tokenizer.decode
        sized = partial(self.model.tokenizer.words, spaceless=self.model.spaceless)
        unstable = "" if finished else decode(shown(self.policy, self.tail, sized))
        withheld = decode(tokens[done:]) if finished else decode(tokens[sane:]) if full else ""
        said = tuple(word for _, word in words)
        terms = () if self.preferred is None else self.preferred.add(said)
        return Decision(said, unstable, withheld, trace=trace, terms=terms)

    def _traced(
        self, tokens: list[int], sizes: list[int], done: int, sane: int, safe: int, why: Callable[[int], str]
    ) -> Trace:  # fmt: skip
        """Why the word behind the first `done` tokens waits: by the policy, in a loop, or because it may go on."""
        decode = self.model.tokenizer.decode
        if done == len(tokens):
            return Trace(decode(tokens), len(tokens), done)
        end = next(end for end in accumulate(sizes) if end > done)
        reason = why(max(safe, done)) if safe < end else ""
        if not reason:
            reason = LOOP if sane < end else CUT
        return Trace(decode(tokens), len(tokens), done, decode(tokens[done:end]), reason)

    def _words(
        self, draft: Draft, tokens: list[int], sizes: list[int], spans: list[tuple[int, int]], most: int
    ) -> list[tuple[Committed, Word]]:
        """The words that end within the first `most` tokens, with times and confidence."""
        whole = [n for i, n in enumerate(sizes) if sum(sizes[: i + 1]) <= most]
        words, at = [], 0
        for n in whole:
            text = self.model.tokenizer.decode(tokens[at : at + n])
            begin, end = min(begin for begin, _ in spans[at : at + n]), max(end for _, end in spans[at : at + n])
            confidence = exp(float(draft.log_probs[at : at + n].sum()))
            offset = self.start / self.model.sample_rate
            step = self.model.frame_s
            words.append((
                Committed(tuple(tokens[at : at + n]), text, begin),
                Word(text, offset + begin * step, offset + end * step, confidence),
            ))  # fmt: skip
            at += n
        return words

    def _spans(self, draft: Draft) -> list[tuple[int, int]]:
        """First and last-plus-one frame of each token of the draft, narrowed to where it really looked.

        What is recognised stands in the order of the sound; a translation may look back.
        """
        rows = [*self.tokens, *draft.tokens.tolist(), -1]  # the look behind the last token takes the silence there
        weights = torch.cat([draft.weights, draft.weights[:, -1:]], 1)
        every = replace(draft, tokens=torch.tensor(rows), weights=weights)
        where = focus(every, self.model.alignment_heads, drop_last=0, normalise=True, median=7).numpy()
        first = len(self.tokens)
        if self.model.translates:
            return apart(where[first:])
        spans, where = token_spans(where)[first:-1], where[first:-1]
        narrowed = []
        for row, (begin, end) in zip(where, spans, strict=True):
            loud = np.flatnonzero(row[begin:end] >= FOCUS_SHARE * row[begin:end].max())
            narrowed.append((begin + int(loud[0]), begin + int(loud[-1]) + 1) if len(loud) else (begin, end))
        return narrowed

    def trim(self, history_words: int) -> list[int] | None:
        """Forget the oldest words and the sound before the ones that are kept, where the window is too long.

        The last `history_words` stay, half of the committed words at the most. Returns the tokens that were
        forgotten, or None when nothing can be.
        """
        keep = min(history_words, len(self.words) // 2)
        if not keep:
            return None
        cut = min(word.frame for word in self.words[-keep:]) - round(MARGIN_S / self.model.frame_s)
        return self._keep(keep, cut) if cut * self.model.frame_s >= LEAST_CUT_S else None

    def remember(self, history: TextHistory, reader: AlignAtt) -> list[int]:
        """Forget the words that the history does not keep, and the sound before what the kept ones look at now.

        It is what StreamAtt does behind every look (arXiv 2406.06097); `reader` says how the attention is read. Returns
        the tokens that were forgotten.
        """
        texts, sizes = [word.text for word in self.words], [len(word.tokens) for word in self.words]
        keep = kept(history, texts, sizes)
        if keep == len(self.words) or self.last is None:
            return []
        tokens, total = sum(sizes[-keep:]), self.last.before + self.last.done
        return self._keep(keep, earliest(self.last.draft, reader, self.last.before, range(total - tokens, total)))

    def _keep(self, keep: int, cut: int) -> list[int]:
        """Forget all but the newest words, and the first frames of the sound -> the tokens that were forgotten."""
        forgotten = [token for word in self.words[:-keep] for token in word.tokens]
        self.words = [replace(word, frame=max(0, word.frame - cut)) for word in self.words[-keep:]]
        self._cut(cut)
        return forgotten

    def _restart(self, frame: int) -> None:
        """Forget all words, and the sound before `frame`; the state of the policy belongs to what was forgotten."""
        self.words, self.tail, self.state = [], [], self.policy.initial()
        self._cut(frame)
        self.forgotten = 0
        self.heard.anew()

    def _cut(self, frames: int) -> None:
        """Forget the first `frames` of the sound."""
        step = round(self.model.frame_s * self.model.sample_rate)
        samples = min(frames, self.size // step) * step
        self.hearing.cut(samples)
        self.heard.forget(samples // step)
        self.size, self.start = self.size - samples, self.start + samples
        self.forgotten, self.last = self.forgotten + samples // step, None
