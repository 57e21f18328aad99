"""How late monotonic heads stop: what may be asked of an alignment beside the right tokens.

An `alignment` [B, N, U, T] has where N heads of all layers stop for each token; `counts` [B, U] says which tokens
there are, `valid` [B, T] which frames. Delays are numbers of frames read, 1 for the first. A head that does not stop
has read all frames: to lose the mass is no way to be early.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["AverageLagging", "ExpectedDelay", "HeadVariance", "Latency", "Quantity", "delays", "lagging", "latest"]


def delays(alignment: Tensor, valid: Tensor) -> Tensor:
    """Expected frames read when each token is said [B, N, U] (arXiv 1906.05218, eq. 10)."""
    read = valid.cumsum(1).to(alignment.dtype)
    stopped: Tensor = (alignment * read[:, None, None]).sum(-1)
    return stopped + (1 - alignment.sum(-1)) * read.amax(1)[:, None, None] if read.shape[1] else stopped


def latest(delay: Tensor) -> Tensor:
    """The delays of N heads [B, N, U] -> their mean, weighted by exp(delay) [B, U] (arXiv 1909.12406, eq. 12)."""
    return (delay.softmax(1) * delay).sum(1)


def lagging(delay: Tensor, counts: Tensor, frames: Tensor) -> Tensor:
    """Differentiable average lagging [B], in frames, of the delays [B, U] of tokens (arXiv 1906.05218, eq. 14 to 16).

    How far each token is behind a speaker who says U tokens in `frames` [B] at a constant pace; a token takes a part
    of this time itself, so that a delay is not caught up with all at once.
    """
    pace = frames / counts.sum(1).clamp(min=1)  # frames a token
    total, last = torch.zeros_like(delay[:, 0]) if delay.shape[1] else delay.sum(1), None
    for i in range(delay.shape[1]):
        last = delay[:, i] if last is None else delay[:, i].maximum(last + pace)
        total = total + (last - i * pace) * counts[:, i]
    return total / counts.sum(1).clamp(min=1)


class Latency(nn.Module, ABC):
    """A loss that grows with what is not wanted of an alignment; `weight` times in the sum.

    It is summed over the tokens of a text, as cross entropy is.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight {weight} of {type(self).__name__}: wanted 0 or more")
        self.weight = weight

    @abstractmethod
    def forward(self, alignment: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
        """`alignment` [B, N, U, T], `counts` [B, U], `valid` [B, T] -> [B], without the weight."""


class ExpectedDelay(Latency):
    """The mean of the heads' delays in frames, summed over the tokens."""

    def forward(self, alignment: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
        return (delays(alignment, valid).mean(1) * counts).sum(1)


class AverageLagging(Latency):
    """Differentiable average lagging of the latest heads (L_avg of MMA, arXiv 1909.12406), once for each token."""

    def forward(self, alignment: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
        return lagging(latest(delays(alignment, valid)), counts, valid.sum(1)) * counts.sum(1)


class HeadVariance(Latency):
    """The variance of the delays among heads (L_var of MMA, arXiv 1909.12406, eq. 13), summed over the tokens."""

    def forward(self, alignment: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
        return (delays(alignment, valid).var(1, correction=0) * counts).sum(1)


class Quantity(Latency):
    """How many tokens more or fewer than there are each head stops for, on average: |U - sum of the alignment|."""

    def forward(self, alignment: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
        stops = (alignment.sum(-1) * counts[:, None]).sum(2)
        return (counts.sum(1)[:, None] - stops).abs().mean(1)
