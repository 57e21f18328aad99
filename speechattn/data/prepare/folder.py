"""A folder of one's own recordings with a transcript file, split into parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from speechattn.data.prepare.manifests import Skipped, Utterance, prepared, write_manifests
from speechattn.data.prepare.sound import AudioFormat
from speechattn.data.prepare.transcripts import Entry, read_transcripts
from speechattn.errors import InputError

__all__ = ["parse_shares", "prepare", "split_of"]


def parse_shares(words: Sequence[str]) -> dict[str, float]:
    """`dev=0.1` and so on; what is left of 1 goes to train. InputError for shares that make no sense."""
    shares: dict[str, float] = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            shares[name] = float(number)
        except ValueError:
            shares[name] = -1.0
        if not name or not 0 < shares[name] < 1 or name == "train":
            raise InputError(f"share {word}: wanted NAME=NUMBER, between 0 and 1, as dev=0.1; train gets the rest")
    if sum(shares.values()) >= 1:
        raise InputError(f"the shares {' '.join(words)} leave nothing for train")
    return shares


def split_of(key: str, shares: Mapping[str, float]) -> str:
    """The part that a key (a speaker, or an utterance) falls into: by a hash of it alone."""
    at = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        at -= share
        if at < 0:
            return name
    return "train"


def assign(entries: Sequence[Entry], shares: Mapping[str, float], by: str | None = None) -> dict[str, list[Entry]]:
    """The entries of each part: as the file says, or by speaker where all have one (no voice is in two parts), or by
    utterance; `by` says which. InputError where a part gets nothing: few voices cannot be shared out."""
    given = [entry.split for entry in entries]
    if any(given) and shares:
        raise InputError("the transcripts name the parts themselves: leave --split-share away")
    if any(given) and not all(given):
        missing = next(entry.id for entry in entries if not entry.split)
        raise InputError(f"some utterances have a split, but {missing} has none")
    without = next((entry.id for entry in entries if not entry.speaker), None)
    if by == "speaker" and without is not None:
        raise InputError(f"--split-by speaker: {without} has no speaker")
    by_speaker = by != "utterance" and without is None
    keys = [str(entry.speaker) if by_speaker else entry.id for entry in entries]
    parts: dict[str, list[Entry]] = {}
    for entry, key in zip(entries, keys, strict=True):
        parts.setdefault(entry.split or split_of(key, shares), []).append(entry)
    for name in (*shares, "train") if shares else ():
        if name not in parts:
            what, otherwise = ("speakers", "--split-by utterance, ") if by_speaker else ("utterances", "")
            raise InputError(
                f"no utterance falls into {name}: there are {len({*keys})} {what} to share out by chance; take "
                f"{otherwise}other shares, or a column `split` in the transcripts"
            )
    return parts


def utterances(
    audio: Path, entries: Sequence[Entry], *, name: str, language: str, translation_language: str | None
) -> Iterator[Utterance | Skipped]:
    """Entries with what they leave open: paths below the folder, and the languages."""
    for entry in entries:
        path = audio / entry.audio
        if entry.fault is not None:
            yield Skipped(entry.id, entry.fault)
        elif not entry.audio:
            yield Skipped(entry.id, "no sound is named")
        else:
            to = entry.translation_language or translation_language if entry.translation else None
            yield Utterance(
                entry.id, path, entry.text, entry.speaker or name, entry.language or language, entry.translation, to,
                entry.start_s, entry.duration_s,
            )  # fmt: skip


def prepare(
    audio: Path, folder: Path, transcripts: Path, *, name: str = "own", language: str = "en",
    translation_language: str | None = None, shares: Mapping[str, float] | None = None, split_by: str | None = None,
    audio_format: AudioFormat = "flac",
) -> list[str]:  # fmt: skip
    """Manifests of every part; the parts' names. What has changed since is prepared again.

    Recordings at 16 kHz, mono, in WAV, FLAC or Ogg are used where they lie; others are converted. InputError where
    part of the set-up is missing.
    """
    if not audio.is_dir():
        raise InputError(f"{audio}: no such folder")
    entries = read_transcripts(transcripts)
    parts = assign(entries, shares or {}, split_by)
    for split, chosen in parts.items():
        options = {
            "audio": str(audio.resolve()), "audio_format": audio_format, "language": language,
            "translation_language": translation_language, "entries": fingerprint(audio, chosen),
        }  # fmt: skip
        if prepared(folder, name, split, options) is None:
            rows = utterances(audio, chosen, name=name, language=language, translation_language=translation_language)
            write_manifests(folder, name, split, rows, audio_format=audio_format, options=options, total=len(chosen))
    return list(parts)


def fingerprint(audio: Path, entries: Sequence[Entry]) -> str:
    """Changes when a transcript or a recording does (by size and time)."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr(entry).encode())
        try:
            stat = (audio / entry.audio).stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        except OSError:
            digest.update(b"missing")
    return digest.hexdigest()
