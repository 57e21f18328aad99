"""Dense attention in torch's fused kernels: any pattern without sinks; the scores are not kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.attention.pattern import Pattern, Span, visible
from speechattn.attention.position import Position
from speechattn.attention.softmax import shared

__all__ = ["Fused"]


class Fused:
    """Pattern and bias become the mask of `scaled_dot_product_attention`."""

    name = "fused"

    def supports(self, q: Tensor, pattern: Pattern, position: Position | None) -> str | None:
        """Everything but sinks."""
        return "sinks stand at a distance that depends on the query" if pattern.sinks else None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, valid: Tensor, position: Position | None
    ) -> Tensor:
        """As `attend`, of keys and values that are finite where they are not valid."""
        frames, ahead = q.shape[2], pattern.right
        queries, keys = range(frames), range(ahead + frames - k.shape[2], ahead + frames)
        seen = valid[:, None, None]
        if pattern != Span.full():  # whose one row of mask is the same for all queries
            seen = seen & visible(pattern, queries, keys, q.device)
        blind = ~seen.any(-1, keepdim=True)
        mask = seen | blind  # no row may be masked altogether: its softmax would be NaN
        k, v = shared(k, q.shape[1]), shared(v, q.shape[1])
        if position is not None:
            turned, moved = position.turn(q[:, :, None], k[:, :, None], queries, keys)
            bias = position.bias(q[:, :, None], queries, keys)
            q, k = turned[:, :, 0], moved[:, :, 0]
            if bias is not None:
                mask = torch.where(mask, bias[..., 0, :, :], -torch.inf).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(blind, 0.0)
