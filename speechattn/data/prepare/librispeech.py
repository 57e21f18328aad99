"""LibriSpeech and Mini LibriSpeech: read English of public-domain books (Panayotov et al. 2015); CC BY 4.0.

lhotse fetches it. Its preparation stops at the first file that cannot be read and says nothing of one that is missing;
here both are listed, so the layout is read here (and the tests compare with lhotse's).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from speechattn.data.prepare.debian import sha256
from speechattn.data.prepare.manifests import Skipped, Utterance, prepared, write_manifests
from speechattn.data.prepare.sound import AudioFormat
from speechattn.data.prepare.transcripts import read_lines
from speechattn.errors import InputError

__all__ = ["MINI", "PARTS", "download", "find_corpus", "prepare", "utterances"]

# Utterances of each part, and the SHA-256 of its archive.
PARTS: dict[str, tuple[int, str]] = {
    "dev-clean": (2703, "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3"),
    "dev-other": (2864, "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365"),
    "test-clean": (2620, "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23"),
    "test-other": (2939, "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29"),
    "train-clean-100": (28539, "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2"),
    "train-clean-360": (104014, "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf"),
    "train-other-500": (148688, "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2"),
}
MINI = {"dev-clean-2": 1089, "train-clean-5": 1519}


def download(folder: Path, parts: Sequence[str]) -> Path:
    """Fetch and unpack parts with lhotse; the corpus's folder. InputError for an archive with another checksum."""
    try:
        from lhotse.recipes.librispeech import download_librispeech  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise InputError("downloading needs lhotse: pip install 'speechattn[train]'") from error
    check_names(parts)
    for part in parts:
        fresh = not (folder / "LibriSpeech" / part / ".completed").is_file()
        try:
            download_librispeech(folder, dataset_parts=[part])
        except (OSError, EOFError) as error:
            raise InputError(f"LibriSpeech {part} cannot be fetched: {error}") from error
        archive = folder / f"{part}.tar.gz"
        if fresh and part in PARTS and archive.is_file() and (found := sha256(archive)) != PARTS[part][1]:
            (folder / "LibriSpeech" / part / ".completed").unlink(missing_ok=True)
            raise InputError(f"{archive}: its SHA-256 is {found}, expected {PARTS[part][1]}; remove it and try again")
    return folder / "LibriSpeech"


def check_names(parts: Sequence[str]) -> None:
    """InputError for a part that LibriSpeech does not have."""
    for part in parts:
        if part not in PARTS and part not in MINI:
            raise InputError(f"LibriSpeech has no part {part}; it has {', '.join([*PARTS, *MINI])}")


def find_corpus(folder: Path) -> Path:
    """The folder that holds the parts, given it or the one above."""
    for place in (folder, folder / "LibriSpeech"):
        if any((place / part).is_dir() for part in (*PARTS, *MINI)):
            return place
    raise InputError(f"{folder}: none of {', '.join([*PARTS, *MINI])} is in it; fetch them with --download")


def utterances(part: Path) -> Iterator[Utterance | Skipped]:
    """The utterances of a part: `READER/CHAPTER/READER-CHAPTER.trans.txt` and a FLAC file for each of its lines."""
    for chapter in sorted(part.glob("*/*/*.trans.txt")):
        told = set()
        for line in filter(str.strip, read_lines(chapter)):
            name, _, text = line.strip().partition(" ")
            told.add(name)
            yield Utterance(name, chapter.parent / f"{name}.flac", text, name.partition("-")[0], "en")
        for sound in sorted(chapter.parent.glob("*.flac")):
            if sound.stem not in told:
                yield Skipped(sound.stem, f"{chapter.name} has no line for it")


def prepare(
    corpus: Path, folder: Path, parts: Sequence[str] | None = None, *, audio_format: AudioFormat = "flac"
) -> list[str]:
    """Manifests of the parts asked for, or of all that are there; their names.

    The corpus's files are used where they lie. InputError names a part that is missing.
    """
    corpus = find_corpus(corpus)
    parts = [part for part in (*PARTS, *MINI) if (corpus / part).is_dir()] if parts is None else list(parts)
    check_names(parts)
    missing = [part for part in parts if not (corpus / part).is_dir()]
    if missing:
        raise InputError(f"{corpus}: {', '.join(missing)} missing; fetch with --download")
    for part in parts:
        options = {"corpus": str(corpus.resolve()), "audio_format": audio_format}
        if prepared(folder, "librispeech", part, options) is None:
            write_manifests(
                folder, "librispeech", part, utterances(corpus / part), audio_format=audio_format, options=options,
                total=expected(part),
            )  # fmt: skip
    return parts


def expected(part: str) -> int:
    """How many utterances the published part has."""
    return MINI[part] if part in MINI else PARTS[part][0]
