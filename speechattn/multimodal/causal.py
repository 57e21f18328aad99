"""What a speech language model needs of a causal language model, whoever made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from speechattn.frames import Frames

__all__ = ["CausalLM", "Inspected"]


@dataclass(frozen=True)
class Inspected:
    """What a language model made of sequences of which `mask` [B, S] is there.

    `states` [B, S, D]: the embeddings that enter, then the residual stream behind each of N layers (before the last
    norm). `weights` [B, H, S, S] of each layer: where queries (rows) look; None where nobody asked.
    """

    states: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] | None
    mask: Tensor


class CausalLM(Protocol):
    """A module that goes on with sequences of embeddings, each seeing itself and what came before it.

    Law: `extend` in pieces gives what it gives in one piece. Positions count the valid frames of a row; invalid frames
    are not seen.
    """

    @property
    def dim(self) -> int:
        """Features of an embedding."""

    @property
    def vocab(self) -> int:
        """Tokens."""

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, U] -> [B, U, D]."""

    def start(self, rows: int) -> Any:
        """An empty cache: a tree of so many rows."""

    def extend(self, x: Frames, cache: Any) -> tuple[Tensor, Any]:
        """The next embeddings [B, T, D] -> hidden [B, T, D], of which `logits` says what follows; the next cache."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden [..., D] -> unnormalised scores of the next token [..., V]."""

    def inspect(self, x: Frames, *, weights: bool = True) -> tuple[Tensor, Inspected]:
        """As `extend` from nothing, and what is inside; gradients flow through the states."""
