"""A log of any of the tools, recognised by what is in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from speechattn.errors import InputError
from speechattn.live.events import Event
from speechattn.score.latency.clocks import CLOCKS, retimed
from speechattn.score.latency.erasure import Erasure
from speechattn.score.latency.events import said_of, shown_erasure
from speechattn.score.latency.instances import read_instances
from speechattn.score.latency.said import PLAIN, SIMULEVAL, SIMULSTREAM, Counting, Said, Unit
from speechattn.score.latency.simulstream import Tokens, read_simulstream

__all__ = ["Kind", "Log", "kind_of", "read_events", "read_log", "referred"]

Kind = Literal["speechattn", "simuleval", "simulstream"]
MARKS: dict[str, Kind] = {
    "committed": "speechattn", "prediction": "simuleval", "metadata": "simulstream",
    "total_audio_processed": "simulstream", "model_loading_time": "simulstream",
}  # fmt: skip
OWN = {"speechattn": "queueing", "simuleval": "simuleval", "simulstream": "simulstream"}  # clocks
COUNTING = {"speechattn": PLAIN, "simuleval": SIMULEVAL, "simulstream": SIMULSTREAM}


@dataclass(frozen=True)
class Log:
    """What was said, by which clock computing is counted, and what was taken back where the log shows it."""

    kind: Kind
    said: list[Said]
    clock: str
    erasure: Erasure | None
    counting: Counting


def kind_of(lines: Sequence[str], where: str) -> Kind:
    """Whose log it is; InputError when nobody's."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}, line {number}: not an event ({error})") from error
        if isinstance(row, dict):
            for key, kind in MARKS.items():
                if key in row:
                    return kind
        raise InputError(
            f"{where}, line {number}: not an event, nor a line of an instances.log or of a log of simulstream"
        )
    raise InputError(f"{where}: no words to measure")


def read_log(
    lines: Sequence[str], *, where: str, unit: Unit = "word", tokens: Tokens = "word", clock: str | None = None
) -> Log:
    """All utterances of a log; InputError names the line that cannot be read.

    Without `clock` (a key of `CLOCKS`) computing is counted as the tool of the log does.
    """
    kind = kind_of(lines, where)
    clock = clock or OWN[kind]
    gone: Erasure | None = None
    if kind == "simulstream":
        recordings = read_simulstream(lines, where=where)
        said = [recording.said(tokens=tokens, unit=unit, clock=CLOCKS[clock]) for recording in recordings]
        gone = sum((recording.erasure(tokens=tokens, unit=unit) for recording in recordings), Erasure())
    elif kind == "simuleval":
        said = read_instances(lines, where=where, unit=unit)
    else:
        events = read_events(lines, where)
        said, gone = [said_of(events, unit=unit, name=where)], shown_erasure(events, unit=unit)
    if kind != "simulstream" and clock != OWN[kind]:
        said = [retimed(one, CLOCKS[OWN[kind]], CLOCKS[clock]) for one in said]
    if not any(one.units for one in said):
        raise InputError(f"{where}: no words to measure")
    return Log(kind, said, clock, gone, COUNTING[kind])


def read_events(lines: Sequence[str], where: str) -> list[Event]:
    """An event log; InputError names the line that is none."""
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(Event.from_json(line))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{where}, line {number}: not an event ({error})") from error
    return events


def referred(log: Log, references: Sequence[str], where: str) -> Log:
    """With a line of reference for each utterance; an event log is one, and so are all lines then. Else InputError."""
    if log.kind == "speechattn":
        references = [" ".join(references)]
    if len(references) != len(log.said):
        raise InputError(f"{where} has {len(references)} lines for {len(log.said)} utterances: they must pair up")
    said = [
        one.against(line, log.counting.count(line, one.unit)) for one, line in zip(log.said, references, strict=True)
    ]
    return replace(log, said=said)
