"""What reads its source and writes its target in turns, whoever made it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.decoder.groups import Schedule
from speechattn.frames import Frames

__all__ = ["InTurns", "text_losses"]


@runtime_checkable
class InTurns(Protocol):
    """A module with caches for two groups, source frames and target tokens, which are fed in any order.

    Law: whatever the order, `read`, `finish` and `write` give what the module gives in one masked pass over source
    [B, T, ...], tokens [B, U] and how many frames were `read` before each of them [B, U].
    """

    schedule: Schedule  # when the next token is written, in training and by default in a search

    @property
    def vocab(self) -> int:
        """Tokens."""

    @property
    def forgets(self) -> bool:
        """Old frames are gone when others are read, so that frames are read no earlier than a token wants them."""

    def __call__(self, source: Frames, tokens: Tensor, read: Tensor) -> tuple[Any, Tensor]:
        """The masked pass -> what was made of the source, and hidden [B, U, D]."""

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, U] -> [B, U, D]."""

    def start(self, rows: int) -> Any:
        """Nothing read, nothing written: a tree of so many rows."""

    def read(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        """The next source frames [B, T, ...] -> what was made of them, and the next state."""

    def finish(self, state: Any) -> Any:
        """No frame will follow: what has waited for others is read."""

    def write(self, tokens: Frames, state: Any, *, read: Tensor | None = None) -> tuple[Tensor, Any]:
        """The next target tokens [B, U] -> hidden [B, U, D], of which `logits` says what follows, and the next state.

        Each sees the frames that were read so far, or the first `read` [B, U] of them.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., D] -> unnormalised scores of the next token [..., V]."""

    def losses(
        self, source: Frames, targets: Tensor, lengths: Tensor, *, sos: int, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """Cross-entropy of each row's text and its end [B], summed over tokens, each written when `schedule` says."""


def text_losses(
    head: InTurns, source: Frames, targets: Tensor, lengths: Tensor, read: Tensor, *, sos: int, eos: int,
    smoothing: float,
) -> Tensor:  # fmt: skip
    """Cross-entropy of each row's text and its end [B], summed over tokens that are written behind `read` [B, U + 1].

    Of `targets` [B, U] the first `lengths` [B] count.
    """
    at = torch.arange(targets.shape[1] + 1, device=targets.device)
    targets = targets.where(at[:-1] < lengths[:, None], eos)
    end = targets.new_full((len(targets), 1), eos)
    _, hidden = head(source, torch.cat([torch.full_like(end, sos), targets], 1), read)
    wanted = torch.cat([targets, end], 1)
    each = F.cross_entropy(head.logits(hidden).mT, wanted, reduction="none", label_smoothing=smoothing)
    return each.masked_fill(at > lengths[:, None], 0.0).sum(1)
