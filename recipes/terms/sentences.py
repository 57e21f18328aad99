"""Sentences with rare words that no matcher was trained on, to be spoken.

    python -m recipes.terms.sentences WORDNET FOLDER --without KNOWN.txt

The rule. A word is *rare* that has five letters or more, only letters, and stands at most ten times in WordNet's
glosses (Debian's `wordnet-base`, folder `usr/share/wordnet`). The SHA-256 of a rare word modulo 10 says which part it
belongs to: 0 and 1 test, 2 dev, the others train. A text is of the test part if one of its words is, else of dev if one
is, and else of train. So nothing that is trained on holds a word of the other parts. Sentences are examples of WordNet;
lines of KNOWN.txt are in no part: the encoder was trained on them. Their order is that of their SHA-256.

Writes `test.txt`, the first so many of the test part.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from recipes.fotaq.sentences import FILES, examples, usable

LEAST, MOST = 5, 10  # letters of a rare word; how often it may stand in the glosses
FEWEST = 4  # words of a sentence


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def glosses(wordnet: Path) -> Iterable[str]:
    """What WordNet says of each sense."""
    for name in FILES:
        for line in (wordnet / name).read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                yield line.partition(" | ")[2]


def counted(wordnet: Path) -> Counter[str]:
    """How often each word stands in the glosses."""
    return Counter(word for gloss in glosses(wordnet) for word in words(gloss))


def rare(word: str, counts: Counter[str]) -> bool:
    """Whether it is long and seldom."""
    return len(word) >= LEAST and word.isalpha() and counts[word] <= MOST


def digest(text: str) -> int:
    """SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest())


def part(word: str) -> str:
    """Of a rare word."""
    return ("test", "test", "dev")[digest(word) % 10] if digest(word) % 10 < 3 else "train"


def part_of(text: str, counts: Counter[str]) -> str:
    """Of a sentence, by its rare words."""
    parts = {part(word) for word in words(text) if rare(word, counts)}
    return next((name for name in ("test", "dev") if name in parts), "train")


def parted(found: Iterable[str], counts: Counter[str]) -> dict[str, list[str]]:
    """Sentences with a rare word by part, in the order of their hashes."""
    out: dict[str, list[str]] = {"test": [], "dev": [], "train": []}
    for text in sorted(found, key=digest):
        if len(text.split()) >= FEWEST and any(rare(word, counts) for word in words(text)):
            out[part_of(text, counts)].append(text)
    return out


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--without", type=Path, help="a text file: its lines are in no part")
    parser.add_argument("--lines", type=int, default=220)
    given = parser.parse_args()
    known = set(given.without.read_text(encoding="utf-8").splitlines()) if given.without else set()
    counts = counted(given.wordnet)
    found = {" ".join(text.split()) for text in examples(given.wordnet)} - known
    lines = parted(filter(usable, found), counts)["test"][: given.lines]
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "test.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{given.folder / 'test.txt'}: {len(lines)} sentences")


if __name__ == "__main__":
    main()
