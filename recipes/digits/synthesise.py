"""Synthetic speech for training and measuring, into a cache folder: `python synthesise.py CACHE`."""

from __future__ import annotations

import argparse
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from speech import RARE, Spoken, Voice, draw_text, joined, require, speak
from tqdm import tqdm

FLITE = ("slt", "rms", "awb", "kal16")
ESPEAK = tuple(f"{accent}+{kind}" for accent in ("en-us", "en-gb") for kind in ("m1", "m3", "m7", "f2", "f4", "f5"))
UNHEARD = ("en-gb-x-rp+m4", "en-us+f3", "en-gb-scotland+m2")  # voices that training never hears
STRETCHES = (0.95, 1.05, 1.15, 1.3, 1.5)
EXTREME = (0.85, 1.75)  # speeds that training never hears
SIZES = {"train": 5000, "seen": 300, "speed": 300, "voice": 300, "rare": 60}


def draw_voice(split: str, chance: random.Random) -> Voice:
    """Two of three utterances are flite's, whose voices come from recordings of people."""
    stretch = chance.choice(EXTREME if split == "speed" else STRETCHES)
    pitch = chance.choice((0.85, 1.0, 1.15))
    if split == "voice":
        return Voice("espeak-ng", chance.choice(UNHEARD), stretch, pitch)
    if chance.random() < 0.67:
        return Voice("flite", chance.choice(FLITE), stretch, pitch)
    return Voice("espeak-ng", chance.choice(ESPEAK), stretch, pitch)


def one(split: str, number: int) -> Spoken:
    """Utterance `number` of a split; it depends on nothing else."""
    chance = random.Random(f"{split} {number}")
    voice = draw_voice(split, chance)
    if split == "rare":
        text = f"call {sorted(RARE)[number % len(RARE)]} " + draw_text(chance, rare=0)
        return speak(" ".join(text.split()[:5]), voice, chance=chance)
    text = draw_text(chance, rare=0.04 if split == "train" else 0)
    if chance.random() < 0.15:
        return joined(text, voice, chance=chance)
    return speak(text, voice, chance=chance)


def main() -> None:
    """Write `SPLIT.npy` (all samples in a row) and `SPLIT.json` (where each utterance lies, and what is known)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    require()
    args.cache.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        with ThreadPoolExecutor(args.jobs) as pool:
            made = pool.map(lambda number, split=split: one(split, number), range(size))
            spoken = list(tqdm(made, total=size, desc=split))
        ends = np.cumsum([len(s.samples) for s in spoken]).tolist()
        entries = [
            {"start": end - len(s.samples), "end": end, "text": s.text, "voice": str(s.voice), "words": s.words}
            for s, end in zip(spoken, ends, strict=True)
        ]
        np.save(args.cache / f"{split}.npy", np.concatenate([s.samples for s in spoken]))
        (args.cache / f"{split}.json").write_text(json.dumps(entries))


if __name__ == "__main__":
    main()
