"""Flight of the Amazon Queen: 2.6 hours of voice-acted English dialogue with its script, from a Debian package.

The game may be redistributed free of charge with its notice; see `data/fotaq/README.md`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile

from speechattn.audio.resample import Resampler, Samples, to_mono
from speechattn.errors import InputError

__all__ = ["SPLITS", "Clip", "Game", "Line", "default_folder", "prepare", "read_split"]

PACKAGE = "flight-of-the-amazon-queen"
INSIDE = "usr/share/scummvm/flight-of-the-amazon-queen/queen.1c"
SHA256 = "cc91960d133fcd4173eda4bac304e80d2bbdbaa085640287ab9e0507bd603f67"
RATE = 16000

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
            for name in (f"{prefix}{number:X}", f"*{prefix}{number:X}"):
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


def prepare(folder: Path, splits: tuple[str, ...] = ("train", "dev", "test")) -> Path:
    """Fetch the package, check it, and write the splits that are not there yet; returns the folder.

    Each split gets 16 kHz WAV files and lhotse-compatible `fotaq_recordings_SPLIT.jsonl` and
    `fotaq_supervisions_SPLIT.jsonl`; the licence lies beside them. InputError when the package cannot be fetched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [split for split in splits if not (folder / f"fotaq_supervisions_{split}.jsonl").is_file()]
    if not missing:
        return folder
    game = Game(fetch(folder))
    clips = list(game.clips())
    for split in missing:
        write_split(folder, split, game, [clip for clip in clips if clip.split == split])
    return folder


def fetch(folder: Path) -> Path:
    """`queen.1c` in the folder, from the Debian package; its own apt state, so neither root nor an update is needed."""
    target = folder / "queen.1c"
    if not target.is_file():
        work = folder / "package"
        for part in ("state/lists/partial", "cache/archives/partial", "files"):
            (work / part).mkdir(parents=True, exist_ok=True)
        options = [
            f"Dir::State={work / 'state'}",
            f"Dir::Cache={work / 'cache'}",
            "APT::Sandbox::User=",
            "Debug::NoLocking=1",
        ]
        apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
        run([*apt, "update"], work)
        run([*apt, "download", PACKAGE], work)
        (package,) = work.glob(f"{PACKAGE}_*.deb")
        run(["dpkg-deb", "-x", str(package), "files"], work)
        shutil.copy(work / "files/usr/share/doc" / PACKAGE / "copyright", folder / "LICENCE")
        (work / "files" / INSIDE).rename(target)
        shutil.rmtree(work)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != SHA256:
        raise InputError(f"{target}: its SHA-256 is {found}, expected {SHA256}; remove it to fetch it again")
    return target


def run(command: list[str], folder: Path) -> None:
    """Run a program of the package system; InputError with its own words when it fails."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError as error:
        raise InputError(
            f"{command[0]} is not installed: the recordings come as a package of Debian or Ubuntu"
        ) from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise InputError(f"the package {PACKAGE} cannot be fetched: {said[-1] if said else error}") from error


def write_split(folder: Path, split: str, game: Game, clips: list[Clip]) -> None:
    """The WAV files and the two manifests of one split; the manifests come last, so a broken run starts again."""
    (folder / split).mkdir(exist_ok=True)
    recordings, supervisions = [], []
    for clip in clips:
        x, name = game.audio(clip), f"{clip.dialogue}-{clip.name.lstrip('*')}"
        path = (folder / split / f"{name}.wav").resolve()
        soundfile.write(path, x, RATE, subtype="PCM_16")
        seconds = len(x) / RATE
        source = {"type": "file", "channels": [0], "source": str(path)}
        recordings.append({
            "id": name, "sources": [source], "sampling_rate": RATE, "num_samples": len(x), "duration": seconds,
            "channel_ids": [0],
        })  # fmt: skip
        supervisions.append({
            "id": name, "recording_id": name, "start": 0.0, "duration": seconds, "channel": 0, "text": clip.text,
            "language": "English", "speaker": clip.speaker, "custom": {"dialogue": clip.dialogue},
        })  # fmt: skip
    for kind, rows in (("recordings", recordings), ("supervisions", supervisions)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"fotaq_{kind}_{split}.jsonl").write_text(lines, encoding="utf-8")


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
    rows = [
        [json.loads(line) for line in (folder / f"fotaq_{kind}_{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for kind in ("recordings", "supervisions")
    ]
    return [
        Line(s["id"], Path(r["sources"][0]["source"]), s["custom"]["dialogue"], s["speaker"], s["text"], s["duration"])
        for r, s in zip(*rows, strict=True)
    ]
