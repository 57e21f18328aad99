"""Clips of a manifest joined into streams: several utterances of one speaker with pauses between them.

A stream is a cut of lhotse with a supervision for each clip, in order: its text (and `custom.translation`), where it
begins, and how long it is. `custom.word_ends` are seconds of the stream, of clips whose word ends are known. Training
takes cuts with one supervision; scoring takes these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechattn.audio.resample import Samples
from speechattn.data import cuts
from speechattn.data.prepare.manifests import Row, file_name, write_rows
from speechattn.data.prepare.sound import RATE, write_sound
from speechattn.errors import InputError

__all__ = ["Joining", "join_clips", "together", "write_streams"]


@dataclass(frozen=True)
class Joining:
    """`least` to `most` clips make a stream, with silent pauses of `shortest_s` to `longest_s` behind each."""

    least: int = 10
    most: int = 20
    shortest_s: float = 0.3
    longest_s: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InputError(f"streams of {self.least} to {self.most} clips: wanted 1 or more, and no fewer at the end")
        if not 0 <= self.shortest_s <= self.longest_s:
            raise InputError(f"pauses of {self.shortest_s} to {self.longest_s} s: wanted 0 or more, in this order")


def by_speaker(clip: cuts.Utterance) -> str:
    """Who speaks."""
    return str(clip.cut.supervisions[0].speaker or "")


def together(
    clips: Sequence[cuts.Utterance], how: Joining, *, of: Callable[[cuts.Utterance], str] = by_speaker
) -> dict[str, list[cuts.Utterance]]:  # fmt: skip
    """Name of a stream -> its clips, each clip once: the clips of one speaker (`of`) in the order of the manifest.

    They are shared out evenly, about halfway between `least` and `most` to a stream. Who has fewer than `least` has one
    stream of all. The first streams of all speakers come before all second ones: any first N are a fair part.
    """
    found: dict[tuple[int, str], list[cuts.Utterance]] = {}
    for name, group in groupby(sorted(clips, key=of), key=of):
        mine = list(group)
        parts = max(1, round(2 * len(mine) / (how.least + how.most)))
        while parts > 1 and len(mine) // parts < how.least:
            parts -= 1
        while -(-len(mine) // parts) > how.most:
            parts += 1
        for number, rows in enumerate(np.array_split(np.arange(len(mine)), parts)):
            found[number, name] = [mine[i] for i in rows]
    return {f"{name}-{number:02d}": found[number, name] for number, name in sorted(found)}


def join_clips(
    name: str, clips: Sequence[tuple[cuts.Utterance, Samples]], how: Joining,
    word_ends: Mapping[str, Sequence[float]] | None = None,
) -> tuple[Samples, list[Row]]:  # fmt: skip
    """Sounds [n] at 16 kHz, one after the other, and a supervision for each.

    Pauses depend on the seed and the name alone. `word_ends` are seconds of a clip, by its id.
    """
    digest = hashlib.sha256(f"{how.seed} {name}".encode()).digest()
    random = np.random.default_rng(np.frombuffer(digest, np.uint32))
    pieces, rows, at = list[Samples](), list[Row](), 0
    for clip, sound in clips:
        said, start = clip.cut.supervisions[0], at / RATE
        custom = dict(said.custom or {})
        if word_ends is not None and clip.id in word_ends:
            custom["word_ends"] = [round(start + end, 3) for end in word_ends[clip.id]]
        rows.append({
            "id": clip.id, "recording_id": name, "start": start, "duration": len(sound) / RATE, "channel": 0,
            "text": clip.text, "language": said.language, "speaker": said.speaker, "custom": custom,
        })  # fmt: skip
        pause = np.zeros(round(random.uniform(how.shortest_s, how.longest_s) * RATE), np.float32)
        pieces += [sound, pause]
        at += len(sound) + len(pause)
    return np.concatenate(pieces), rows


def write_streams(
    manifest: Path, out: Path, how: Joining | None = None, *, word_ends: Mapping[str, Sequence[float]] | None = None,
    of: Callable[[cuts.Utterance], str] = by_speaker,
) -> list[Row]:  # fmt: skip
    """Join the clips of a cuts manifest into streams: `out` (`.jsonl.gz`) and, beside it, a folder of FLAC files.

    -> the rows of `out`, whose paths begin at its folder. InputError for a clip that cannot be read, or is not one
    utterance.
    """
    how = how or Joining()
    if not out.name.endswith(".jsonl.gz"):
        raise InputError(f"{out}: the manifest of the streams ends in .jsonl.gz")
    folder = out.with_name(out.name.removesuffix(".jsonl.gz"))
    clips = [cuts.utterance(row, manifest.parent.resolve()) for _, row, _ in cuts.read_cuts(manifest)]
    if mixed := next((clip.id for clip in clips if len(clip.cut.supervisions) != 1), None):
        raise InputError(f"{manifest}: {mixed} is not one utterance, and cannot be a part of a stream")
    streams = together(clips, how, of=of)
    if not streams:
        raise InputError(f"{manifest}: no clips to join")
    bar = tqdm(streams.items(), desc=out.name, unit=" streams", disable=None)
    rows = [write_stream(name, mine, folder, how, word_ends) for name, mine in bar]
    write_rows(out, rows)
    return rows


def write_stream(
    name: str, clips: Iterable[cuts.Utterance], folder: Path, how: Joining,
    word_ends: Mapping[str, Sequence[float]] | None,
) -> Row:  # fmt: skip
    """One stream: its sound on disk, its cut."""
    path = folder / f"{file_name(name)}.flac"
    sound, supervisions = join_clips(name, [(clip, cuts.load_sound(clip, RATE)) for clip in clips], how, word_ends)
    write_sound(path, sound, "flac")
    recording = {
        "id": name, "sources": [{"type": "file", "channels": [0], "source": f"{folder.name}/{path.name}"}],
        "sampling_rate": RATE, "num_samples": len(sound), "duration": len(sound) / RATE, "channel_ids": [0],
    }  # fmt: skip
    return {
        "id": name, "start": 0.0, "duration": len(sound) / RATE, "channel": 0, "supervisions": supervisions,
        "recording": recording, "type": "MonoCut",
    }  # fmt: skip
