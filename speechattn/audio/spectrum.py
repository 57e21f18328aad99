"""Spectral features as streams over samples: [B, N] -> [B, T, mels]."""

from __future__ import annotations

from math import e, log, pi

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.frames import Frames
from speechattn.stream import Buffer, Sliding

__all__ = ["CentredLogMel", "KaldiFbank", "LogMel"]


class LogMel(Sliding):
    """Logarithm (to `base`) of the mel power of Hann windows; power below `floor` counts as `floor`.

    As torchaudio's MelSpectrogram with center=False: an output is valid where its whole window is. `scale` is "htk"
    (triangles of height 1) or "slaney" (of area 1, as librosa and Whisper have them). A transform longer than the
    window adds zeros behind it. With `right`, window t ends that far behind sample t * hop, and is valid where that is.
    """

    bank: Tensor
    window: Tensor

    def __init__(
        self, mels: int = 80, *, rate: int = 16000, window: int = 400, hop: int = 160, transform: int | None = None,
        low: float = 0.0, high: float | None = None, scale: str = "htk", floor: float = 1e-10, base: float = e,
        right: int | None = None,
    ) -> None:  # fmt: skip
        from torchaudio.functional import melscale_fbanks  # slow to import

        super().__init__(window, hop, right=window - 1 if right is None else right, whole=right is None)
        self.transform, self.floor, self.base = transform or window, floor, base
        if self.transform < window:
            raise ValueError(f"a transform of {transform} samples is shorter than the window of {window}")
        bank = melscale_fbanks(
            self.transform // 2 + 1, low, rate / 2 if high is None else high, mels, rate,
            norm="slaney" if scale == "slaney" else None, mel_scale=scale,
        )  # fmt: skip
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def windows(self, x: Tensor) -> Tensor:
        framed = x.unfold(1, self.kernel, self.block or 1) * self.window
        return (power(framed, self.transform) @ self.bank).clamp(min=self.floor).log() / log(self.base)


class CentredLogMel(LogMel):
    """The same with windows around every `hop`-th sample: as torch.stft(center=True), but for the end of a row.

    Before the first sample of a row stands its mirror image; behind the last one there is silence.
    """

    def __init__(
        self, mels: int = 80, *, rate: int = 16000, window: int = 400, hop: int = 160, transform: int | None = None,
        low: float = 0.0, high: float | None = None, scale: str = "htk", floor: float = 1e-10, base: float = e,
    ) -> None:  # fmt: skip
        super().__init__(
            mels, rate=rate, window=window, hop=hop, transform=transform, low=low, high=high, scale=scale, floor=floor,
            base=base, right=(window - 1) // 2,
        )  # fmt: skip

    def step(self, x: Frames, state: Buffer) -> tuple[Frames, Buffer]:
        # A window that begins before the sound holds all that is mirrored into it, but for one sample: its weight is 0.
        z, room = state.append(x.values, x.mask), state.mask.shape[1]
        before = (z.mask.cumsum(1) == 0).sum(1, keepdim=True)
        at = torch.arange(z.mask.shape[1], device=z.mask.device)
        source = torch.where(at < before, 2 * before - at, at).clamp(max=max(z.mask.shape[1] - 1, 0))
        mirrored = z.values.gather(1, source)
        y, _ = super().step(Frames(mirrored[:, room:], x.mask), Buffer(mirrored[:, :room], state.mask))
        return y, z.last(room)


class KaldiFbank(Sliding):
    """Kaldi's filterbank features (compute-fbank-feats; torchaudio.compliance.kaldi.fbank) without dither.

    Each window loses its mean, is pre-emphasised inside itself, and is weighted by a Hann window to the 0.85; an
    output is valid where its whole window is (snip_edges). Samples in [-1, 1) become Kaldi's 16-bit ones by `gain`.
    """

    bank: Tensor

    def __init__(
        self, mels: int = 80, *, rate: int = 16000, window: int = 400, hop: int = 160, low: float = 20.0,
        high: float | None = None, preemphasis: float = 0.97, gain: float = 32768.0,
    ) -> None:  # fmt: skip
        from torchaudio.compliance.kaldi import get_mel_banks  # slow to import

        super().__init__(window, hop, right=window - 1, whole=True)
        self.transform, self.preemphasis, self.gain = 1 << (window - 1).bit_length(), preemphasis, gain
        bank, _ = get_mel_banks(mels, self.transform, float(rate), low, high or 0.0, 100.0, -500.0, 1.0)
        self.register_buffer("bank", F.pad(bank, [0, 1]).T.contiguous(), persistent=False)

    def windows(self, x: Tensor) -> Tensor:
        framed = x.unfold(1, self.kernel, self.block or 1) * self.gain
        framed = framed - framed.mean(-1, keepdim=True)
        before = torch.cat([framed[..., :1], framed[..., :-1]], -1)  # the first sample stands before itself
        at = torch.arange(self.kernel, dtype=x.dtype, device=x.device)  # made here: as exact as the samples
        window = (0.5 - 0.5 * (at * (2 * pi / (self.kernel - 1))).cos()).pow(0.85)
        framed = (framed - self.preemphasis * before) * window
        return (power(framed, self.transform) @ self.bank).clamp(min=torch.finfo(torch.float32).eps).log()


def power(framed: Tensor, transform: int) -> Tensor:
    """Power spectrum of windows [..., K], zeros behind them: [..., transform / 2 + 1]."""
    spectrum = torch.view_as_real(torch.fft.rfft(framed, transform))
    return spectrum.square().sum(-1)
