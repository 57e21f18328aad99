"""Two decoders that read a text from its two ends (U2++, arXiv 2106.05642, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Memory

__all__ = ["TwoWay", "turned"]


class TwoWay(nn.Module):
    """`forth` reads from left to right, `back` from right to left, with a weight of `reverse`.

    `forth` alone can go on with a text; `back` helps to train the encoder, and to judge texts that are whole.
    """

    def __init__(self, forth: AttentionDecoder, back: AttentionDecoder, *, reverse: float = 0.3) -> None:
        super().__init__()
        if not 0 <= reverse <= 1:
            raise ValueError(f"a weight of {reverse} for the decoder that reads backwards: wanted 0 to 1")
        self.forth, self.back, self.reverse = forth, back, reverse

    def loss(
        self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """Mean over the batch of `losses`; 0 for a batch of none."""
        losses = self.losses(memory, targets, lengths, sos=sos, eos=eos, smoothing=smoothing)
        return losses.sum() / max(len(losses), 1)

    def losses(
        self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """Weighted sum of the two losses [B] of texts [B, U], of which the first `lengths` [B] count."""
        forth = self.forth.losses(memory, targets, lengths, sos=sos, eos=eos, smoothing=smoothing)
        back = self.back.losses(memory, turned(targets, lengths), lengths, sos=sos, eos=eos, smoothing=smoothing)
        return (1 - self.reverse) * forth + self.reverse * back

    def log_prob(self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int) -> Tensor:
        """Weighted sum of the two log-probabilities of texts and their ends [B * K], K for each memory."""
        forth = self.forth.log_prob(memory, targets, lengths, sos=sos, eos=eos)
        back = self.back.log_prob(memory, turned(targets, lengths), lengths, sos=sos, eos=eos)
        return (1 - self.reverse) * forth + self.reverse * back


def turned(targets: Tensor, lengths: Tensor) -> Tensor:
    """The first `lengths` [B] tokens of each row [B, U] from their end; the others stay where they are."""
    at = torch.arange(targets.shape[1], device=targets.device)
    return targets.gather(1, torch.where(at < lengths[:, None], lengths[:, None] - 1 - at, at))
