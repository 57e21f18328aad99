"""What a model hears in an utterance, and where it looks: the numbers of a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechattn.analysis.rollout import rollout
from speechattn.analysis.saliency import Reading
from speechattn.analysis.statistics import coverage, entropy, monotonicity
from speechattn.analysis.weights import LayerWeights, Unseen
from speechattn.audio.resample import Samples
from speechattn.audio.spectrum import CentredLogMel
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.live.events import Event
from speechattn.live.session import Session
from speechattn.model import Recognizer
from speechattn.pretrained.whisper import WhisperModel

__all__ = ["Array", "Map", "Spoken", "View", "listen", "summary", "view"]

BLOCK_S = 0.1  # of sound to a session at once
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Spoken:
    """A word, when it was said, and how much sound had been heard when it was committed; in seconds."""

    text: str
    start: float
    end: float
    committed: float


@dataclass(frozen=True)
class Map:
    """A panel: rows over the frames of the sound. With `labels` they are tokens, without they are frames, too."""

    name: str
    frame_s: float
    values: Array  # [U, T]
    labels: tuple[str, ...] = ()
    words: tuple[tuple[int, int], ...] = ()  # first and last-plus-one row of each word


@dataclass(frozen=True)
class View:
    """All that the picture shows."""

    title: str
    duration_s: float
    highest_hz: float
    spectrum: Array  # decibels below the loudest [T', mels]
    words: tuple[Spoken, ...]
    maps: tuple[Map, ...]
    statistics: dict[str, Any]


def listen(model: Recognizer | WhisperModel, samples: Samples) -> tuple[Spoken, ...]:
    """The words of samples [N] at the model's rate, live: as a session commits them."""
    events: list[Event] = []
    session = Session(model, on_event=events.append)
    size = round(BLOCK_S * model.sample_rate)
    for at in range(0, len(samples), size):
        session.feed(samples[at : at + size], model.sample_rate)
    session.finish()
    return tuple(
        Spoken(word.text, word.start, word.end, event.audio_s) for event in events for word in event.words
    )  # fmt: skip


def view(
    model: Recognizer | WhisperModel, samples: Samples, *, name: str, layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> View:  # fmt: skip
    """What the model `name` hears in samples [N] at its rate, and where it looks.

    That is its cross-attention, mean over `layers` and `heads` (all); a model without an attention decoder shows its
    CTC posterior and the attention rollout of its encoder, or the posterior alone where there is no such rollout.
    InputError for a layer or head that there is none of, where nothing is said, and where there is nothing to show.
    """
    words = listen(model, samples)
    reading = Reading.of(model, samples, "".join(word.text for word in words))
    if reading.decoder is not None:
        found = reading.cross_weights()
        which = chosen("layer", layers, found.shape[0]), chosen("head", heads, found.shape[1])
        maps: tuple[Map, ...] = (crossed(model, reading, found, which, len(words)),)
        what = f"cross-attention, {picked(which, layers, heads)}"
        statistics = of_tokens(found, reading, which)
    else:
        maps, what, statistics = without_decoder(reading, layers, heads)
    return View(f"{name}: {what}", len(samples) / model.sample_rate, model.sample_rate / 2,
                spectrum(samples, model.sample_rate), words, maps, statistics)  # fmt: skip


def chosen(kind: str, wanted: Sequence[int] | None, count: int) -> list[int]:
    """The indices, or all; InputError for one that there is none of."""
    if wanted is None:
        return list(range(count))
    wrong = [str(i) for i in wanted if not 0 <= i < count]
    if wrong or not wanted:
        raise InputError(f"{kind} {', '.join(wrong) or 'list is empty'}: this model has {kind}s 0 to {count - 1}")
    return list(dict.fromkeys(wanted))


def said(kind: str, indices: Sequence[int], wanted: Sequence[int] | None) -> str:
    """The indices as a title has them."""
    many = kind if len(indices) == 1 else f"{kind}s"
    return f"all {len(indices)} {many}" if wanted is None else f"{many} {', '.join(map(str, indices))}"


def picked(which: tuple[list[int], list[int]], layers: Sequence[int] | None, heads: Sequence[int] | None) -> str:
    """Layers and heads as a title has them."""
    return f"mean of {said('layer', which[0], layers)} and {said('head', which[1], heads)}"


def crossed(
    model: Recognizer | WhisperModel, reading: Reading, found: Tensor, which: tuple[list[int], list[int]], words: int
) -> Map:  # fmt: skip
    """The mean of the chosen heads, for every token, over the frames that hear sound."""
    mean = found[which[0]][:, which[1]].mean((0, 1))[:, : reading.frames]
    sizes = model.tokenizer.words(reading.tokens, spaceless=model.spaceless)
    ends = np.cumsum([0, *sizes]).tolist()
    rows = tuple(pairwise(ends)) if len(sizes) == words else ()
    return Map("cross-attention", reading.frame_s, array(mean), tuple(shown(label) for label in reading.labels), rows)


def without_decoder(
    reading: Reading, layers: Sequence[int] | None, heads: Sequence[int] | None
) -> tuple[tuple[Map, ...], str, dict[str, Any]]:
    """What CTC hears and what reaches the top of the encoder: maps, their names as a title has them, statistics."""
    try:
        seen = reading.self_weights()
    except Unseen as error:
        if layers is not None or heads is not None:
            raise InputError(f"no layers and heads to choose from: {error}") from error
        return alone(reading, str(error)), f"CTC posterior ({reading.lacking}; {error})", {}
    which = chosen("layer", layers, len(seen)), chosen("head", heads, min(w.weights.shape[1] for w in seen))
    statistics = of_frames(seen, which)
    if (block := crowded(seen)) is not None:
        reason = f"no rollout: block {block} has several attentions side by side"
        return alone(reading, reason), f"CTC posterior ({reading.lacking}; {reason})", statistics
    maps = (*posterior(reading), reached(reading, seen, which))
    names = " and ".join(one.name for one in maps)
    return maps, f"{names} ({reading.lacking}), {picked(which, layers, heads)}", statistics


def crowded(seen: Sequence[LayerWeights]) -> str | None:
    """The first block, by its name up to the last index, that has several of the layers."""
    blocks = [found[0] if (found := re.match(r"(.*\.)?\d+(?=\.|$)", one.name)) else "" for one in seen]
    return next((block for block in blocks if blocks.count(block) > 1), None)


def alone(reading: Reading, reason: str) -> tuple[Map, ...]:
    """The CTC posterior; without it an InputError that has the reason."""
    if not (found := posterior(reading)):
        raise InputError(f"there is nothing to show: {reading.lacking}, no CTC head, and {reason}")
    return found


def posterior(reading: Reading) -> tuple[Map, ...]:
    """That of each kind of token that CTC hears, where there is CTC."""
    if reading.ctc is None:
        return ()
    with torch.no_grad():
        heard = reading.ctc(reading.memory()).values[0, : reading.frames].exp()
    kinds = list(dict.fromkeys(reading.tokens))
    names = dict(zip(reading.tokens, reading.labels, strict=True))
    labels = tuple(shown(names[token]) for token in kinds)
    return (Map("CTC posterior", reading.frame_s, array(heard[:, kinds].T), labels),)


def reached(reading: Reading, seen: Sequence[LayerWeights], which: tuple[list[int], list[int]]) -> Map:
    """How much of each frame reaches the top."""
    layers = [seen[i].weights[:, which[1]] for i in which[0]]
    if len({layer.shape[-1] for layer in layers}) == 1:
        rolled = rollout(layers)[0, : reading.frames, : reading.frames]
        return Map("attention rollout", reading.frame_s, array(rolled))
    mean = layers[-1].mean(1)[0]  # the rate falls on the way up: the layers cannot be multiplied
    step = reading.frame_s * reading.frames / len(mean)
    return Map(f"attention of {seen[which[0][-1]].name}", step, array(mean))


def of_tokens(found: Tensor, reading: Reading, which: tuple[list[int], list[int]]) -> dict[str, Any]:
    """Statistics of each chosen head of the decoder [L, H, U, T]."""
    found = found[which[0]][:, which[1]]
    inside = found[..., : reading.frames]
    mean = inside.mean((0, 1))
    return {
        "layers": which[0], "heads": which[1], "entropy": entropy(found).tolist(),
        "monotonicity": monotonicity(inside).tolist(), "coverage": coverage(inside).tolist(),
        "share_of_sound": inside.sum(-1).mean(-1).tolist(),
        "mean": {"monotonicity": float(monotonicity(mean)), "coverage": float(coverage(mean))},
    }  # fmt: skip


def of_frames(seen: Sequence[LayerWeights], which: tuple[list[int], list[int]]) -> dict[str, Any]:
    """Statistics of each chosen head of the encoder."""
    entropies = [entropy(seen[i].weights[:, which[1]])[0].tolist() for i in which[0]]
    return {"layers": which[0], "heads": which[1], "names": [seen[i].name for i in which[0]], "entropy": entropies}


def array(x: Tensor) -> Array:
    """On the CPU, in float32."""
    found: Array = x.detach().float().cpu().numpy()
    return found


def shown(label: str) -> str:
    """A token as a label: what cannot be seen is drawn."""
    return "".join("␣" if c.isspace() else c if c.isprintable() else "·" for c in label)


def spectrum(samples: Samples, rate: int) -> Array:
    """Log-mel of samples [N] every 10 ms, in decibels below the loudest [T, 80]."""
    front = CentredLogMel(80, rate=rate, window=rate // 40, hop=rate // 100, scale="slaney", base=10.0)
    x = torch.from_numpy(np.ascontiguousarray(samples, np.float32))[None]
    with torch.no_grad():
        log = 10 * front(Frames(x, torch.ones_like(x, dtype=torch.bool))).values[0]
    return array(log - log.max())


def summary(seen: View) -> dict[str, Any]:
    """The numbers of the picture, but for the spectrogram; times to the millisecond."""
    return {
        "title": seen.title, "duration_s": round(seen.duration_s, 3), 
        "words": [
            {"text": w.text.strip(), "start": round(w.start, 3), "end": round(w.end, 3),
             "committed": round(w.committed, 3)}
            for w in seen.words
        ],
        "maps": [
            {"name": one.name, "frame_s": one.frame_s, "labels": list(one.labels),
             "words": [list(rows) for rows in one.words],
             "values": np.round(one.values.astype(float), 5).tolist()}
            for one in seen.maps
        ],
        "statistics": seen.statistics,
    }  # fmt: skip
