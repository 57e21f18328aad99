"""Transcripts as files: txt, srt, vtt, json, tsv."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from speechattn.live.events import Event, Word

__all__ = ["FORMATS", "Segment", "segments"]

LONGEST_S, LONGEST_CHARACTERS = 7.0, 84  # of a subtitle


@dataclass(frozen=True)
class Segment:
    """Words that are shown together; times in seconds."""

    start: float
    end: float
    text: str
    words: tuple[Word, ...]


def segments(events: Iterable[Event]) -> list[Segment]:
    """Cut committed words at ends of utterances and sentences, and where a subtitle would be too long."""
    done: list[Segment] = []
    line: list[Word] = []

    def close() -> None:
        if line:
            text, start = "".join(word.text for word in line).strip(), min(word.start for word in line)
            start = max(start, done[-1].start) if done else start  # words of a translation may look back
            done.append(Segment(start, max(start, *(word.end for word in line)), text, tuple(line)))
            line.clear()

    for event in events:
        for word in event.words:
            long = line and (
                word.end - min(one.start for one in line) > LONGEST_S
                or sum(len(w.text) for w in line) + len(word.text) > LONGEST_CHARACTERS
            )
            if long and word.text.startswith(" "):
                close()
            line.append(word)
            if word.text.rstrip().endswith((".", "?", "!", "\u3002", "\uff1f", "\uff01")):
                close()
        if event.final:
            close()
    close()
    return done


def clock(seconds: float, separator: str) -> str:
    """HH:MM:SS and milliseconds."""
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{separator}{rest % 1000:03d}"


def srt(parts: Sequence[Segment]) -> str:
    """SubRip."""
    return "\n".join(
        f"{i}\n{clock(part.start, ',')} --> {clock(part.end, ',')}\n{part.text}\n" for i, part in enumerate(parts, 1)
    )


def vtt(parts: Sequence[Segment]) -> str:
    """WebVTT."""
    return "WEBVTT\n\n" + "\n".join(
        f"{clock(part.start, '.')} --> {clock(part.end, '.')}\n{part.text}\n" for part in parts
    )


def txt(parts: Sequence[Segment]) -> str:
    """One line a segment."""
    return "".join(f"{part.text}\n" for part in parts)


def tsv(parts: Sequence[Segment]) -> str:
    """Start and end in milliseconds, text; as openai-whisper writes it."""
    rows = (f"{round(1000 * p.start)}\t{round(1000 * p.end)}\t{p.text.replace(chr(9), ' ')}\n" for p in parts)
    return "start\tend\ttext\n" + "".join(rows)


def as_json(parts: Sequence[Segment]) -> str:
    """Text, and segments with their words."""
    said = {"text": " ".join(part.text for part in parts), "segments": [asdict(part) for part in parts]}
    return json.dumps(said, ensure_ascii=False, indent=1) + "\n"


FORMATS: dict[str, Callable[[Sequence[Segment]], str]] = {
    "txt": txt,
    "srt": srt,
    "vtt": vtt,
    "json": as_json,
    "tsv": tsv,
}
