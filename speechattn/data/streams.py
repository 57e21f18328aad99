"""Clips joined into long streams, with the word ends that lag is measured against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from speechattn.audio.resample import Samples
from speechattn.data.fotaq import RATE, Line
from speechattn.score.lag import Heard, lag_words

__all__ = ["WORD_ENDS", "Stream", "join", "read_word_ends"]

WORD_ENDS = Path(__file__).with_name("fotaq_word_ends.jsonl")

SHORTEST_GAP_S, LONGEST_GAP_S = 0.2, 0.8  # pauses between turns of a conversation


@dataclass(frozen=True)
class Stream:
    """`samples` [n] at 16 kHz of clips joined in order, and the second at which each clip begins."""

    name: str
    samples: Samples
    lines: tuple[Line, ...]
    starts_s: tuple[float, ...]

    @property
    def text(self) -> str:
        """What the script says, clip after clip."""
        return " ".join(line.text for line in self.lines)

    @property
    def duration_s(self) -> float:
        """Length of the stream."""
        return len(self.samples) / RATE

    def heard(self, ends: dict[str, list[float]]) -> list[Heard]:
        """Every word of the clips that could be aligned, with its end in the stream."""
        return [
            Heard(word, start + end)
            for line, start in zip(self.lines, self.starts_s, strict=True)
            if line.name in ends
            for word, end in zip(lag_words(line.text), ends[line.name], strict=True)
        ]


def join(name: str, lines: Sequence[Line], *, seed: int = 0) -> Stream:
    """Clips one after the other with silent gaps of 0.2 to 0.8 s; the same seed gives the same stream."""
    rng = np.random.default_rng(seed)
    pieces: list[Samples] = []
    starts, at = [], 0
    for line in lines:
        sound = soundfile.read(line.path, dtype="float32")[0]
        gap = np.zeros(round(rng.uniform(SHORTEST_GAP_S, LONGEST_GAP_S) * RATE), np.float32)
        starts.append(at / RATE)
        pieces += [sound, gap]
        at += len(sound) + len(gap)
    return Stream(name, np.concatenate(pieces), tuple(lines), tuple(starts))


def read_word_ends(path: Path = WORD_ENDS) -> dict[str, list[float]]:
    """Clip -> word ends in seconds, as `benchmarks/align_fotaq.py` wrote them (dev and test split)."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row["ends"] for row in rows}
