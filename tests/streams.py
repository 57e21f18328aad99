"""One or more of every stream of the package, ready to be checked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from speechattn.attention import Alibi, Blocks, Bucketed, Relative, Rotary, SelfAttention, Span
from speechattn.attention.blocks import Blockwise
from speechattn.attention.linear import Causal
from speechattn.attention.prefill import Prefill
from speechattn.attention.self_attention import Spanned
from speechattn.audio.normal import GlobalCMVN
from speechattn.audio.spectrum import CentredLogMel, KaldiFbank, LogMel
from speechattn.decoder.ctc import CTC, IntermediateCTC, SelfConditioned
from speechattn.encoder import (
    Conformer,
    EBranchformer,
    EfficientConformer,
    Encoder,
    LabelEncoder,
    Transformer,
    branchformer,
    conformer,
    efficient,
    layers,
    transformer,
)  # fmt: skip
from speechattn.stream import (
    Delay,
    Parallel,
    Planned,
    Pointwise,
    Residual,
    Serial,
    Sliding,
    Stream,
)  # fmt: skip

D = 8
BASES = {Stream, Planned, Sliding, Spanned, Causal, Blockwise, Prefill}


def lively(stream: Stream) -> Stream:
    """No parameter stays at a value that hides something, and no activation is flat."""
    for part in stream.modules():
        if isinstance(part, Pointwise) and isinstance(part.f, nn.ReLU):
            part.f = nn.Softplus()
    for name, parameter in stream.named_parameters():
        mean = 1.0 if ("norm" in name and "weight" in name) or ("conv" in name and "bias" in name) else 0.0
        torch.nn.init.normal_(parameter, mean, 0.4)
    return stream.eval()


def attention(span: Span | Blocks, **options: object) -> SelfAttention:
    return SelfAttention(D, 2, span, **options)  # type: ignore[arg-type]


def block(**options: object) -> Stream:
    return conformer.ConformerBlock(D, 2, 12, Span(5, 4), layers.Depthwise(D, 3), position=Relative(D, 2))


FRONT = Pointwise(nn.Identity())
MAKERS: dict[type[Stream], list[Callable[[], Stream]]] = {
    Delay: [lambda: Delay(3), lambda: Delay(0)],
    Pointwise: [lambda: Pointwise(nn.Linear(D, 5))],
    CTC: [lambda: CTC(D, 5)],
    SelfConditioned: [lambda: SelfConditioned(IntermediateCTC(CTC(D, 5)))],
    Serial: [
        lambda: Serial(layers.Depthwise(D, 3, right=1), attention(Span(3, 4, 1)), layers.Depthwise(D, 5, right=2)),
        lambda: Serial(Delay(1), layers.Stack(3, 2), Delay(1), Pointwise(nn.Linear(3 * D, D)), attention(Span(2, 3))),
        lambda: Serial(attention(Span.full()), layers.Depthwise(D, 3, right=1)),
        lambda: Serial(layers.Depthwise(D, 3, right=1), attention(Blocks(3, ((True,) * 9,) * 9))),
        lambda: Serial(),
    ],
    Parallel: [lambda: Parallel(layers.Depthwise(D, 5, right=2), attention(Span(3, 4))),
               lambda: Parallel(attention(Span.full()), layers.Depthwise(D, 5, right=2))],
    Residual: [lambda: Residual(layers.Depthwise(D, 5, right=2), scale=0.5),
               lambda: Residual(layers.Depthwise(D, 5, stride=2), skip=layers.Every(D, D, 2)),
               lambda: Residual(layers.Depthwise(D, 2), skip=layers.Depthwise(D, 5, right=2))],
    SelfAttention: [
        lambda: attention(Span.full(), position=Relative(D, 2)),
        lambda: attention(Span.causal(), position=Relative(D, 2)),
        lambda: attention(Span.causal(), position=Bucketed(D, 2, buckets=8, farthest=16)),
        lambda: attention(Span.sliding(4, 2), position=Rotary(D, 2)),
        lambda: attention(Span.chunked(6, 4, right=3), position=Relative(D, 2)),
        lambda: attention(Span.chunked(None, 3, right=2), position=Alibi(D, 2)),
        lambda: attention(Span.dilated(6, 3), position=Bucketed(D, 2, buckets=8, farthest=16)),
        lambda: attention(Span.sliding(3, sinks=2), position=Relative(D, 2)),
        lambda: attention(Span(5, 4, 2, 2, 3), position=Alibi(D, 2)),
        lambda: attention(Span.chunked(4, 2), position=Rotary(D, 2), key_heads=1),
        lambda: attention(Span.chunked(4, 2), position=Relative(3 * D, 2), group=3),
        lambda: attention(Span.full(), group=3),
        lambda: attention(Blocks(6, tuple(tuple((i + j) % 3 != 1 for j in range(6)) for i in range(6)))),
    ],
    layers.Depthwise: [lambda: layers.Depthwise(D, 5), lambda: layers.Depthwise(D, 5, right=3),
                       lambda: layers.Depthwise(D, 4, right=2, stride=3), lambda: layers.Depthwise(D, 1)],
    layers.ChunkDepthwise: [lambda: layers.ChunkDepthwise(D, 5, Span(3, 4)),
                            lambda: layers.ChunkDepthwise(D, 5, Span.full())],
    layers.Conv2d: [lambda: layers.Conv2d(1, 3, 3, 2, right=1), lambda: layers.Conv2d(1, 3, 3, 2, right=2, whole=True),
                    lambda: layers.Conv2d(1, 3, 5, 3, right=4, whole=True)],
    layers.Stack: [lambda: layers.Stack(4, 3), lambda: layers.Stack(2, 3), lambda: layers.Stack(4, 1)],
    layers.Every: [lambda: layers.Every(D, 4, 3)],
    layers.Subsample: [lambda: layers.Subsample(D, 6, factor=2), lambda: layers.Subsample(D, 6, factor=4),
                       lambda: layers.Subsample(11, 6, factor=6), lambda: layers.Subsample(15, 6, factor=8),
                       lambda: layers.Subsample(11, 6, factor=6, whole=True)],
    conformer.ConformerBlock: [block],
    branchformer.Gate: [lambda: branchformer.Gate(D // 2, layers.Depthwise(D // 2, 5, right=2))],
    branchformer.EBranchformerBlock: [lambda: branchformer.EBranchformerBlock(
        D, 2, 12, 6, Span(5, 4, 1), layers.Depthwise(6, 5, right=1), layers.Depthwise(2 * D, 3, right=1),
        position=Relative(D, 2))],
    efficient.EfficientConformerBlock: [lambda: efficient.EfficientConformerBlock(
        D, 2, 12, Span(4, 2), kernel=3, stride=2, outputs=6, group=3, position=Relative(3 * D, 2))],
    transformer.TransformerBlock: [lambda: transformer.TransformerBlock(
        D, 4, 12, Span.sliding(4, 1), position=Relative(D, 4), key_heads=2)],
    Encoder: [lambda: Encoder(FRONT, [block(), block()], Pointwise(nn.LayerNorm(D)), dim=D)],
    Conformer: [lambda: Conformer(D, D, 2, 2, 12, span=Span(5, 2), kernel=3),
                lambda: Conformer(D, D, 2, 2, 12, span=Span(5, 2, 1), kernel=5, conv_right=1, macaron=False),
                lambda: Conformer(D, D, 1, 2, 12, span=Span.full(), kernel=5, conv_right=None),
                lambda: Conformer(11, D, 1, 2, 12, span=Span(2, 2), kernel=5, conv_right=None, factor=6)],
    Transformer: [lambda: Transformer(D, D, 2, 2, 12, span=Span.sliding(4, 2)),
                  lambda: Transformer(D, D, 2, 2, 12, span=Span.sliding(3, sinks=2), position=Rotary)],
    LabelEncoder: [lambda: LabelEncoder(7, D, 2, 2, 12, left=3), lambda: LabelEncoder(7, D, 2, 2, 12)],
    EBranchformer: [lambda: EBranchformer(D, D, 2, 2, 12, span=Span(5, 2), kernel=3, gate=6),
                    lambda: EBranchformer(D, D, 1, 2, 12, span=Span(2, 2, 1), kernel=3, gate=6, conv_right=1)],
    LogMel: [lambda: LogMel(4, rate=1600, window=40, hop=16), lambda: LogMel(4, rate=1600, window=10, hop=16)],
    CentredLogMel: [lambda: CentredLogMel(4, rate=1600, window=40, hop=16)],
    KaldiFbank: [lambda: KaldiFbank(4, rate=1600, window=40, hop=16)],
    GlobalCMVN: [lambda: GlobalCMVN(torch.randn(D), torch.rand(D) + 0.5)],
    EfficientConformer: [lambda: EfficientConformer(
        D, (8, 12), (2, 1), 2, span=Span(6, 3), kernel=3, widening=2, group=3)],
}  # fmt: skip
CASES = [pytest.param(make, id=f"{kind.__name__}-{i}") for kind, makers in MAKERS.items()
         for i, make in enumerate(makers)]  # fmt: skip
