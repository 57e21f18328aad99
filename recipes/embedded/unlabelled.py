"""Manifests of the recordings of FOTAQ that no dialogue names, as far as their voice is the hero's: part `unlabelled`.

    python recipes/embedded/unlabelled.py data/fotaq

The hero's voice is training data, so nothing of a character of the dev or test part is in it: his remarks (`JOE...`)
and his lines (`J` behind the number of the line) that are in no dialogue. Who speaks in the cutaways (`C...`) is not
known, so they stay out. Distillation asks for no texts; the manifests say "?" in their place.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from speechattn.data.fotaq import SHA256, Clip, Game, fetch
from speechattn.data.prepare.manifests import write_manifests

HEROS = re.compile(r"JOE\w+|\d\d[0-9A-F]{4}J\d")
TEXT = "?"


def clips(game: Game) -> Iterator[Clip]:
    """What the hero says outside the dialogues."""
    known = {clip.name for clip in game.clips()}
    names = sorted(name.removesuffix(".SB") for name in game.files if name.endswith(".SB"))
    return (Clip(name, "NONE", "JOE", TEXT) for name in names if name not in known and HEROS.fullmatch(name))


def main(folder: Path) -> None:
    """Write them into the folder of the corpus."""
    game = Game(fetch(folder))
    found = list(clips(game))
    written = write_manifests(
        folder, "fotaq", "unlabelled", (game.utterance(clip) for clip in found),
        options={"source": SHA256}, total=len(found),
    )  # fmt: skip
    print(written)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
