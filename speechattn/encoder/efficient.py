"""Efficient Conformer (Burchi & Vielzeuf, arXiv 2109.01163): the rate falls on the way up."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import nn

from speechattn.attention.pattern import Pattern
from speechattn.attention.position import Position, Relative
from speechattn.attention.self_attention import SelfAttention, set_span
from speechattn.encoder.base import Encoder, PositionMaker, made
from speechattn.encoder.layers import Depthwise, Every, Subsample, convolution, feed_forward, self_attention
from speechattn.stream import Pointwise, Residual, Serial, Stream

__all__ = ["EfficientConformer", "EfficientConformerBlock"]


class EfficientConformerBlock(Serial):
    """A Conformer block whose convolution may drop every other frame (`stride` 2) and widen the rest to `outputs`."""

    def __init__(
        self, dim: int, heads: int, inner: int, span: Pattern, *, kernel: int = 15, stride: int = 1,
        outputs: int | None = None, group: int = 1, position: Position | None = None, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        out = outputs or dim
        skip = Every(dim, out, stride) if stride > 1 or out != dim else None
        attention = self_attention(dim, heads, span, position=position, group=group, dropout=dropout)
        depthwise = Depthwise(dim, kernel, stride=stride)
        super().__init__(
            macaron=feed_forward(dim, inner, dropout=dropout, scale=0.5),
            attention=Residual(attention),
            convolution=Residual(convolution(dim, depthwise, outputs=out, dropout=dropout), skip=skip),
            feed_forward=feed_forward(out, inner * out // dim, dropout=dropout, scale=0.5),
            norm=Pointwise(nn.LayerNorm(out)),
        )


class EfficientConformer(Encoder):
    """Stages of blocks; between two stages the last block of the first halves the rate and widens the features.

    `span` counts output frames; earlier stages get the same stretch of time. The first stage puts `group` neighbours
    into one for its attention, so the span at its rate must divide by it.
    """

    def __init__(
        self, mels: int = 80, dims: Sequence[int] = (120, 168, 240), depths: Sequence[int] = (5, 5, 5), heads: int = 4,
        *, span: Pattern, kernel: int = 15, group: int = 3, widening: int = 4,
        position: PositionMaker | None = Relative, dropout: float = 0.0, subsample: Stream | None = None,
    ) -> None:  # fmt: skip
        if len(dims) != len(depths) or min(depths) < 1:
            raise ValueError(f"widths {list(dims)} and depths {list(depths)}: wanted one of each for every stage")
        blocks = []
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            for i in range(depth):
                last, g = i == depth - 1 and stage < len(dims) - 1, group if stage == 0 else 1
                blocks.append(EfficientConformerBlock(
                    dim, heads, widening * dim, span, kernel=kernel, stride=2 if last else 1,
                    outputs=dims[stage + 1] if last else None, group=g, position=made(position, dim * g, heads),
                    dropout=dropout,
                ))  # fmt: skip
        front = subsample or Subsample(mels, dims[0], factor=2)
        super().__init__(front, blocks, Pointwise(nn.Identity()), dim=dims[-1])
        for i, block in enumerate(blocks):
            attention = next(m for m in block.modules() if isinstance(m, SelfAttention))
            attention.rate = int(1 / prod((b.ratio for b in blocks[i:]), start=block.ratio**0))
        set_span(self, span)
