"""What a search proposes to a policy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from speechattn.decoder.attention import Head

__all__ = ["Draft"]


@dataclass(frozen=True)
class Draft:
    """A proposed continuation of the committed text, without end-of-text.

    `tokens` [U] with their log-probabilities `log_probs` [U]; `ended` tells whether the model itself said end-of-text
    behind them; `first` counts the tokens that were committed before this draft since the session began.

    `weights` [N, P + U, T]: where the pairs in `heads` looked on reading each token of prompt (committed text
    included) and draft. A token is said on reading the one before it, so the draft's own rows are `[-U - 1 : -1]`
    and the last row is the look at what follows it.

    `waiting` [U]: a head of monotonic cross attention ran out of frames on saying this token, so that more of them may
    change it; None where no head ever waits.
    """

    tokens: Tensor
    log_probs: Tensor
    weights: Tensor
    heads: tuple[Head, ...]
    first: int
    ended: bool
    waiting: Tensor | None = None

    def alignment(self, heads: tuple[Head, ...]) -> Tensor:
        """Rows of some of the heads [n, P + U, T]."""
        return self.weights[[self.heads.index(head) for head in heads]]
