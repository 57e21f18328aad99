"""What a session needs of a model: samples in, decisions out. Two kinds of model listen in two ways.

`StreamModel`: an encoder that goes on from where it was, and a search that goes with it. `WindowModel`: an encoder
that reads a window of sound again at every look (Whisper), and a policy that says how much of a draft is safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from speechattn.audio.resample import Samples
from speechattn.decoder.attention import Head
from speechattn.frames import Frames, Memory
from speechattn.live.events import Trace, Word
from speechattn.policy import Policy
from speechattn.search import Draft, Search
from speechattn.search.leaning import Leaning
from speechattn.search.phrases import Phrases
from speechattn.stream import Stream

__all__ = ["Decision", "Listener", "Model", "StreamModel", "Tokens", "WindowModel"]


class Tokens(Protocol):
    """Ids and text."""

    def encode(self, text: str) -> list[int]:
        """Text -> ids."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens."""

    def words(self, tokens: Sequence[int], *, spaceless: bool = False) -> list[int]:
        """How many tokens each word has; they add up to all tokens."""


class Model(Protocol):
    """What both kinds have. A frame is one step of the encoder's output."""

    @property
    def sample_rate(self) -> int:
        """Samples a second that it wants."""

    @property
    def frame_s(self) -> float:
        """Seconds of sound in a frame."""

    @property
    def tokenizer(self) -> Tokens:
        """Ids and text."""

    @property
    def spaceless(self) -> bool:
        """The language is written without spaces."""


@runtime_checkable
class StreamModel(Model, Protocol):
    """Samples to frames by a stream, frames to hypotheses by a search."""

    @property
    def listening(self) -> Stream:
        """Samples [B, N] -> encoder frames [B, T, D]."""

    def windowed(self) -> WindowModel | None:
        """The same model, where its encoder cannot stream but an attention decoder can follow it."""

    def sound(self, samples: Samples) -> Tensor:
        """Samples [N] as `listening` wants them [1, N]."""

    def search(self, *, phrases: Sequence[str] | None = None) -> Search:
        """The model's own choice, over encoder frames; one that prefers `phrases`, if only an empty list."""

    def blank(self, frames: Frames) -> Tensor:
        """Where nothing is said [B, T] bool, as the model hears it."""


@runtime_checkable
class WindowModel(Model, Protocol):
    """Sound in, memory and drafts out: `front_end`, `encode`, `draft`."""

    def policy(self) -> Policy:
        """How much of a draft is safe, where nobody says."""

    max_s: float  # the longest piece of sound it can encode
    alignment_heads: tuple[Head, ...]
    decoder_size: tuple[int, int]  # layers, heads in each
    translates: bool  # its words do not stand in the order of the sound

    @property
    def front_end(self) -> Stream:
        """Samples [B, N] -> features [B, T, F]; float32, where the sound is."""

    def encode(self, features: Tensor, *, samples: int, start: int = 0, finished: bool = False) -> Memory:
        """Features of so many `samples` and of the silence behind them, as `Hearing` reads them -> memory [1, T, D]."""

    def draft(
        self, memory: Memory, committed: Sequence[int], *, guess: Sequence[int] = (), context: Sequence[int] = (),
        heads: tuple[Head, ...] = (), frames: int | None = None, max_tokens: int = 224, first: int = 0,
        leaning: Leaning | None = None,
    ) -> Draft:  # fmt: skip
        """Continue `committed` over the memory; `context` is text that was said before the memory begins. It may be
        `leaning` towards phrases of a book that `phrases` gave.
        """

    def phrases(self, bonus: float) -> Phrases | None:
        """An empty book of phrases, each token of which is worth `bonus`; None where there can be none."""


@dataclass(frozen=True)
class Decision:
    """What one look at the sound led to; `final` where it ends an utterance."""

    words: tuple[Word, ...] = ()
    unstable: str = ""
    withheld: str = ""
    final: bool = False
    trace: Trace | None = None
    terms: tuple[str, ...] = ()


class Listener(Protocol):
    """Sound of one stream at the model's rate -> decisions.

    Laws: the decisions do not depend on how the sound was cut into pieces; memory and the time of a step are bounded.
    """

    @property
    def heard(self) -> int:
        """Samples that were listened to."""

    def hear(self, samples: Samples) -> Iterator[Decision | None]:
        """More sound [n]. Comes back after every piece of work, with what it led to or None."""

    def finish(self) -> Iterator[Decision | None]:
        """No more sound: what remains is decided."""
