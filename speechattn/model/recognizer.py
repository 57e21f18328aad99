"""A recogniser that streams: front-end, encoder, heads, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechattn.audio.resample import Samples
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.decoder.letters import Letters, OwnTokens
from speechattn.decoder.transducer import Transducer
from speechattn.encoder import Encoder
from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames
from speechattn.live.transcript import Transcript, transcribe
from speechattn.model.searches import BONUS, HEARING, LETTERS, SEARCHES, SOURCE, possible
from speechattn.model.window import WindowRecognizer
from speechattn.policy.adaptive import WordCounter
from speechattn.search import Search
from speechattn.search.aligned import AlignedGreedy
from speechattn.search.phrases import Phrases
from speechattn.stream import Pointwise, Serial, Stream
from speechattn.text.pieces import Pieces, spelled

__all__ = ["Recognizer"]

HEADS = {SOURCE, LETTERS, *(head for kind in SEARCHES.values() for head in kind.needs)}
WIDEST = 1000  # hypotheses
SPIKE = 0.1  # a label less probable than this is none (arXiv 2107.07509, section 3)


class Cast(nn.Module):
    """To the type of the encoder's weights; they are not a part of this."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = (encoder,)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, T, F]."""
        return x.to(next(self.encoder[0].parameters()).dtype)


class Recognizer(nn.Module):
    """Sound -> words. `heads` are those of `ctc`, `attention` and `transducer` that it has.

    `language` is what it hears, and what it says but for a translator, which says `target_language`; `spaceless` is
    about what it says.

    Every search works on the frames of `listening`, which is front-end and encoder one after the other; so whoever
    has one of the heads can recognise, live and offline, with the same code.
    """

    def __init__(
        self, front_end: Stream, encoder: Stream, heads: Mapping[str, nn.Module], tokenizer: Pieces, *,
        sample_rate: int = 16000, language: str | None = None, target_language: str | None = None,
        spaceless: bool = False, config: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        unknown = sorted(heads.keys() - HEADS)
        if unknown or not heads:
            raise ModelError(f"heads: {', '.join(unknown) or 'none'}; wanted one of {', '.join(sorted(HEADS))}")
        self.front_end, self.encoder, self.heads = front_end, encoder, nn.ModuleDict(heads)
        parts = front_end.members if isinstance(front_end, Serial) else [front_end]
        before = Serial(*parts, Pointwise(Cast(encoder)))
        body = encoder.listening(before) if isinstance(encoder, Encoder) else Serial(before, encoder)
        self.body = (body,)  # in a tuple: its weights have names already
        self.tokenizer, self.config = tokenizer, config
        self.sample_rate, self.spaceless = sample_rate, spaceless
        self.language, self.target_language = language, target_language

    @property
    def translates(self) -> bool:
        """Its text is a translation: a language is named for it, or a head `source` says what was said."""
        return self.target_language is not None or SOURCE in self.heads

    @property
    def listening(self) -> Stream:
        """Samples [B, N] -> encoder frames [B, T, D]."""
        return self.body[0]

    @property
    def frame_s(self) -> float:
        """Seconds of sound for each frame of the encoder."""
        return float(1 / (self.listening.plan().ratio * self.sample_rate))

    @property
    def ctc(self) -> CTC:
        """The CTC head; InputError where there is none."""
        head = dict(self.heads).get("ctc")
        if not isinstance(head, CTC):
            raise InputError(f"this needs a CTC head; the model has {', '.join(self.heads)}")
        return head

    @property
    def speller(self) -> tuple[CTC, Pieces]:
        """Who can tell when a text was said, and its tokens: the CTC head, or that of letters; InputError for none."""
        letters = dict(self.heads).get(LETTERS)
        if "ctc" not in self.heads and isinstance(letters, Letters):
            return letters, letters.pieces
        return self.ctc, self.tokenizer

    @property
    def counter(self) -> WordCounter | None:
        """Who counts the words that were said: a CTC head `source`, that of letters, or `ctc`; None where none hears.

        The head `ctc` of a translator says the translation.
        """
        heads = dict(self.heads)
        names = (SOURCE, LETTERS) if self.translates else (SOURCE, LETTERS, "ctc")
        name = next((name for name in names if name in heads), "")
        head = heads.get(name)
        if not isinstance(head, CTC):
            return None
        return WordCounter(head, head.pieces if isinstance(head, OwnTokens) else self.tokenizer, self.spaceless)

    def cast(self, dtype: torch.dtype) -> Recognizer:
        """Weights of this type; the front-end is never less exact than float32."""
        self.to(dtype)
        self.front_end.to(dtype if dtype == torch.float64 else torch.float32)
        return self

    def sound(self, samples: Samples) -> Tensor:
        """Samples [N] where the front-end is, and as exact [1, N]."""
        like = next(self.encoder.parameters())
        exact = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.from_numpy(samples)[None].to(like.device, exact)

    def search(
        self, kind: str | None = None, *, beam_size: int = 10, phrases: Sequence[str] | None = None,
        bonus: float | None = None,
    ) -> Search:  # fmt: skip
        """A search over encoder frames: one of `SEARCHES`; None: the first that the heads allow.

        `phrases` are preferred by `bonus`, a log-probability for each token (None: the search's own); with an empty
        list there are none yet, and a session can `prefer` some later. InputError for what cannot be done.
        """
        known = possible(self.heads, streams=self.listening.plan().block is not None)
        kind = known[0] if kind is None and known else str(kind)
        if kind not in known:
            raise InputError(f"search {kind}: this model's heads allow {', '.join(known) or 'none'}")
        if not isinstance(beam_size, int) or not 1 <= beam_size <= WIDEST:
            raise InputError(f"beam size {beam_size}: a whole number from 1 to {WIDEST}")
        bonus = BONUS.get(kind, 1.5) if bonus is None else bonus
        if not isfinite(bonus):
            raise InputError(f"bonus {bonus}: wanted a finite number")
        book = None
        if phrases is not None:
            book = Phrases.from_text(phrases, self.tokenizer, bonus=bonus, vocab=self.tokenizer.size)
            if self.spaceless:  # no mark will say that a word has ended
                tokens = [s for phrase in spelled(phrases, self.tokenizer) for s in phrase.spellings]
                book = Phrases(tokens, bonus=bonus, vocab=self.tokenizer.size)
                book.lines = tuple(phrases)
        try:
            search = SEARCHES[kind].make(self.heads, self.tokenizer, beam_size, book)
        except ValueError as error:
            raise InputError(f"search {kind}: {error}") from error
        return search.translating() if self.translates and isinstance(search, AlignedGreedy) else search

    def blank(self, frames: Frames) -> Tensor:
        """Where nothing is said [B, T] bool, as a CTC head hears it (first that of letters), or else the transducer."""
        head = next((self.heads[name] for name in HEARING if name in self.heads), None)
        if not isinstance(head, CTC | Transducer):
            has = ", ".join(self.heads)
            raise InputError(f"no head hears where nobody speaks, as CTC or a transducer does: {has}")
        scores = head.begins(frames) if isinstance(head, Transducer) else head(frames).values
        best, label = scores.max(-1)
        nothing: Tensor = (label == head.blank) | (best.exp() < SPIKE)
        return nothing

    def windowed(self) -> WindowRecognizer | None:
        """How this model listens while its encoder needs the whole utterance: with its attention decoder, if any.

        Else with that of monotonic heads.
        """
        heads, end = dict(self.heads), self.tokenizer.end
        decoder = heads.get("attention", heads.get("monotonic"))
        if not isinstance(decoder, AttentionDecoder) or end is None:
            return None
        return WindowRecognizer(
            self.front_end, self.encoder, decoder, self.tokenizer, end=end, sample_rate=self.sample_rate,
            spaceless=self.spaceless, never=sorted(self.tokenizer.special - {end}), counter=self.counter,
            translates=self.translates,
        )  # fmt: skip

    def transcribe(self, sound: str | Path | Samples, **options: Any) -> Transcript:
        """The words of a recording (a path, or samples at the model's rate); `options` are those of `Session`."""
        return transcribe(self, sound, **options)
