"""What happens to a text before tokens are made of it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from speechattn.errors import InputError

__all__ = ["NORMALISERS", "normaliser"]

APOSTROPHE = "'"
APOSTROPHES = frozenset("'\u2019\u02bc\uff07")  # typographic, modifier letter, full width


def plain(text: str) -> str:
    """The text without spaces at its ends; several become one."""
    return " ".join(text.split())


def lower(text: str) -> str:
    """`plain`, in lower case."""
    return plain(text.lower())


def letters(text: str) -> str:
    """Lower case; only letters and their marks (Unicode's L and M), apostrophes inside or beside a word, and spaces.

    Typographic apostrophes become plain ones. A dash or a slash parts words, and so does any other sign, but what is
    not seen (Cf: soft hyphens, joiners) goes, and so does an apostrophe without a letter beside it. Digits go too:
    write numbers as words. Composed as far as Unicode can (NFC).
    """
    kept = "".join(map(letter, text.lower()))
    return unicodedata.normalize("NFC", " ".join(word for word in kept.split() if word.strip(APOSTROPHE)))


def written(text: str) -> str:
    """As it is printed: words in capitals of more than one letter become small, the first letter a capital, and where
    the text ends in a letter or digit there is a full stop behind it.
    """
    words = [word.lower() if loud(word) else word for word in text.split()]
    said = " ".join(words)
    first = next((i for i, sign in enumerate(said) if sign.isalnum()), len(said))
    said = said[:first] + said[first : first + 1].capitalize() + said[first + 1 :]
    return f"{said}." if said[-1:].isalnum() else said


def loud(word: str) -> bool:
    """It has capitals only, and more than one."""
    return word.isupper() and sum(map(str.isalpha, word)) > 1


def letter(sign: str) -> str:
    """What `letters` makes of a sign."""
    kind = unicodedata.category(sign)
    return APOSTROPHE if sign in APOSTROPHES else sign if kind[0] in "LM" else "" if kind == "Cf" else " "


def whisper_english(text: str) -> str:
    """The normaliser of Whisper's English scores."""
    from whisper_normalizer.english import EnglishTextNormalizer

    global _english
    if _english is None:
        _english = EnglishTextNormalizer()
    return plain(_english(text))


_english: Callable[[str], str] | None = None
NORMALISERS: dict[str, Callable[[str], str]] = {
    "none": plain, "lower": lower, "letters": letters, "written": written,
    "whisper-english": whisper_english,
}  # fmt: skip


def normaliser(name: str) -> Callable[[str], str]:
    """A function of text by its name, one of `NORMALISERS`. Law: what it gives, it leaves as it is.

    (Of `whisper-english` nobody promises that.)
    """
    if name not in NORMALISERS:
        raise InputError(f"text normaliser {name}: wanted one of {', '.join(NORMALISERS)}")
    return NORMALISERS[name]
