"""Sentences to synthesise: `python dialogue.py OUT FOLDER...`.

What people say to each other in the campaigns of Battle for Wesnoth (Debian's packages
`wesnoth-1.16-httt` and so on, unpacked), in an order that does not change.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

MESSAGE = re.compile(r'\bmessage\s*=\s*_\s*"((?:[^"]|"")*)"')
SHORTEST, LONGEST = 3, 20  # words


def messages(source: str) -> Iterator[str]:
    """What is said in a file of Wesnoth's markup language: translatable `message` attributes."""
    for said in MESSAGE.findall(source):
        yield " ".join(re.sub(r"<[^>]*>|^[a-z_ ]+\^", " ", said.replace('""', '"')).split())


def sentences(text: str) -> list[str]:
    """A text, cut behind the marks that end sentences."""
    text = text.replace("\u2019", "'").replace("\u2026", "...").replace("\u2014", ", ")
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)]


def usable(text: str) -> bool:
    """Only letters and the usual marks, and not too short or long to say."""
    return SHORTEST <= len(text.split()) <= LONGEST and re.fullmatch(r"[A-Za-z ,.;:!?'-]+", text) is not None


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--lines", type=int, help="at most")
    given = parser.parse_args()
    files = (path for folder in given.folders for path in sorted(folder.rglob("*.cfg")))
    said = {part for path in files for text in messages(path.read_text(encoding="utf-8")) for part in sentences(text)}
    order = sorted(filter(usable, said), key=lambda text: hashlib.sha256(text.encode()).digest())[: given.lines]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("".join(f"{text}\n" for text in order), encoding="utf-8")
    print(f"{given.out}: {len(order)} sentences")


if __name__ == "__main__":
    main()
