"""A model that streams, whose every decision is known: sound that spells its own letters."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from speechattn.frames import Frames
from speechattn.search import Search
from speechattn.search.ctc import CTCPrefixBeam
from speechattn.search.phrases import Phrases
from speechattn.stream import Serial, Sliding, Stream
from speechattn.text.pieces import Pieces

RATE = 16000
FRAME = 320
BLOCK = 8  # frames a step
LETTERS = Pieces(["<blank>", "▁", *"abcdefghijklmnopqrstuvwxyz"])


class Levels(Sliding):
    """The loudest sample of each 20 ms says which letter it is, with 99 %: log-probabilities [B, T, V].

    Between two levels it is the lower letter with 60 % and the next one with 39 %.
    """

    def __init__(self) -> None:
        super().__init__(FRAME, FRAME, right=FRAME - 1)

    def windows(self, x: Tensor) -> Tensor:
        level = x.unfold(1, FRAME, FRAME).amax(-1) * 50
        token = (level + 0.1).floor().long()
        unsure = (level - token > 0.2)[..., None]
        shares = torch.full((*token.shape, LETTERS.size), 0.01 / (LETTERS.size - 1), dtype=x.dtype)
        sure = shares.scatter(2, token[..., None], 0.99)
        other = shares.scatter(2, token[..., None], 0.6).scatter(2, (token[..., None] + 1) % LETTERS.size, 0.39)
        return torch.where(unsure, other, sure).log()


@dataclass
class Speller:
    """Letters of 60 ms with 20 ms of nothing behind each."""

    sample_rate: int = RATE
    frame_s: float = FRAME / RATE
    spaceless: bool = False
    tokenizer: Pieces = LETTERS
    listening: Stream = field(default_factory=lambda: Serial(Levels(), Chunked(BLOCK)))
    size: int = 4
    phrases: Phrases | None = None

    def windowed(self) -> None:
        return None

    def sound(self, samples: np.ndarray) -> Tensor:
        return torch.from_numpy(samples)[None]

    def search(self) -> Search:
        return CTCPrefixBeam(self.size, phrases=self.phrases)

    def blank(self, frames: Frames) -> Tensor:
        return frames.values.argmax(-1) == 0


class Chunked(Stream):
    """The same frames, a whole chunk at a time, one chunk late."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.block = self.latency = chunk

    def init_state(self, x: Frames) -> Frames:
        values = x.values.new_zeros(len(x.mask), self.latency, LETTERS.size)
        return Frames(values, torch.zeros(values.shape[:2], dtype=torch.bool))

    def step(self, x: Frames, state: Frames) -> tuple[Frames, Frames]:
        both, frames = Frames.cat([state, x]), x.mask.shape[1]
        return both[:frames], both[frames:]


def sound(text: str) -> np.ndarray:
    """`text` spoken: a digit n is n tenths of a second of silence, a space begins a word, a capital is said badly."""
    levels: list[float] = []
    for letter in text:
        if letter.isdigit():
            levels += [0] * (5 * int(letter))
        elif letter == " ":
            levels += [1, 1]
        else:
            level = LETTERS.pieces.index(letter.lower())
            levels += [level + 0.35, 0] if letter.isupper() else [level, level, level, 0]
    return np.repeat(np.array(levels, np.float32) / 50, FRAME)
