"""Where speech begins and ends."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.audio.resample import Samples
from speechattn.errors import ModelError

__all__ = ["FRAME", "AlwaysSpeech", "Endpointer", "SileroVAD", "VoiceActivity"]

FRAME = 512  # samples at 16 kHz: 32 ms
CONTEXT = 64  # samples before each frame that the network sees too


class VoiceActivity(Protocol):
    """Probability of speech, frame by frame; remembers what it heard."""

    def __call__(self, frame: Samples) -> float:
        """`frame` [512] at 16 kHz -> probability that somebody speaks."""


class AlwaysSpeech:
    """No detection: everything is speech, and there are no endpoints."""

    def __call__(self, frame: Samples) -> float:
        """One."""
        return 1.0


class SileroNetwork(nn.Module):
    """Silero VAD 6 at 16 kHz: a learned Fourier transform, four convolutions, an LSTM cell, a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`x` [B, 64 + 512] -> probability [B] and the next state."""
        real, imaginary = self.stft_conv(F.pad(x[:, None], [0, CONTEXT], mode="reflect")).chunk(2, 1)
        y = (real.square() + imaginary.square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            y = conv(y).relu()
        h, c = self.lstm_cell(y.squeeze(-1), state)
        return self.final_conv(h.relu()[..., None]).sigmoid().flatten(), (h, c)


class SileroVAD:
    """The silero-vad network with the weights of the installed `silero-vad` package (MIT)."""

    def __init__(self) -> None:
        from safetensors.torch import load_file

        spec = importlib.util.find_spec("silero_vad")
        if spec is None or spec.origin is None:
            raise ModelError(
                "the package silero-vad is not installed: pip install silero-vad, or go without (--no-vad)"
            )
        self.network = SileroNetwork()
        self.network.load_state_dict(load_file(Path(spec.origin).parent / "data" / "silero_vad_16k.safetensors"))
        self.network.eval().requires_grad_(False)
        self.state: tuple[Tensor, Tensor] | None = None
        self.before = torch.zeros(CONTEXT)

    @torch.inference_mode()
    def __call__(self, frame: Samples) -> float:
        """`frame` [512] at 16 kHz -> probability that somebody speaks."""
        x = torch.cat([self.before, torch.from_numpy(frame)])
        chance, self.state = self.network(x[None], self.state)
        self.before = x[-CONTEXT:]
        return float(chance)


class Endpointer:
    """Speech begins when the probability reaches `threshold`; it ends after `silence_s` below `threshold - 0.15`."""

    def __init__(self, vad: VoiceActivity, *, threshold: float = 0.5, silence_s: float = 0.5) -> None:
        self.vad, self.threshold = vad, threshold
        self.patience = max(1, round(silence_s * 16000 / FRAME))
        self.speaking, self.quiet = False, 0

    def feed(self, frame: Samples) -> bool:
        """True while somebody speaks, the silence that may still be a pause included."""
        chance = self.vad(frame)
        if not self.speaking:
            self.speaking, self.quiet = chance >= self.threshold, 0
        elif chance >= self.threshold - 0.15:
            self.quiet = 0
        else:
            self.quiet += 1
            self.speaking = self.quiet < self.patience
        return self.speaking
