"""LRS3-TED: face tracks of TED talks with their sound and words (Afouras, Chung, Zisserman, arXiv 1809.00496).

From a local copy, in one of two layouts:

- as published: `PART/TALK/NUMBER.mp4` and `.txt` for the parts pretrain, trainval and test, with pictures of whole
  faces. The mouth is cut out by one box for all, which is rough: heads turn, and a box does not follow them;
- as auto_avsr's preparation leaves it, which finds landmarks: mouths of 96 x 96 pixels in
  `lrs3_video_segNs/PART/TALK/NUMBER.mp4` with a `.wav` beside it, or with the sound inside, and the words in
  `lrs3_text_segNs`. These files are used where they lie.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from speechattn.audio.read import open_recording
from speechattn.audio.vision import RATE, Box, pyav, read_video, write_video
from speechattn.data.prepare.manifests import Skipped, Utterance, Written, manifest_path, prepared, write_manifests
from speechattn.data.prepare.sound import AudioFormat, atomic
from speechattn.data.prepare.transcripts import read_lines
from speechattn.errors import InputError

__all__ = ["BOX", "SPLITS", "prepare"]

SPLITS = ("pretrain", "trainval", "test")
BOX = Box(56, 56, 112, 112)  # the middle of 224 x 224, as public recipes without landmarks take it
SIZE = 96  # pixels of an edge, of which training cuts out 88
LONGEST_S = 16.0
MARGIN_S = 0.5  # around the words of a piece of a long clip, at most
HEADER = ["WORD", "START", "END", "ASDSCORE"]
NOISES = re.compile(r"\{(?:BR|CG|LG|LS|NS|SL)\}")  # breath, cough, laugh, ...: the aligner's names


class Word(NamedTuple):
    """One word and its time in a clip."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Clip:
    """A clip's files; `ready`: its pictures are mouths."""

    id: str
    talk: str
    video: Path
    text: Path
    ready: bool

    @property
    def sound(self) -> Path:
        """Where its sound is."""
        beside = self.video.with_suffix(".wav")
        return beside if self.ready and beside.is_file() else self.video


class Piece(NamedTuple):
    """What is said from picture `first` on, before picture `last` (None: to the end)."""

    text: str
    first: int = 0
    last: int | None = None


class Part(NamedTuple):
    """What becomes an utterance, and its video."""

    id: str
    piece: Piece
    video: Path


def find_clips(source: Path, split: str) -> list[Clip]:
    """The clips of a part, by name; InputError where the folder has neither layout, or the part is empty."""
    cropped = sorted(source.glob("lrs3_video_seg*s"))
    if len(cropped) > 1:
        raise InputError(f"{source}: {' and '.join(path.name for path in cropped)}: name the folder with one of them")
    videos, texts, ready = source / split, source / split, bool(cropped)
    if cropped:
        videos = cropped[0] / split
        texts = source / cropped[0].name.replace("_video_", "_text_") / split
    if not videos.is_dir():
        raise InputError(f"{source}: no folder {videos.relative_to(source)} in it; LRS3 is PART/TALK/NUMBER.mp4 with "
                         f"the parts {', '.join(SPLITS)}")  # fmt: skip
    names = {path.relative_to(videos).with_suffix("") for path in videos.glob("*/*.mp4")}
    names |= {path.relative_to(texts).with_suffix("") for path in texts.glob("*/*.txt")}
    if not names:
        raise InputError(f"{videos}: no TALK/NUMBER.mp4 in it")
    return [
        Clip(
            f"{split}-{name.parent.name}-{name.name}", name.parent.name, videos / f"{name}.mp4",
            texts / f"{name}.txt", ready,
        )
        for name in sorted(names)
    ]  # fmt: skip


def said(text: str) -> str:
    """The words, without what the aligner noted of noises, and without braces around others."""
    return " ".join(NOISES.sub(" ", text).replace("{", "").replace("}", "").split())


def read_text(path: Path) -> tuple[str, list[Word]]:
    """What a text file as published says, and the times of the words where it has them; InputError for another file."""
    lines = [line.strip() for line in read_lines(path)]
    name, mark, text = lines[0].partition(":")
    if name != "Text" or not mark:
        raise InputError(f"{path}: it does not begin with Text:")
    at = next((i for i, line in enumerate(lines) if line.split() == HEADER), len(lines))
    words = []
    for number, line in enumerate(lines[at + 1 :], at + 2):
        try:
            word, start, end, *_ = line.split() or [""] * 3
            if word:
                words.append(Word(word, float(start), float(end)))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: wanted {' '.join(HEADER)}") from error
    if any(a.start_s > b.start_s for a, b in pairwise(words)) or any(word.end_s < word.start_s for word in words):
        raise InputError(f"{path}: times that go back")
    return said(text), words


def cut(words: Sequence[Word], seconds: float, longest_s: float) -> list[Piece]:
    """A long clip in pieces of whole words, each of at most `longest_s`, on the clock of the pictures.

    A piece ends at the longest pause of its second half, in the middle between two words, and at most 0.5 s beside a
    word. InputError for a word that is longer than a piece may be.
    """
    middles = [0.0, *((a.end_s + b.start_s) / 2 for a, b in pairwise(words)), seconds]

    def piece(a: int, b: int) -> Piece:
        start, end = max(middles[a], words[a].start_s - MARGIN_S), min(middles[b], words[b - 1].end_s + MARGIN_S)
        return Piece(said(" ".join(word.text for word in words[a:b])), round(start * RATE), round(end * RATE))

    def length(a: int, b: int) -> float:
        found = piece(a, b)
        return ((found.last or 0) - found.first) / RATE

    pieces, a = [], 0
    while a < len(words):
        b = a
        while b < len(words) and length(a, b + 1) <= longest_s:
            b += 1
        if b == a:
            raise InputError(f"a word of {words[a].end_s - words[a].start_s:.1f} s: {words[a].text}")
        if b < len(words):
            ends = [end for end in range(a + 1, b + 1) if length(a, end) > longest_s / 2] or [b]
            b = max(ends, key=lambda end: (words[end].start_s - words[end - 1].end_s, end))
        pieces.append(piece(a, b))
        a = b
    return [one for one in pieces if one.text]


def pieces_of(clip: Clip, longest_s: float) -> list[Piece]:
    """A clip as it is, or what becomes of a long one; InputError where it cannot be used."""
    if not clip.video.is_file():
        raise InputError(f"{clip.video}: no such file")
    if clip.ready:
        return [Piece(said(" ".join(read_lines(clip.text))))]
    text, words = read_text(clip.text)
    seconds = open_recording(clip.sound).duration_s
    if seconds <= longest_s:
        return [Piece(text)]
    if not words:
        raise InputError(f"{seconds:.1f} s, more than {longest_s:g}, and no times of words to cut it at")
    return cut(words, seconds, longest_s)


def take(folder: Path, box: Box, size: int, longest_s: float, clip: Clip) -> list[Part] | Skipped:
    """Videos of mouths that are not there yet; the reason where there are none."""
    try:
        pieces = pieces_of(clip, longest_s)
        if clip.ready:
            read_video(clip.video, size=size)  # says what is wrong with it
            return [Part(clip.id, piece, clip.video.resolve()) for piece in pieces]
        shape = "-".join(map(str, (*box, size)))
        place = folder.resolve() / "video" / shape / clip.video.parent.parent.name / clip.talk
        parts = []
        for i, piece in enumerate(pieces):
            number = "" if piece.last is None else f"-{piece.first}-{piece.last}"
            name = clip.id if piece.last is None else f"{clip.id}-{i}"
            parts.append(Part(name, piece, place / f"{clip.video.stem}{number}.mkv"))
        if not all(part.video.is_file() for part in parts):
            images = read_video(clip.video, box=box, size=size).frames
            place.mkdir(parents=True, exist_ok=True)
            for part in parts:
                with atomic(part.video) as file:
                    write_video(Path(file.name), images[part.piece.first : part.piece.last])
        return parts
    except InputError as error:
        return Skipped(clip.id, str(error))


def utterances(clip: Clip, parts: Sequence[Part] | Skipped) -> Iterator[Utterance | Skipped]:
    """What is said in a clip; the sound of a piece begins with its first picture."""
    if isinstance(parts, Skipped):
        yield parts
        return
    for name, piece, video in parts:
        length = None if piece.last is None else (piece.last - piece.first) / RATE
        yield Utterance(
            name, clip.sound, piece.text, clip.talk, "en", start_s=piece.first / RATE, duration_s=length,
            custom={"video": str(video)},
        )  # fmt: skip


def prepare(
    source: Path, folder: Path, split: str, *, box: Box | None = None, longest_s: float = LONGEST_S,
    valid_talks: int = 0, jobs: int = 1, audio_format: AudioFormat = "flac",
) -> list[str]:  # fmt: skip
    """Videos of mouths of 96 x 96 pixels and manifests of a part, on `jobs` threads; the names of the parts written.

    Of a copy as published `box` (None: `BOX`) is the mouth, and clips of more than `longest_s` are cut. The last
    `valid_talks` talks, by name, become a part `valid` of their own, which LRS3 lacks. A part that is there stays, and
    so do videos that an earlier run has made.
    """
    pyav()
    if split not in SPLITS:
        raise InputError(f"part {split}: wanted one of {', '.join(SPLITS)}")
    if longest_s < 1 or valid_talks < 0:
        raise InputError(f"pieces of {longest_s:g} s, {valid_talks} talks: wanted at least 1 s, and none or more")
    clips = find_clips(source, split)
    if clips[0].ready and box is not None:
        raise InputError(f"{source}: its pictures are mouths already: no box is wanted")
    talks = sorted({clip.talk for clip in clips})
    if valid_talks >= len(talks):
        raise InputError(f"{valid_talks} talks to be left for validation: there are {len(talks)}")
    apart = {*talks[len(talks) - valid_talks :]}
    found = {split: [clip for clip in clips if clip.talk not in apart]}
    if apart:
        found["valid"] = [clip for clip in clips if clip.talk in apart]
    mouth = box or BOX
    options = {
        "source": str(source.resolve()), "split": split, "box": list(mouth), "longest_s": longest_s, "size": SIZE,
        "valid_talks": valid_talks, "audio_format": audio_format,
    }  # fmt: skip
    for name, part in found.items():
        done = prepared(folder, "lrs3", name, options)
        if done is None or not first_video(folder, name):
            write_part(folder, name, part, partial(take, folder, mouth, SIZE, longest_s), jobs, options, audio_format)
    return [*found]


def first_video(folder: Path, name: str) -> bool:
    """The videos of a part are there, as far as its first one tells."""
    with gzip.open(manifest_path(folder, "lrs3", "cuts", name), "rt", encoding="utf-8") as cuts:
        return Path(json.loads(cuts.readline())["supervisions"][0]["custom"]["video"]).is_file()


def write_part(
    folder: Path, name: str, clips: Sequence[Clip], make: Any, jobs: int, options: dict[str, object],
    audio_format: AudioFormat,
) -> Written:  # fmt: skip
    """Videos first, then sounds and manifests."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            made = tqdm(pool.map(make, clips), total=len(clips), desc=f"lrs3 {name}", unit=" clips", disable=None)
            parts = list(made)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    rows = [row for clip, one in zip(clips, parts, strict=True) for row in utterances(clip, one)]
    return write_manifests(folder, "lrs3", name, rows, audio_format=audio_format, options=options, total=len(rows))
