"""ESPnet's networks in this library's modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position, Relative
from speechattn.attention.self_attention import set_span
from speechattn.audio.spectrum import CentredLogMel
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.letters import OwnTokens
from speechattn.encoder.base import Encoder
from speechattn.encoder.branchformer import EBranchformerBlock
from speechattn.encoder.conformer import ConformerBlock
from speechattn.encoder.layers import Depthwise, Subsample
from speechattn.pretrained.espnet.config import EncoderConfig
from speechattn.pretrained.espnet.decoder import LAYER_NORM_EPS
from speechattn.pretrained.espnet.legacy import LegacyRelative, Whole
from speechattn.stream import Pointwise, Serial
from speechattn.text.pieces import Pieces

__all__ = ["Espnet", "build", "encoder_spec"]


class Espnet(nn.Module):
    """What a model's `config.yaml` calls ESPnet's parts: each of these makes one, and nothing is an `Espnet`."""

    @classmethod
    def encoder(
        cls, kind: str, mels: int, dim: int, depth: int, heads: int, inner: int, kernel: int, gate: int,
        merge_kernel: int, macaron: bool, activation: type[nn.Module], convolutions: Sequence[tuple[int, int]],
        legacy: bool, longest: int, dropout: float = 0.0, span: Pattern | None = None,
    ) -> Encoder:  # fmt: skip
        """A Conformer or E-Branchformer, as `EncoderConfig` describes it."""
        encoder = build(EncoderConfig(
            kind, dim, depth, heads, inner, kernel, gate, merge_kernel, macaron, activation,
            tuple((size, stride) for size, stride in convolutions), legacy, longest, dropout,
        ), mels)  # fmt: skip
        if span is not None:
            set_span(encoder, span)
        return encoder

    @classmethod
    def decoder(
        cls, vocab: int, dim: int, heads: int, depth: int, inner: int, dropout: float = 0.0
    ) -> AttentionDecoder:
        """The Transformer decoder."""
        decoder = AttentionDecoder.usual(vocab, dim, heads, depth, inner, dropout=dropout)
        set_eps(decoder)
        return decoder

    @classmethod
    def own_tokens(cls, dim: int, tokens: str) -> OwnTokens:
        """A CTC over tokens of its own, one a line."""
        return OwnTokens(dim, Pieces(tokens.split("\n")))

    @classmethod
    def htk_log_mel(
        cls, mels: int, rate: int, window: int, hop: int, transform: int, low: float = 0.0, high: float | None = None
    ) -> CentredLogMel:
        """With `htk: true`: HTK's scale, but triangles of area 1, as librosa has them."""
        from torchaudio.functional import melscale_fbanks  # slow to import

        made = CentredLogMel(mels, rate=rate, window=window, hop=hop, transform=transform, low=low, high=high)
        top = rate / 2 if high is None else high
        made.bank = melscale_fbanks(transform // 2 + 1, low, top, mels, rate, norm="slaney", mel_scale="htk")
        return made


def encoder_spec(config: EncoderConfig, mels: int, span: Span | None = None) -> dict[str, Any]:
    """An `Espnet.encoder` in words."""
    args = asdict(config) | {"mels": mels, "activation": f"torch.nn.{config.activation.__name__}"}
    if span is not None:
        args["span"] = {"class_path": "speechattn.attention.Span", "init_args": asdict(span)}
    return {"class_path": f"{Espnet.__module__}.Espnet.encoder", "init_args": args}


def set_eps(network: nn.Module) -> None:
    """Its layer norms add as much to the variance as ESPnet's."""
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = LAYER_NORM_EPS


def build(config: EncoderConfig, mels: int) -> Encoder:
    """The modules; each convolution looks as far ahead as back, and the batch norms are gone."""
    front = Subsample(mels, config.dim, convolutions=config.convolutions, whole=True)
    subsample = Serial(*front.members, Whole()) if config.legacy else front
    blocks = [conformer_block(config) if config.kind == "conformer" else branchformer_block(config)
              for _ in range(config.depth)]  # fmt: skip
    encoder = Encoder(subsample, blocks, Pointwise(nn.LayerNorm(config.dim)), dim=config.dim)
    set_eps(encoder)
    return encoder


def conformer_block(config: EncoderConfig) -> ConformerBlock:
    """One of `encoder: conformer`."""
    return ConformerBlock(
        config.dim, config.heads, config.inner, Span.full(),
        centred(config.dim, config.kernel) if config.kernel else None, position=position(config),
        macaron=config.macaron, norm=nn.Identity(), activation=config.activation, dropout=config.dropout,
    )  # fmt: skip


def branchformer_block(config: EncoderConfig) -> EBranchformerBlock:
    """One of `encoder: e_branchformer`."""
    return EBranchformerBlock(
        config.dim, config.heads, config.inner, config.gate, Span.full(), centred(config.gate, config.kernel),
        centred(2 * config.dim, config.merge_kernel), position=position(config), macaron=config.macaron,
        activation=config.activation, dropout=config.dropout,
    )  # fmt: skip


def centred(dim: int, kernel: int) -> Depthwise:
    """A filter that sees as much ahead as behind."""
    return Depthwise(dim, kernel, right=kernel // 2)


def position(config: EncoderConfig) -> Position:
    """Relative positions, new or old."""
    if config.legacy:
        return LegacyRelative(config.dim, config.heads, longest=config.longest)
    return Relative(config.dim, config.heads)
