"""Time and memory of encoders, side by side."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from speechattn.frames import Frames
from speechattn.stream import Stream

__all__ = ["inference", "memory_mb", "sound", "times_ms", "training"]


def sound(seconds: float, mels: int, rows: int = 1) -> Frames:
    """Features of nothing in particular, 100 frames a second."""
    values = torch.randn(rows, int(100 * seconds), mels, generator=torch.Generator().manual_seed(0))
    return Frames(values, torch.ones(values.shape[:2], dtype=torch.bool))


def training(encoder: Stream, x: Frames) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        encoder.zero_grad()
        encoder.train()(x).values.sum().backward()

    return step


def inference(encoder: Stream, x: Frames) -> Callable[[], None]:
    """Forward without gradients, the whole utterance at once."""

    def step() -> None:
        with torch.no_grad():
            encoder.eval().at_once(x)

    return step


def times_ms(steps: Mapping[str, Callable[[], None]], *, repeats: int = 7) -> dict[str, float]:
    """The median of each in ms of the wall clock, in turns, behind one run that does not count."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if i:
                found[name].append(1000 * (time.perf_counter() - began))
    return {name: median(each) for name, each in found.items()}


def memory_mb(step: Callable[[], None]) -> float:
    """What the process grows by at most, in a process of its own that begins as this one is."""
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=grown, args=(step, theirs))
    child.start()
    theirs.close()
    try:
        return float(ours.recv())
    finally:
        child.join()


def grown(step: Callable[[], None], answer: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    answer.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
