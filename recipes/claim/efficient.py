"""Grouped attention and falling rates make a Conformer faster (arXiv 2109.01163, table 3)."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch

from claim.cost import inference, sound, times_ms, training
from claim.report import Results, Section, spread, table
from claim.strings import MELS, tokenizer
from claim.training import Data, count, recogniser, train
from speechattn.attention import Span
from speechattn.decoder.ctc import CTC
from speechattn.encoder import Conformer, EfficientConformer, Encoder
from speechattn.encoder.layers import Subsample
from speechattn.task.objectives import CTCObjective

KINDS = ("conformer", "efficient", "ungrouped")
POINTS = {"conformer": 3, "efficient": 3, "ungrouped": 1, "cost": 1}
STEPS = 800
SECONDS = (5, 15, 30)
VERDICT = """\
**It holds in part.** Groups and falling rates are faster for longer utterances; without groups the first stage costs
more than the falling rate saves. But there are more errors, by 0.7 points, with a quarter more parameters. The
utterances of this training last two seconds, and a digit four frames of 80 ms."""


def encoder(kind: str) -> Encoder:
    """Six blocks: of width 96 at 40 ms a frame, or of 72, 96 and 128 at 20, 40 and 80 ms."""
    if kind == "conformer":
        front = Subsample(MELS, 96, factor=4, channels=24)
        return Conformer(MELS, 96, 6, 4, 384, span=Span.full(), kernel=15, subsample=front)
    front = Subsample(MELS, 72, factor=2, channels=24)
    group = 3 if kind == "efficient" else 1
    return EfficientConformer(MELS, (72, 96, 128), (2, 2, 2), span=Span.full(), kernel=15, group=group, subsample=front)


def run(point: str, seed: int, data: Data) -> dict[str, Any]:
    torch.manual_seed(seed)
    if point == "cost":
        return cost(SECONDS[:1] if data.quick else SECONDS)
    part = encoder(point)
    model = recogniser(part, {"ctc": CTC(part.dim, tokenizer().size)})
    done = train(model, [CTCObjective()], data, seed=seed, steps=STEPS)
    found = count(model, model.search("ctc", beam_size=1), data.joined(1))
    return {"wer": found.rate, "words": found.words, "parameters": done.parameters, "training_s": done.seconds}


def cost(lengths: tuple[int, ...]) -> dict[str, Any]:
    """A training step and a forward pass over four utterances of so many seconds."""
    encoders = {kind: encoder(kind) for kind in KINDS}
    found: dict[str, Any] = {"seconds": list(lengths), "training_ms": [], "inference_ms": []}
    for seconds in lengths:
        x = sound(seconds, MELS, rows=4)
        for name, step in (("training_ms", training), ("inference_ms", inference)):
            found[name].append(times_ms({kind: step(part, x) for kind, part in encoders.items()}))
    return found


def report(results: Results) -> Section:
    cost = results["cost"][0]
    said = {
        "conformer": "Conformer",
        "efficient": "Efficient Conformer, groups of 3",
        "ungrouped": "the same, no groups",
    }
    rows = [
        [said[kind], f"{results[kind][0]['parameters']:,}", spread([one["wer"] for one in results[kind]], 2),
         str(len(results[kind]))] for kind in KINDS
    ]  # fmt: skip
    names = [f"{phase}, {s} s" for phase in ("training", "inference") for s in cost["seconds"]]
    each = [*cost["training_ms"], *cost["inference_ms"]]
    ratios = [
        [said[kind], *(f"{one[kind]:.0f} ms ({one['conformer'] / one[kind]:.2f}x)" for one in each)] for kind in KINDS
    ]
    text = (
        f"Word error rate of greedy CTC in % on {results['conformer'][0]['words']} words; mean and standard deviation "
        "over the seeds.\n\n"
        + table(["encoder", "parameters", "WER %", "seeds"], rows)
        + "\n\nTime of the encoder over four utterances, one thread, median of seven in turns; in "
        "brackets how many times "
        "as fast as the Conformer.\n\n" + table(["encoder", *names], ratios)
    )

    def draw(figure: Any) -> None:
        first, second = figure.subplots(1, 2)
        first.bar(KINDS, [mean(one["wer"] for one in results[kind]) for kind in KINDS])
        first.set(ylabel="WER %")
        for kind in KINDS:
            second.plot(cost["seconds"], [one[kind] for one in cost["training_ms"]], "o-", label=f"{kind}: training")
            second.plot(cost["seconds"], [one[kind] for one in cost["inference_ms"]], "s--", label=f"{kind}: inference")
        second.set(xlabel="seconds of sound", ylabel="ms")
        second.legend(fontsize=6)

    return Section("Efficient Conformer: grouped attention and falling rates are faster at equal error", text, draw)
