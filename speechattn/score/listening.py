"""The two ways in which a model hears an utterance: offline, the whole of it, and streamed, as it would live."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from speechattn.audio.resample import Resampler, Samples
from speechattn.audio.vision import Image
from speechattn.data.batch import seen
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.live.events import Event
from speechattn.live.lips import beside
from speechattn.live.session import Session
from speechattn.model import Recognizer
from speechattn.score.utterances import Utterance
from speechattn.search import Search

__all__ = ["BySession", "Ears", "Heard", "Offline", "WholeUtterances", "listen", "streamed", "through"]


@dataclass(frozen=True)
class Heard:
    """What was heard of one utterance, and how many seconds of computing that took.

    `streamed` is None where the model cannot stream. `delay_s` adds up, over `words`, the time from the end of a
    streamed word, as the model hears it, to its commit. `withheld` is what the session judged to be a loop. `failed`
    says why there is nothing.
    """

    id: str
    duration_s: float = 0.0
    offline: str = ""
    streamed: str | None = None
    offline_s: float = 0.0
    streamed_s: float = 0.0
    delay_s: float = 0.0
    words: int = 0
    withheld: str = ""
    failed: str = ""


class Offline(Protocol):
    """Whole utterances at the model's rate -> their texts."""

    def __call__(self, sounds: Sequence[Samples], lips: Sequence[Image | None] = ()) -> list[str]:
        """One text for each; a model that sees lips may be given pictures [T, S, S] of each."""


class WholeUtterances:
    """`Offline`: one pass of the encoder over a padded batch, then the search; `deaf` it sees lips alone."""

    def __init__(self, model: Recognizer, search: Search, *, deaf: bool = False) -> None:
        self.model, self.search, self.deaf = model, search, deaf

    @torch.inference_mode()
    def __call__(self, sounds: Sequence[Samples], lips: Sequence[Image | None] = ()) -> list[str]:
        rows = [self.model.sound(sound)[0] for sound in sounds]
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        x = Frames.from_lengths(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)
        if any(images is not None for images in lips):
            sound = Frames(0 * x.values, x.mask & False) if self.deaf else x
            x = seen(sound, lips)
        found = self.search.decode(self.model.listening(x))
        return [self.model.tokenizer.decode(row[0].tokens) if row else "" for row in found]


class BySession:
    """`Offline`: a session that commits whole utterances, for models that read windows of sound."""

    def __init__(self, session: Callable[[], Session]) -> None:
        self.session = session

    def __call__(self, sounds: Sequence[Samples], lips: Sequence[Image | None] = ()) -> list[str]:
        texts = []
        for sound in sounds:
            session = self.session()
            events = session.feed(sound, session.model.sample_rate) + session.finish()
            texts.append("".join(event.committed for event in events).strip())
        return texts


@dataclass(frozen=True)
class Ears:
    """Both ways; `session` is None for a model that cannot stream. Live sound comes `chunk_s` at a time.

    `size`: how large the pictures are that the model sees; None where it sees none. `deaf`: it is given those alone.
    """

    offline: Offline
    session: Callable[[], Session] | None
    sample_rate: int
    chunk_s: float = 0.1
    size: int | None = None
    deaf: bool = False


class Sensed(NamedTuple):
    """An utterance: samples at its own rate and at the model's, and the pictures that go with them."""

    samples: Samples
    rate: int
    whole: Samples
    lips: Image | None

    @classmethod
    def of(cls, ears: Ears, one: Utterance) -> Sensed:
        """InputError for what cannot be read, and for one without pictures for a model that is to see alone."""
        samples, rate = one.sound.read()
        whole = Resampler(rate, ears.sample_rate).feed(samples, last=True)
        lips = None if ears.size is None else one.sound.lips(len(whole), ears.size)
        if ears.deaf and lips is None:
            raise InputError(f"{one.id}: it has no pictures, and its sound is left out")
        return cls(samples, rate, whole, lips)


def listen(ears: Ears, batch: Sequence[Utterance]) -> list[Heard]:
    """Both ways of hearing each utterance; what cannot be read or heard fails alone, and says why."""
    done, sounds = {}, dict[str, Sensed]()
    for one in batch:
        try:
            sounds[one.id] = Sensed.of(ears, one)
        except (InputError, OSError) as error:
            done[one.id] = Heard(one.id, one.duration_s, failed=str(error))
    offline = hear_offline(ears, sounds)
    for name, sensed in sounds.items():
        text, took = offline[name]
        duration_s = len(sensed.samples) / sensed.rate
        if isinstance(text, Exception):
            done[name] = Heard(name, duration_s, failed=f"{name}: {text}")
            continue
        try:
            done[name] = hear_live(ears, name, sensed, text, took)
        except (InputError, ValueError, RuntimeError) as error:
            done[name] = Heard(name, duration_s, failed=f"{name}: {error}")
    return [done[one.id] for one in batch]


def hear_offline(ears: Ears, sounds: dict[str, Sensed]) -> dict[str, tuple[str | Exception, float]]:
    """Text and seconds of each; the time of a batch is shared out by length, and one that fails is heard one by one."""
    if not sounds:
        return {}
    began = time.perf_counter()
    try:
        wholes, lips = [one.whole for one in sounds.values()], [one.lips for one in sounds.values()]
        texts: Sequence[str | Exception] = ears.offline(wholes) if ears.size is None else ears.offline(wholes, lips)
    except (InputError, ValueError, RuntimeError) as error:
        if len(sounds) > 1:
            alone = [hear_offline(ears, {name: one}) for name, one in sounds.items()]
            return {name: found for row in alone for name, found in row.items()}
        texts = [error]
    share = (time.perf_counter() - began) / max(1, sum(len(one.whole) for one in sounds.values()))
    return {name: (text, share * len(one.whole)) for (name, one), text in zip(sounds.items(), texts, strict=True)}


def hear_live(ears: Ears, name: str, sensed: Sensed, offline: str, offline_s: float) -> Heard:
    """Piece by piece through a session, as the live loop does."""
    duration_s = len(sensed.samples) / sensed.rate
    if ears.session is None:
        return Heard(name, duration_s, offline, None, offline_s)
    events, took = through(
        ears.session(), sensed.samples, sensed.rate, ears.chunk_s, lips=sensed.lips, deaf=ears.deaf
    )  # fmt: skip
    return streamed(Heard(name, duration_s, offline, None, offline_s), events, took)


def through(
    session: Session, samples: Samples, rate: int, chunk_s: float, *, lips: Image | None = None, deaf: bool = False
) -> tuple[list[Event], float]:
    """All that a session says of the samples [N], piece by piece, and the seconds of computing by its clock.

    `lips` [T, S, S] are given to it as well; to one that is `deaf` alone.
    """
    events, size = list[Event](), max(1, round(chunk_s * rate))
    began = session.clock()
    pieces = (samples[at : at + size] for at in range(0, len(samples), size))
    for piece, images in beside(pieces, rate, lips):
        events += session.feed(None if deaf else piece, rate, images)
    events += session.finish()
    return events, session.clock() - began


def streamed(said: Heard, events: Sequence[Event], took: float) -> Heard:
    """The same with what a session said of it."""
    delays = [event.emitted_s - word.end for event in events for word in event.words]
    return replace(
        said, streamed="".join(event.committed for event in events).strip(), streamed_s=took, delay_s=sum(delays),
        words=len(delays), withheld=" ".join(event.withheld for event in events).strip(),
    )  # fmt: skip
