"""Listening at all points of latency-quality curves: what is finished stands in a folder for each, and stays."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechattn.audio.resample import Resampler, Samples
from speechattn.cli.evaluate import SEARCH, changed, ears, settings
from speechattn.cli.options import build_model, build_session
from speechattn.cli.sweeps import at
from speechattn.data.prepare.manifests import file_name
from speechattn.errors import InputError
from speechattn.live.events import Event
from speechattn.live.session import Session
from speechattn.model import Recognizer
from speechattn.pretrained.whisper import WhisperModel
from speechattn.score.curves import Setting, sentences_of
from speechattn.score.evaluation import one_line
from speechattn.score.journal import Journal, replace_text
from speechattn.score.listening import Ears, Heard, streamed, through
from speechattn.score.shards import shared_out
from speechattn.score.utterances import Utterance

__all__ = ["OFFLINE", "TIMERS", "hear", "live", "log_of"]

TIMERS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
OFFLINE = "offline"
Done = dict[str, Heard]


def live(options: argparse.Namespace, model: Recognizer | WhisperModel) -> Session:
    """A session at one point; a search is for the offline half of a model that reads windows."""
    whole = isinstance(model, Recognizer) and model.listening.plan().block is None
    return build_session(changed(options, SEARCH) if whole else options, model)


@dataclass
class Booth:
    """Where one process listens: with the model of the last point, made anew for another."""

    setting: Setting | None = None
    model: Any = None

    def sit(self, setting: Setting | None, make: Callable[[], Any]) -> Any:
        """The model, or ears, of this point."""
        if self.model is None or self.setting != setting:
            self.model, self.setting = make(), setting
        return self.model


Job = tuple[Setting | None, argparse.Namespace, Utterance]
Answer = tuple[Heard, list[Event]]


def listen(booth: Booth, job: Job) -> Answer:
    """One utterance at one point; what cannot be heard says why."""
    setting, options, one = job
    try:
        samples, rate = one.sound.read()
        said = Heard(one.id, len(samples) / rate)
        if setting is None:
            return offline(booth.sit(None, partial(ears, options)), one, said, samples, rate), []
        model = booth.sit(setting, partial(build_model, options))
        session = live(options, model)
        session.clock = TIMERS[options.timer]
        session.began = session.clock()
        events, took = through(session, samples, rate, options.chunk)
        return streamed(said, events, took), events
    except (InputError, OSError, ValueError, RuntimeError) as error:
        return Heard(one.id, one.duration_s, failed=f"{one.id}: {error}"), []


def offline(booth: Ears, one: Utterance, said: Heard, samples: Samples, rate: int) -> Heard:
    """Each sentence heard as a whole; a line of text for each."""
    places = [(row.offset, row.offset + row.length) for row in sentences_of(one, translated=False)]
    cuts = [samples[round(first * rate / 1000) : round(last * rate / 1000)] for first, last in places]
    began = time.perf_counter()
    texts = booth.offline([Resampler(rate, booth.sample_rate).feed(cut, last=True) for cut in cuts])
    text = "\n".join(one_line(text) for text in texts)
    return replace(said, offline=text, offline_s=time.perf_counter() - began)


def place_of(options: argparse.Namespace, setting: Setting | None) -> Path:
    """The folder of a point."""
    return Path(options.output_dir) / (OFFLINE if setting is None else setting.name)


def log_of(options: argparse.Namespace, setting: Setting, one: Utterance) -> Path:
    """The event log of an utterance at a point, as `stream --format jsonl` writes one."""
    return place_of(options, setting) / "logs" / f"{file_name(one.id)}.jsonl"


def hear(
    options: argparse.Namespace, points: Sequence[Setting], utterances: Sequence[Utterance]
) -> Mapping[Setting | None, Done]:  # fmt: skip
    """What could be heard at every point and offline (None), by id; only what is missing is listened to."""
    with ExitStack() as stack:
        journals = {
            setting: stack.enter_context(
                Journal(place_of(options, setting), settings(at(options, setting), Path(options.output_dir)))
            )
            for setting in (None, *points)
        }
        found = {setting: dict(journal.done) for setting, journal in journals.items()}
        work: list[Job] = [
            (setting, at(options, setting), one)
            for setting in journals
            for one in utterances
            if one.id not in found[setting] or not (setting is None or log_of(options, setting, one).exists())
        ]
        bar = tqdm(
            total=round(sum(one.duration_s for _, _, one in work), 1), unit="s", desc="curves",
            disable=not sys.stderr.isatty(), bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]",
        )  # fmt: skip
        with bar:
            for (setting, _, one), (said, events) in shared_out(Booth, work, listen, processes=options.processes):
                if said.failed:
                    print(f"speechattn: skipped {said.failed}", file=sys.stderr)
                    found[setting].pop(one.id, None)
                else:
                    if setting is not None:
                        path = log_of(options, setting, one)
                        path.parent.mkdir(exist_ok=True)
                        replace_text(path, "".join(f"{event.to_json()}\n" for event in events))
                    found[setting][one.id] = said
                journals[setting].add([said])
                bar.update(one.duration_s)
    return found
