"""A talk and its sentences: the times and references of each, and what was said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from speechattn.errors import InputError
from speechattn.score.latency.said import PLAIN, Counting, Said
from speechattn.score.latency.segmenter import Segmenter

__all__ = ["Sentence", "by_talk", "read_sentences", "resegmented"]


@dataclass(frozen=True)
class Sentence:
    """`offset` and `length` in ms of the recording `talk` (a file name without its folder and its ending)."""

    talk: str
    offset: float
    length: float
    reference: str


def read_sentences(segments: str | Path, references: Sequence[str]) -> list[Sentence]:
    """A YAML or JSON list of {wav, offset, duration} in seconds, and a line of reference for each; else InputError."""
    try:
        text = Path(segments).read_text(encoding="utf-8-sig")
        rows = json.loads(text) if str(segments).endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{segments}: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{segments}: not a list of segments ({' '.join(str(error).split())})") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{segments}: wanted a list of {{wav, offset, duration}}")
    if len(rows) != len(references):
        raise InputError(
            f"{segments}: {len(rows)} segments for {len(references)} lines of reference: they must pair up"
        )
    where = [f"{segments}, segment {k}" for k in range(1, len(rows) + 1)]
    return [sentence(*given) for given in zip(rows, references, where, strict=True)]


def sentence(row: Any, reference: str, where: str) -> Sentence:
    """One row of the list."""
    try:
        found = Sentence(Path(row["wav"]).stem, 1000 * float(row["offset"]), 1000 * float(row["duration"]), reference)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: wanted wav, offset and duration in seconds ({error!r})") from error
    if not (found.offset >= 0 and 0 < found.length < float("inf")):
        raise InputError(f"{where}: offset {found.offset / 1000:g} s, duration {found.length / 1000:g} s")
    return found


def by_talk(talks: Sequence[Said], sentences: Sequence[Sentence]) -> list[tuple[Said, list[Sentence]]]:
    """What was said of each talk, with its sentences; InputError names a talk that one of them lacks.

    Talks are told apart by the stem of their names; where there is only one on both sides, names do not matter.
    """
    names = list(dict.fromkeys(sentence.talk for sentence in sentences))
    said = {Path(talk.name).stem: talk for talk in talks}
    if len(said) != len(talks):
        raise InputError(f"{len(talks)} talks of {len(said)} names: each talk must have one log")
    if len(names) == len(talks) == 1:
        return [(talks[0], list(sentences))]
    for missing in [*(name for name in names if name not in said), *(name for name in said if name not in names)]:
        raise InputError(f"talk {missing}: not in {'the log' if missing in names else 'the segments'}")
    return [(said[name], [sentence for sentence in sentences if sentence.talk == name]) for name in names]


def resegmented(
    talk: Said, sentences: Sequence[Sentence], segmenter: Segmenter, *, counting: Counting = PLAIN
) -> list[Said]:
    """One `Said` for every sentence, with the words that belong to it, and its times from the sentence's beginning.

    `to_end` is the way to the end of the talk's last sentence.
    """
    where = segmenter(talk.units, [counting.split(sentence.reference, talk.unit) for sentence in sentences])
    end = max(sentence.offset + sentence.length for sentence in sentences)
    found = []
    for s, sentence in enumerate(sentences):
        mine = [j for j, owner in enumerate(where) if owner == s]
        found.append(replace(
            talk,
            units=tuple(talk.units[j] for j in mine),
            delays=tuple(talk.delays[j] - sentence.offset for j in mine),
            elapsed=tuple(talk.elapsed[j] - sentence.offset for j in mine) if talk.elapsed else (),
            source_length=sentence.length,
            reference=sentence.reference,
            reference_length=counting.count(sentence.reference, talk.unit),
            to_end=end - sentence.offset,
        ))  # fmt: skip
    return found
