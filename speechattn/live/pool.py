"""Many streams of sound, one model, one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from speechattn.errors import InputError
from speechattn.live.endings import StreamSettings
from speechattn.live.events import Event
from speechattn.live.listener import StreamModel
from speechattn.live.session import Session
from speechattn.live.streaming import Streaming, listen
from speechattn.live.terms import Terms
from speechattn.search import Search
from speechattn.search.phrases import Hits

__all__ = ["Pool"]

BACKLOG_S = 60.0  # of sound that may wait in a slot


class Pool:
    """`slots` sessions that share a model: `feed` queues sound, `step` takes one block of each that has one.

    Laws: each session's events are those of a `Session` alone, whoever else is there; nobody waits for another one's
    sound, and nobody gets a second block before all others that are ready had one.
    """

    def __init__(
        self, model: StreamModel, slots: int, *, search: Search | None = None, settings: StreamSettings | None = None,
        trace: bool = False, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        if slots < 1:
            raise InputError(f"a pool of {slots} slots: at least 1")
        if settings is not None and not isinstance(settings, StreamSettings):
            raise InputError(f"{type(settings).__name__}: the settings of a pool are StreamSettings")
        if not isinstance(model, StreamModel):
            raise InputError(
                "a pool needs a model that streams; one that reads windows listens in a Session of its own"
            )
        self.model, self.slots, self.settings, self.trace, self.clock = model, slots, settings, trace, clock
        self.search = search or model.search()
        self.sessions: dict[int, Session] = {}
        self.opened = 0

    def open(
        self, *, phrases: Sequence[str] = (), terms: Terms | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> int:  # fmt: skip
        """A slot for a new stream: its number, never used again. InputError when all are taken.

        `phrases` are preferred in this stream; `prefer` gives it others. So are `terms`, where they are retrieved.
        """
        if len(self.sessions) == self.slots:
            raise InputError(f"all {self.slots} slots are taken; close one first")
        session = Session(
            self.model, settings=self.settings, search=self.search, terms=terms, trace=self.trace,
            on_event=on_event, clock=self.clock,
        )  # fmt: skip
        if phrases:
            session.prefer(phrases)
        self.opened += 1
        self.sessions[self.opened] = session
        return self.opened

    def feed(self, slot: int, samples: object, rate: int, lips: object = None) -> None:
        """More sound for a slot, and pictures, as `Session.feed` takes them. InputError when too much waits already."""
        session = self._session(slot)
        one = self._listener(session)
        if len(one.waiting) > BACKLOG_S * self.model.sample_rate:
            raise InputError(f"slot {slot}: more than {BACKLOG_S:g} s of sound wait; step the pool, or feed slower")
        one.add(session.sensed(samples, rate, lips))

    def prefer(self, slot: int, phrases: Sequence[str]) -> None:
        """As `Session.prefer`."""
        self._session(slot).prefer(phrases)

    def hits(self, slot: int) -> list[Hits]:
        """As `Session.hits`."""
        return self._session(slot).hits()

    def close(self, slot: int) -> None:
        """No more sound for a slot: the next steps say what remains, and free it."""
        session = self._session(slot)
        one = self._listener(session)
        if not session.closed:
            one.add(session.rest())
            one.end()

    def step(self) -> dict[int, list[Event]]:
        """One block of each slot that has one, as one batch -> the events of each slot that has some.

        A slot that was closed and has nothing left is free after this.
        """
        began, sessions = self.clock(), dict(self.sessions)
        ready = {slot: session for slot, session in self.sessions.items() if self._listener(session).ready}
        decisions = listen([self._listener(session) for session in ready.values()]) if ready else []
        events: dict[int, list[Event]] = {}
        for (slot, session), said in zip(ready.items(), decisions, strict=True):
            took = self.clock() - began
            for i, decision in enumerate(said or [None]):
                events.setdefault(slot, []).extend(session.tell(decision, 0.0 if i else took))
        for slot, session in list(self.sessions.items()):
            if session.closed and not self._listener(session).ready:
                began = self.clock()
                decision = self._listener(session).last()
                events.setdefault(slot, []).extend(session.tell(decision, self.clock() - began))
                del self.sessions[slot]
        try:
            self._announce(sessions, events)
        finally:
            for slot in sessions.keys() - self.sessions.keys():
                sessions[slot].close()
        return {slot: said for slot, said in events.items() if said}

    def _announce(self, sessions: dict[int, Session], events: dict[int, list[Event]]) -> None:
        """Tell those who listen; an error of one of them is raised when all the others know."""
        errors: list[Exception] = []
        for slot, said in events.items():
            try:
                sessions[slot].announce(said)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    @property
    def busy(self) -> bool:
        """A step has something to do."""
        return any(session.closed or self._listener(session).ready for session in self.sessions.values())

    def _session(self, slot: int) -> Session:
        if slot not in self.sessions:
            raise InputError(f"slot {slot} is not open")
        return self.sessions[slot]

    def _listener(self, session: Session) -> Streaming:
        assert isinstance(session.listener, Streaming)
        return session.listener
