"""A manifest of cuts in little memory, and the sound of one cut."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechattn.audio.clip import EVERY
from speechattn.audio.resample import Resampler, Samples, to_mono
from speechattn.audio.vision import RATE, Image, Stretch, read_video
from speechattn.data.shar import fill, read_shar
from speechattn.errors import InputError

__all__ = ["Manifest", "Utterance", "load_lips", "load_sound", "utterance"]


@dataclass(frozen=True)
class Utterance:
    """What a manifest says about one cut; `cut` is lhotse's, `video` shows its recording and begins with it."""

    id: str
    text: str
    translation: str | None
    duration_s: float
    cut: Any
    video: Path | None = None


@dataclass(frozen=True)
class Manifest:
    """Cuts as the lines of their files: one block of bytes, which worker processes share and never copy.

    Row i lies at `starts[i]` to `starts[i + 1]` of `lines`; `folder_of[i]` is the number of its folder, which paths of
    recordings are relative to. `filmed`: one of them has a video.
    """

    lines: NDArray[np.uint8]
    starts: NDArray[np.int64]
    durations_s: NDArray[np.float64]
    folder_of: NDArray[np.int32]
    folders: tuple[Path, ...]
    filmed: bool = False

    def __len__(self) -> int:
        return len(self.durations_s)

    def row(self, i: int) -> Any:
        """Row i as it was written."""
        return json.loads(bytes(self.lines[self.starts[i] : self.starts[i + 1]]))

    def __getitem__(self, i: int) -> Utterance:
        """InputError for a row of which lhotse makes no cut."""
        try:
            return utterance(self.row(i), self.folders[self.folder_of[i]])
        except Exception as error:  # whatever lhotse's constructors say to what they do not know
            raise InputError(f"not a cut of lhotse ({error})") from error

    def select(self, rows: NDArray[np.int64]) -> Manifest:
        """The same lines, fewer or repeated rows."""
        pieces = [self.lines[self.starts[i] : self.starts[i + 1]] for i in rows]
        return Manifest(
            np.concatenate([np.zeros(0, np.uint8), *pieces]), np.cumsum([0, *map(len, pieces)]),
            self.durations_s[rows], self.folder_of[rows], self.folders, self.filmed,
        )  # fmt: skip

    @classmethod
    def read(cls, paths: Sequence[Path], repeats: Sequence[int] | None = None) -> Manifest:
        """Cuts files of lhotse (`.jsonl` or `.jsonl.gz`) or folders of Lhotse Shar, each `repeats` times.

        InputError for a file that is missing or none, and for an id that is there twice (repeats get `#2`, `#3`, ...).
        """
        lines: list[bytes] = []
        durations: list[float] = []
        folder_of: list[int] = []
        seen: set[str] = set()
        filmed = False
        for number, path in enumerate(paths):
            times = (repeats or [1] * len(paths))[number]
            for line, row, seconds in read_cuts(path):
                name = row["id"]
                if name in seen:
                    raise InputError(f"{path}: the cut {name} is there twice; ids must differ over all manifests")
                seen.add(name)
                filmed = filmed or shown(row)
                lines += [line, *(json.dumps({**row, "id": f"{name}#{n}"}).encode() for n in range(2, times + 1))][
                    :times
                ]
                durations += [seconds] * times
                folder_of += [number] * times
        return cls(
            np.frombuffer(b"".join(lines), np.uint8), np.cumsum([0, *map(len, lines)]), np.array(durations, np.float64),
            np.array(folder_of, np.int32), tuple(path.parent.resolve() for path in paths), filmed,
        )  # fmt: skip


def read_rows(path: Path) -> Iterable[tuple[bytes, Any]]:
    """Each line of a cuts manifest, as it is and parsed."""
    from lhotse.serialization import decode_json_line, open_best

    if not path.is_file():
        raise InputError(f"{path}: no such manifest; `speechattn prepare` makes one")
    with open_best(path, "rb") as file:
        for line in file:
            yield line, decode_json_line(line)


def read_cuts(path: Path) -> Iterable[tuple[bytes, dict[str, Any], float]]:
    """Each cut of a manifest or of a folder of Lhotse Shar, in bytes and parsed, and its seconds.

    InputError names the line that is no cut. A cut has one supervision, unless it is mixed of several; others are left
    out, with a warning.
    """
    odd: list[str] = []
    try:
        for number, (line, row) in enumerate(read_shar(path) if path.is_dir() else read_rows(path), 1):
            if not isinstance(row, dict) or not isinstance(row.get("id"), str) or "type" not in row:
                raise InputError(f"{path}, line {number}: not a cut of lhotse")
            if "tracks" in row or len(row.get("supervisions") or ()) == 1:
                yield line, row, row_seconds(row)
            else:
                odd.append(row["id"])
    except (OSError, EOFError, ValueError, TypeError, LookupError, zlib.error) as error:
        raise InputError(f"{path}: not a manifest that can be read ({error})") from error
    if odd:
        warnings.warn(f"{path}: {len(odd)} cuts have no supervision or several and are left out: {', '.join(odd[:5])}"
                      f"{', ...' if len(odd) > 5 else ''}", stacklevel=2)  # fmt: skip


def shown(row: dict[str, Any]) -> bool:
    """Whether a cut has a video."""
    cuts = [track.get("cut") or {} for track in row["tracks"]] if "tracks" in row else [row]
    return any("video" in (said.get("custom") or {}) for cut in cuts for said in cut.get("supervisions") or ())


def row_seconds(row: dict[str, Any]) -> float:
    """How long a cut is."""
    if "duration" in row:
        return float(row["duration"])
    from lhotse.serialization import deserialize_item

    return float(deserialize_item(json.loads(json.dumps(row))).duration)  # it takes its argument apart


def utterance(row: dict[str, Any], folder: Path) -> Utterance:
    """A row of a manifest; relative paths in it begin at `folder`."""
    from lhotse.serialization import deserialize_item

    return of_cut(deserialize_item(row), folder)


def of_cut(cut: Any, folder: Path | None = None) -> Utterance:
    """A cut of lhotse; with several supervisions (mixed cuts), what is said is that of all in order."""
    if folder is not None:
        cut = cut.with_recording_path_prefix(folder)
    said = sorted(cut.supervisions, key=lambda supervision: supervision.start)
    translations = [(supervision.custom or {}).get("translation") for supervision in said]
    videos = [supervision.custom["video"] for supervision in said if "video" in (supervision.custom or {})]
    return Utterance(
        id=cut.id,
        text=" ".join(supervision.text or "" for supervision in said),
        translation=" ".join(map(str, translations)) if translations and None not in translations else None,
        duration_s=float(cut.duration),
        cut=cut,
        video=(folder or Path()) / str(videos[0]) if videos else None,
    )


def load_sound(utterance: Utterance, rate: int) -> Samples:
    """Samples [N] at `rate`, mono. InputError when they cannot be had."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of libraries that are tried in vain; the error says enough
            fill(utterance.cut)
            x = to_mono(np.asarray(utterance.cut.load_audio()).T)
    except InputError:
        raise
    except Exception as error:  # lhotse tries several libraries, and each has errors of its own
        lines = (str(error).strip() or type(error).__name__).splitlines()
        said = [line.rpartition(">: ")[2] for line in lines if line.startswith("Exception #")] or lines
        raise InputError(said[0]) from error
    if not len(x):
        raise InputError("holds no samples")
    return Resampler(utterance.cut.sampling_rate, rate).feed(x, last=True)


def load_lips(utterance: Utterance, samples: int, *, size: int, pace: Fraction = Fraction(1)) -> Image | None:
    """Pictures [T, size, size] of so many samples at 16 kHz, one for each 640, as far as the video goes; None without.

    The sound was made `pace` times as long, and they follow it. InputError when they cannot be had.
    """
    if utterance.video is None:
        return None
    cut = utterance.cut
    if hasattr(cut, "tracks"):
        raise InputError("no pictures are read for a cut that is mixed of several: train with `video: false`")
    changes = {change["name"] if isinstance(change, dict) else type(change).__name__
               for change in cut.recording.transforms or ()}  # fmt: skip
    if paces := sorted(changes & {"Speed", "Tempo"}):
        raise InputError(f"the manifest changes the pace of the sound ({', '.join(paces)}), not that of the video")
    begin = Fraction(round(cut.start * cut.sampling_rate), cut.sampling_rate)
    return read_video(utterance.video, size=size, stretch=Stretch(begin, ceil(samples / EVERY), RATE * pace)).frames
