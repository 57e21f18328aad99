"""Times of `benchmarks/model.py`: one stream, many streams, and the first word of a fresh process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from model_runs import RATE, TEACHER, WINDOW_S, pieces, streaming
from report import Report

from speechattn import Session, load_model
from speechattn.audio.hearing import hear
from speechattn.audio.resample import Samples
from speechattn.data.prepare.sound import write_sound
from speechattn.live import Pool
from speechattn.live.streaming import Streaming
from speechattn.pretrained.whisper import WhisperModel
from speechattn.score.significance import interval

TURN_S = 10.0  # of sound between two turns of the other loop
LATE_S = 60.0  # a process that says nothing for so long


def spread(values: Sequence[float]) -> str:
    """The bootstrap interval of a mean."""
    low, high = interval(np.array(values)[:, None], lambda sums: sums[:, 0] / len(values))
    return f"[{low:.3g}, {high:.3g}]"


def one_stream(report: Report, name: str, samples: Samples) -> None:
    """Real-time factor, and a loop that encodes the last 30 s at each chunk, turn by turn in the same process."""
    model, teacher = streaming(name), load_model(TEACHER, pad_s=WINDOW_S)
    assert isinstance(teacher, WhisperModel)
    session = Session(model)
    assert isinstance(session.listener, Streaming)
    chunk_s = session.listener.block / RATE
    window = samples[: round(WINDOW_S * RATE)]
    ours, theirs, whole = list[float](), list[float](), list[float]()
    step = round(TURN_S * RATE)
    for at in range(0, len(samples) - step + 1, step):
        began = time.process_time()
        for piece in pieces(samples[at : at + step]):
            session.feed(piece, RATE)
        ours.append((time.process_time() - began) / TURN_S)
        began = time.process_time()
        with torch.inference_mode():
            memory = teacher.encode(hear(teacher.front_end, window), samples=len(window), finished=True)
            theirs.append((time.process_time() - began) / chunk_s)
            teacher.draft(memory, [])
        whole.append((time.process_time() - began) / chunk_s)
    ours, theirs, whole = ours[1:], theirs[1:], whole[1:]  # the first turn warms up
    turns = f"{len(ours)} turns of {TURN_S:g} s, one thread, processor time"
    report.row("rtf", float(np.mean(ours)), "", f"{spread(ours)}; {turns}; chunks of {1e3 * chunk_s:g} ms",
               "at most 0.10", lambda v: v <= 0.10)  # fmt: skip
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    note = f"{spread(ratios)}; {TEACHER}'s encoder alone over 30 s at each chunk (no decoding) / all of ours; {turns}"
    report.row("rtf_ratio", median(ratios), "x", note, "at least 10", lambda v: v >= 10)
    ratios = [b / a for a, b in zip(ours, whole, strict=True)]
    note = f"{spread(ratios)}; the same, and its decoder reads the text anew at each chunk; {turns}"
    report.row("rtf_ratio_decoding", median(ratios), "x", note)


def many_streams(report: Report, name: str, sounds: Sequence[Samples], *, slots: int = 16) -> None:
    """All at once through a pool: what a step takes while everybody speaks at speaking speed."""
    model = streaming(name)
    pool = Pool(model, slots)
    names = [pool.open() for _ in range(slots)]
    block_s = max(session.listener.block for session in pool.sessions.values()) / RATE  # type: ignore[union-attr]
    steps, wall = list[float](), list[float]()
    for at in range(0, min(map(len, sounds)), round(block_s * RATE)):
        for slot, samples in zip(names, sounds, strict=True):
            pool.feed(slot, samples[at : at + round(block_s * RATE)], RATE)
        began, wall_began = time.process_time(), time.perf_counter()
        pool.step()
        steps.append(time.process_time() - began)
        wall.append(time.perf_counter() - wall_began)
    steps, wall = steps[2:], wall[2:]
    p95 = float(np.percentile(steps, 95))
    note = (
        f"{slots} streams, {len(steps)} steps: processor time median {1e3 * median(steps):.0f}, p95 {1e3 * p95:.0f} ms "
        f"(wall p95 {1e3 * float(np.percentile(wall, 95)):.0f}), chunk {1e3 * block_s:.0f} ms"
    )
    report.row(f"pool_{slots}_p95", 1e3 * p95, "ms", note, f"below {1e3 * block_s:.0f} at 16",
               (lambda v: v < 1e3 * block_s) if slots == 16 else None)  # fmt: skip
    report.row(f"pool_{slots}_fits", slots * block_s / float(np.mean(steps)), "",
               "streams that the mean step of this batch leaves room for",
               "at least 16", lambda v: v >= 16)  # fmt: skip


def first_word(report: Report, name: str, samples: Samples, *, times: int = 5) -> None:
    """`speechattn stream FILE --fast` as a process: from its start to the first character on its output."""
    took = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "talk.flac"
        write_sound(path, samples, "flac")
        for _ in range(times):
            command = [sys.executable, "-m", "speechattn", "stream", str(path), "--fast", "--model", name]
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert process.stdout is not None
            said = process.stdout.read(1)
            took.append(time.perf_counter() - began if said else LATE_S)
            process.kill()
            process.wait()
            process.stdout.close()
    note = f"{spread(took)}; wall time, median of {times}: " + ", ".join(f"{one:.2f}" for one in took)
    report.row("first_word", median(took), "s", note, "at most 3", lambda v: v <= 3)
