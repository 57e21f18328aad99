"""Whisper's log-mel features (arXiv 2212.04356, section 2.2): a stream, and what depends on the whole input."""

from __future__ import annotations

from torch import Tensor

from speechattn.audio.spectrum import CentredLogMel

__all__ = ["HOP", "SAMPLE_RATE", "SILENCE", "FrontEnd", "scaled"]

SAMPLE_RATE = 16000
HOP = 160  # 10 ms
SILENCE = -10.0  # what the front-end gives to zeros


class FrontEnd(CentredLogMel):
    """Base-10 logarithm of the mel power in 25 ms, every 10 ms: samples [B, N] at 16 kHz -> [B, N / 160, mels]."""

    def __init__(self, mels: int = 80) -> None:
        super().__init__(mels, rate=SAMPLE_RATE, hop=HOP, scale="slaney", floor=10**SILENCE, base=10.0)


def scaled(log: Tensor) -> Tensor:
    """Logarithms [B, T, mels] of a whole input, floored 8 below each row's maximum, scaled to about [-1, 1]."""
    return (log.maximum(log.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0
