"""One stream of sound, listened to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
from torch import nn

from speechattn.attention.attend import BACKENDS
from speechattn.attention.self_attention import set_backend, unable
from speechattn.audio.clip import EVERY
from speechattn.audio.resample import Resampler, Samples, to_mono
from speechattn.audio.vad import VoiceActivity
from speechattn.errors import InputError
from speechattn.live.endings import StreamSettings
from speechattn.live.events import Event, Word
from speechattn.live.listener import Decision, Listener, StreamModel, WindowModel
from speechattn.live.preferred import NO_TERMS, Preferred
from speechattn.live.streaming import Streaming
from speechattn.live.terms import Terms, TermUse
from speechattn.live.windowed import Settings, Windowed
from speechattn.policy import Policy
from speechattn.search import Search
from speechattn.search.phrases import Hits
from speechattn.terms.text import Term

__all__ = ["Session", "listener"]


def listener(
    model: StreamModel | WindowModel, *, policy: Policy | None = None,
    settings: Settings | StreamSettings | None = None, vad: VoiceActivity | None = None, search: Search | None = None,
    terms: Terms | None = None, trace: bool = False,
) -> Listener:  # fmt: skip
    """Who listens with this kind of model; InputError for what the kind cannot honour.

    A model that could stream but for its encoder's span (see `set_span`) listens in windows, if it can.
    """
    if isinstance(model, StreamModel) and model.listening.plan().block is None:
        model = model.windowed() or model
    if isinstance(model, StreamModel):
        if vad is not None:
            raise InputError("this model hears by itself where nobody speaks: it takes no voice detection")
        if isinstance(settings, Settings):
            raise InputError("this model reads no windows: its settings are StreamSettings")
        return Streaming(model, policy=policy, settings=settings, search=search, terms=terms, trace=trace)
    if search is not None or isinstance(settings, StreamSettings):
        raise InputError("this model reads windows of sound: it takes Settings, and no search of a stream")
    return Windowed(model, policy=policy, settings=settings, vad=vad, terms=terms, trace=trace)


def choose_backend(model: StreamModel | WindowModel, name: str) -> None:
    """All attention in the model, encoder and decoder, computes by this backend.

    InputError for an unknown one and for one that the model cannot run with; then nothing is changed.
    """
    whole = nn.ModuleList(modules(model))
    if name != "auto" and name in BACKENDS and (reason := unable(whole, name)):
        raise InputError(f"this model cannot run with the backend {name}: {reason}")
    try:
        set_backend(whole, name)
    except ValueError as error:
        raise InputError(str(error).replace(type(whole).__name__, "this model")) from error


def modules(model: StreamModel | WindowModel) -> list[nn.Module]:
    """All that the model computes with."""
    if isinstance(model, nn.Module):
        return [model]
    held = [part for part in vars(model).values() if isinstance(part, nn.Module)]
    return [model.listening, *held] if isinstance(model, StreamModel) else held


class Session:
    """Feed sound, and pictures of lips to a model that sees them; get events.

    Laws: committed text only grows; the events do not depend on how the sound was cut into pieces, nor the pictures
    that are there in time; memory and the time of a step are bounded, however long the stream is; `finish` commits
    everything that is not a loop.

    What else is given (`policy`, `settings`, `vad`, `search`, `terms`) goes to the `listener` that the model needs.
    With `trace` every step that has a draft is an event, and says why it committed no more; the text is the same. With
    `backend` all attention in the model computes by it from now on, for this session and for all others that share the
    model (see `set_backend`); InputError for one that cannot.
    `on_event` is called with every event. As a context manager a session finishes when the block ends without an
    error; `async for event in session` yields events, while another task feeds, until the session is finished.
    """

    def __init__(
        self, model: StreamModel | WindowModel, *, policy: Policy | None = None,
        settings: Settings | StreamSettings | None = None, vad: VoiceActivity | None = None,
        search: Search | None = None, terms: Terms | None = None, backend: str | None = None, trace: bool = False,
        on_event: Callable[[Event], None] | None = None, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        if backend is not None:
            choose_backend(model, backend)
        self.model = model
        self.listener = listener(
            model, policy=policy, settings=settings, vad=vad, search=search, terms=terms, trace=trace
        )  # fmt: skip
        self.on_event, self.clock, self.began = on_event, clock, clock()
        self.resampler: Resampler | None = None
        self.ready_s = 0.0  # when the last step would have ended at speaking speed
        self.closed, self.fresh = False, True  # fresh: the next word begins an utterance
        self.listeners: list[asyncio.Queue[Event | None]] = []

    @property
    def audio_s(self) -> float:
        """Seconds of sound that were heard."""
        return self.listener.heard / self.model.sample_rate

    @property
    def late(self) -> int:
        """Pictures that came when the sound of their time had been heard, so that nobody saw them."""
        lips = self.listener.lips if isinstance(self.listener, Streaming) else None
        return 0 if lips is None else lips.late

    def feed(self, samples: object, rate: int, lips: object = None) -> list[Event]:
        """`samples` [n] or [n, channels] at `rate` Hz, float or integer, of any length -> what they led to.

        A model that sees lips may be given the next pictures [m, size, size], bytes, 25 a second, before their sound or
        with it; without sound (`samples` None) they last as long as they are. InputError for samples or pictures that
        are none, for pictures that the model cannot see, for another rate than before, and after `finish`.
        """
        return self._drive(self.listener.hear(self.sensed(samples, rate, lips)))

    def sensed(self, samples: object, rate: int, lips: object) -> Samples:
        """Samples as the model wants them, NaN where there are none; the listener has the pictures."""
        if self.closed:
            raise InputError("this session is finished; start another one")
        if lips is not None and not isinstance(self.listener, Streaming):
            raise InputError("this model reads windows of sound: pictures are for one that streams")
        sound = None if samples is None else self.mono(samples, rate)  # both are looked at before either is taken
        if lips is not None:
            assert isinstance(self.listener, Streaming)
            self.listener.see(lips)
        if sound is not None and self.resampler is not None:
            return self.resampler.feed(sound)
        if lips is None:
            raise InputError("neither samples nor pictures: wanted one of them")
        rest, self.resampler = self.held(), None
        return np.concatenate([rest, np.full(EVERY * len(np.asarray(lips)), np.nan, np.float32)])

    def finish(self) -> list[Event]:
        """No more sound: commit everything that remains. A second call does nothing."""
        if self.closed:
            return []
        try:
            events = self._drive(self.listener.hear(self.rest()))
            return events + self._drive(self.listener.finish())
        finally:
            self.close()

    def mono(self, samples: object, rate: int) -> Samples:
        """Samples [n] that the resampler takes; InputError for what is none, and for another rate than before."""
        found = to_mono(samples)
        if self.resampler is None:
            self.resampler = Resampler(rate, self.model.sample_rate)
        elif rate != self.resampler.rate:
            raise InputError(f"sample rate {rate} Hz after {self.resampler.rate} Hz in the same session")
        return found

    def rest(self) -> Samples:
        """What the resampler still holds; no more sound may come."""
        self.closed = True
        return self.held()

    def held(self) -> Samples:
        """What the resampler still holds; it is spent."""
        nothing = np.zeros(0, np.float32)
        return nothing if self.resampler is None else self.resampler.feed(nothing, last=True)

    def prefer(self, phrases: Sequence[str]) -> None:
        """From now on these phrases are preferred, and no others. InputError for a model or a search that cannot."""
        if self.closed:
            raise InputError("this session is finished; start another one")
        assert isinstance(self.listener, Streaming | Windowed)
        self.listener.prefer(phrases)

    def hits(self) -> list[Hits]:
        """Where each phrase was said since it was asked for: pairs of seconds, none for one that was not."""
        preferred = self._preferred()
        return [] if preferred is None else preferred.hits()

    def terms(self) -> list[TermUse] | None:
        """What became of each term that was retrieved in an utterance that is over; None where there are no terms."""
        preferred = self._preferred()
        return None if preferred is None else preferred.uses()

    def add_terms(self, terms: Sequence[Term]) -> None:
        """From now on these terms may be retrieved, too. InputError for one that is there or that cannot be spelled."""
        self._terms().add_terms(terms)

    def remove_terms(self, sources: Sequence[str]) -> None:
        """From now on these are not retrieved. InputError for one that is not there."""
        self._terms().remove_terms(sources)

    def _preferred(self) -> Preferred | None:
        assert isinstance(self.listener, Streaming | Windowed)
        return self.listener.preferred

    def _terms(self) -> Preferred:
        preferred = self._preferred()
        if preferred is None:
            raise InputError(NO_TERMS)
        return preferred

    def close(self) -> None:
        """Nothing will follow for those who wait for events."""
        preferred = self._preferred()
        if preferred is not None:
            preferred.forget()
        for queue in self.listeners:
            queue.put_nowait(None)

    def _drive(self, decisions: Iterator[Decision | None]) -> list[Event]:
        """Let the listener work; account for its time piece by piece."""
        events, began = list[Event](), self.clock()
        for decision in decisions:
            new = self.tell(decision, self.clock() - began)
            events += new
            self.announce(new)
            began = self.clock()
        return events

    def tell(self, decision: Decision | None, took_s: float) -> list[Event]:
        """The events of a decision that took so long; none when there is nothing to say.

        The time is accounted for as if sound came at speaking speed and steps queued.
        """
        self.ready_s = max(self.ready_s, self.audio_s) + took_s
        if decision is None:
            return []
        words = self._apart(decision.words)
        self.fresh = self.fresh or decision.final
        text = "".join(word.text for word in words)
        events = []
        if text or decision.unstable or decision.final or decision.trace:
            said = Event(
                "text", text, decision.unstable, words, self.audio_s, decision.final, trace=decision.trace,
                terms=decision.terms,
            )  # fmt: skip
            events.append(said)
        if decision.withheld:
            events.append(Event("withheld", "", "", (), self.audio_s, withheld=decision.withheld))
        wall_s = self.clock() - self.began
        return [replace(event, emitted_s=self.ready_s, wall_s=wall_s) for event in events]

    def announce(self, events: Sequence[Event]) -> None:
        """Tell those who listen for events."""
        for event in events:
            if self.on_event:
                self.on_event(event)
            for queue in self.listeners:
                queue.put_nowait(event)

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
        else:
            self.close()

    async def __aiter__(self) -> AsyncIterator[Event]:
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self.listeners.append(queue)
        if self.closed:
            queue.put_nowait(None)
        while (event := await queue.get()) is not None:
            yield event
