"""FlexAttention (torch.nn.attention.flex_attention): any pattern, compiled; CUDA."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from speechattn.attention.pattern import Pattern
from speechattn.attention.position import Position, Relative
from speechattn.attention.softmax import shared

__all__ = ["Flex"]


class Flex:
    """The pattern becomes a block mask, a bias by distance a change of the score."""

    name = "flex"

    def supports(self, q: Tensor, pattern: Pattern, position: Position | None) -> str | None:
        """CUDA; no sinks, and no bias that depends on the query."""
        if q.device.type != "cuda":
            return f"it needs CUDA, the tensors are on {q.device.type}"
        return self.expresses(pattern, position)

    def expresses(self, pattern: Pattern, position: Position | None) -> str | None:
        """Why it cannot be said in a block mask and a table, on any device."""
        if pattern.sinks:
            return "sinks depend on what is valid"
        if isinstance(position, Relative):
            return "the Transformer-XL term depends on the query"
        return None

    def preferred(self, q: Tensor) -> bool:
        """Never: it is compiled anew for each length of utterance."""
        return False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, valid: Tensor, position: Position | None
    ) -> Tensor:
        """As `attend`."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        batch, heads, frames, dim = q.shape
        first = k.shape[2] - pattern.right - frames
        table = None
        if position is not None:
            q, k = position.turn(q, shared(k, heads), range(frames), range(-first, k.shape[2] - first))
            table = position.scalars(range(first + frames - 1, first - k.shape[2], -1), q.device)

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return pattern.allowed(i, j - first) & valid[b, j]

        def scored(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert table is not None
            return score + table[h, frames - 1 - i + j].to(score.dtype)

        mask = create_block_mask(seen, batch, None, frames, k.shape[2], device=str(q.device))
        run = torch.compile(flex_attention) if q.device.type == "cuda" else flex_attention
        found = run(
            q, shared(k, heads), shared(v, heads), score_mod=None if table is None else scored, block_mask=mask,
            scale=1 / sqrt(dim),
        )  # fmt: skip
        assert isinstance(found, Tensor)
        return found
