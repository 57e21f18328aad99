"""Tux Paint's stamps: short spoken descriptions in nine languages, each with its text and with English.

From a Debian package; licence GPL-2, see `data/tuxpaint/README.md`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from speechattn.data.prepare.debian import download, sha256, unpack
from speechattn.data.prepare.manifests import Skipped, Utterance, prepared, write_manifests
from speechattn.data.prepare.sound import AudioFormat, read_sound
from speechattn.errors import InputError

__all__ = ["LANGUAGES", "PACKAGE", "SPLITS", "Stamp", "prepare", "read_stamps", "split_of"]

PACKAGE = "tuxpaint-stamps-default"
SHA256 = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"  # 2022.06.04-1
INSIDE = Path("usr/share/tuxpaint/stamps")

LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")  # more than 300 clips each
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Stamp:
    """A picture's description: `texts` by language (en is the translation), and the clip of each language spoken."""

    name: str
    texts: dict[str, str]
    clips: dict[str, Path]

    @property
    def split(self) -> str:
        """train, dev or test."""
        return split_of(self.texts["en"])


def split_of(english: str) -> str:
    """70 % train, 10 % dev, 20 % test, by a hash of the English line alone: no line is in two parts."""
    place = int(hashlib.sha256(english.encode()).hexdigest(), 16) % 100
    return "train" if place < 70 else "dev" if place < 80 else "test"


def read_stamps(folder: Path) -> Iterator[Stamp]:
    """Every stamp below a folder that has a description, by name.

    `NAME.txt` holds the English line, then `CODE.utf8=text` lines; `NAME_desc_CODE.ogg` (or .wav) are the clips.
    """
    for path in sorted(folder.rglob("*.txt")):
        first, *others = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        texts = {"en": first.strip()}
        for line in others:
            code, mark, text = line.partition(".utf8=")
            if mark:
                texts[code.strip()] = text.strip()
        start = f"{path.stem}_desc_"
        clips = {
            clip.stem.removeprefix(start): clip
            for ending in ("wav", "ogg")
            for clip in sorted(path.parent.glob(f"*.{ending}"))
            if clip.stem.startswith(start)
        }
        yield Stamp("_".join(path.relative_to(folder).with_suffix("").parts), texts, clips)


def utterances(stamps: Sequence[Stamp], language: str) -> Iterator[Utterance | Skipped]:
    """The clips of a language, to be translated into English."""
    for stamp in stamps:
        if language in stamp.clips:
            name = f"{language}-{stamp.name}"
            if language not in stamp.texts:
                yield Skipped(name, f"the description has no text in {language}")
                continue
            sound, speaker = partial(read_sound, stamp.clips[language]), f"tuxpaint-{language}"
            yield Utterance(name, sound, stamp.texts[language], speaker, language, stamp.texts["en"], "en")


def prepare(
    folder: Path, languages: Sequence[str] = LANGUAGES, *, audio_format: AudioFormat = "flac",
    package: Path | None = None,
) -> list[str]:  # fmt: skip
    """Fetch the package (or take a file of it), and write the parts that are not there; the names of the corpora.

    Each language is a corpus of its own: `tuxpaint-fr` and so on. InputError names a language without clips. The
    package's file is kept in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {"audio_format": audio_format, "source": SHA256}
    names = {f"tuxpaint-{language}": language for language in sorted(set(languages))}
    missing = [(name, split) for name in names for split in SPLITS if prepared(folder, name, split, options) is None]
    if missing:
        with TemporaryDirectory(dir=folder) as work:
            unpack(fetch(folder, package), Path(work))
            shutil.copy(Path(work) / "usr/share/doc" / PACKAGE / "copyright", folder / "LICENCE")
            stamps = list(read_stamps(Path(work) / INSIDE))
            check(stamps, languages)
            for name, split in missing:
                spoken = list(utterances([stamp for stamp in stamps if stamp.split == split], names[name]))
                write_manifests(
                    folder, name, split, spoken, audio_format=audio_format, options=options, total=len(spoken)
                )
    return list(names)


def check(stamps: Sequence[Stamp], languages: Sequence[str]) -> None:
    """InputError for a language that nobody speaks here."""
    spoken = {language for stamp in stamps for language in stamp.clips}
    for language in languages:
        if language not in spoken:
            raise InputError(f"tuxpaint has no recordings in {language}; it has {' '.join(sorted(spoken))}")


def fetch(folder: Path, package: Path | None = None) -> Path:
    """The package's file: the one given, the one that lies in the folder, or a fresh one."""
    target = package or folder / f"{PACKAGE}.deb"
    if package is not None and not package.is_file():
        raise InputError(f"{package}: no such file; leave --package away to fetch {PACKAGE}")
    if not target.is_file():
        with TemporaryDirectory(dir=folder) as work:
            download(PACKAGE, Path(work)).rename(target)
    found = sha256(target)
    if found != SHA256:
        raise InputError(f"{target}: its SHA-256 is {found}, expected {SHA256}, that of version 2022.06.04-1")
    return target
