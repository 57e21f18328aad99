"""How much sound a model that streams waits for before it listens."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from speechattn.attention.pattern import Span
from speechattn.attention.self_attention import Spanned, set_span
from speechattn.errors import InputError
from speechattn.model.recognizer import Recognizer

__all__ = ["LONGEST_MS", "set_chunk"]

LONGEST_MS = 10_000  # who waits for longer does not listen live


def set_chunk(model: Recognizer, chunk_ms: int) -> None:
    """The encoder hears chunks of so many milliseconds from now on, with as much before them as it did.

    Law: it is the model whose configuration has this chunk, and before it what is read again (`Encoder.revise`). A
    session that runs does not survive it. InputError for what is no whole number of the encoder's frames, for more than
    `LONGEST_MS`, and for an encoder without chunks.
    """
    plan = model.listening.plan()
    spans = [part.span for part in model.encoder.modules() if isinstance(part, Spanned) and part.rate == 1]
    span = next((span for span in spans if isinstance(span, Span)), None)
    if plan.block is None or span is None:
        raise InputError(f"a chunk of {chunk_ms} ms: the encoder of this model does not hear chunks")
    frame_ms = 1000 / (plan.ratio * model.sample_rate)
    frames = Fraction(chunk_ms) / frame_ms
    if frames < 1 or frames.denominator > 1:
        raise InputError(
            f"a chunk of {chunk_ms} ms: wanted a multiple of {float(frame_ms):g} ms, a frame of this model"
        )
    if chunk_ms > LONGEST_MS:
        raise InputError(f"a chunk of {chunk_ms} ms: at most {LONGEST_MS} ms")
    try:
        set_span(model.encoder, replace(span, chunk=int(frames) + getattr(model.encoder, "revise", 0)))
    except ValueError as error:
        raise InputError(f"a chunk of {chunk_ms} ms: {error}") from error
