"""What the live session needs of a model, and how to get one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from speechattn.decoder.attention import Head
from speechattn.errors import ModelError
from speechattn.frames import Memory
from speechattn.search import Draft
from speechattn.stream import Stream
from speechattn.text.tokenizer import Tokenizer

__all__ = ["Model", "load_model"]


class Model(Protocol):
    """Sound in, memory and drafts out: `front_end`, `encode`, `draft`. A frame is one step of the encoder's output."""

    sample_rate: int
    frame_s: float
    max_s: float  # the longest piece of sound it can encode
    alignment_heads: tuple[Head, ...]
    decoder_size: tuple[int, int]  # layers, heads in each
    tokenizer: Tokenizer

    @property
    def spaceless(self) -> bool:
        """The language is written without spaces."""

    @property
    def front_end(self) -> Stream:
        """Samples [B, N] -> features [B, T, F]; float32, where the sound is."""

    def encode(self, features: Tensor, *, samples: int, start: int = 0, finished: bool = False) -> Memory:
        """Features of so many `samples` and of the silence behind them, as `Hearing` reads them -> memory [1, T, D]."""

    def draft(
        self, memory: Memory, committed: Sequence[int], *, guess: Sequence[int] = (), context: Sequence[int] = (),
        heads: tuple[Head, ...] = (), frames: int | None = None, max_tokens: int = 224, first: int = 0,
    ) -> Draft:  # fmt: skip
        """Continue `committed` over the memory; `context` is text that was said before the memory begins."""


def load_model(
    name: str = "tiny.en", *, device: str = "cpu", dtype: str = "float32", language: str | None = None,
    task: str = "transcribe", pad_s: float | None = None,
) -> Model:  # fmt: skip
    """A model by name (`tiny.en`, `large-v3`) or path; ModelError says what was looked for and what to do.

    `pad_s` is the silence that follows the sound into the encoder; None is the measured default.
    """
    from speechattn.pretrained.whisper import load

    if dtype not in ("float32", "float16", "bfloat16"):
        raise ModelError(f"dtype {dtype}: wanted float32, float16 or bfloat16")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return load(name, device=place, dtype=getattr(torch, dtype), language=language, task=task, pad_s=pad_s)
