"""Mixture of block attention."""

from __future__ import annotations

from torch import Tensor, nn

from speechattn.attention.blocks import Blockwise
from speechattn.attention.pattern import Pattern
from speechattn.attention.position import Position

__all__ = ["MoBA"]


class MoBA(Blockwise):
    """Each query reads its own block and the blocks before it whose mean key it likes best (arXiv 2502.13189, eq. 5-6).

    The score of a block is q . mean(keys); `blocks` counts the own one, which is always read and never scored.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        norm: nn.Module | None = None, dropout: float = 0.0, size: int = 64, blocks: int = 3,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, span, position=position, key_heads=key_heads, norm=norm, dropout=dropout,
                         size=size, blocks=blocks)  # fmt: skip

    def marked(self, k: Tensor) -> Tensor:
        return k.mean(-3, keepdim=True)

    def worth(self, q: Tensor, marks: Tensor) -> Tensor:
        return q @ marks[..., 0, :].mT
