"""Dense attention in torch's fused kernels: any pattern without sinks; the scores are not kept."""

from __future__ import annotations

from torch import Tensor

from speechattn.attention.pattern import Pattern, Span, visible
from speechattn.attention.position import Position
from speechattn.attention.softmax import fused

__all__ = ["Fused"]


class Fused:
    """Pattern and bias become the mask of `scaled_dot_product_attention`."""

    name = "fused"

    def supports(self, q: Tensor, pattern: Pattern, position: Position | None) -> str | None:
        """Everything but sinks."""
        return "sinks stand at a distance that depends on the query" if pattern.sinks else None

    def preferred(self, q: Tensor) -> bool:
        """Always."""
        return True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, valid: Tensor, position: Position | None
    ) -> Tensor:
        """As `attend`."""
        frames, ahead = q.shape[2], pattern.right
        queries, keys = range(frames), range(ahead + frames - k.shape[2], ahead + frames)
        seen = valid[:, None, None]
        if pattern != Span.full():  # whose one row of mask is the same for all queries
            seen = seen & visible(pattern, queries, keys, q.device)
        return fused(q, k, v, position, queries, keys, seen).masked_fill(~seen.any(-1, keepdim=True), 0.0)
