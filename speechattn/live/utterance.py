"""The piece of sound that is being listened to, and what has been committed of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, exp
from typing import Any

import numpy as np
import torch

from speechattn.audio.hearing import Hearing
from speechattn.audio.resample import Samples
from speechattn.live.events import Word
from speechattn.live.listener import Decision, WindowModel
from speechattn.live.timing import token_spans
from speechattn.policy import Policy, Source
from speechattn.policy.align_att import focus
from speechattn.search import Draft
from speechattn.search.loops import loop_start

__all__ = ["Utterance"]

TOKENS_PER_S, TOKENS_AT_LEAST = 8, 10  # more than anybody says: a draft that needs more is a loop
FOCUS_SHARE = 0.25  # a token is said while its attention is above this share of its peak
LEAST_CUT_S = 1.0  # forgetting less is not worth it
FULL_SPARE_S = 2.0  # the newest sound of a full window may hold half a word
MARGIN_S = 0.1  # sound kept before the first word that is kept


@dataclass(frozen=True)
class Committed:
    """A committed word: its tokens, and the first encoder frame of the window that it looked at."""

    tokens: tuple[int, ...]
    frame: int


class Utterance:
    """A window of sound, re-encoded at every look, and the committed words that it still covers.

    `start` is the sample at which the window begins, `first` the tokens that were committed before it.
    """

    def __init__(
        self, model: WindowModel, policy: Policy, *, start: int, first: int, context: Sequence[int] = ()
    ) -> None:
        self.model, self.policy, self.start, self.first = model, policy, start, first
        self.context = list(context)
        self.heads = tuple(dict.fromkeys([*model.alignment_heads, *policy.heads]))
        self.state: Any = policy.initial()
        self.hearing = Hearing(model.front_end)
        self.size = 0  # samples
        self.words: list[Committed] = []
        self.tail: list[int] = []

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
        draft = self.model.draft(
            memory, self.tokens, guess=self.tail, context=self.context, heads=self.heads, frames=frames,
            max_tokens=TOKENS_AT_LEAST + ceil(TOKENS_PER_S * self.seconds), first=self.first,
        )  # fmt: skip
        safe, self.state = self.policy.accept(draft, Source(frames, self.model.frame_s, finished, paused), self.state)
        tokens = draft.tokens.tolist()
        loop = loop_start([*self.tokens, *tokens])
        sane = len(tokens) if loop is None else max(0, loop - len(self.tokens))
        sizes = self.model.tokenizer.words(tokens, spaceless=self.model.spaceless)
        if sizes and not (draft.ended or finished):
            sizes.pop()  # the draft was cut inside its last word
        spans = self._spans(draft) if tokens else []
        if full:
            end = frames - round(FULL_SPARE_S / self.model.frame_s)
            safe = max(safe, next((i for i, span in enumerate(spans) if span[1] > end), len(tokens)))
        words = self._words(draft, tokens, sizes, spans, min(safe, sane))
        done = sum(len(word.tokens) for word, _ in words)
        self.tail = tokens[done:sane]
        self.words += [word for word, _ in words]
        self.first += done
        if full:
            self._restart(spans[done - 1][1] if done else frames - round(FULL_SPARE_S / self.model.frame_s))
        decode = self.model.tokenizer.decode
        unstable = "" if finished else decode(self.tail)
        withheld = decode(tokens[done:]) if finished else decode(tokens[sane:]) if full else ""
        return Decision(tuple(word for _, word in words), unstable, withheld)

    def _words(
        self, draft: Draft, tokens: list[int], sizes: list[int], spans: list[tuple[int, int]], most: int
    ) -> list[tuple[Committed, Word]]:
        """The words that end within the first `most` tokens, with times and confidence."""
        whole = [n for i, n in enumerate(sizes) if sum(sizes[: i + 1]) <= most]
        words, at = [], 0
        for n in whole:
            text = self.model.tokenizer.decode(tokens[at : at + n])
            begin, end = spans[at][0], max(end for _, end in spans[at : at + n])
            confidence = exp(float(draft.log_probs[at : at + n].sum()))
            offset = self.start / self.model.sample_rate
            step = self.model.frame_s
            words.append((
                Committed(tuple(tokens[at : at + n]), begin),
                Word(text, offset + begin * step, offset + end * step, confidence),
            ))  # fmt: skip
            at += n
        return words

    def _spans(self, draft: Draft) -> list[tuple[int, int]]:
        """First and last-plus-one frame of each token of the draft, narrowed to where it really looked."""
        rows = [*self.tokens, *draft.tokens.tolist(), -1]  # the look behind the last token takes the silence there
        weights = torch.cat([draft.weights, draft.weights[:, -1:]], 1)
        every = replace(draft, tokens=torch.tensor(rows), weights=weights)
        where = focus(every, self.model.alignment_heads, drop_last=0, normalise=True, median=7).numpy()
        first = len(self.tokens)
        spans, where = token_spans(where)[first:-1], where[first:-1]
        narrowed = []
        for row, (begin, end) in zip(where, spans, strict=True):
            loud = np.flatnonzero(row[begin:end] >= FOCUS_SHARE * row[begin:end].max())
            narrowed.append((begin + int(loud[0]), begin + int(loud[-1]) + 1) if len(loud) else (begin, end))
        return narrowed

    def trim(self, history_words: int) -> list[int] | None:
        """Forget the oldest words and the sound before the ones that are kept (StreamAtt, arXiv 2406.06097).

        The last `history_words` stay, half of the committed words at the most. Returns the tokens that were
        forgotten, or None when nothing can be.
        """
        keep = min(history_words, len(self.words) // 2)
        if not keep:
            return None
        kept = self.words[-keep:]
        cut = min(word.frame for word in kept) - round(MARGIN_S / self.model.frame_s)
        if cut * self.model.frame_s < LEAST_CUT_S:
            return None
        forgotten = [token for word in self.words[:-keep] for token in word.tokens]
        self.words = [Committed(word.tokens, word.frame - cut) for word in kept]
        self._cut(cut)
        return forgotten

    def _restart(self, frame: int) -> None:
        """Forget all words, and the sound before `frame`; the state of the policy belongs to what was forgotten."""
        self.words, self.tail, self.state = [], [], self.policy.initial()
        self._cut(frame)

    def _cut(self, frames: int) -> None:
        """Forget the first `frames` of the sound."""
        step = round(self.model.frame_s * self.model.sample_rate)
        samples = min(frames, self.size // step) * step
        self.hearing.cut(samples)
        self.size, self.start = self.size - samples, self.start + samples
