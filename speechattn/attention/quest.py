"""Query-aware pages of keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speechattn.attention.blocks import Blockwise
from speechattn.attention.pattern import Pattern
from speechattn.attention.position import Position

__all__ = ["Quest", "bound"]


class Quest(Blockwise):
    """Each query reads its own page and the pages before it that may hold the largest scores (arXiv 2406.10774).

    A page is marked with the least and the greatest of each feature of its keys; `bound` of them is never less than
    the largest dot product with a key of the page. `blocks` counts the own page, which is always read.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        norm: nn.Module | None = None, dropout: float = 0.0, size: int = 16, blocks: int = 16,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, span, position=position, key_heads=key_heads, norm=norm, dropout=dropout,
                         size=size, blocks=blocks)  # fmt: skip

    def marked(self, k: Tensor) -> Tensor:
        return torch.stack([k.amin(-3), k.amax(-3)], -3)

    def worth(self, q: Tensor, marks: Tensor) -> Tensor:
        return bound(q, marks[..., 0, :], marks[..., 1, :])


def bound(q: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """q [..., T, D], least and greatest [..., N, D] -> the sum of max(q_d m_d, q_d M_d) over features [..., T, N].

    The greatest counts where the query is positive, the least where it is negative: one product of matrices.
    """
    return torch.cat([q.clamp(min=0), q.clamp(max=0)], -1) @ torch.cat([greatest, least], -1).mT
