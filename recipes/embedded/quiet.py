"""Sound in which nobody speaks, for training: a part `train` of the corpus `quiet`, with empty texts.

    python recipes/embedded/quiet.py data/quiet

A third each of hiss between -90 and -50 dB, of noise between white and brown at -45 to -20 dB, and of music of the game
SuperTux at -35 to -12 dB (a package of Debian, GPL-2+; in no test set). Whisper itself says "you" of such sound.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sources import SOURCES, fetch

from speechattn.audio.resample import Samples
from speechattn.data.prepare.manifests import Utterance, write_manifests
from speechattn.data.prepare.sound import RATE, whole

CLIPS, SHORTEST_S, LONGEST_S = 480, 2.0, 9.0
LEVELS = {"hiss": (-90.0, -50.0), "noise": (-45.0, -20.0), "music": (-35.0, -12.0)}  # decibels


@dataclass(frozen=True)
class Clip:
    """Clip `n`, a function of the number and the pieces of music alone."""

    n: int
    pieces: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """One of `LEVELS`, in turn."""
        return list(LEVELS)[self.n % len(LEVELS)]

    def __call__(self) -> Samples:
        """Samples [N]."""
        rng = np.random.default_rng([8, self.n])
        size = round(rng.uniform(SHORTEST_S, LONGEST_S) * RATE)
        if self.kind == "music":
            piece = whole(self.pieces[rng.integers(len(self.pieces))])
            first = int(rng.integers(max(1, len(piece) - size)))
            x = piece[first : first + size]
        else:
            slope = 0.0 if self.kind == "hiss" else rng.uniform(0, 1)
            x = np.fft.irfft(np.fft.rfft(rng.standard_normal(size)) * np.arange(size // 2 + 1).clip(1) ** -slope, size)
        level = 10 ** (rng.uniform(*LEVELS[self.kind]) / 20)
        return np.clip(level * x / max(1e-9, float(np.sqrt(np.mean(x**2)))), -1, 1).astype(np.float32)


def clips(folder: Path) -> Iterator[Utterance]:
    """All of them; the music is fetched into the folder."""
    pieces = tuple(sorted((fetch(SOURCES["supertux-data"], folder) / "files").rglob("music/**/*.ogg")))
    for n in range(CLIPS):
        clip = Clip(n, pieces)
        yield Utterance(f"quiet-{n}", clip, "", clip.kind, "en", custom={"sound": clip.kind})


def main(folder: Path) -> None:
    """Write them into the folder."""
    print(write_manifests(folder, "quiet", "train", clips(folder), total=CLIPS))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
