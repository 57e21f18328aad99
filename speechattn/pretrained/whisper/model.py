"""Whisper (Radford et al., arXiv 2212.04356) as plain modules: log-mel -> encoder -> memory -> decoder."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.pattern import Span
from speechattn.attention.self_attention import SelfAttention
from speechattn.cross.soft import Soft
from speechattn.decoder.attention import AttentionDecoder, DecoderState
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.pretrained.whisper.config import WhisperConfig
from speechattn.pretrained.whisper.features import HOP, SILENCE, scaled
from speechattn.stream import Stream

__all__ = ["Encoder", "Whisper"]

STRIDE = 2 * HOP  # samples per encoder frame: 20 ms at 16 kHz
GRID = 25 * STRIDE
SILENT_LEVEL = -0.6  # log-mel of silence next to speech of usual loudness (the floor is 8 decades below its peak)


class EncoderLayer(nn.Module):
    """Self attention and feed-forward, each behind its norm and added to its input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm, self.ff_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, Span.full())
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Frames) -> Frames:
        """The same shape; what is not valid may become anything."""
        values = x.values + self.attention(Frames(self.norm(x.values), x.mask)).values
        return Frames(values + self.ff(self.ff_norm(values)), x.mask)


class Encoder(Stream):
    """Log-mel [B, 2T, mels] -> [B, T, D]: two convolutions (the second halves the rate), fixed positions, attention.

    Every frame looks at every frame, so it needs the whole utterance. The cost follows the input: fewer frames than
    the 1,500 it was trained with are simply fewer frames; ValueError when there are more frames than positions.
    """

    block = None
    ratio = Fraction(1, 2)

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.conv1 = nn.Conv1d(config.mels, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.positions = nn.Parameter(torch.zeros(config.audio_context, dim))
        self.layers = nn.ModuleList(EncoderLayer(dim, config.encoder_heads) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(dim)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        spent, mask = self._spend(state), x.mask[:, ::2]
        if mask.shape[1] > len(self.positions):
            raise ValueError(f"{mask.shape[1]} frames do not fit into the encoder's {len(self.positions)} positions")
        values = F.gelu(self.conv1(x.values.transpose(1, 2))).where(x.mask[:, None], 0.0)
        values = F.gelu(self.conv2(values)).transpose(1, 2) + self.positions[: mask.shape[1]]
        y = Frames(values, mask)
        for layer in self.layers:
            y = layer(y)
        return Frames.of(self.norm(y.values), mask), spent


class Whisper(nn.Module):
    """Encoder and decoder with the weights of any Whisper checkpoint."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        if config.encoder_dim != config.decoder_dim:
            raise ModelError(f"encoder width {config.encoder_dim} and decoder width {config.decoder_dim} differ")
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = AttentionDecoder(
            config.vocab, config.text_context, config.decoder_dim, config.decoder_heads, config.decoder_layers,
            cross=partial(Soft, key_bias=False),
        )  # fmt: skip

        self._silence: DecoderState | None = None

    @property
    def max_samples(self) -> int:
        """The longest input, in samples at 16 kHz: 30 s for every released checkpoint."""
        return self.config.audio_context * STRIDE

    def encode(self, features: Tensor, *, samples: int, pad: int) -> Frames:
        """Front-end `features` [B, T, mels] of so many `samples` and silence behind them -> frames [B, T', D].

        There is one for each 320 samples, with at least `pad` samples of silence, and as many more as make T' a
        multiple of 25 (half a second): a few lengths that come again and again are faster than ever new ones, and do
        not fill the caches of the kernels.
        """
        n = -(-samples // STRIDE) * STRIDE
        total = max(n, min(-(-(n + pad) // GRID) * GRID, self.max_samples)) // HOP
        mel = scaled(F.pad(features, [0, 0, 0, total - features.shape[1]], value=SILENCE))
        mask = torch.ones(mel.shape[:2], dtype=torch.bool, device=mel.device)
        x: Frames = self.encoder(Frames(mel.to(self.encoder.positions), mask))
        return x

    @torch.inference_mode()
    def silence(self) -> DecoderState:
        """What the decoder reads of 30 s of silence; computed once.

        Whisper was trained on speech followed by silence up to 30 s. Without it the decoder does not find the end of
        its text and loops; encoding it at every look is most of the cost. So the frames that the encoder gives to
        silence are remembered, and those behind the encoded sound are read from here.
        """
        if self._silence is None:
            weight = self.encoder.positions
            mel = weight.new_full((1, 2 * self.config.audio_context, self.config.mels), SILENT_LEVEL)
            mask = torch.ones(mel.shape[:2], dtype=torch.bool, device=mel.device)
            self._silence = self.decoder.start(Memory.of(self.encoder(Frames(mel, mask))))
        return self._silence
