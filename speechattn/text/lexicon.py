"""How words are pronounced: dictionaries in the form of the CMU Pronouncing Dictionary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from speechattn.errors import InputError

__all__ = ["JOINT", "Lexicon"]

JOINT = "-"  # between the phones of a word
MARK = "▁"  # what a vocabulary has before a word
COMMENTS = (";;;", "##")
STRESSED = re.compile("(A[AEHOWY]|E[HRY]|I[HY]|O[WY]|U[HW])[012]")  # the vowels of ARPAbet


class Lexicon:
    """The phones of words, as text: `hello` is said `HH-AH-L-OW`. A word may be there in lower or in upper case."""

    def __init__(self, words: Mapping[str, str]) -> None:
        self.words = dict(words)

    def said(self, word: str) -> str | None:
        """The phones of a word, with `JOINT` between them; None where the lexicon lacks it."""
        return next((self.words[form] for form in (word, word.lower(), word.upper()) if form in self.words), None)

    @property
    def phones(self) -> list[str]:
        """All that occur, in order."""
        return sorted({phone for said in self.words.values() for phone in said.split(JOINT)})

    def __or__(self, other: Lexicon) -> Lexicon:
        """Both; what `other` says counts."""
        return Lexicon(self.words | other.words)

    @classmethod
    def read(cls, lines: Iterable[str], name: str) -> Lexicon:
        """Lines of a word and its phones; of several pronunciations (`word(2)`) the first counts, English stress goes.

        InputError naming the line that is none.
        """
        words: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if line.startswith(COMMENTS) or not line.strip():
                continue
            word, *phones = line.partition(" #")[0].split()
            if not phones or any(sign in phone for phone in phones for sign in (JOINT, MARK)):
                raise InputError(f"{name}, line {number}: {line.strip()[:60]!r} is not a word and its phones")
            if word.endswith(")") and word.rpartition("(")[2][:-1].isdecimal():
                word = word.rpartition("(")[0]
            words.setdefault(word, JOINT.join(map(unstressed, phones)))
        if not words:
            raise InputError(f"{name}: no word in it")
        return cls(words)

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """A dictionary file; InputError when it is none."""
        try:
            return cls.read(path.read_text(encoding="utf-8").split("\n"), str(path))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text") from error
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error

    @classmethod
    def cmu(cls) -> Lexicon:
        """The CMU Pronouncing Dictionary of American English, as PocketSphinx has it: 39 phones without stress."""
        try:
            from pocketsphinx import get_model_path
        except ImportError as error:
            raise InputError(
                "the CMU dictionary needs pocketsphinx: pip install 'speechattn[phonemes]' (or give --lexicon FILE)"
            ) from error
        return cls.load(Path(get_model_path("en-us")) / "cmudict-en-us.dict")

    def save(self, path: Path) -> None:
        """Write a line of word and phones for each word."""
        lines = (f"{word} {said.replace(JOINT, ' ')}\n" for word, said in self.words.items())
        path.write_text("".join(lines), encoding="utf-8", newline="\n")


def unstressed(phone: str) -> str:
    """A vowel of ARPAbet without its stress."""
    return phone[:-1] if STRESSED.fullmatch(phone) else phone
