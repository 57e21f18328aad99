"""ESPnet's first relative positions, which depend on the length of the utterance."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Relative
from speechattn.attention.self_attention import Spanned
from speechattn.frames import Frames
from speechattn.stream import Plan

__all__ = ["LegacyRelative", "Whole"]

ONLY_WHOLE = "legacy relative positions depend on the length of the utterance: only Span.full() works"


class LegacyRelative(Relative):
    """The Transformer-XL term from a table of T rows instead of 2 T - 1 (`rel_pos_type: legacy`).

    Row r stands for distance max(`longest`, T) - 1 - r. After the shift, query i scores key j <= i at distance
    i - j + max(`longest`, T) - T; its next key gets 0, and the keys behind that the first scores of query i + 1.
    """

    def __init__(self, dim: int, heads: int, *, longest: int = 5000) -> None:
        super().__init__(dim, heads)
        self.longest = longest

    def bias(self, q: Tensor, queries: range, keys: range) -> Tensor:
        """[B, H, T, T]; ValueError unless the window is the utterance."""
        frames = q.shape[2]
        if queries != keys:
            raise ValueError(ONLY_WHOLE)
        last = max(self.longest, frames) - 1
        rows, own = self.rows(range(last, last - frames, -1), q)
        scores = q @ rows + own
        return F.pad(scores, [1, 0]).flatten(-2)[..., frames:].reshape(scores.shape)


class Whole(Spanned):
    """Waits for the whole utterance, drops the frames that no row has, and lets no other span be set."""

    span: Pattern = Span.full()

    def scaled(self, span: Pattern) -> Pattern:
        if span != Span.full():
            raise ValueError(ONLY_WHOLE)
        return span

    def plan(self) -> Plan:
        return Plan(None, Fraction(1), 0, None, 0)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        return x[: int(x.mask.any(0).sum())], self._spend(state)
