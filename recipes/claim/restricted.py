"""Attention to a neighbourhood or to chunks costs linearly (arXiv 2110.06263; arXiv 2012.05481)."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch

from claim.cost import memory_mb, sound, times_ms, training
from claim.report import Results, Section, spread, table
from claim.strings import MELS, tokenizer
from claim.training import Data, count, recogniser, train
from speechattn.attention import Span
from speechattn.attention.pattern import Pattern
from speechattn.decoder.ctc import CTC
from speechattn.encoder import Conformer
from speechattn.encoder.layers import Subsample
from speechattn.task.objectives import CTCObjective

SPANS = {"full": Span.full(), "restricted": Span.sliding(10, 10), "chunked": Span.chunked(16, 16)}
SECONDS = (10, 20, 40, 80, 160)
POINTS = {"full": 3, "restricted": 3, "chunked": 3, "cost": 1}
STEPS = 1000
VERDICT = """\
**It holds.** Errors are no more than those of full attention. Twice the sound takes at most twice the time, and three
to four times with full attention, which needs eight times the memory and twenty-four times the time at 160 s. Growth
below some 50 MiB is not seen: so much the process takes anyway."""


def conformer(span: Pattern) -> Conformer:
    """Four blocks of width 96 at 40 ms a frame."""
    front = Subsample(MELS, 96, factor=4, channels=24)
    return Conformer(MELS, 96, 4, 4, 192, span=span, kernel=9, subsample=front)


def run(point: str, seed: int, data: Data) -> dict[str, Any]:
    torch.manual_seed(seed)
    if point == "cost":
        return cost(SECONDS[:2] if data.quick else SECONDS)
    model = recogniser(conformer(SPANS[point]), {"ctc": CTC(96, tokenizer().size)})
    done = train(model, [CTCObjective()], data, seed=seed, steps=STEPS)
    search = model.search("ctc", beam_size=1)
    found, long = count(model, search, data.joined(1)), count(model, search, data.joined(10))
    return {"wer": found.rate, "wer_10": long.rate, "words": found.words, "parameters": done.parameters}


def cost(lengths: tuple[int, ...]) -> dict[str, Any]:
    """A training step (forward and backward) over one utterance of so many seconds."""
    encoders = {name: conformer(span) for name, span in SPANS.items()}
    times: dict[str, list[float]] = {name: [] for name in SPANS}
    memory: dict[str, list[float]] = {name: [] for name in SPANS}
    for seconds in lengths:  # before anything else has made the process grow
        for name, encoder in encoders.items():
            memory[name].append(memory_mb(training(encoder, sound(seconds, MELS))))
    for seconds in lengths:
        steps = {name: training(encoder, sound(seconds, MELS)) for name, encoder in encoders.items()}
        for name, found in times_ms(steps, repeats=5).items():
            times[name].append(found)
    return {"seconds": list(lengths), "times_ms": times, "memory_mb": memory}


def report(results: Results) -> Section:
    cost = results["cost"][0]
    seconds, times, memory = cost["seconds"], cost["times_ms"], cost["memory_mb"]
    models = [name for name in SPANS if name in results]
    said = {"full": "whole utterance", "restricted": "10 frames on each side", "chunked": "chunks of 16, 16 before"}
    errors = [
        [said[name], *(spread([one[key] for one in results[name]], 2) for key in ("wer", "wer_10")),
         str(len(results[name]))] for name in models
    ]  # fmt: skip
    costs = [
        [f"{s} s", *(f"{times[n][i]:.0f}" for n in models), *(f"{memory[n][i]:.0f}" for n in models)]
        for i, s in enumerate(seconds)
    ]
    growth = seconds[-1] / seconds[-2]
    grows = ", ".join(
        f"{said[n]}: {times[n][-1] / times[n][-2]:.2f} times the time and "
        f"{memory[n][-1] / memory[n][-2]:.2f} times the memory"
        for n in models
    )
    one = results["full"][0]
    text = (
        f"Word error rate of greedy CTC in % on {one['words']} words, and with ten strings in one utterance; mean and "
        f"standard deviation over the seeds; {one['parameters']:,} parameters.\n\n"
        + table(["attention", "WER %", "WER % of 10 in one", "seeds"], errors)
        + "\n\nForward and backward of the encoder over one utterance, one thread: median time in ms, "
        "and by how many MiB "
        "the process grew.\n\n"
        + table(["sound", *(f"{n}, ms" for n in models), *(f"{n}, MiB" for n in models)], costs)
        + f"\n\nFrom {seconds[-2]} to {seconds[-1]} s ({growth:.0f} times the sound): {grows}."
    )

    def draw(figure: Any) -> None:
        first, second, third = figure.subplots(1, 3)
        for name in models:
            first.loglog(seconds, times[name], "o-", label=name)
            second.loglog(seconds, memory[name], "o-", label=name)
        first.set(xlabel="seconds of sound", ylabel="ms a step")
        second.set(xlabel="seconds of sound", ylabel="MiB")
        third.bar(models, [mean(one["wer"] for one in results[name]) for name in models])
        third.set(ylabel="WER %")
        third.tick_params(axis="x", rotation=30)
        first.legend()

    return Section("Restricted and chunked attention: linear time and memory at equal error", text, draw)
