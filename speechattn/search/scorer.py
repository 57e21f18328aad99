"""What a label-synchronous beam is a weighted list of."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from speechattn.frames import Frames

__all__ = ["Scorer"]


class Scorer(Protocol):
    """Log-probabilities of the next token of each hypothesis: attention decoder, CTC prefixes, language model, ...

    The state is a tree, batch first in every leaf, of B rows with K hypotheses each. A cycle of the search is
    `score`, then `extend`; `read` may come between two cycles, and then the last token is looked at again with the
    frames that are new: `score` does not consume the state that it was given.
    """

    @property
    def partial(self) -> bool:
        """It scores a few candidates that the others proposed, because scoring every token would cost too much."""

    def start(self, x: Frames) -> Any:
        """The state of one empty hypothesis for each row of `x` [B, T, D], whose frames are not read."""

    def read(self, x: Frames, state: Any) -> Any:
        """Encoder frames [B, T, D] more."""

    def score(self, state: Any, candidates: Tensor | None) -> tuple[Tensor, Any]:
        """Every token's score [B, K, V] or the `candidates`' [B, K, C] where `partial`; and the state behind it."""

    def extend(self, state: Any, parents: Tensor, tokens: Tensor) -> Any:
        """From the state that `score` gave: hypothesis j of a row is that of `parents` [B, K'] and says `tokens`."""

    def select(self, state: Any, parents: Tensor) -> Any:
        """Hypotheses of the rows picked and put in another order by `parents` [B, K'], none of them longer."""
