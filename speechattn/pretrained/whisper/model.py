"""Whisper (Radford et al., arXiv 2212.04356) as plain modules: log-mel -> encoder -> memory -> decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.audio.mel import HOP, log_mel
from speechattn.cross.soft import Soft
from speechattn.decoder.attention import AttentionDecoder, DecoderState
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.pretrained.whisper.config import WhisperConfig

__all__ = ["Encoder", "Whisper"]

STRIDE = 2 * HOP  # samples per encoder frame: 20 ms at 16 kHz
GRID = 25 * STRIDE
SILENT_LEVEL = -0.6  # log-mel of silence next to speech of usual loudness (the floor is 8 decades below its peak)


class SelfAttention(nn.Module):
    """Every frame looks at every frame."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, T, D] -> the same shape."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class EncoderLayer(nn.Module):
    """Self attention and feed-forward, each behind its norm and added to its input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm, self.ff_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, T, D] -> the same shape."""
        x = x + self.attention(self.norm(x))
        x = x + self.ff(self.ff_norm(x))
        return x


class Encoder(nn.Module):
    """Two convolutions (the second halves the rate), fixed positions, full attention.

    The cost follows the input: fewer frames than the 1,500 it was trained with are simply fewer frames.
    """

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.conv1 = nn.Conv1d(config.mels, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.positions = nn.Parameter(torch.zeros(config.audio_context, dim))
        self.layers = nn.ModuleList(EncoderLayer(dim, config.encoder_heads) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel [B, 2T, mels] -> [B, T, D]; ValueError when T is more than there are positions."""
        x = F.gelu(self.conv1(mel.transpose(1, 2)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        if x.shape[1] > len(self.positions):
            raise ValueError(f"{x.shape[1]} frames do not fit into the encoder's {len(self.positions)} positions")
        x = x + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.norm(x)
        return y


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
            cross=lambda: Soft(config.decoder_dim, config.decoder_heads, key_bias=False), key_bias=False,
        )  # fmt: skip

        self._silence: DecoderState | None = None

    @property
    def max_samples(self) -> int:
        """The longest input, in samples at 16 kHz: 30 s for every released checkpoint."""
        return self.config.audio_context * STRIDE

    def encode(self, samples: Tensor, *, pad: int) -> Tensor:
        """`samples` [B, n] at 16 kHz and silence behind them -> frames [B, T, D], one for each 320 samples.

        There are at least `pad` samples of silence, and as many more as make T a multiple of 25 (half a second): a few
        lengths that come again and again are faster than ever new ones, and do not fill the caches of the kernels.
        """
        n = -(-samples.shape[1] // STRIDE) * STRIDE
        total = max(n, min(-(-(n + pad) // GRID) * GRID, self.max_samples))
        mel = log_mel(F.pad(samples, [0, total - samples.shape[1]]), self.config.mels)
        x: Tensor = self.encoder(mel.to(self.encoder.positions))
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
            x = self.encoder(mel)
            self._silence = self.decoder.start(Memory.of(Frames(x, x.new_ones(x.shape[:2], dtype=torch.bool))))
        return self._silence
