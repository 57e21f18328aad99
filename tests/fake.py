"""A recogniser whose every decision is known: word i is said at a known time, and looked at there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from speechattn.frames import Frames, Memory
from speechattn.live import Event
from speechattn.policy import Policy
from speechattn.policy.align_att import AlignAtt
from speechattn.search import Draft
from speechattn.search.leaning import Leaning
from speechattn.search.phrases import Phrases
from speechattn.stream import Sliding, Stream

RATE = 16000
FRAME = 320


class FakeTokenizer:
    """Token n is the text " wn"; from 1000 on it is a wrong guess at a word that is still being said."""

    end_of_text = 10**6

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f" w{t}" if t < 1000 else f" cut{t - 1000}" for t in tokens)

    def words(self, tokens: Sequence[int], *, spaceless: bool = False) -> list[int]:
        return [1] * len(tokens)


class Loudness(Sliding):
    """The greatest sample of every 20 ms."""

    def __init__(self) -> None:
        super().__init__(FRAME, FRAME, right=FRAME - 1)

    def windows(self, x: Tensor) -> Tensor:
        return x.unfold(1, FRAME, FRAME).amax(-1, keepdim=True)


@dataclass
class FakeModel:
    """Says word i (0, 1, ...) once its sound has begun, wrongly until it has ended; word i ends at `ends_s[i]`.

    A token looks at the middle of its word. `loop_from` makes it repeat word 7 for ever once that time is heard.
    """

    ends_s: Sequence[float]
    word_s: float = 0.3
    loop_from_s: float | None = None
    sample_rate: int = RATE
    frame_s: float = 0.02
    max_s: float = 30.0
    alignment_heads: tuple[tuple[int, int], ...] = ((0, 0),)
    decoder_size: tuple[int, int] = (1, 1)
    spaceless: bool = False
    translates: bool = False
    front_end: Stream = field(default_factory=Loudness)
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    encoded: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)

    def phrases(self, bonus: float) -> Phrases | None:
        return None

    def policy(self) -> Policy:
        return AlignAtt.whisper(self.alignment_heads)

    def encode(self, features: Tensor, *, samples: int, start: int = 0, finished: bool = False) -> Memory:
        self.encoded.append(samples)
        n = -(-samples // FRAME)
        values = features.new_zeros(1, n, 1)
        memory = Memory.of(Frames(values, torch.ones(1, n, dtype=torch.bool)), start=start, finished=finished)
        self.end_s = (start + samples) / RATE
        return memory

    def draft(
        self, memory: Memory, committed: Sequence[int], *, guess: Sequence[int] = (), context: Sequence[int] = (),
        heads: tuple[tuple[int, int], ...] = (), frames: int | None = None, max_tokens: int = 224, first: int = 0,
        leaning: Leaning | None = None,
    ) -> Draft:  # fmt: skip
        start_s, end_s = int(memory.start[0]) / RATE, self.end_s
        self.prompts.append(len(committed) + len(context))
        inside = [
            i for i, end in enumerate(self.ends_s) if start_s <= end - self.word_s + 0.15 and end - self.word_s < end_s
        ]
        said = [i if self.ends_s[i] <= end_s else 1000 + i for i in inside]
        words = [t for t in committed if self.loop_from_s is None or t != 7]
        new = said[len(words) :] if words == said[: len(words)] else said
        looks = [
            (self.ends_s[min(t % 1000, len(self.ends_s) - 1)] - self.word_s / 2 - start_s) for t in [*committed, *new]
        ]
        if self.loop_from_s is not None and end_s > self.loop_from_s:
            new += [7] * 12
            looks += [looks[-1] if looks else 0.0] * 12
        n = memory.frames.mask.shape[1] if frames is None else frames
        weights = torch.full((1, len(looks) + 2, n), 1e-3)
        for row, look in enumerate(looks):
            distance = torch.arange(n) - min(n - 1, max(0, int(look / self.frame_s)))
            weights[0, row + 1] += (-distance.square() / 20).exp()
        weights[0, -1, -1] = 1.0
        # rows: prompt, then the look that says each committed and new token, then the look behind them
        weights = weights[:, 1:]
        weights = torch.cat([torch.full((1, 2, n), 1e-3), weights], 1)
        return Draft(torch.tensor(new, dtype=torch.long), torch.full((len(new),), -0.1), weights, heads, first, True)


@dataclass
class Reordering(FakeModel):
    """A translator: of every two words it says the second one first, each where it looks at its own sound.

    The word at position p of the text is word p ^ 1 of the sound; a word that has not ended is said wrongly.
    """

    translates: bool = True

    def draft(
        self, memory: Memory, committed: Sequence[int], *, guess: Sequence[int] = (), context: Sequence[int] = (),
        heads: tuple[tuple[int, int], ...] = (), frames: int | None = None, max_tokens: int = 224, first: int = 0,
        leaning: Leaning | None = None,
    ) -> Draft:  # fmt: skip
        start_s, end_s = int(memory.start[0]) / RATE, self.end_s
        self.prompts.append(len(committed) + len(context))
        begun = [i for i, end in enumerate(self.ends_s) if start_s <= end - self.word_s + 0.15 < end_s + 0.15]
        at = (committed[-1] ^ 1) + 1 if committed else (begun[0] if begun else 0)
        heard = list(takewhile(lambda i: i in begun, (p ^ 1 for p in count(at))))
        new = [i if self.ends_s[i] <= end_s else 1000 + i for i in heard]
        n = memory.frames.mask.shape[1] if frames is None else frames
        weights = torch.full((1, 2 + len(committed) + len(new), n), 1e-3)  # a prompt of two, and the look behind all
        for row, token in enumerate([*committed, *new]):
            middle = self.ends_s[token % 1000] - self.word_s / 2 - start_s
            distance = torch.arange(n) - min(n - 1, max(0, int(middle / self.frame_s + 1e-6)))
            weights[0, row + 1] += (-distance.square() / 20).exp()
        return Draft(torch.tensor(new, dtype=torch.long), torch.full((len(new),), -0.1), weights, heads, first, True)


def draft(n: int, **more: Any) -> Draft:
    """Tokens 0 to n - 1, of which nobody looks at anything."""
    return Draft(torch.arange(n), torch.zeros(n), torch.zeros(0, n + 1, 9), (), 0, True, **more)


def said(events: Sequence[Event]) -> str:
    """All that was committed."""
    return "".join(event.committed for event in events)
