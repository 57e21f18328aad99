"""The event log of this library: what was committed when, and what had been shown before."""

from __future__ import annotations

from collections.abc import Sequence

from speechattn.live.events import Event
from speechattn.score.latency.erasure import Erasure, erasure
from speechattn.score.latency.said import Said, Unit, units_of
from speechattn.score.latency.simulstream import Chunk, Recording

__all__ = ["recording_of", "said_of", "shown_erasure"]


def said_of(events: Sequence[Event], *, unit: Unit = "word", name: str = "") -> Said:
    """The committed text: a word was said when its last letter was. `elapsed` is of the clock `Queueing`."""
    letters = [(letter, 1000 * event.audio_s, 1000 * event.emitted_s) for event in events for letter in event.committed]
    units, times, begun = list[str](), list[tuple[float, float]](), False
    for letter, delay, done in letters:
        if letter.isspace():
            begun = False
        elif begun and unit == "word":
            units[-1], times[-1] = units[-1] + letter, (delay, done)
        else:
            units.append(letter)
            times.append((delay, done))
            begun = True
    return Said(
        tuple(units), tuple(delay for delay, _ in times), 1000 * max((event.audio_s for event in events), default=0.0),
        tuple(done for _, done in times), name=name, unit=unit,
    )  # fmt: skip


def shown_erasure(events: Sequence[Event], *, unit: Unit = "word") -> Erasure:
    """Of what stood on the screen: committed text and the unstable rest behind it."""
    committed, shown = "", list[list[str]]()
    for event in events:
        committed += event.committed
        shown.append(units_of(committed + event.unstable, unit))
    return erasure(shown)


def recording_of(events: Sequence[Event], name: str) -> Recording:
    """The log as simulstream writes one, with what was committed; tokens are pieces (`spm`), a blank is U+2581.

    Events say when a step was done, not how long it took: the time since the later of its sound and the step before.
    """
    chunks, last = list[Chunk](), 0.0
    for event in events:
        arrival, done = 1000 * event.audio_s, 1000 * event.emitted_s
        tokens = (event.committed.replace(" ", "\u2581"),) if event.committed else ()
        chunks.append(Chunk(arrival, max(0.0, done - max(last, arrival)), tokens))
        last = max(last, done)
    return Recording(name, chunks)
