"""Sentences of the GRID corpus's grammar, to be spoken: command, colour, preposition, letter, digit, adverb.

    python -m recipes.av.commands FOLDER

61,440 sentences can be said (Cooke et al., 2006, has 25 letters; here without `a`, which voices read as an article).
They are drawn without repetition, so no sentence of `train.txt` is one of `dev.txt` or `test.txt`. All words stand
in all parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

SLOTS = (
    ("bin", "lay", "place", "set"), ("blue", "green", "red", "white"), ("at", "by", "in", "with"),
    tuple("bcdefghijklmnopqrstuvxyz"),
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ("again", "now", "please", "soon"),
)  # fmt: skip
SIZES = {"train": 3000, "dev": 200, "test": 300}


def parts(seed: int = 0) -> dict[str, list[str]]:
    """Sentences of each part."""
    sentences = [" ".join(words) for words in product(*SLOTS)]
    order = np.random.default_rng(seed).permutation(len(sentences))
    found, at = {}, 0
    for name, size in SIZES.items():
        found[name] = [sentences[i] for i in order[at : at + size]]
        at += size
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in parts().items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
