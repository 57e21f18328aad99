"""The numbers that describe a Whisper checkpoint, whichever layout it was read from."""

from __future__ import annotations

from dataclasses import dataclass

from speechattn.decoder.attention import Head

__all__ = ["WhisperConfig"]


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of the two halves, and what a checkpoint says about decoding (arXiv 2212.04356).

    `alignment_heads` are the (layer, head) pairs whose attention follows the speech. A checkpoint that names none
    gets every head of the upper half of the decoder, as the reference implementation does.
    """

    mels: int
    vocab: int
    audio_context: int
    text_context: int
    encoder_dim: int
    encoder_heads: int
    encoder_layers: int
    decoder_dim: int
    decoder_heads: int
    decoder_layers: int
    alignment_heads: tuple[Head, ...] = ()
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.alignment_heads:
            upper = range(self.decoder_layers // 2, self.decoder_layers)
            every = tuple((layer, head) for layer in upper for head in range(self.decoder_heads))
            object.__setattr__(self, "alignment_heads", every)

    @property
    def multilingual(self) -> bool:
        """English-only checkpoints have 51,864 tokens, all others more."""
        return self.vocab >= 51865
