"""The recognisers whose decoders are compared: one encoder, and heads that look at its frames in different ways."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from claim.strings import MELS, tokenizer
from claim.training import recogniser
from speechattn.attention import Span
from speechattn.cross import CrossMaker
from speechattn.cross.soft import Soft
from speechattn.decoder.attention import AttentionDecoder, sinusoids
from speechattn.decoder.ctc import CTC
from speechattn.encoder import Conformer
from speechattn.encoder.layers import Subsample
from speechattn.model import Recognizer
from speechattn.task.objectives import CTCObjective, Objective

__all__ = ["ALONE", "DIM", "FRAME_S", "VOCAB", "decoder", "local", "objectives"]

ALONE = 250  # steps of CTC alone: a decoder that is told of frames that say nothing yet spoils them
DIM, VOCAB, FRAME_S = 96, tokenizer().size, 0.04


def local(heads: dict[str, nn.Module], *, chunk: int = 8) -> Recognizer:
    """Four Conformer blocks that hear chunks of `chunk` frames of 40 ms, 16 frames before them, and CTC."""
    front = Subsample(MELS, DIM, factor=4, channels=24)
    encoder = Conformer(MELS, DIM, 4, 4, 192, span=Span.chunked(16, chunk), kernel=9, subsample=front)
    return recogniser(encoder, {"ctc": CTC(DIM, VOCAB), **heads})


def decoder(depth: int = 1, cross: CrossMaker = Soft, *, positions: bool = False) -> AttentionDecoder:
    """Layers of width 96 with four heads; with `positions` it knows where in the utterance a frame is.

    The encoder hears a second or two: it gives the same digit the same frames wherever it is said.
    """
    table = sinusoids if positions else None
    return AttentionDecoder.usual(VOCAB, DIM, 4, depth, 192, cross=cross, dropout=0.1, memory_positions=table)


def objectives(*others: Objective) -> Sequence[Objective]:
    """With CTC beside them, as recognisers are trained."""
    return [CTCObjective(0.3), *others]
