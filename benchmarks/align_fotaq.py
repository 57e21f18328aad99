"""Word ends of the Flight of the Amazon Queen dev and test clips, by forced alignment of the script.

The aligner (pocketsphinx with the English model it ships) shares nothing with the recogniser whose lag is measured.
Writes, for each clip, its name, and the end in seconds of each word of `lag_words(text)`. Clips that
cannot be aligned are left out and counted.

    python benchmarks/align_fotaq.py speechattn/data/fotaq_word_ends.jsonl
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import soundfile
from pocketsphinx import Decoder

from speechattn.data.fotaq import Line, default_folder, prepare, read_split
from speechattn.score.lag import lag_words

# A rough phone for each letter: for the few words that the dictionary lacks, good enough to find where they end.
PHONES = "AE B K D EH F G HH IH JH K L M N AA P K R S T AH V W K Y Z"
LETTERS = dict(zip("abcdefghijklmnopqrstuvwxyz", PHONES.split(), strict=True))
SILENCE_S = 0.5  # around each clip: the aligner wants to start and end in silence, the clips are cut tight


def align(decoder: Decoder, line: Line) -> list[float] | None:
    """End of each word in seconds, or None when the script does not fit the sound."""
    words = lag_words(line.text)
    for word in words:
        if decoder.lookup_word(word) is None:
            phones = " ".join(LETTERS[letter] for letter in word if letter in LETTERS)
            if not phones:
                return None
            decoder.add_word(word, phones, True)
    sound = soundfile.read(line.path, dtype="int16")[0]
    hush = np.random.default_rng(0).integers(-8, 9, round(SILENCE_S * 16000)).astype(np.int16)
    decoder.set_align_text(" ".join(words))
    decoder.start_utt()
    decoder.process_raw(np.concatenate([hush, sound, hush]).tobytes(), full_utt=True)
    decoder.end_utt()
    if decoder.hyp() is None:
        return None
    rate = decoder.config["frate"]
    found = [
        (s.word.split("(")[0], (s.end_frame + 1) / rate - SILENCE_S) for s in decoder.seg() if s.word[0] not in "<[+"
    ]
    return [min(end, line.duration_s) for _, end in found] if [word for word, _ in found] == words else None


def main() -> None:
    """Align, write, count."""
    logging.disable()
    folder = prepare(default_folder(), ("dev", "test"))
    decoder = Decoder(lm=None, loglevel="FATAL")
    rows, failed = [], 0
    for split in ("dev", "test"):
        for line in read_split(folder, split):
            ends = align(decoder, line) if lag_words(line.text) else []
            failed += ends is None
            if ends is not None:
                rows.append({"id": line.name, "ends": [round(end, 2) for end in ends]})
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} clips aligned, {sum(len(row['ends']) for row in rows)} words; {failed} clips could not be")


if __name__ == "__main__":
    main()
