"""Whisper's encoder as streams, with the same weights: every chunk is encoded once, or its end once more.

What makes it need 30 s is taken away: attention sees the chunk and some history (`Span`), the floor of the features is
a number instead of the loudest frame of the window, and the positions turn in a circle instead of ending.
"""

from __future__ import annotations

from math import lcm, log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.pattern import Pattern, Span
from speechattn.encoder import Encoder
from speechattn.encoder.layers import feed_forward, self_attention
from speechattn.encoder.revising import Revising
from speechattn.frames import Frames
from speechattn.pretrained.whisper.config import WhisperConfig
from speechattn.pretrained.whisper.features import FrontEnd
from speechattn.pretrained.whisper.model import SILENT_LEVEL, Whisper
from speechattn.stream import Plan, Planned, Pointwise, Residual, Serial, Sliding, Spent, Stream

__all__ = ["Convolution", "Floored", "Flow", "StreamingEncoder", "Turning", "circle", "front_end", "streaming", "turn",
           "weights"]  # fmt: skip

PERIOD = 1500  # frames of 20 ms: the 30 s that Whisper knows
LONGEST_WAVE = 10_000.0


class Floored(Stream):
    """Logarithms [B, T, mels] -> about [-1, 1], as `scaled` of sound of usual loudness: the floor is a number."""

    def __init__(self, floor: float = SILENT_LEVEL) -> None:
        super().__init__()
        self.floor = floor

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        return Frames.finite(((x.values + 4.0) / 4.0).clamp(min=self.floor), x.mask), state


def front_end(mels: int = 80) -> Serial:
    """Samples [B, N] at 16 kHz -> features [B, N / 160, mels] whose floor depends on no other frame.

    The members are `mel`, the logarithms, and `level`.
    """
    return Serial(mel=FrontEnd(mels), level=Floored())


class Convolution(Sliding):
    """A centred convolution over three frames and GELU: [B, T, D] -> [B, T / stride, D']."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(3, stride, right=1)
        self.conv = nn.Conv1d(inputs, outputs, 3, stride)

    masked = staticmethod(Frames.finite)

    def windows(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Turning(Stream):
    """Adds row `t mod period` of a table to the t-th valid frame of each row [B, T, D]: positions that never end.

    The table is Whisper's: sines in the first half of the features, cosines in the second. `first` is the row that a
    stream begins with: a training draws it (`turn`), so that a model learns every place of the circle and its seam.
    """

    table: Tensor

    def __init__(self, dim: int, period: int = PERIOD) -> None:
        super().__init__()
        rates = torch.exp(torch.arange(dim // 2).double() * (-log(LONGEST_WAVE) / (dim // 2 - 1)))
        angles = torch.arange(period).double()[:, None] * rates
        table = torch.cat([angles.sin(), angles.cos()], 1)
        self.register_buffer("table", table.to(torch.get_default_dtype()))
        self.first = 0

    def init_state(self, x: Frames) -> Tensor:
        return torch.full((len(x.mask),), self.first, dtype=torch.long, device=x.mask.device)

    def step(self, x: Frames, state: Tensor) -> tuple[Frames, Tensor]:
        period = len(self.table)
        at = (state[:, None] + x.mask.cumsum(1) - 1) % period
        after = (state + x.mask.sum(1)) % period
        return Frames.finite(x.values + self.table[at].to(x.values.dtype), x.mask), after


def circle(stream: nn.Module) -> int | None:
    """How many positions `Turning` inside `stream` has; None where there is none."""
    return next((len(module.table) for module in stream.modules() if isinstance(module, Turning)), None)


def turn(stream: nn.Module, first: int) -> None:
    """All `Turning` inside `stream` begin at this row of their tables. ValueError when there is none."""
    inner = [module for module in stream.modules() if isinstance(module, Turning)]
    if not inner:
        raise ValueError(f"{type(stream).__name__} has no positions that turn")
    for module in inner:
        module.first = first % len(module.table)


class StreamingEncoder(Encoder):
    """Log-mel [B, 2T, mels] -> [B, T, dim]: Whisper's encoder (arXiv 2212.04356), whose attention sees `span`.

    Law: with `Span.full()`, from position 0, and no more than `period` frames it is Whisper's.

    Who listens by it (`listening`) reads the last `revise` frames of each chunk again with the next one (`Revising`),
    and so it is trained (`heard`). `forward` says each chunk of the span once.
    """

    def __init__(
        self, mels: int = 80, dim: int = 384, depth: int = 4, heads: int = 6, *, span: Pattern, revise: int = 0,
        period: int = PERIOD,
    ) -> None:  # fmt: skip
        stem = Serial(
            first=Convolution(mels, dim), second=Convolution(dim, dim, stride=2), positions=Turning(dim, period)
        )
        blocks = [
            Serial(
                attention=Residual(self_attention(dim, heads, span)),
                feed_forward=feed_forward(dim, 4 * dim, activation=nn.GELU),
            )
            for _ in range(depth)
        ]
        super().__init__(stem, blocks, Pointwise(nn.LayerNorm(dim)), dim=dim)
        if not isinstance(revise, int) or revise < 0:
            raise ValueError(f"revise {revise}: wanted a number of frames, 0 or more")
        self.revise = revise

    def listening(self, front_end: Stream) -> Flow:
        """Front-end and convolutions stand in one series: their two looks ahead of 10 ms are one frame."""
        stem = [part for whole in (front_end, self.subsample) for part in members(whole)]
        return Flow(Serial(*stem), self.body())

    def heard(self, x: Frames) -> Frames:
        body = self.body()
        return body.at_once(self.subsample(x)) if isinstance(body, Revising) else super().heard(x)

    def body(self) -> Stream:
        """Layers and norm, as a listener steps them."""
        body: Stream = Serial(layers=self.layers, norm=self.norm)
        return Revising(body, self.revise) if self.revise else body


class Flow(Planned):
    """`first` and then `second`, whose chunks take the frames as they come.

    What `first` says is late by its look-ahead. `Serial` delays it further, up to the next chunk of `second`. Here the
    first chunk begins with frames that are not there instead, so that a chunk waits for its own frames alone. The
    price: the chunks of `second` begin `first.delay` frames earlier than they would offline. `second` keeps the rate.
    """

    def __init__(self, first: Stream, second: Stream) -> None:
        super().__init__()
        if second.plan().ratio != 1:
            raise ValueError(f"a stream of ratio {second.plan().ratio} has frames of its own to wait for: use Serial")
        self.first, self.second = first, second

    def plan(self) -> Plan:
        a, b = self.first.plan(), self.second.plan()
        if a.block is None or b.block is None:
            return Plan(None, a.ratio, 0, None, 0)
        frame = int(1 / a.ratio)
        first = self.second.earliest(a.delay)
        first = None if first is None else self.first.earliest(first - a.delay)
        block = lcm(a.block, b.block * frame)
        return Plan(block, a.ratio, a.latency + b.latency * frame, None if first is None else -first, a.delay + b.delay)

    def init_state(self, x: Frames) -> Any:
        if self.block is None:
            return ()
        state = self.first.init_state(x)
        y, _ = self.first.step(x[:0], state)
        return state, self.second.init_state(y)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        if isinstance(state, Spent) or not state:
            spent = self._spend(state)
            return self.second(self.first(x)), spent
        first, second = state
        y, first = self.first.step(x, first)
        y, second = self.second.step(y, second)
        return y, (first, second)

    def ahead(self, state: Any) -> Frames | None:
        return self.second.ahead(state[1]) if isinstance(state, tuple) and state else None


def members(stream: Stream) -> list[Stream]:
    """Of a series, or the stream itself."""
    return stream.members if isinstance(stream, Serial) else [stream]


NAMES = {
    "conv1.": "subsample.first.conv.", "conv2.": "subsample.second.conv.", "positions": "subsample.positions.table",
    "norm.": "norm.f.",
}  # fmt: skip
INNER = {
    "norm.": "attention.first.norm.", "attention.": "attention.first.", "ff_norm.": "feed_forward.first.f.norm.",
    "ff.0.": "feed_forward.first.f.widen.", "ff.2.": "feed_forward.first.f.narrow.",
}  # fmt: skip


def weights(encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors of Whisper's encoder by the names of a `StreamingEncoder`."""
    return {renamed(name): tensor for name, tensor in encoder.state_dict().items()}


def renamed(name: str) -> str:
    """Of one tensor."""
    names, before = NAMES, ""
    if name.startswith("layers."):
        _, number, name = name.split(".", 2)
        names, before = INNER, f"layers.{number}."
    start = next(start for start in names if name.startswith(start))
    return f"{before}{names[start]}{name.removeprefix(start)}"


def streaming(whisper: Whisper, span: Pattern | None = None) -> StreamingEncoder:
    """The encoder of `whisper` as a stream, with a copy of its weights; without a `span` it sees everything."""
    config: WhisperConfig = whisper.config
    made = StreamingEncoder(
        config.mels, config.encoder_dim, config.encoder_layers, config.encoder_heads,
        span=span or Span.full(), period=config.audio_context,
    )  # fmt: skip
    made.load_state_dict(weights(whisper.encoder))
    return made.to(whisper.encoder.positions).eval()
