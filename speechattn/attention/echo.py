"""Echo multi-scale attention: windows of several sizes beside the attention of the model, and a gate between them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import reduce

import torch
from torch import nn

from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position
from speechattn.attention.self_attention import SelfAttention
from speechattn.frames import Frames
from speechattn.linear import run
from speechattn.stream import Parallel, Pointwise, Serial, Stream
from speechattn.stream.parallel import both

__all__ = ["EchoAttention", "Gated", "Scale", "Together"]


USUAL = (Span.sliding(3), Span.sliding(15), Span.sliding(63))  # frames behind


class Scale(SelfAttention):
    """Self-attention within a window of its own, whatever span is set around it."""

    def scaled(self, span: Pattern) -> Pattern:
        return self.span


class Together(Parallel):
    """The sum of two streams."""

    def combine(self, first: Frames, second: Frames) -> Frames:
        return both(first.values + second.values, first, second)


class Gated(Parallel):
    """y = g * x + (1 - g) * e / n, where g = sigmoid(W [x; e / n]) for each feature; e is the sum of n scales."""

    def __init__(self, first: Stream, second: Stream, *, dim: int, scales: int = 1) -> None:
        super().__init__(first, second)
        self.scales = scales
        self.gate = nn.Linear(2 * dim, dim)

    def combine(self, first: Frames, second: Frames) -> Frames:
        x, echo = first.values, second.values / self.scales
        gate = run(self.gate, torch.cat([x, echo], -1)).sigmoid()
        return both(gate * x + (1 - gate) * echo, first, second)


class EchoAttention(Serial):
    """Self-attention with an echo: the mean of attentions in `windows`, chosen by a gate (arXiv 2309.07765).

    With a gate of 1 it is the self-attention alone, bit for bit; windows that hold the utterance are full attention.
    Each window is a span, and no span set from outside changes it; what one looks ahead adds to the latency. By default
    they look 3, 15 and 63 frames back. They have weights of their own, and copies of `position`.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        norm: nn.Module | None = None, dropout: float = 0.0, windows: Sequence[Span] | None = None,
    ) -> None:  # fmt: skip
        windows = USUAL if windows is None else windows
        if not windows:
            raise ValueError("no windows: an echo needs at least one")
        main = SelfAttention(dim, heads, span, position=position, key_heads=key_heads, dropout=dropout)
        scales: list[Stream] = [
            Scale(dim, heads, window, position=deepcopy(position), key_heads=key_heads, dropout=dropout)
            for window in windows
        ]
        before = {} if norm is None else {"norm": Pointwise(norm)}
        super().__init__(**before, echo=Gated(main, reduce(Together, scales), dim=dim, scales=len(scales)))
