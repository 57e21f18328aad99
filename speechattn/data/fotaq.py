"""Flight of the Amazon Queen: 2.6 hours of voice-acted English dialogue with its script, from a Debian package.

The game may be redistributed free of charge with its notice; see `data/fotaq/README.md`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile

from speechattn.audio.resample import Resampler, Samples, to_mono
from speechattn.data.prepare.debian import download, sha256, unpack
from speechattn.data.prepare.manifests import Utterance, manifest_path, prepared, write_manifests
from speechattn.data.prepare.sound import RATE, AudioFormat
from speechattn.errors import InputError

__all__ = ["RATE", "SPLITS", "Clip", "Game", "Line", "default_folder", "prepare", "read_split"]

PACKAGE = "flight-of-the-amazon-queen"
INSIDE = "usr/share/scummvm/flight-of-the-amazon-queen/queen.1c"
SHA256 = "cc91960d133fcd4173eda4bac304e80d2bbdbaa085640287ab9e0507bd603f67"

# By character, so that no voice is in two parts; everybody else, and the hero, is training data.
SPLITS = {"dev": ("LOU", "HENRY", "CHEF"), "test": ("TAM", "KLUNK", "FAYE", "ORACLE", "NAOMI")}


@dataclass(frozen=True)
class Clip:
    """One recorded line: `dialogue` is the game's file, `speaker` the character, `text` what the script says."""

    name: str
    dialogue: str
    speaker: str
    text: str

    @property
    def split(self) -> str:
        """train, dev or test."""
        return next((split for split, speakers in SPLITS.items() if self.speaker in speakers), "train")


class Game:
    """`queen.1c`: a table of files, dialogues among them, and one MP3 per spoken segment."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        if self.data[:10] != b"QTBLCEM10\0":
            raise InputError(f"{path}: not the English talkie of Flight of the Amazon Queen")
        (count,) = struct.unpack_from(">H", self.data, 13)
        self.files: dict[str, tuple[int, int]] = {}
        for at in range(15, 15 + 21 * count, 21):
            name, _, offset, size = struct.unpack_from(">12sBII", self.data, at)
            self.files[name.split(b"\0")[0].decode().strip()] = (offset, size)

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        offset, size = self.files[name]
        return self.data[offset : offset + size]

    def audio(self, clip: Clip) -> Samples:
        """Samples [n] at 16 kHz."""
        x, rate = soundfile.read(io.BytesIO(self.read(clip.name + ".SB")), dtype="float32")
        return Resampler(rate, RATE).feed(to_mono(x), last=True)

    def utterance(self, clip: Clip) -> Utterance:
        """A clip for the manifests."""
        name = f"{clip.dialogue}-{clip.name}"
        custom = {"dialogue": clip.dialogue}
        return Utterance(name, lambda: self.audio(clip), clip.text, clip.speaker, "en", custom=custom)

    def clips(self) -> Iterator[Clip]:
        """Every line of the dialogues that was recorded, in the order of the script, and only once."""
        seen: set[str] = set()
        for name in sorted(self.files):
            if not name.endswith(".DOG"):
                continue
            body, character = self.read(name)[20:], re.sub(r"\d*\.DOG$", "", name)
            levels, _, key, heroes, persons = struct.unpack_from(">5h", body)
            (offset,) = struct.unpack_from(">H", body, 22)
            for letter, speaker, at, count in (
                ("J", "JOE", 32 + 96 * levels, heroes),
                ("P", character, offset, persons),
            ):
                for line, text in strings(body, at, count):
                    for clip in self.segments(f"{key:02d}{line:04X}{letter}", name[:-4], speaker, text):
                        if clip.name not in seen:
                            seen.add(clip.name)
                            yield clip

    def segments(self, prefix: str, dialogue: str, speaker: str, text: str) -> Iterator[Clip]:
        """The recorded segments of one line of the script."""
        for number, words in enumerate(split_line(text), 1):
            name = f"{prefix}{number:X}"
            if words and f"{name}.SB" in self.files:
                yield Clip(name, dialogue, speaker, words)


def strings(body: bytes, at: int, count: int) -> Iterator[tuple[int, str]]:
    """Numbered strings of a dialogue: two bytes, a number, a length, the text, padding to four bytes."""
    start = at
    for _ in range(count):
        if at + 5 > len(body):
            return
        number, size = struct.unpack_from(">HB", body, at + 2)
        yield number, body[at + 5 : at + 5 + size].decode("latin1")
        at = start + -(-(at + 5 + size - start) // 4) * 4


def split_line(text: str) -> list[str]:
    """The segments of a line, one for each `*` command.

    A command is two letters or digits; XY carries eleven more for a position. A segment without words (a gesture)
    still counts: forgetting that shifts every later clip of the line to its neighbour's text.
    """
    parts, start = [], 0
    for command in re.finditer(r"\*(?:XY.{11}|..)", text):
        parts.append(text[start : command.start()])
        start = command.end()
    return [part.strip() for part in [*parts, text[start:]]]


def default_folder() -> Path:
    """Where prepared data is kept: below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speechattn" / "fotaq"


def prepare(
    folder: Path, splits: tuple[str, ...] = ("train", "dev", "test"), *, audio_format: AudioFormat = "flac"
) -> Path:
    """Fetch the package, check it, and write the splits that are not there yet; returns the folder.

    The manifests are those of `speechattn.data.prepare.manifests`, the licence lies beside them. InputError when the
    package cannot be fetched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {"audio_format": audio_format, "source": SHA256}
    missing = [split for split in splits if prepared(folder, "fotaq", split, options) is None]
    if not missing:
        return folder
    game = Game(fetch(folder))
    clips = list(game.clips())
    for split in missing:
        chosen = [clip for clip in clips if clip.split == split]
        utterances = (game.utterance(clip) for clip in chosen)
        write_manifests(
            folder, "fotaq", split, utterances, audio_format=audio_format, options=options, total=len(chosen)
        )
    return folder


def fetch(folder: Path) -> Path:
    """`queen.1c` in the folder, from the Debian package, which is fetched when it is not there."""
    target = folder / "queen.1c"
    if not target.is_file():
        work = folder / "package"
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir(parents=True, exist_ok=True)
        unpack(download(PACKAGE, work), work / "files")
        shutil.copy(work / "files/usr/share/doc" / PACKAGE / "copyright", folder / "LICENCE")
        (work / "files" / INSIDE).rename(target)
        shutil.rmtree(work)
    found = sha256(target)
    if found != SHA256:
        raise InputError(f"{target}: its SHA-256 is {found}, expected {SHA256}; remove it to fetch it again")
    return target


@dataclass(frozen=True)
class Line:
    """A clip as it was prepared: where it lies, who speaks, what is said."""

    name: str
    path: Path
    dialogue: str
    speaker: str
    text: str
    duration_s: float


def read_split(folder: Path, split: str) -> list[Line]:
    """The prepared lines of one split, in the order of the script."""
    with gzip.open(manifest_path(folder, "fotaq", "cuts", split), "rt", encoding="utf-8") as file:
        cuts = [json.loads(line) for line in file]
    return [
        Line(
            cut["id"], folder / cut["recording"]["sources"][0]["source"], said["custom"]["dialogue"], said["speaker"],
            said["text"], cut["duration"],
        )
        for cut in cuts
        for said in cut["supervisions"]
    ]  # fmt: skip
