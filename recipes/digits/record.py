"""The short recordings that tests use, with their words and times: `python record.py FOLDER`."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import soundfile
from speech import RARE, RATE, Voice, joined, require, speak

LINES = (
    ("one two three four five six", Voice("flite", "slt")),
    ("seven eight nine zero", Voice("flite", "rms")),
    ("call john, please", Voice("flite", "awb")),
    ("call hannah, call anna", Voice("flite", "slt", 1.1)),
    ("turn right, go on, stop", Voice("flite", "rms", 1.1)),
    ("yes, thank you, aaron", Voice("flite", "slt", 1.0, 0.85)),
    ("nine nine one, five zero", Voice("flite", "awb", 0.95)),
    ("no, go left, play three", Voice("flite", "rms", 1.0, 1.15)),
    ("call mark, two two four", Voice("flite", "kal16", 1.25)),
    ("six, one eight", Voice("espeak-ng", "en-us+f2")),
    ("please call anna", Voice("espeak-ng", "en-gb+m3")),
    ("seven three, yes", Voice("espeak-ng", "en-gb+f4")),
    ("call jon, please", Voice("flite", "slt")),
    ("please call marc", Voice("flite", "rms")),
)


def main() -> None:
    """A FLAC file for each line, and `transcripts.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    require()
    folder.mkdir(parents=True, exist_ok=True)
    entries, silence = [], np.zeros(RATE // 5, np.int16)
    for number, (said, voice) in enumerate(LINES):
        text = said.replace(",", "")
        told = voice.engine == "flite"  # where the words lie; those of the other are spoken one by one
        spoken = speak(said, voice) if told else joined(text, voice, chance=random.Random(number))
        assert spoken.words is not None, text
        name = f"{number:02d}.flac"
        soundfile.write(folder / name, np.concatenate([spoken.samples, silence]), RATE, subtype="PCM_16")
        words = [
            {"word": word, "start": start, "end": end}
            for word, (start, end) in zip(text.split(), spoken.words, strict=True)
        ]
        rare = any(word in RARE for word in text.split())
        entries.append({"file": name, "text": text, "voice": str(voice), "rare": rare, "words": words})
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (folder / "transcripts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
