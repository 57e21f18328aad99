"""MuST-C: English TED talks with their transcripts and translations (Di Gangi et al. 2019); CC BY-NC-ND 4.0.

From a local copy: its makers ask for agreement before the download. Every cut is a part of a talk's file, with what is
said as `text` and the translation beside it (lhotse's recipe reads the translation only, as the text).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from speechattn.data.prepare.manifests import Skipped, Utterance, prepared, write_manifests
from speechattn.data.prepare.sound import AudioFormat
from speechattn.data.prepare.transcripts import read_lines
from speechattn.errors import InputError

__all__ = ["SPLITS", "prepare", "utterances"]

SPLITS = ("train", "dev", "tst-COMMON", "tst-HE")


def find_pair(corpus: Path, language: str) -> Path:
    """The `data` folder of a language pair, given the corpus, the pair's folder or `data` itself."""
    pair = f"en-{language}"
    for place in (corpus / pair / "data", corpus / "data", corpus):
        if place.parent.resolve().name == pair and place.is_dir():
            return place
    raise InputError(f"{corpus}: no folder {pair}/data in it; MuST-C is {pair}/data/SPLIT/{{wav,txt}}")


def check_split(data: Path, split: str, language: str) -> None:
    """InputError that names every file a split lacks."""
    text = data / split / "txt"
    wanted = [text / f"{split}.{ending}" for ending in ("yaml", "en", language)]
    missing = [path for path in wanted if not path.is_file()]
    if not (data / split / "wav").is_dir():
        missing.append(data / split / "wav")
    if missing:
        raise InputError(f"MuST-C {split} lacks {', '.join(str(path.relative_to(data)) for path in missing)} in {data}")


def read_segments(path: Path) -> list[dict[str, Any]]:
    """The segments of a split: `wav`, `offset`, `duration`, `speaker_id`. The C parser, for there are 250,000 lines."""
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        segments = yaml.load("\n".join(read_lines(path)), Loader=loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(segments, list):
        raise InputError(f"{path}: not a list of segments")
    for number, segment in enumerate(segments, 1):
        if not isinstance(segment, dict) or not {"wav", "offset", "duration"} <= segment.keys():
            raise InputError(f"{path}, segment {number}: wanted wav, offset and duration")
    return segments


def utterances(data: Path, split: str, language: str) -> Iterator[Utterance | Skipped]:
    """Line i of transcript and translation belongs to segment i; ids are `TALK-seg-N`, where N counts in a talk."""
    folder = data / split
    segments = read_segments(folder / "txt" / f"{split}.yaml")
    texts, translations = (read_lines(folder / "txt" / f"{split}.{one}") for one in ("en", language))
    if not len(segments) == len(texts) == len(translations):
        raise InputError(
            f"{folder}: {len(segments)} segments, {len(texts)} lines in en, {len(translations)} lines in {language}"
        )
    numbers: dict[str, count[int]] = {}
    for segment, text, translation in zip(segments, texts, translations, strict=True):
        talk = Path(str(segment["wav"])).stem
        name = f"{talk}-seg-{next(numbers.setdefault(talk, count()))}"
        try:
            start, duration = float(segment["offset"]), float(segment["duration"])
        except (TypeError, ValueError):
            yield Skipped(name, f"offset {segment['offset']}, duration {segment['duration']}: not numbers")
            continue
        yield Utterance(
            name, folder / "wav" / str(segment["wav"]), text, str(segment.get("speaker_id", talk)), "en", translation,
            language, start, duration,
        )  # fmt: skip


def prepare(
    corpus: Path, folder: Path, language: str, splits: Sequence[str] = SPLITS, *, audio_format: AudioFormat = "flac"
) -> str:
    """Manifests of a language pair; the corpus's name, `must_c_en-de`.

    Talks at 16 kHz are used where they lie. InputError names what is missing, before anything is written.
    """
    data, name = find_pair(corpus, language), f"must_c_en-{language}"
    for split in splits:
        check_split(data, split, language)
    options = {"corpus": str(data.resolve()), "audio_format": audio_format}
    for split in splits:
        if prepared(folder, name, split, options) is None:
            rows = list(utterances(data, split, language))
            write_manifests(folder, name, split, rows, audio_format=audio_format, options=options, total=len(rows))
    return name
