"""Conformer (Gulati et al., arXiv 2005.08100)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from speechattn.attention.pattern import Pattern
from speechattn.attention.position import Position, Relative
from speechattn.attention.self_attention import SelfAttention
from speechattn.encoder.base import Encoder, PositionMaker, made
from speechattn.encoder.layers import AttentionMaker, Subsample, convolution, feed_forward, filters, self_attention
from speechattn.stream import Pointwise, Residual, Serial, Stream

__all__ = ["Conformer", "ConformerBlock"]


class ConformerBlock(Serial):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm; without `macaron` one whole, there.

    Without `depthwise` there is no convolution and no last norm: a pre-norm Transformer block (as in ESPnet).
    """

    def __init__(
        self, dim: int, heads: int, inner: int, span: Pattern, depthwise: Stream | None, *,
        position: Position | None = None, key_heads: int | None = None, macaron: bool = True,
        norm: nn.Module | None = None, activation: Callable[[], nn.Module] = nn.SiLU, dropout: float = 0.0,
        attention: AttentionMaker = SelfAttention,
    ) -> None:  # fmt: skip
        distant = self_attention(
            dim, heads, span, position=position, key_heads=key_heads, dropout=dropout, attention=attention
        )
        parts: dict[str, Stream] = {}
        if macaron:
            parts["macaron"] = feed_forward(dim, inner, activation=activation, dropout=dropout, scale=0.5)
        parts["attention"] = Residual(distant)
        if depthwise:
            mixed = convolution(dim, depthwise, norm=norm, activation=activation, dropout=dropout)
            parts["convolution"] = Residual(mixed)
        scale = 0.5 if macaron else 1.0
        parts["feed_forward"] = feed_forward(dim, inner, activation=activation, dropout=dropout, scale=scale)
        if depthwise:
            parts["norm"] = Pointwise(nn.LayerNorm(dim))
        super().__init__(**parts)


class Conformer(Encoder):
    """Strided convolutions, then `depth` blocks; LayerNorm in the convolution, so that no statistic streams.

    `conv_right` frames the convolution looks ahead; 0 is causal, None to the end of the chunk.
    """

    def __init__(
        self, mels: int = 80, dim: int = 256, depth: int = 12, heads: int = 4, inner: int = 2048, *, span: Pattern,
        kernel: int = 15, conv_right: int | None = 0, position: PositionMaker | None = Relative,
        key_heads: int | None = None, macaron: bool = True, factor: int = 4, dropout: float = 0.0,
        attention: AttentionMaker = SelfAttention, subsample: Stream | None = None,
    ) -> None:  # fmt: skip
        blocks = [
            ConformerBlock(
                dim, heads, inner, span, filters(dim, kernel, conv_right, span), position=made(position, dim, heads),
                key_heads=key_heads, macaron=macaron, dropout=dropout, attention=attention,
            )
            for _ in range(depth)
        ]  # fmt: skip
        super().__init__(subsample or Subsample(mels, dim, factor=factor), blocks, Pointwise(nn.Identity()), dim=dim)
