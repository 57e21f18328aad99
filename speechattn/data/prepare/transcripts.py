"""Who says what in which file: tables (TSV), JSON lines and Kaldi data folders, as people have them.

- TSV: with a header that names a sound and a text column (Common Voice's are understood), or two columns without one.
- JSONL: an object per line with the same names (NeMo's manifests are understood).
- Kaldi: a folder with `wav.scp` and `text`, and if there are any `segments` and `utt2spk`.

Names of columns and keys: sound `audio path file audio_filepath audio_path wav`, text `text sentence transcript
transcription`, and where known `id speaker language translation translation_language split start duration end`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from speechattn.errors import InputError

__all__ = ["Entry", "read_lines", "read_transcripts"]

NAMES = {
    "audio": ("audio", "path", "file", "audio_filepath", "audio_path", "wav"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "id": ("id", "utt_id", "utterance_id"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "language": ("language", "lang", "locale"),
    "translation": ("translation",),
    "translation_language": ("translation_language",),
    "split": ("split",),
    "start": ("start", "offset"),
    "duration": ("duration",),
    "end": ("end",),
}
TO_ITS_END = -1.0  # what Kaldi says for the end of a recording


@dataclass(frozen=True)
class Entry:
    """One utterance as a transcript file has it: `audio` is a path as written there, `fault` why it cannot be used."""

    id: str
    audio: str
    text: str
    speaker: str | None = None
    language: str | None = None
    translation: str | None = None
    translation_language: str | None = None
    split: str | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    fault: str | None = None


def read_transcripts(path: Path) -> list[Entry]:
    """The utterances of a file or a Kaldi folder, in its order; InputError where it is none of the known forms."""
    try:
        if path.is_dir() or path.name in ("wav.scp", "text"):
            entries = list(read_kaldi(path if path.is_dir() else path.parent))
        elif path.suffix in (".jsonl", ".json"):
            entries = list(read_jsonl(path))
        else:
            entries = list(read_tsv(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if not entries:
        raise InputError(f"{path}: no utterances in it")
    return entries


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; other line ends of Unicode may stand inside of them. InputError when it is none."""
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def read_tsv(path: Path) -> Iterator[Entry]:
    """Rows of a table; the first is a header if it names a sound and a text column."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    header = rows[0] if rows else []
    if not (columns := known(header)):
        header = ["audio", "text"]
        columns = known(header)
    elif not {"audio", "text"} <= columns.keys():
        raise InputError(f"{path}, line 1: the header has no column for sound or text; it has {', '.join(header)}")
    else:
        rows = rows[1:]
    first = 1
    for number, row in enumerate(rows, first):
        if len(row) < 2:
            if any(row):
                raise InputError(f"{path}, line {number}: wanted columns separated by tabs")
            continue
        values = dict(zip(header, row, strict=False))
        yield entry({name: values.get(column) for name, column in columns.items()}, number)


def known(columns: list[str]) -> dict[str, str]:
    """Our name -> the name of the column in the file."""
    there = {column.strip().lower(): column for column in reversed(columns)}
    return {name: there[found] for name, others in NAMES.items() if (found := next(filter(there.get, others), None))}


def read_jsonl(path: Path) -> Iterator[Entry]:
    """Objects, one per line."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        columns = known(list(row)) if isinstance(row, dict) else {}
        if not {"audio", "text"} <= columns.keys():
            raise InputError(f"{path}, line {number}: wanted an object with audio and text")
        yield entry({name: row[column] for name, column in columns.items()}, number)


def entry(row: Mapping[str, object], number: int) -> Entry:
    """A row under our names; times that are no numbers become its fault. Without an id, it is named after its sound."""
    said = {name: None if value in (None, "") else str(value) for name, value in row.items()}
    audio, fault = said.get("audio") or "", None
    try:
        start = float(said.get("start") or 0)
        end, length = said.get("end"), said.get("duration")
        duration = float(end) - start if end else float(length) if length else None
    except ValueError as error:
        start, duration, fault = 0.0, None, str(error)
    part = f"-{start:.2f}" if said.get("start") else ""
    own = f"{Path(audio).with_suffix('').as_posix().strip('/')}{part}" if Path(audio).name else f"line-{number}"
    return Entry(
        said.get("id") or own, audio, said.get("text") or "", said.get("speaker"), said.get("language"),
        said.get("translation"), said.get("translation_language"), said.get("split"), start, duration, fault,
    )  # fmt: skip


def read_kaldi(folder: Path) -> Iterator[Entry]:
    """The lines of `text`; commands in `wav.scp` (`... |`) are not run, and such recordings are at fault."""
    recordings, texts = read_pairs(folder / "wav.scp"), read_pairs(folder / "text")
    speakers = read_pairs(folder / "utt2spk") if (folder / "utt2spk").is_file() else {}
    segments = read_pairs(folder / "segments") if (folder / "segments").is_file() else {}
    for name, text in texts.items():
        recording, start, duration, fault = name, 0.0, None, None
        if segments:
            fields = segments.get(name, "").split()
            try:
                recording, start = fields[0], float(fields[1])
                duration = None if float(fields[2]) == TO_ITS_END else float(fields[2]) - start
            except (IndexError, ValueError):
                fault = "segments has no `RECORDING START END` for it"
        audio = recordings.get(recording, "")
        if not audio:
            fault = fault or f"wav.scp has no recording {recording}"
        elif audio.endswith("|"):
            fault = "wav.scp names a command, not a file"
        yield Entry(name, audio, text, speakers.get(name), start_s=start, duration_s=duration, fault=fault)


def read_pairs(path: Path) -> dict[str, str]:
    """A Kaldi table: the first word of each line, and the rest."""
    pairs = {}
    for line in filter(str.strip, read_lines(path)):
        name, *rest = line.split(maxsplit=1)
        pairs[name] = "".join(rest).strip()
    return pairs
