"""Attention from tokens to encoder frames: its two verbs are the READ and the look of simultaneous translation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from speechattn.frames import Memory

__all__ = ["Attended", "CrossAttention"]


@dataclass(frozen=True)
class Attended:
    """What a query saw, and where.

    `context` [B, U, D]; `weights` [B, H, U, T] made the context and sum to 1 over valid frames; `alignment`
    [B, H, U, T] is the stopping distribution of monotonic heads and equals the weights for soft ones; `waiting`
    [B, H, U] is True where a head wants more input, which a soft head never does.
    """

    context: Tensor
    weights: Tensor
    alignment: Tensor
    waiting: Tensor


class CrossAttention(Protocol):
    """Read the encoder's memory once, attend to it token by token.

    The state is a value: `read` makes it, `attend` returns the next one (monotonic heads remember where they stand).
    """

    def read(self, memory: Memory) -> Any:
        """Project the memory; the state has the batch first in every tensor."""

    def attend(self, query: Tensor, state: Any) -> tuple[Attended, Any]:
        """Let `query` [B, U, D] look at what was read."""
