"""Retranslation (arXiv 1912.03393, 2004.03643): all text may be taken back until its utterance ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from speechattn.decoder.attention import Head
from speechattn.policy import Source
from speechattn.search import Draft

__all__ = ["Retranslation"]


@dataclass(frozen=True)
class Retranslation:
    """Commit nothing before the end: the whole draft is shown as unstable text, and replaced by the next one.

    It lags least and flickers most, which normalised erasure measures (`speechattn score latency`). The last `mask`
    tokens of the draft are not shown (mask-k), nor is a word that they cut. What is shown is right as late as what the
    other policies commit, so compare it at its erasure, not by its lag alone.
    """

    mask: int = 0
    heads: tuple[Head, ...] = ()

    def __post_init__(self) -> None:
        if self.mask < 0:
            raise ValueError(f"mask-k hides 0 or more tokens, not {self.mask}")

    def initial(self) -> None:
        """Nothing to remember."""

    def accept(self, draft: Draft, source: Source, state: None) -> tuple[int, None]:
        """All at the end, and nothing before."""
        return len(draft.tokens) if source.finished else 0, None

    def why(self, draft: Draft, source: Source, state: None, n: int) -> str:
        """The utterance goes on."""
        return "the utterance has not ended (retranslation)"

    def shown(self, sizes: Sequence[int]) -> int:
        """How many tokens of a tail are shown, of whose words each has so many."""
        room, ends = sum(sizes) - self.mask, 0
        for size in sizes:
            if ends + size > room:
                break
            ends += size
        return ends
