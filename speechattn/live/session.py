"""One stream of sound, listened to."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np

from speechattn.audio.resample import Resampler, Samples, to_mono
from speechattn.audio.vad import FRAME, Endpointer, SileroVAD, VoiceActivity
from speechattn.errors import InputError
from speechattn.live.events import Event, Word
from speechattn.live.utterance import Decision, Utterance
from speechattn.model import Model
from speechattn.policy import Policy
from speechattn.policy.align_att import AlignAtt

__all__ = ["FRAME_THRESHOLD", "Session", "Settings"]

FRAME_THRESHOLD = 20  # frames of 20 ms: with looks at pauses, as accurate as the 25 of the preset and faster
SPARE_S = 1.5  # of the longest input: silence behind the speech, and the sound since the last look


@dataclass(frozen=True)
class Settings:
    """How a session listens; times in seconds.

    It looks at the sound every `min_chunk_s`, `pause_s` after speech stops (then the next `min_chunk_s` begins), and at
    the end of an utterance, which is `silence_s` without speech; `threshold` is the probability at which speech
    begins, and `preroll_s` of sound before it is listened to as well. A window longer than `max_window_s` loses its
    oldest words but for `history_words`; `context_tokens` of text that left the window stay as a prompt.
    """

    min_chunk_s: float = 1.0
    pause_s: float = 0.25
    silence_s: float = 0.5
    threshold: float = 0.5
    preroll_s: float = 0.3
    max_window_s: float = 12.0
    history_words: int = 10
    context_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least in (("min_chunk_s", 0.032), ("silence_s", 0.032), ("max_window_s", 2.0)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}: at least {least} s are needed")


class Session:
    """Feed sound, get events.

    Laws: committed text only grows; the events do not depend on how the sound was cut into pieces; memory and the
    time of a step are bounded, however long the stream is; `finish` commits everything that is not a loop.

    `on_event` is called with every event. As a context manager a session finishes when the block ends without an
    error; `async for event in session` yields events, while another task feeds, until the session is finished.
    """

    def __init__(
        self, model: Model, *, policy: Policy | None = None, settings: Settings | None = None,
        vad: VoiceActivity | None = None, on_event: Callable[[Event], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.model = model
        self.policy: Policy = policy or AlignAtt.whisper(model.alignment_heads, FRAME_THRESHOLD)
        self.settings = settings or Settings()
        self.limit_s = model.max_s - SPARE_S
        if self.settings.max_window_s > self.limit_s:
            raise InputError(f"max_window_s is {self.settings.max_window_s}: at most {self.limit_s:g} s fit this model")
        self.endpointer = Endpointer(
            vad or SileroVAD(), threshold=self.settings.threshold, silence_s=self.settings.silence_s
        )
        self.on_event, self.clock, self.began = on_event, clock, clock()
        self.resampler: Resampler | None = None
        self.rest: Samples = np.zeros(0, np.float32)  # less than one frame
        self.preroll: deque[Samples] = deque(maxlen=round(self.settings.preroll_s * model.sample_rate / FRAME) or 1)
        self.utterance: Utterance | None = None
        self.heard = 0  # samples at the model's rate
        self.next_look = self._samples(self.settings.min_chunk_s)
        self.tokens = 0  # committed so far
        self.context: list[int] = []
        self.ready_s = 0.0  # when the last step would have ended at speaking speed
        self.closed, self.fresh = False, True  # fresh: the next word begins an utterance
        self.listeners: list[asyncio.Queue[Event | None]] = []

    def _samples(self, seconds: float) -> int:
        return round(seconds * self.model.sample_rate)

    @property
    def audio_s(self) -> float:
        """Seconds of sound that were heard."""
        return self.heard / self.model.sample_rate

    def feed(self, samples: object, rate: int) -> list[Event]:
        """`samples` [n] or [n, channels] at `rate` Hz, float or integer, of any length -> what they led to.

        InputError for samples that are none, for another rate than before, and after `finish`.
        """
        if self.closed:
            raise InputError("this session is finished; start another one")
        if self.resampler is None:
            self.resampler = Resampler(rate, self.model.sample_rate)
        elif rate != self.resampler.rate:
            raise InputError(f"sample rate {rate} Hz after {self.resampler.rate} Hz in the same session")
        return self._hear(self.resampler.feed(to_mono(samples)))

    def finish(self) -> list[Event]:
        """No more sound: commit everything that remains. A second call does nothing."""
        if self.closed:
            return []
        events = [] if self.resampler is None else self._hear(self.resampler.feed(self.rest[:0], last=True))
        self.closed = True
        began = self.clock()
        if len(self.rest) and self.utterance:
            self.utterance.add(self.rest)
        self.heard += len(self.rest)
        if self.utterance:
            events += self._say(self._look(finished=True), began, final=True)
        for queue in self.listeners:
            queue.put_nowait(None)
        return events

    def _hear(self, samples: Samples) -> list[Event]:
        """Cut the sound into frames of 32 ms, counted since the stream began, and take them one by one."""
        self.rest = np.concatenate([self.rest, samples])
        events: list[Event] = []
        whole = len(self.rest) // FRAME * FRAME
        for at in range(0, whole, FRAME):
            events += self._frame(self.rest[at : at + FRAME])
        self.rest = self.rest[whole:].copy()
        return events

    def _frame(self, frame: Samples) -> list[Event]:
        """Speech may begin, go on or end with this frame; a look at the sound may be due."""
        began = self.clock()
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
                return []
            start = self.heard - sum(map(len, self.preroll))
            self.utterance = Utterance(self.model, self.policy, start=start, first=self.tokens, context=self.context)
            for piece in self.preroll:
                self.utterance.add(piece)
            self.preroll.clear()
        else:
            self.utterance.add(frame)
        if not speaking or due:
            return self._say(self._look(finished=not speaking, paused=pausing), began, final=not speaking)
        self._spend(began)
        return []

    def _look(self, *, finished: bool, paused: bool = False) -> Decision:
        """Decide, then forget what the window no longer needs."""
        utterance = self.utterance
        assert utterance is not None
        decision = utterance.decide(finished=finished, paused=paused)
        if not finished and utterance.seconds > self.settings.max_window_s:
            forgotten = utterance.trim(self.settings.history_words)
            if forgotten is not None:
                self._remember(forgotten)
            elif utterance.seconds >= self.limit_s:
                self._remember(utterance.tokens)
                more = utterance.decide(finished=False, full=True)
                decision = Decision(decision.words + more.words, more.unstable, more.withheld)
        self.tokens = utterance.first
        if finished:
            self._remember(utterance.tokens)
            self.utterance = None
        return decision

    def _remember(self, tokens: list[int]) -> None:
        """Text that left the window, as far as the prompt is long."""
        if self.settings.context_tokens:
            self.context = [*self.context, *tokens][-self.settings.context_tokens :]

    def _spend(self, began: float) -> None:
        """Account for the time since `began`, as if sound came at speaking speed and steps queued."""
        self.ready_s = max(self.ready_s, self.audio_s) + self.clock() - began

    def _say(self, decision: Decision, began: float, *, final: bool) -> list[Event]:
        """The events of a decision; none when there is nothing to say."""
        self._spend(began)
        words = self._apart(decision.words)
        self.fresh = self.fresh or final
        text = "".join(word.text for word in words)
        events = []
        if text or decision.unstable or final:
            events.append(Event("text", text, decision.unstable, words, self.audio_s, final=final))
        if decision.withheld:
            events.append(Event("withheld", "", "", (), self.audio_s, withheld=decision.withheld))
        wall_s = self.clock() - self.began
        events = [replace(event, emitted_s=self.ready_s, wall_s=wall_s) for event in events]
        for event in events:
            if self.on_event:
                self.on_event(event)
            for queue in self.listeners:
                queue.put_nowait(event)
        return events

    def _apart(self, words: tuple[Word, ...]) -> tuple[Word, ...]:
        """The first word of an utterance brings a space, so that the joined text keeps words apart."""
        fresh, self.fresh = self.fresh and bool(words), self.fresh and not words
        if not fresh or self.model.spaceless or words[0].text.startswith(" "):
            return words
        return (replace(words[0], text=" " + words[0].text), *words[1:])

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()

    async def __aiter__(self) -> AsyncIterator[Event]:
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self.listeners.append(queue)
        if self.closed:
            queue.put_nowait(None)
        while (event := await queue.get()) is not None:
            yield event
