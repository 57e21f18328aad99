"""Sentences to synthesise: `python sentences.py WORDNET CUTS OUT`.

The examples in WordNet's glosses (Debian's `wordnet-base`, folder `usr/share/wordnet`) in an order that does not
change, and between them the lines of a cuts manifest (FOTAQ's training split), so that other voices say them, too.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
SHORTEST, LONGEST = 3, 25  # words


def examples(wordnet: Path) -> Iterator[str]:
    """What stands between double quotes in the glosses."""
    for name in FILES:
        for line in (wordnet / name).read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                yield from re.findall(r'"([^"]+)"', line.partition(" | ")[2])


def lines_of(cuts: Path) -> list[str]:
    """The texts of a cuts manifest."""
    with gzip.open(cuts, "rt", encoding="utf-8") as file:
        return [supervision["text"] for row in file for supervision in json.loads(row)["supervisions"]]


def usable(text: str) -> bool:
    """Only letters and the usual marks, and not too short or long to say."""
    return SHORTEST <= len(text.split()) <= LONGEST and re.fullmatch(r"[A-Za-z ,.;:!?'-]+", text) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wordnet", type=Path)
    parser.add_argument("cuts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lines", type=int, default=12000, help="of WordNet")
    args = parser.parse_args()
    found = {" ".join(text.split()) for text in examples(args.wordnet)}
    order = sorted(filter(usable, found), key=lambda text: hashlib.sha256(text.encode()).digest())
    said = [text for text in dict.fromkeys(lines_of(args.cuts)) if usable(text)]
    mixed = sorted(order[: args.lines] + said, key=lambda text: hashlib.sha256(text.encode()).digest())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(f"{text}\n" for text in mixed), encoding="utf-8")
    print(f"{args.out}: {len(mixed)} sentences, {len(said)} of them from {args.cuts}")


if __name__ == "__main__":
    main()
