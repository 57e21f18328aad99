"""Models that read a window of sound again at every look: any encoder with an attention decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from speechattn.cross.monotonic import Monotonic
from speechattn.cross.soft import Soft
from speechattn.decoder.attention import AttentionDecoder, DecoderState, Head
from speechattn.frames import Frames, Memory
from speechattn.live.listener import Tokens
from speechattn.policy import Policy
from speechattn.policy.adaptive import WordCounter
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.monotonic import Stopped
from speechattn.search import Draft
from speechattn.search.greedy import Greedy
from speechattn.search.leaning import Leaning
from speechattn.search.phrases import Phrases, beginnings
from speechattn.stream import Stream
from speechattn.text.pieces import Pieces

__all__ = ["Window", "WindowRecognizer"]

LONGEST_S = 30.0


class Window:
    """A `WindowModel` but for its encoder: greedy search of an attention decoder over the memory of a window.

    A subclass gives `encode`; `prompt` and `behind` where there is more to them.
    """

    sample_rate: int
    frame_s: float
    max_s: float
    alignment_heads: tuple[Head, ...]
    front_end: Stream
    spaceless: bool
    translates: bool = False

    def __init__(self, decoder: AttentionDecoder, tokenizer: Tokens, search: Greedy) -> None:
        self.decoder, self.tokenizer, self.greedy = decoder, tokenizer, search
        self.decoder_size = len(decoder.layers), decoder.heads

    def policy(self) -> Policy:
        """How much of a draft is safe, where nobody says."""
        raise NotImplementedError

    def encode(self, features: Tensor, *, samples: int, start: int = 0, finished: bool = False) -> Memory:
        """Features of so many `samples` and of the silence behind them, as `Hearing` reads them -> memory [1, T, D]."""
        raise NotImplementedError

    def prompt(self, memory: Memory, context: Sequence[int]) -> list[int]:
        """What the decoder reads before the text; `context` was said before the memory begins."""
        raise NotImplementedError

    def behind(self) -> DecoderState | None:
        """What the decoder finds behind the memory."""
        return None

    def phrases(self, bonus: float) -> Phrases | None:
        """An empty book of phrases, each token of which is worth `bonus`; None where a text cannot be taken back."""
        if not all(isinstance(layer.cross, Soft) for layer in self.decoder.layers):
            return None
        begins = None if self.spaceless else beginnings(self.tokenizer)
        return Phrases(bonus=bonus, vocab=self.decoder.vocab, begins=begins)

    def draft(
        self, memory: Memory, committed: Sequence[int], *, guess: Sequence[int] = (), context: Sequence[int] = (),
        heads: tuple[Head, ...] = (), frames: int | None = None, max_tokens: int = 224, first: int = 0,
        leaning: Leaning | None = None,
    ) -> Draft:  # fmt: skip
        """Continue `committed` over the memory, greedily."""
        return self.greedy.draft(
            memory, self.prompt(memory, context), committed, behind=self.behind(), guess=guess, heads=heads,
            frames=frames, max_tokens=max_tokens, first=first, leaning=leaning,
        )  # fmt: skip


class Spaced:
    """`Pieces` whose text begins with a space where a word does, so that texts of words can be joined."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces

    @property
    def unknown(self) -> int | None:
        """What stands for text that cannot be spelled."""
        return self.pieces.unknown

    @property
    def begins(self) -> tuple[bool, ...]:
        """Which tokens begin a word."""
        return self.pieces.begins

    def encode(self, text: str) -> list[int]:
        """Text -> ids."""
        return self.pieces.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens."""
        text = self.pieces.decode(tokens)
        return f" {text}" if text and self.pieces.space and self.pieces.begins[tokens[0]] else text

    def words(self, tokens: Sequence[int], *, spaceless: bool = False) -> list[int]:
        """How many tokens each word has."""
        return self.pieces.words(tokens, spaceless=spaceless)


class WindowRecognizer(Window):
    """A recogniser whose encoder needs the whole utterance, listening in windows with its attention decoder.

    `end` is its start and end of sentence; tokens in `never` are not said. Words are placed by the heads of the middle
    layer, and committed by AlignAtt (arXiv 2305.11408) on the same, or where monotonic heads have stopped. `counter`
    counts the words that a CTC head hears.
    """

    max_s = LONGEST_S

    def __init__(
        self, front_end: Stream, encoder: Stream, decoder: AttentionDecoder, tokenizer: Pieces, *, end: int,
        sample_rate: int, spaceless: bool = False, never: Sequence[int] = (), counter: WordCounter | None = None,
        translates: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(decoder, Spaced(tokenizer), Greedy(decoder, end, suppress=never))
        self.front_end, self.encoder, self.end = front_end, encoder, end
        self.sample_rate, self.spaceless, self.translates = sample_rate, spaceless, translates
        self.ratio = front_end.plan().ratio
        self.frame_s = float(1 / (self.ratio * encoder.plan().ratio * sample_rate))
        self.alignment_heads, self.counter = decoder.alignment_heads, counter

    def policy(self) -> Policy:
        if any(isinstance(layer.cross, Monotonic) for layer in self.decoder.layers):
            return Stopped()
        return replace(AlignAtt.fbk(0, 1), heads=self.alignment_heads)

    @torch.inference_mode()
    def encode(self, features: Tensor, *, samples: int, start: int = 0, finished: bool = False) -> Memory:
        frames = min(ceil(samples * self.ratio), features.shape[1])
        like = next(self.encoder.parameters())
        x = features[:, :frames].to(like)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return Memory.of(self.encoder(Frames(x, mask)), start=start, finished=finished)

    def prompt(self, memory: Memory, context: Sequence[int]) -> list[int]:
        return [self.end, *context]
