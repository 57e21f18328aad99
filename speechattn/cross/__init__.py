"""Attention from tokens to encoder frames: its two verbs are the READ and the look of simultaneous translation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from speechattn.frames import Memory

__all__ = ["Attended", "CrossAttention", "CrossMaker", "chosen"]


@dataclass(frozen=True)
class Attended:
    """What a query saw, and where.

    `context` [B, U, D]; `weights` [B, H, U, T] made the context and sum to 1 over valid frames; `alignment`
    [B, N, U, T] is the stopping distribution of the N heads that were asked for if they are monotonic, and their
    weights if they are soft; `waiting` [B, H, U] is True where a head wants more input, which a soft head never does.

    Where heads were asked for, soft attention need not have had all weights at any time: `weights` is then that of
    these heads alone.
    """

    context: Tensor
    weights: Tensor
    alignment: Tensor
    waiting: Tensor


class CrossAttention(Protocol):
    """Read the encoder's memory once, attend to it token by token.

    What was read belongs to the recording, and its hypotheses share it; the `place` where each of them stands is its
    own: where a monotonic head stopped, where the last token looked. Both are trees of tensors, batch first.

    Law: in `eval()`, attending to tokens one by one equals attending to them at once.
    """

    def read(self, memory: Memory) -> Any:
        """Project the memory. What was read has a `mask` [B, T], and `then(other, skip)` adds what was read later."""

    def place(self, rows: Tensor) -> Any:
        """Where hypotheses stand before the first token, for the number, type and device of `rows` [B * K, ...].

        () where nothing is remembered.
        """

    def attend(
        self, query: Tensor, read: Any, place: Any, *, heads: Sequence[int] | None = None
    ) -> tuple[Attended, Any]:
        """Let `query` [B * K, U, D] look at what was read; row b * K + k looks at row b. -> also the next place.

        Who wants the alignment of some `heads` only, or of none, says so (None: of all, in their order).
        """


def chosen(alignment: Tensor, heads: Sequence[int] | None) -> Tensor:
    """Of [B, H, U, T] the `heads` that are asked for [B, N, U, T]; all where None."""
    return alignment if heads is None else alignment[:, list(heads)]


CrossMaker = Callable[[int, int], nn.Module]  # a CrossAttention from width and heads
