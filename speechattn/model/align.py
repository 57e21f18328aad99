"""Where each line of a text is said in a recording."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np
import torch
from torch import Tensor

from speechattn.audio.read import Recording
from speechattn.audio.resample import Resampler, Samples
from speechattn.decoder.segmentation import Segment, segment
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.model.recognizer import Recognizer
from speechattn.text.pieces import Pieces

__all__ = ["Aligned", "AlignedWord", "align", "posteriors"]

AT_ONCE_S = 10.0  # of sound through the encoder
MARGIN_S = 0.5  # an utterance reaches so far beyond its letters (arXiv 2007.09127, section 2.2)


@dataclass(frozen=True)
class AlignedWord:
    """A word and its times in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Aligned:
    """A line of text, its times in seconds, its words, and its confidence.

    That is the lowest mean log-probability per frame of any 30 frames: 0 is sure; below -2, look at it.
    """

    text: str
    start: float
    end: float
    confidence: float
    words: tuple[AlignedWord, ...]


def align(
    model: Recognizer, recording: Recording, lines: Sequence[str], *, on_sound: Callable[[float], object] | None = None
) -> list[Aligned]:  # fmt: skip
    """CTC segmentation (arXiv 2007.09127) of a recording of any length by its text, one utterance a line.

    What is said before, behind and between the lines may be anything. `on_sound` hears of the seconds that are done.
    InputError for a model without a CTC head, of tokens or letters, a line that cannot be spelled, and for too short
    a recording.
    """
    lines = [" ".join(line.split()) for line in lines if line.strip()]
    if not lines:
        raise InputError("there is no text to align")
    head, tokenizer = model.speller
    tokens = [spoken(line, tokenizer) for line in lines]
    log_probs = posteriors(model, recording, on_sound=on_sound)
    found = segment(log_probs, tokens, blank=head.blank, margin=round(MARGIN_S / model.frame_s))
    return [timed(model, tokenizer, *one) for one in zip(lines, tokens, found, strict=True)]


@torch.inference_mode()
def posteriors(
    model: Recognizer, recording: Recording, *, on_sound: Callable[[float], object] | None = None
) -> Tensor:  # fmt: skip
    """Log-probabilities [T, V] of the CTC head over a whole recording, as the encoder hears it live."""
    plan, (head, tokenizer) = model.listening.plan(), model.speller
    if plan.block is None:
        raise InputError("the encoder of this model needs the whole recording at once")
    piece = max(1, round(AT_ONCE_S * model.sample_rate / plan.block)) * plan.block
    found: list[Tensor] = []
    state = None
    for samples, valid in padded(recording, model.sample_rate, piece, plan.block, plan.latency):
        values = model.sound(samples)
        x = Frames(values, torch.arange(values.shape[1], device=values.device)[None] < valid)
        state = model.listening.init_state(x) if state is None else state
        frames, state = model.listening.step(x, state)
        y = head(frames)
        found.append(y.values[y.mask].cpu())
        if on_sound:
            on_sound(valid / model.sample_rate)
    return torch.cat(found) if found else torch.zeros(0, tokenizer.size)


def padded(
    recording: Recording, rate: int, piece: int, block: int, latency: int
) -> Iterator[tuple[Samples, int]]:  # fmt: skip
    """Pieces of sound with the number of samples that are there; at the end, what pushes the last frames out."""
    resampler, waiting, total = Resampler(recording.rate, rate), np.zeros(0, np.float32), 0
    for sound in recording.blocks():
        waiting = np.concatenate([waiting, resampler.feed(sound)])
        if len(waiting) >= piece:
            total += piece
            yield waiting[:piece], piece
            waiting = waiting[piece:]
    waiting = np.concatenate([waiting, resampler.feed(waiting[:0], last=True)])
    total += len(waiting)
    if total:
        more = ceil((total + latency) / block) * block - total
        yield np.pad(waiting, [0, more]), len(waiting)


def spoken(line: str, tokenizer: Pieces) -> list[int]:
    """The tokens of a line: as it is written, or in the vocabulary's case; signs that it lacks are left out."""
    for form in (line, line.lower(), line.upper()):
        letters = "".join(c if said(c, tokenizer) else "" for c in form)
        if any(c.isalnum() for c in letters) and sum(map(str.isalnum, letters)) == sum(map(str.isalnum, form)):
            return tokenizer.encode(letters)
    raise InputError(f"{line!r} cannot be spelled with the model's vocabulary: write it as it is said")


def said(letter: str, tokenizer: Pieces) -> bool:
    """The vocabulary has it, or it is a space."""
    if letter.isspace():
        return True
    try:
        return tokenizer.unknown not in tokenizer.encode(letter) or unicodedata.category(letter)[0] == "L"
    except InputError:
        return False


def timed(model: Recognizer, tokenizer: Pieces, line: str, tokens: Sequence[int], found: Segment) -> Aligned:
    """Frames to seconds; words as they are written, where there are as many as are spelled."""
    step = model.frame_s
    bounds = np.cumsum([0, *tokenizer.words(tokens, spaceless=model.spaceless)]).tolist()
    words = [tokenizer.decode(tokens[a:b]) for a, b in pairwise(bounds)]
    written = line.split()
    texts = written if len(written) == len(words) else words
    times = [(found.tokens[a][0] * step, found.tokens[b - 1][1] * step) for a, b in pairwise(bounds)]
    return Aligned(
        line, found.start * step, found.end * step, found.confidence,
        tuple(AlignedWord(text, *time) for text, time in zip(texts, times, strict=True)),
    )  # fmt: skip
