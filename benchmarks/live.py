"""Live transcription of real dialogue: word error rate, lag, real-time factor and memory, all in one run.

    make bench-live            # the figures that are quoted (about 25 minutes on 2 cores)
    python benchmarks/live.py --quick

Data: Flight of the Amazon Queen, test split (25 minutes of 5 actors), one stream per character: the clips of its
dialogues joined with silent gaps of 0.2 to 0.8 s, no reset between them. Lag is measured against word ends from an
offline alignment with another recogniser (`benchmarks/align_fotaq.py`), computing and queueing included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from report import Report

from speechattn import AlignAtt, Event, LocalAgreement, Session, load_model
from speechattn.audio.hearing import hear
from speechattn.data.fotaq import Line, default_folder, prepare, read_split
from speechattn.data.streams import Stream, join, read_word_ends
from speechattn.live.listener import WindowModel as Model
from speechattn.live.windowed import Settings
from speechattn.policy import Policy
from speechattn.pretrained.whisper.load import FRAME_THRESHOLD
from speechattn.score.calibration import calibration, word_marks
from speechattn.score.lag import measure_lag
from speechattn.score.wer import WordErrors, bootstrap, word_errors

PIECE_S = 0.1  # sound arrives in pieces of this length
RATE = 16000
FULL_PAD = 30.0


@dataclass(frozen=True)
class Run:
    """One way to listen to all streams."""

    events: list[list[Event]]
    streams: list[Stream]
    seconds: float  # of computing
    before: int  # words committed before finish

    @property
    def rtf(self) -> float:
        """Seconds of computing per second of sound."""
        return self.seconds / sum(stream.duration_s for stream in self.streams)

    def words(self) -> int:
        """Committed words."""
        return sum(len(event.words) for events in self.events for event in events)

    def errors(self) -> WordErrors:
        """Word errors, one utterance per stream; the interval comes from the clips (see `clip_interval`)."""
        texts = ["".join(event.committed for event in events) for events in self.events]
        return word_errors([stream.text for stream in self.streams], texts)


def listen(model: Model, policy: Policy, streams: list[Stream], settings: Settings | None = None) -> Run:
    """Feed each stream in small pieces to a session of its own."""
    heard: list[list[Event]] = []
    before, began = 0, time.perf_counter()
    for stream in streams:
        session = Session(model, policy=policy, settings=settings)
        events = [event for piece in pieces(stream.samples) for event in session.feed(piece, RATE)]
        before += sum(len(event.words) for event in events)
        heard.append(events + session.finish())
    return Run(heard, streams, time.perf_counter() - began, before)


def pieces(samples: np.ndarray) -> Iterator[np.ndarray]:
    """The sound as it arrives."""
    step = round(PIECE_S * RATE)
    yield from (samples[at : at + step] for at in range(0, len(samples), step))


def by_clip(run: Run) -> tuple[list[str], list[str]]:
    """References and hypotheses per clip: each committed word goes to the clip during which its middle was said."""
    references, hypotheses = [], []
    for stream, events in zip(run.streams, run.events, strict=True):
        texts = [""] * len(stream.lines)
        for word in (word for event in events for word in event.words):
            clip = int(np.searchsorted(stream.starts_s, (word.start + word.end) / 2, side="right")) - 1
            texts[max(clip, 0)] += word.text
        references += [line.text for line in stream.lines]
        hypotheses += texts
    return references, hypotheses


def offline(model: Model, lines: list[Line]) -> WordErrors:
    """Greedy decoding of each clip alone, padded to 30 s: what the same weights can do without a stream."""
    import soundfile

    texts = []
    for line in lines:
        sound = soundfile.read(line.path, dtype="float32")[0]
        memory = model.encode(hear(model.front_end, sound), samples=len(sound), finished=True)
        texts.append(model.tokenizer.decode(model.draft(memory, []).tokens.tolist()))
    return word_errors([line.text for line in lines], texts)


def megabytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def soak(streams: list[Stream], minutes: float) -> dict[str, list[float]]:
    """One session over an hour of the clips, again and again: memory and time per step at three ages."""
    torch.set_num_threads(1)
    model = load_model("tiny.en")
    session = Session(model)
    sound = np.concatenate([stream.samples for stream in streams])
    memory, steps, marks = [], [], [min(2.0, minutes / 4), minutes / 2, minutes]
    at, spent = 0, {mark: [] for mark in marks}
    while session.audio_s < minutes * 60:
        piece = sound[at : at + round(PIECE_S * RATE)]
        at = (at + len(piece)) % len(sound)
        began = time.process_time()  # of this process alone: other runs share the machine
        session.feed(piece, RATE)
        took, minute = time.process_time() - began, session.audio_s / 60
        for mark in marks:
            if max(0, mark - 4) < minute <= max(mark, 4) and took > 0.02:  # a look, not only voice detection
                spent[mark].append(took)
        if len(memory) < len(marks) and minute >= marks[len(memory)] - 1e-3:
            memory.append(megabytes())
    steps = [1e3 * float(np.median(spent[mark])) for mark in marks]
    return {"minutes": marks, "megabytes": memory, "step_ms": steps}


def main() -> None:
    """Run everything; `--quick` takes one stream and two minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, for development")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    folder = prepare(default_folder(), ("test",))
    by_speaker = groupby(
        sorted(read_split(folder, "test"), key=lambda line: line.speaker), key=lambda line: line.speaker
    )
    streams = [join(speaker, list(lines)) for speaker, lines in by_speaker]
    if quick:
        streams = [join(stream.name, stream.lines[:8]) for stream in streams[:1]]
    figures(streams, minutes=0.5 if quick else 60.0)


def figures(streams: list[Stream], minutes: float) -> None:
    """Measure, then report. The soak runs beside what is not timed."""
    ends = read_word_ends()
    model, padded = load_model("tiny.en"), load_model("tiny.en", pad_s=FULL_PAD)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        hour = pool.apply_async(soak, (streams, minutes))
        clips = offline(padded, [line for stream in streams for line in stream.lines])
        agreement = listen(model, LocalAgreement(), streams)
        aged = hour.get()
    align = AlignAtt.whisper(model.alignment_heads, FRAME_THRESHOLD)
    live = listen(model, align, streams)
    short = [join(streams[0].name, streams[0].lines[: 8 if minutes < 1 else 40])]
    slow, fast = listen(padded, align, short), listen(model, align, short)
    report = Report()
    row = report.row
    where = f"{len(streams)} streams, {sum(s.duration_s for s in streams) / 60:.1f} min"
    row("offline_wer", 100 * clips.rate, "%", str(clips))
    for name, run in (("alignatt", live), ("local_agreement", agreement)):
        measure(row, name, run, ends, clips, where)
    row("rtf_padded_30s", slow.rtf, "", f"the same loop, each look encodes 30 s; {short[0].duration_s / 60:.1f} min")
    row(
        "rtf_ratio", slow.rtf / fast.rtf, "x", "padded over ours, same stream, same run", "at least 3", lambda v: v >= 3
    )
    note = ", ".join(f"{m:.0f} MB at {t:g} min" for m, t in zip(aged["megabytes"], aged["minutes"], strict=True))
    growth = aged["megabytes"][-1] / aged["megabytes"][0]
    row("memory_growth", growth, "x", note, "flat: at most 1.05", lambda v: v <= 1.05)
    note = ", ".join(f"{m:.0f} ms at {t:g} min" for m, t in zip(aged["step_ms"], aged["minutes"], strict=True))
    row(
        "step_growth",
        aged["step_ms"][-1] / aged["step_ms"][0],
        "x",
        f"processor time of the median look: {note}",
        "flat: at most 1.1",
        lambda v: v <= 1.1,
    )
    report.print()


def measure(
    row: Callable[..., None], name: str, run: Run, ends: dict[str, list[float]], clips: WordErrors, where: str
) -> None:
    """The rows of one policy; the goals are AlignAtt's."""
    goals = name == "alignatt"
    errors, per_clip = run.errors(), word_errors(*by_clip(run))
    row(
        f"{name}_wer",
        100 * errors.rate,
        "%",
        f"{errors}; over clips [{100 * per_clip.low:.2f}, {100 * per_clip.high:.2f}]; {where}",
    )
    gap = 100 * (errors.rate - clips.rate)
    row(f"{name}_wer_gap", gap, "points", "streamed minus offline", *(("at most 2", lambda v: v <= 2) if goals else ()))
    lags = [measure_lag(events, stream.heard(ends)) for stream, events in zip(run.streams, run.events, strict=True)]
    seconds = np.concatenate([lag.seconds for lag in lags])
    low, high = bootstrap(seconds, np.ones(len(seconds)))
    note = (
        f"[{low:.2f}, {high:.2f}], p50 {np.median(seconds):.2f}, p95 {np.percentile(seconds, 95):.2f} s; "
        f"{len(seconds)} correct words of {sum(lag.said for lag in lags)} aligned"
    )
    row(f"{name}_lag_mean", float(seconds.mean()), "s", note, *(("at most 1.0", lambda v: v <= 1) if goals else ()))
    share = 100 * run.before / max(run.words(), 1)
    row(
        f"{name}_before_finish",
        share,
        "%",
        f"{run.before} of {run.words()} words",
        *(("at least 95", lambda v: v >= 95) if goals else ()),
    )
    rtf_note = "1 s steps, one thread; " + ("alone" if goals else "beside the soak, not comparable")
    row(f"{name}_rtf", run.rtf, "", rtf_note, *(("at most 0.25", lambda v: v <= 0.25) if goals else ()))
    if goals:
        marks = [
            word_marks([word for event in events for word in event.words], stream.text)
            for stream, events in zip(run.streams, run.events, strict=True)
        ]
        fit = calibration([c for cs, _ in marks for c in cs], [r for _, rs in marks for r in rs])
        row("confidence_ece", fit.ece, "", f"{fit.n} words, {100 * fit.accuracy:.1f} % right")
        row("confidence_nce", fit.nce, "", "normalised cross entropy: 1 perfect, 0 as good as the mean")


if __name__ == "__main__":
    main()
