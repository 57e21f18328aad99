"""Listening with a model that reads a window of sound again at every look."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from speechattn.audio.resample import Samples
from speechattn.audio.vad import FRAME, Endpointer, SileroVAD, VoiceActivity
from speechattn.errors import InputError
from speechattn.live.endings import at_least
from speechattn.live.listener import Decision, WindowModel
from speechattn.live.preferred import Preferred
from speechattn.live.terms import Terms
from speechattn.live.utterance import Utterance
from speechattn.policy import Policy
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.stream_att import TextHistory

__all__ = ["Settings", "Windowed"]

SPARE_S = 1.5  # of the longest input: silence behind the speech, and the sound since the last look


@dataclass(frozen=True)
class Settings:
    """How a session listens in windows; times in seconds.

    It looks at the sound every `min_chunk_s`, `pause_s` after speech stops (then the next `min_chunk_s` begins), and at
    the end of an utterance, which is `silence_s` without speech; `threshold` is the probability at which speech
    begins, and `preroll_s` of sound before it is listened to as well. A window longer than `max_window_s` loses its
    oldest words but for `history_words`; `context_tokens` of text that left the window stay as a prompt. With a
    `history` words are forgotten behind every look, and the sound before what the others look at (StreamAtt, arXiv
    2406.06097). Each token of a preferred phrase or term is worth `bonus`, a log-probability; `prompted` they are
    worth nothing, but stand in the prompt, as far as they fit.
    """

    min_chunk_s: float = 1.0
    pause_s: float = 0.25
    silence_s: float = 0.5
    threshold: float = 0.5
    preroll_s: float = 0.3
    max_window_s: float = 12.0
    history_words: int = 10
    context_tokens: int = 0
    history: TextHistory | None = None
    bonus: float = 4.0
    prompted: bool = False

    def __post_init__(self) -> None:
        at_least(self, min_chunk_s=0.032, silence_s=0.032, max_window_s=2.0)


class Windowed:
    """A `Listener`: voice detection opens and closes utterances, a policy commits inside them."""

    def __init__(
        self, model: WindowModel, *, policy: Policy | None = None, settings: Settings | None = None,
        vad: VoiceActivity | None = None, terms: Terms | None = None, trace: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.trace = model, trace
        self.policy: Policy = policy or model.policy()
        self.settings = settings or Settings()
        self.preferred = None if terms is None else self._preferred(terms)
        self.reader = reader(self.policy, model)
        self.limit_s = model.max_s - SPARE_S
        if self.settings.max_window_s > self.limit_s:
            raise InputError(f"max_window_s is {self.settings.max_window_s}: at most {self.limit_s:g} s fit this model")
        self.endpointer = Endpointer(
            vad or SileroVAD(), threshold=self.settings.threshold, silence_s=self.settings.silence_s
        )
        self.rest: Samples = np.zeros(0, np.float32)  # less than one frame
        self.preroll: deque[Samples] = deque(maxlen=round(self.settings.preroll_s * model.sample_rate / FRAME) or 1)
        self.utterance: Utterance | None = None
        self.heard = 0
        self.next_look = self._samples(self.settings.min_chunk_s)
        self.tokens = 0  # committed so far
        self.context: list[int] = []

    def prefer(self, phrases: Sequence[str]) -> None:
        """From now on these phrases are preferred, and no others. InputError for what cannot be spelled, or a decoder
        that cannot take anything back.
        """
        preferred = self.preferred or self._preferred(None)
        preferred.drop(preferred.prefer(phrases))
        self.preferred = preferred
        if self.utterance is not None:
            self.utterance.preferred = preferred

    def _preferred(self, terms: Terms | None) -> Preferred:
        book = self.model.phrases(self.settings.bonus)
        if book is None:
            raise InputError("this model prefers no phrases: what its decoder said cannot be taken back")
        return Preferred(
            book, self.model.tokenizer, spaceless=self.model.spaceless, terms=terms,
            translates=self.model.translates,
        )  # fmt: skip

    def _samples(self, seconds: float) -> int:
        return round(seconds * self.model.sample_rate)

    def hear(self, samples: Samples) -> Iterator[Decision | None]:
        """Cut the sound into frames of 32 ms, counted since the stream began, and take them one by one."""
        self.rest = np.concatenate([self.rest, samples])
        while len(self.rest) >= FRAME:
            frame, self.rest = self.rest[:FRAME], self.rest[FRAME:]
            yield self._frame(frame)
        self.rest = self.rest.copy()

    def finish(self) -> Iterator[Decision | None]:
        """Commit everything that remains."""
        if len(self.rest) and self.utterance:
            self.utterance.add(self.rest)
        self.heard += len(self.rest)
        self.rest = self.rest[:0]
        if self.utterance:
            yield self._look(finished=True)

    def _frame(self, frame: Samples) -> Decision | None:
        """Speech may begin, go on or end with this frame; a look at the sound may be due."""
        self.heard += len(frame)
        speaking = self.endpointer.feed(frame)
        pausing = self.endpointer.quiet == max(1, self._samples(self.settings.pause_s) // FRAME)
        full = self.utterance is not None and self.utterance.seconds >= self.limit_s
        due = self.heard >= self.next_look or pausing or full
        if due:
            self.next_look = self.heard + self._samples(self.settings.min_chunk_s)
        if self.utterance is None:
            self.preroll.append(frame)
            if not speaking:
                return None
            start = self.heard - sum(map(len, self.preroll))
            self.utterance = Utterance(
                self.model, self.policy, start=start, first=self.tokens, context=self.context, trace=self.trace,
                preferred=self.preferred, prompted=self.settings.prompted,
            )  # fmt: skip
            for piece in self.preroll:
                self.utterance.add(piece)
            self.preroll.clear()
        else:
            self.utterance.add(frame)
        return self._look(finished=not speaking, paused=pausing) if not speaking or due else None

    def _look(self, *, finished: bool, paused: bool = False) -> Decision:
        """Decide, then forget what the window no longer needs."""
        utterance = self.utterance
        assert utterance is not None
        decision = utterance.decide(finished=finished, paused=paused)
        if self.settings.history is not None and not finished:
            self._remember(utterance.remember(self.settings.history, self.reader))
        if not finished and utterance.seconds > self.settings.max_window_s:
            forgotten = utterance.trim(self.settings.history_words)
            if forgotten is not None:
                self._remember(forgotten)
            elif utterance.seconds >= self.limit_s:
                before = utterance.tokens
                more = utterance.decide(finished=False, full=True)
                self._remember(before)
                decision = replace(more, words=decision.words + more.words, terms=decision.terms + more.terms)
        self.tokens = utterance.first
        if finished:
            self._remember(utterance.tokens)
            self.utterance = None
            if self.preferred is not None:
                self.preferred.anew()
        return replace(decision, final=finished)

    def _remember(self, tokens: list[int]) -> None:
        """Text that left the window, as far as the prompt is long."""
        if self.settings.context_tokens:
            self.context = [*self.context, *tokens][-self.settings.context_tokens :]
        if self.utterance is not None:
            self.utterance.context = self.context


def reader(policy: Policy, model: WindowModel) -> AlignAtt:
    """How attention is read: as the policy does, or as the model's own."""
    found = policy if isinstance(policy, AlignAtt) else model.policy()
    return found if isinstance(found, AlignAtt) else AlignAtt(model.alignment_heads)
