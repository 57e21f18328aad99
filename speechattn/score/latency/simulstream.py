"""simulstream's log: one line of JSON for each chunk of sound, times in seconds; text can be taken back.

Its format (version 1.0.0): `{"id", "metadata": {"wav_name"}}` begins a recording, then for every chunk
`{"id", "total_audio_processed", "computation_time", "generated_tokens", "deleted_tokens"}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from speechattn.errors import InputError
from speechattn.score.latency.clocks import Clock, Queueing
from speechattn.score.latency.erasure import Erasure
from speechattn.score.latency.said import Said, Unit, blank_pieces

__all__ = ["Chunk", "Recording", "Tokens", "chunk_lines", "read_simulstream"]

Tokens = Literal["word", "char", "spm"]  # how tokens make a text: with blanks, without, or with the marks of pieces


@dataclass(frozen=True)
class Chunk:
    """One step: `arrival` and `compute` in ms, tokens that it added at the end after it took `deleted` ones away."""

    arrival: float
    compute: float
    generated: tuple[str, ...]
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recording:
    """All steps of a recording; `name` is its file without folder and ending."""

    name: str
    chunks: list[Chunk] = field(default_factory=list)

    def said(self, *, tokens: Tokens = "word", unit: Unit = "word", clock: Clock | None = None) -> Said:
        """The last text, each word with the time when it became what it is; characters count the blanks.

        InputError where a chunk deletes what is not at the end.
        """
        done = (clock or Queueing()).finish([c.arrival for c in self.chunks], [c.compute for c in self.chunks])
        so_far, units, times = list[str](), list[str](), list[tuple[float, float]]()
        for chunk, finished in zip(self.chunks, done, strict=True):
            if not chunk.generated and not chunk.deleted:
                continue
            kept = len(so_far) - len(chunk.deleted)
            if kept < 0 or tuple(so_far[kept:]) != chunk.deleted:
                raise InputError(f"{self.name}, {chunk.arrival / 1000:g} s: deleted tokens are not the last ones")
            for text in (so_far[:kept], [*so_far[:kept], *chunk.generated]):
                new = blank_pieces(joined(text, tokens), unit)
                same = min(len(units), len(new))  # words stay as they are, but for the last that both texts have
                same -= bool(same) and units[same - 1] != new[same - 1]
                units, times = new, times[:same] + [(chunk.arrival, finished)] * (len(new) - same)
            so_far = [*so_far[:kept], *chunk.generated]
        heard = self.chunks[-1].arrival if self.chunks else 0.0
        delays, elapsed = tuple(time for time, _ in times), tuple(time for _, time in times)
        return Said(tuple(units), delays, heard, elapsed, name=self.name, unit=unit)

    def erasure(self, *, tokens: Tokens = "word", unit: Unit = "word") -> Erasure:
        """Deleted words against those of the last text, as `simulstream_stats` counts: also what comes back at once."""
        deleted = sum(len(blank_pieces(joined(chunk.deleted, tokens), unit)) for chunk in self.chunks)
        return Erasure(deleted, len(self.said(tokens=tokens, unit=unit).units))


def joined(tokens: Sequence[str], how: Tokens) -> str:
    """The text of tokens."""
    text = (" " if how == "word" else "").join(tokens)
    return text.replace("\u2581", " ").strip() if how == "spm" else text


def read_simulstream(lines: Iterable[str], *, where: str = "log") -> list[Recording]:
    """The recordings of a log; InputError names the line that cannot be read."""
    names: dict[Any, str] = {}
    found: dict[str, Recording] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "metadata" in row:
                names[row["id"]] = Path(row["metadata"]["wav_name"]).stem
            elif "id" in row:
                name = names[row["id"]]
                found.setdefault(name, Recording(name)).chunks.append(chunk(row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{where}, line {number}: not a line of simulstream ({what})") from error
    return list(found.values())


def chunk(row: dict[str, Any]) -> Chunk:
    """One line of a chunk."""
    return Chunk(
        1000 * float(row["total_audio_processed"]),
        1000 * float(row["computation_time"]),
        tuple(row["generated_tokens"]),
        tuple(row["deleted_tokens"]),
    )


def chunk_lines(recording: Recording, index: int = 0) -> list[str]:
    """The lines of a log."""
    rows: list[dict[str, Any]] = [{"id": index, "metadata": {"wav_name": f"{recording.name}.wav"}}]
    for step in recording.chunks:
        rows.append({
            "id": index, "total_audio_processed": step.arrival / 1000, "computation_time": step.compute / 1000,
            "generated_tokens": list(step.generated), "deleted_tokens": list(step.deleted),
        })  # fmt: skip
    return [json.dumps(row, ensure_ascii=False) for row in rows]
