"""The shipped model that streams: errors, cost, lag, hours, and what it hears where nobody speaks.

    make bench-model           # the figures that are quoted (within 30 minutes on 2 cores)
    python benchmarks/model.py --quick
    python benchmarks/model.py --only fotaq,read --model PATH

Stages: `fotaq` (test split of FOTAQ at all chunks, beside Whisper), `read` and `voices` (people and synthetic voices
that were never heard, see `recipes/embedded/testsets.py`), `lag`, `hour`, `nobody`, `rtf`, `pool`, `start`. Clips are
heard one by one in a session of their own, in pieces of 0.1 s. Two processes of one thread each share the work; what is
timed on the wall runs alone. Intervals are 95 % bootstraps over clips; differences are paired.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import model_times
import numpy as np
from live import by_clip
from model_runs import (
    TEACHER,
    clips_again,
    clips_offline,
    clips_streamed,
    clips_whole,
    sound,
    sounds_heard,
    stream_heard,
)  # fmt: skip
from report import Report

from speechattn.audio.resample import Samples
from speechattn.data.fotaq import Line, default_folder, prepare, read_split
from speechattn.data.prepare.manifests import manifest_path
from speechattn.data.streams import Stream, join, read_word_ends
from speechattn.model.load import DEFAULT
from speechattn.score.lag import measure_lag
from speechattn.score.significance import interval
from speechattn.score.wer import bootstrap, error_counts, word_errors

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "embedded"))
import testsets

STAGES = ("fotaq", "read", "voices", "lag", "hour", "nobody", "rtf", "pool", "start")
CHUNKS = (160, 320, 640, 1280)
LAG_CHUNK, LAG_CLIPS = 320, 40  # clips of each character
AGAIN = 5  # every fifth clip is heard by the loop that encodes again
SLOTS = (16, 32)


@dataclass(frozen=True)
class Plan:
    """What is measured on: clips by set, streams, and how long."""

    model: str
    stages: tuple[str, ...]
    clips: dict[str, list[Line]]
    minutes: float  # of the hour
    silent_minutes: float
    pool_s: float
    starts: int
    music: Samples | None

    def characters(self) -> list[Stream]:
        """The clips of each character of FOTAQ joined, as many as the lag is measured on."""
        lines = sorted(self.clips["fotaq"], key=lambda line: line.speaker)
        return [join(name, list(said)[:LAG_CLIPS]) for name, said in groupby(lines, key=lambda line: line.speaker)]

    def hour(self) -> Stream:
        """All sets as one stream."""
        return testsets.hour([line for lines in self.clips.values() for line in lines], self.minutes)

    def jobs(self) -> dict[str, tuple[Any, ...]]:
        """Name -> function and arguments, the longest first."""
        jobs: dict[str, tuple[Any, ...]] = {}
        if "hour" in self.stages:
            jobs["hour"] = (stream_heard, self.model, None, [self.hour()])
        for name in [name for name in self.clips if name in self.stages or "hour" in self.stages]:
            lines = self.clips[name]
            if name in self.stages:
                jobs[f"{name} offline"] = (clips_offline, lines)
            if name == "fotaq" and name in self.stages:
                jobs |= {f"{name} {chunk}": (clips_streamed, self.model, chunk, lines) for chunk in CHUNKS}
                jobs[f"{name} full"] = (clips_whole, self.model, lines)
                jobs[f"{name} again"] = (clips_again, lines[::AGAIN])
            else:
                jobs[f"{name} 640"] = (clips_streamed, self.model, 640, lines)
        if "lag" in self.stages:
            jobs["lag"] = (stream_heard, self.model, LAG_CHUNK, self.characters())
        if "nobody" in self.stages:
            sounds = testsets.noises(self.silent_minutes)
            if self.music is not None:
                sounds["music"] = self.music
            jobs["nobody"] = (sounds_heard, self.model, sounds)
        return jobs


@dataclass
class Found:
    """What the jobs gave, by name."""

    plan: Plan
    results: dict[str, Any] = field(default_factory=dict)

    def errors(self, name: str, mode: str) -> np.ndarray:
        """Errors and words of each clip [N, 2] whose text has words."""
        counts = error_counts([line.text for line in self.lines(name, mode)], self.results[f"{name} {mode}"])
        return np.stack([counts[:, :3].sum(1), counts[:, 3]], 1)

    def lines(self, name: str, mode: str) -> list[Line]:
        """The clips of a job."""
        lines = self.plan.clips[name]
        return lines[::AGAIN] if mode == "again" else lines


def relative(first: np.ndarray, second: np.ndarray) -> tuple[float, str]:
    """How many percent more errors the second makes, and the paired interval; both [N, 2] of the same clips."""
    stats = np.stack([first[:, 0], second[:, 0]], 1)
    low, high = interval(stats, lambda sums: 100 * (sums[:, 1] / np.maximum(sums[:, 0], 1) - 1))
    return 100 * float(stats[:, 1].sum() / max(stats[:, 0].sum(), 1) - 1), f"[{low:+.1f}, {high:+.1f}]"


def points(first: np.ndarray, second: np.ndarray) -> tuple[float, str]:
    """By how many points the second rate is higher, and the paired interval."""
    stats = np.stack([second[:, 0] - first[:, 0], first[:, 1]], 1)
    low, high = interval(stats, lambda sums: 100 * sums[:, 0] / sums[:, 1])
    return 100 * float(stats[:, 0].sum() / stats[:, 1].sum()), f"[{low:+.2f}, {high:+.2f}]"


def report_clips(report: Report, found: Found, name: str) -> None:
    """Word error rates of a set, and the differences that have goals."""
    modes = [job.split()[1] for job in found.results if job.split()[0] == name and " " in job]
    speakers = len({line.speaker for line in found.plan.clips[name]})
    for mode in modes:
        errors = word_errors([line.text for line in found.lines(name, mode)], found.results[f"{name} {mode}"])
        what = {
            "offline": f"{TEACHER}, padded to 30 s, each clip at once", "full": "ours, each clip at once",
            "again": f"{TEACHER} live, AlignAtt, encodes again; every {AGAIN}th clip",
        }.get(mode, f"ours, chunks of {mode} ms")  # fmt: skip
        report.row(f"{name}_wer_{mode}", 100 * errors.rate, "%", f"{what}; {errors}; {speakers} speakers")
    offline = found.errors(name, "offline")
    if name != "fotaq":
        value, note = points(offline, found.errors(name, "640"))
        report.row(f"{name}_gap", value, "points", f"{note}; 640 ms minus {TEACHER} offline", "at most 1",
                   lambda v: v <= 1)  # fmt: skip
        return
    value, note = relative(offline, found.errors(name, "640"))
    report.row("fotaq_640_to_offline", value, "%", f"{note}; relative", "at most 15", lambda v: v <= 15)
    value, note = relative(found.errors(name, "640"), found.errors(name, "320"))
    report.row("fotaq_320_to_640", value, "%", f"{note}; relative", "at most 15", lambda v: v <= 15)
    value, note = relative(found.errors(name, "again"), found.errors(name, "640")[::AGAIN])
    report.row("fotaq_640_to_again", value, "%", f"{note}; relative to {TEACHER} live, every {AGAIN}th clip")


def report_lag(report: Report, found: Found) -> None:
    """From the end of a word to its commit, with the time of computing."""
    ends, streams = read_word_ends(), found.plan.characters()
    lags = [
        measure_lag(heard.events, one.heard(ends)) for one, heard in zip(streams, found.results["lag"], strict=True)
    ]
    seconds = np.concatenate([lag.seconds for lag in lags])
    low, high = bootstrap(seconds, np.ones(len(seconds)))
    errors = word_errors([one.text for one in streams], [heard.text for heard in found.results["lag"]])
    middle, late = np.percentile(seconds, [50, 95])
    minutes = sum(one.duration_s for one in streams) / 60
    note = (
        f"[{low:.2f}, {high:.2f}]; p50 {middle:.2f}, p95 {late:.2f} s; {len(seconds)} correct words of "
        f"{sum(lag.said for lag in lags)} aligned; {LAG_CHUNK} ms chunks, {len(streams)} streams, {minutes:.1f} min, "
        f"the first {LAG_CLIPS} clips of each; {errors}"
    )
    report.row("lag_mean", float(seconds.mean()), "s", note, "at most 0.6", lambda v: v <= 0.6)


def report_hour(report: Report, found: Found) -> None:
    """Does it get slower, larger or worse?"""
    stream, (heard,) = found.plan.hour(), found.results["hour"]
    quarter = max(1, len(heard.step_ms) // 4)
    busy = [[ms for ms in part if ms > 2] for part in (heard.step_ms[:quarter], heard.step_ms[-quarter:])]
    first, last = (float(np.mean(part)) if part else float("nan") for part in busy)
    note = (
        f"mean of steps in the last quarter / in the first: {last:.1f} and {first:.1f} ms; {heard.seconds / 60:.0f} min"
    )
    report.row("hour_step_growth", last / first, "x", note, "flat: at most 1.1", lambda v: v <= 1.1)
    report.row("hour_memory_slope", *heard.growth(), "flat: at most 20", lambda v: v <= 20)
    text = dict[str, str]()
    for name, lines in found.plan.clips.items():
        text |= {f"{name} {line.name}": said for line, said in zip(lines, found.results[f"{name} 640"], strict=True)}
    sets = {id(line): name for name, lines in found.plan.clips.items() for line in lines}
    alone = [text[f"{sets[id(line)]} {line.name}"] for line in stream.lines]
    whole = word_errors([stream.text], [heard.text])
    apart = word_errors([line.text for line in stream.lines], alone)
    references, hypotheses = by_clip(Joined([heard.events], [stream]))  # type: ignore[arg-type]
    _, note = points(*(counted(references, said) for said in (alone, hypotheses)))
    times = len(stream.lines) / len(sets)
    report.row("hour_wer", 100 * whole.rate, "%", f"{whole}; every clip {times:.2f} times on average")
    report.row("hour_wer_gap", 100 * (whole.rate - apart.rate), "points",
               f"{note} when words go to clips by their times; one by one: {apart}",
               "at most 1", lambda v: v <= 1)  # fmt: skip


@dataclass(frozen=True)
class Joined:
    """As `by_clip` wants it."""

    events: list[Any]
    streams: list[Stream]


def counted(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """Errors and words of each clip [N, 2]."""
    counts = error_counts(references, hypotheses)
    return np.stack([counts[:, :3].sum(1), counts[:, 3]], 1)


def report_nobody(report: Report, found: Found) -> None:
    """Words where there are none."""
    for what, (words, minutes, text) in found.results["nobody"].items():
        low, high = (poisson / minutes for poisson in poisson_bounds(words))
        note = f"[{low:.2f}, {high:.2f}] (Poisson); {words} words in {minutes:.1f} min: {text[:60]!r}"
        report.row(f"{what}_words", words / minutes, "1/min", note, "at most 1", lambda v: v <= 1)


def poisson_bounds(count: int, *, draws: int = 200_000) -> tuple[float, float]:
    """The exact 95 % interval of a rate of which so many were counted, by quantiles of two gamma distributions."""
    rng = np.random.default_rng(0)
    low = float(np.percentile(rng.gamma(count, size=draws), 2.5)) if count else 0.0
    return low, float(np.percentile(rng.gamma(count + 1, size=draws), 97.5))


def talkers(plan: Plan, n: int, seconds: float) -> list[Samples]:
    """`n` sounds of so many seconds: clips joined, from another place for each."""
    lines, sounds = [line for clips in plan.clips.values() for line in clips], list[Samples]()
    size = round(seconds * 16000)
    for i in range(n):
        parts, at = [np.zeros(0, np.float32)], i * len(lines) // n
        while sum(map(len, parts)) < size:
            parts += [sound(lines[at % len(lines)]), np.zeros(6400, np.float32)]
            at += 1
        sounds.append(np.concatenate(parts)[:size])
    return sounds


def timed(report: Report, plan: Plan) -> None:
    """What must have the machine to itself."""
    if "start" in plan.stages:
        model_times.first_word(report, plan.model, sound(plan.clips["fotaq"][0]), times=plan.starts)
    if "rtf" in plan.stages:
        (talk,) = talkers(plan, 1, 4 * plan.pool_s)
        model_times.one_stream(report, plan.model, talk)
    if "pool" in plan.stages:
        for slots in SLOTS:
            model_times.many_streams(report, plan.model, talkers(plan, slots, plan.pool_s), slots=slots)


def measured(plan: Plan) -> Report:
    """First what is timed, then the jobs in two processes; a job's memory is its own."""
    report, found = Report(), Found(plan)
    timed(report, plan)
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        waiting = {name: pool.apply_async(job, rest) for name, (job, *rest) in plan.jobs().items()}
        for name, one in waiting.items():
            found.results[name] = one.get()
            print(f"done: {name}", file=sys.stderr, flush=True)
    for name in plan.clips:
        if name in plan.stages:
            report_clips(report, found, name)
    for stage, tell in (("lag", report_lag), ("hour", report_hour), ("nobody", report_nobody)):
        if stage in plan.stages:
            tell(report, found)
    return report


def planned(given: argparse.Namespace) -> Plan:
    """From the options."""
    stages = tuple(given.only.split(",")) if given.only else STAGES
    if unknown := set(stages) - set(STAGES):
        raise SystemExit(f"--only {','.join(sorted(unknown))}: stages are {', '.join(STAGES)}")
    fotaq = prepare(given.fotaq or default_folder(), ("test",))
    clips = {"fotaq": read_split(fotaq, "test")}
    for name in ("read", "voices"):
        if manifest_path(given.sets, name, "cuts", "test").is_file():
            clips[name] = testsets.read_lines(given.sets, name)
        else:
            print(
                f"no set {name} in {given.sets}: its rows are missing (recipes/embedded/testsets.py)", file=sys.stderr
            )
    wanted = "nobody" in stages and (given.sets / "music.flac").is_file()
    music = testsets.music(given.sets) if wanted else None
    if not given.quick:
        return Plan(given.model, stages, clips, 60.0, 10.0, 60.0, 5, music)
    clips = {name: lines[:: max(1, len(lines) // 4)][:4] for name, lines in clips.items()}
    return Plan(given.model, stages, clips, 0.3, 0.1, 8.0, 1, None if music is None else music[: 6 * 16000])


def main() -> None:
    """Measure and report."""
    data = Path(__file__).parents[1] / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, help=f"name or folder (default {DEFAULT})")
    parser.add_argument("--only", help=f"stages, with commas between them: {', '.join(STAGES)}")
    parser.add_argument("--quick", action="store_true", help="under a minute, for development")
    parser.add_argument("--fotaq", type=Path, help="where FOTAQ is or will be prepared (default: the user's cache)")
    parser.add_argument("--sets", type=Path, default=data / "embedded", help="what testsets.py made")
    measured(planned(parser.parse_args())).print()


if __name__ == "__main__":
    main()
