"""Whisper's log-mel features."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["HOP", "SAMPLE_RATE", "log_mel"]

SAMPLE_RATE = 16000
HOP = 160  # 10 ms
WINDOW = 400  # 25 ms


@cache
def filters(mels: int) -> Tensor:
    """Slaney-scaled, area-normalised triangles [201, mels], as librosa makes them."""
    from torchaudio.functional import melscale_fbanks  # slow to import

    bank: Tensor = melscale_fbanks(
        WINDOW // 2 + 1, 0.0, SAMPLE_RATE / 2, mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return bank


def log_mel(samples: Tensor, mels: int = 80) -> Tensor:
    """`samples` [B, n] at 16 kHz -> [B, n / 160, mels], one row a 10 ms.

    Power spectrum of centred 25 ms Hann windows, base-10 logarithm, floored 8 below each row's maximum and scaled
    to about [-1, 1] (arXiv 2212.04356, section 2.2). Because of the floor the features depend on the whole input.
    """
    window = torch.hann_window(WINDOW, device=samples.device)
    power = torch.stft(samples.float(), WINDOW, HOP, window=window, return_complex=True)[..., :-1].abs().square()
    log = (power.transpose(1, 2) @ filters(mels).to(samples.device)).clamp(min=1e-10).log10()
    return (log.maximum(log.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0
