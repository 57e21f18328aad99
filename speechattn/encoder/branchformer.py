"""E-Branchformer (Kim et al., arXiv 2210.00077)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from speechattn.attention.pattern import Pattern
from speechattn.attention.position import Position, Relative
from speechattn.attention.self_attention import SelfAttention
from speechattn.encoder.base import Encoder, PositionMaker, made
from speechattn.encoder.layers import AttentionMaker, Half, Subsample, feed_forward, filters, self_attention
from speechattn.frames import Frames
from speechattn.stream import Parallel, Pointwise, Residual, Serial, Stream
from speechattn.stream.parallel import both

__all__ = ["EBranchformer", "EBranchformerBlock", "Gate"]


class Gate(Parallel):
    """The first half of the features, weighed by the filtered second half (convolutional spatial gating)."""

    def __init__(self, dim: int, depthwise: Stream) -> None:
        second = Serial(norm=Pointwise(Half(1), nn.LayerNorm(dim)), depthwise=depthwise)
        super().__init__(Pointwise(Half(0)), second)

    def combine(self, first: Frames, second: Frames) -> Frames:
        return both(first.values * second.values, first, second)


class EBranchformerBlock(Serial):
    """Attention and a gated convolution side by side, between two halves of a feed-forward.

    Without `macaron` one whole feed-forward comes after them; with `inner` 0 there is none.
    """

    def __init__(
        self, dim: int, heads: int, inner: int, gate: int, span: Pattern, depthwise: Stream, merge: Stream, *,
        position: Position | None = None, macaron: bool = True, activation: Callable[[], nn.Module] = nn.SiLU,
        dropout: float = 0.0, attention: AttentionMaker = SelfAttention,
    ) -> None:  # fmt: skip
        local = Serial(
            widen=Pointwise(nn.LayerNorm(dim), nn.Linear(dim, 2 * gate), nn.GELU()),
            gate=Gate(gate, depthwise),
            narrow=Pointwise(nn.Dropout(dropout), nn.Linear(gate, dim), nn.Dropout(dropout)),
        )
        distant = self_attention(dim, heads, span, position=position, dropout=dropout, attention=attention)
        parts: dict[str, Stream] = {}
        if inner and macaron:
            parts["macaron"] = feed_forward(dim, inner, activation=activation, dropout=dropout, scale=0.5)
        parts["branches"] = Residual(Serial(
            both=Parallel(distant, local),
            merge=Residual(merge),
            narrow=Pointwise(nn.Linear(2 * dim, dim), nn.Dropout(dropout)),
        ))  # fmt: skip
        if inner:
            scale = 0.5 if macaron else 1.0
            parts["feed_forward"] = feed_forward(dim, inner, activation=activation, dropout=dropout, scale=scale)
        super().__init__(**parts, norm=Pointwise(nn.LayerNorm(dim)))


class EBranchformer(Encoder):
    """Strided convolutions, then `depth` blocks; `gate` is the width of the gated branch, half of what it computes."""

    def __init__(
        self, mels: int = 80, dim: int = 256, depth: int = 12, heads: int = 4, inner: int = 1024, *, span: Pattern,
        gate: int | None = None, kernel: int = 31, merge_kernel: int = 3, conv_right: int | None = 0,
        position: PositionMaker | None = Relative, factor: int = 4, dropout: float = 0.0,
        attention: AttentionMaker = SelfAttention, subsample: Stream | None = None,
    ) -> None:  # fmt: skip
        gate = gate or 3 * dim
        blocks = [
            EBranchformerBlock(
                dim, heads, inner, gate, span, filters(gate, kernel, conv_right, span),
                filters(2 * dim, merge_kernel, conv_right and min(conv_right, merge_kernel // 2), span),
                position=made(position, dim, heads), dropout=dropout, attention=attention,
            )
            for _ in range(depth)
        ]  # fmt: skip
        norm = Pointwise(nn.LayerNorm(dim))
        super().__init__(subsample or Subsample(mels, dim, factor=factor), blocks, norm, dim=dim)
