"""Manifests: what a prepared corpus is on disk, and the one function that writes it.

The contract. A corpus NAME with a part SPLIT (train, dev, test, ...) is a folder with

- `NAME_cuts_SPLIT.jsonl.gz`: what training and evaluation read; one cut for each utterance, in corpus order;
- `NAME_recordings_SPLIT.jsonl.gz` and `NAME_supervisions_SPLIT.jsonl.gz`: the same in lhotse's two other forms;
- `NAME_skipped_SPLIT.tsv`: utterances that were left out, `id<TAB>reason`, with a header line; no others are missing;
- `NAME_prepared_SPLIT.json`: the options that made it and what came out (`utterances`, `hours`, `skipped`). It is
  written last: a part without it, or with other options, is not prepared, and preparing starts again.

All three manifests are lhotse's JSON lines. A cut is a `MonoCut` whose id is the utterance's, with exactly one
supervision over all of it (same id, start 0, same duration) and its recording inside. A supervision has

- `text`: what is said, as the corpus has it (normalising is the business of training and scoring); it is empty only
  where nobody speaks, and then `custom.sound` says what is heard;
- `speaker`: an id; voices that the corpus does not tell apart share one;
- `language`: the code of what is spoken (`en`, `pt_BR`);
- `custom.translation` and `custom.translation_language`, for speech translation;
- `custom.synthetic`: the engine, where no human speaks;
- other strings or numbers of the corpus in `custom`.

Every sound is 16 kHz mono. Files of a corpus that are so already are used where they lie (a cut may be a part of a long
recording); all others are written once, below `FOLDER/NAME_SPLIT/`, as FLAC (16 bits), WAV (16 bits) or Ogg Opus. Paths
are absolute here; readers also take paths relative to the manifest's folder.

The manifests are plain JSON written by hand, because FOTAQ is also prepared by `speechattn demo`, where lhotse need not
be installed; the tests read every one of them with lhotse and validate it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

import numpy as np
import soundfile
from tqdm import tqdm

from speechattn.audio.resample import Samples, to_mono
from speechattn.data.prepare.sound import RATE, AudioFormat, Placed, atomic, in_place, part, whole, write_sound
from speechattn.errors import InputError

__all__ = ["Skipped", "Utterance", "Written", "manifest_path", "prepared", "write_manifests"]

Row: TypeAlias = dict[str, object]

SHORTEST_S = 0.1
LONGEST = 200  # bytes of a file's name without its ending; file systems take 255
FASTEST = 40  # characters per second; fast speech in Latin letters has 20 to 25


@dataclass(frozen=True)
class Utterance:
    """One thing said. `sound` is a file, of which `start_s` and `duration_s` (None: to its end) are the part, or a
    function that gives samples [N] at 16 kHz when they are needed."""

    id: str
    sound: Path | Callable[[], Samples]
    text: str
    speaker: str
    language: str
    translation: str | None = None
    translation_language: str | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    custom: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """An utterance that is left out, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Written:
    """A prepared part: how many utterances and hours are in it, and how many were left out."""

    utterances: int
    hours: float
    skipped: int


def manifest_path(folder: Path, name: str, kind: str, split: str) -> Path:
    """Where a manifest lies: `kind` is cuts, recordings, supervisions, skipped or prepared."""
    ending = {"skipped": "tsv", "prepared": "json"}.get(kind, "jsonl.gz")
    return folder / f"{name}_{kind}_{split}.{ending}"


def prepared(folder: Path, name: str, split: str, options: Mapping[str, object] | None = None) -> Written | None:
    """What was prepared with these options (None: with any), where it is still there; else None: it has to be done."""
    try:
        said = json.loads(manifest_path(folder, name, "prepared", split).read_text(encoding="utf-8"))
        with gzip.open(manifest_path(folder, name, "cuts", split), "rt", encoding="utf-8") as cuts:
            first = json.loads(cuts.readline())
        there = (folder / first["recording"]["sources"][0]["source"]).is_file()
        same = options is None or said["options"] == json.loads(json.dumps(options))
        return Written(said["utterances"], said["hours"], said["skipped"]) if there and same else None
    except (OSError, ValueError, LookupError, TypeError, EOFError, zlib.error):  # whatever has become of it
        return None


def write_manifests(
    folder: Path, name: str, split: str, utterances: Iterable[Utterance | Skipped], *,
    audio_format: AudioFormat = "flac", options: Mapping[str, object] | None = None, total: int | None = None,
) -> Written:  # fmt: skip
    """One part of a corpus, as the contract above says; `total` is for the progress bar only.

    An utterance that cannot be used is left out and listed. InputError where nothing is left. A run that is killed
    leaves nothing that counts as prepared, and no half of a file.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    done = manifest_path(folder, name, "prepared", split)
    done.unlink(missing_ok=True)
    writer = Writer(folder / f"{name}_{split}", audio_format)
    for utterance in tqdm(utterances, total=total, desc=f"{name} {split}", unit=" utterances", disable=None):
        writer.add(utterance)
    write_skipped(manifest_path(folder, name, "skipped", split), writer.skipped)
    if not writer.cuts:
        why = writer.skipped[0].reason if writer.skipped else "the corpus names none"
        raise InputError(f"{name} {split}: no utterance can be used ({len(writer.skipped)} left out; the first: {why})")
    write_rows(manifest_path(folder, name, "recordings", split), writer.recordings.values())
    write_rows(manifest_path(folder, name, "supervisions", split), writer.supervisions)
    write_rows(manifest_path(folder, name, "cuts", split), writer.cuts)
    written = Written(len(writer.cuts), round(writer.seconds / 3600, 4), len(writer.skipped))
    with atomic(done) as file:
        file.write((json.dumps({"options": dict(options or {}), **asdict(written)}, indent=1) + "\n").encode())
    return written


class Writer:
    """Rows of the manifests of one part, utterance by utterance; sounds that must be written go to `folder`."""

    def __init__(self, folder: Path, audio_format: AudioFormat) -> None:
        self.folder, self.audio_format = folder, audio_format
        self.ids: set[str] = set()
        self.files: dict[str, str] = {}
        self.recordings: dict[str, Row] = {}
        self.supervisions: list[Row] = []
        self.cuts: list[Row] = []
        self.skipped: list[Skipped] = []
        self.seconds = 0.0

    def add(self, utterance: Utterance | Skipped) -> None:
        """Check an utterance, write its sound if need be, and its rows; or list it as left out."""
        if isinstance(utterance, Skipped):
            self.skipped.append(utterance)
            return
        try:
            if utterance.id in self.ids:
                raise InputError("an earlier utterance has the same id")
            if not utterance.text.strip() and "sound" not in utterance.custom:
                raise InputError("no text")
            if utterance.translation is not None and not utterance.translation.strip():
                raise InputError("no translation")
            sound = find_sound(utterance)
        except (InputError, soundfile.SoundFileError) as error:
            self.skipped.append(Skipped(utterance.id, str(error)))
            return
        self.ids.add(utterance.id)
        # Outside: that nothing can be written is no fault of the utterance.
        self.add_rows(utterance, sound if isinstance(sound, Placed) else self.write(utterance.id, sound))

    def write(self, name: str, samples: Samples) -> Placed:
        """A new file."""
        path = self.folder / f"{file_name(name)}.{self.audio_format}"
        write_sound(path, samples, self.audio_format)
        return Placed(path, len(samples), 0, len(samples))

    def add_rows(self, utterance: Utterance, placed: Placed) -> None:
        """The supervision and the cut of an utterance."""
        custom: dict[str, object] = dict(utterance.custom)
        if utterance.translation is not None:
            custom["translation"] = utterance.translation.strip()
        if utterance.translation_language is not None:
            custom["translation_language"] = utterance.translation_language
        recording = self.recording(placed, utterance.id if placed.length == placed.frames else placed.path.stem)
        start, duration = placed.start / RATE, placed.length / RATE
        supervision = {
            "id": utterance.id, "recording_id": recording["id"], "start": start, "duration": duration, "channel": 0,
            "text": utterance.text.strip(), "language": utterance.language, "speaker": utterance.speaker,
            "custom": custom,
        }  # fmt: skip
        self.supervisions.append(supervision)
        self.cuts.append({
            "id": utterance.id, "start": start, "duration": duration, "channel": 0,
            "supervisions": [{**supervision, "start": 0.0}], "recording": recording, "type": "MonoCut",
        })  # fmt: skip
        self.seconds += duration

    def recording(self, placed: Placed, name: str) -> Row:
        """The recording of a file, one for all its utterances; a name that another file has gets a number."""
        source, at, free = str(placed.path), 1, name
        if source in self.files:
            return self.recordings[self.files[source]]
        while free in self.recordings:
            at += 1
            free = f"{name}-{at}"
        self.files[source] = free
        self.recordings[free] = {
            "id": free, "sources": [{"type": "file", "channels": [0], "source": source}], "sampling_rate": RATE,
            "num_samples": placed.frames, "duration": placed.frames / RATE, "channel_ids": [0],
        }  # fmt: skip
        return self.recordings[free]


def file_name(name: str) -> str:
    """An id as the name of a file on any system; of one that is too long the beginning and a checksum."""
    plain = quote(name, safe=" ")
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 21]}-{sha256(name.encode()).hexdigest()[:20]}"


def find_sound(utterance: Utterance) -> Placed | Samples:
    """Where the sound lies if it is 16 kHz mono, else samples [N] to be written; InputError for what is no speech."""
    if isinstance(utterance.sound, Path):
        placed = in_place(utterance.sound, utterance.start_s, utterance.duration_s)
        if placed is not None:
            check_pace(utterance.text, placed.length / RATE)
            return placed
        samples = part(whole(utterance.sound), utterance.start_s, utterance.duration_s)
    else:
        samples = to_mono(utterance.sound())
    check_pace(utterance.text, len(samples) / RATE)
    if not np.any(samples):
        raise InputError("silence: every sample is zero")
    return samples


def check_pace(text: str, seconds: float) -> None:
    """InputError where the sound cannot hold the text."""
    if seconds < SHORTEST_S:
        raise InputError(f"{seconds:.3f} s of sound: too short for speech")
    if len(text.strip()) > FASTEST * seconds + 1:
        raise InputError(f"{len(text.strip())} characters in {seconds:.2f} s: nobody speaks so fast")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines, compressed; the same rows give the same bytes."""
    with atomic(path) as file, gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
        for row in rows:
            packed.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> None:
    """A table of what was left out, one line each."""
    with atomic(path) as file:
        file.write(b"id\treason\n")
        for one in skipped:
            file.write("\t".join(" ".join(words.split()) for words in (one.id, one.reason)).encode() + b"\n")
