"""The two encoders of the Transformer Transducer (Zhang et al., arXiv 2002.02562)."""

from __future__ import annotations

from torch import nn

from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position, Relative
from speechattn.attention.self_attention import SelfAttention
from speechattn.encoder.base import Encoder, PositionMaker, made
from speechattn.encoder.layers import AttentionMaker, Stack, feed_forward, self_attention
from speechattn.stream import Pointwise, Residual, Serial, Stream

__all__ = ["LabelEncoder", "Transformer", "TransformerBlock"]


class TransformerBlock(Serial):
    """Attention and feed-forward, each behind its norm and added to its input."""

    def __init__(
        self, dim: int, heads: int, inner: int, span: Pattern, *, position: Position | None = None,
        key_heads: int | None = None, dropout: float = 0.0, attention: AttentionMaker = SelfAttention,
    ) -> None:  # fmt: skip
        looks = self_attention(
            dim, heads, span, position=position, key_heads=key_heads, dropout=dropout, attention=attention
        )
        super().__init__(
            attention=Residual(looks),
            feed_forward=feed_forward(dim, inner, activation=lambda: nn.ReLU(inplace=True), dropout=dropout),
        )


class Transformer(Encoder):
    """The audio encoder: `stack` frames every `stride` of them, then `depth` blocks with the contexts of `span`."""

    def __init__(
        self, mels: int = 80, dim: int = 512, depth: int = 18, heads: int = 8, inner: int = 2048, *, span: Pattern,
        position: PositionMaker | None = Relative, key_heads: int | None = None, stack: int = 4, stride: int = 3,
        dropout: float = 0.0, attention: AttentionMaker = SelfAttention, subsample: Stream | None = None,
    ) -> None:  # fmt: skip
        blocks = [
            TransformerBlock(
                dim, heads, inner, span, position=made(position, dim, heads), key_heads=key_heads, dropout=dropout,
                attention=attention,
            )
            for _ in range(depth)
        ]  # fmt: skip
        stacked = Serial(Stack(stack, stride), Pointwise(nn.Linear(stack * mels, dim)))
        super().__init__(subsample or stacked, blocks, Pointwise(nn.LayerNorm(dim)), dim=dim)


class LabelEncoder(Encoder):
    """Labels [B, U] -> [B, U, dim]; each sees `left` labels before it, None: all. Not valid means not yet said."""

    def __init__(
        self, vocab: int, dim: int = 512, depth: int = 2, heads: int = 8, inner: int = 2048, *, left: int | None = None,
        position: PositionMaker | None = Relative, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        blocks = [
            TransformerBlock(dim, heads, inner, Span(left), position=made(position, dim, heads), dropout=dropout)
            for _ in range(depth)
        ]
        super().__init__(Pointwise(nn.Embedding(vocab, dim)), blocks, Pointwise(nn.LayerNorm(dim)), dim=dim)
