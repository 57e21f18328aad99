"""Global attention against segmental attention on longer input than in training (arXiv 2210.14742, table 4)."""

from __future__ import annotations

from functools import partial
from statistics import mean
from typing import Any

import torch

from claim.attention import ALONE, DIM, VOCAB, decoder, local, objectives
from claim.report import Results, Section, spread, table
from claim.training import Data, Trained, count, train
from speechattn.cross.segmental import Around, AtFrame, Boundary, SegmentAttention, Within
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.segmental import NeuralLength, Segmental
from speechattn.model import Recognizer
from speechattn.search import Search
from speechattn.search.segmental import SegmentalBeam
from speechattn.task.objectives import AttentionObjective
from speechattn.task.segmental import CTCAlignment, OwnAlignment, SegmentalObjective

POINTS = {"positions": 3, "global": 3, "segmental": 3}
TIMES = (1, 2, 4, 10, 20)
STEPS, BEAM = 900, 4
REALIGNED = 350  # batches of the segmental objective before the head aligns itself
BOUNDARIES = {"hard": AtFrame(), "window": Around(4, 2), "segmental": Within(25)}
VERDICT = """\
**It holds.** Global attention breaks at twice the length of the training, whether frames have positions or not;
segmental attention loses a point or two up to twenty times. Global decoders also count their tokens, to numbers that
training never saw; which of this breaks them was not told apart. A trap on the way: told from the first step where a
CTC head that knows nothing yet hears the labels, one of three segmental models did not learn (84 %). So all of these
train CTC alone for the first 250 steps."""


def segmental(boundary: Boundary) -> Segmental:
    """One layer, and a length model."""
    return Segmental(decoder(1, partial(SegmentAttention, boundary=boundary)), NeuralLength(DIM, VOCAB))


def trained(point: str, seed: int, data: Data) -> tuple[Recognizer, Search, Trained]:
    """A model and how it is searched. A point that ends in `-own` aligns itself in the second half of the training."""
    torch.manual_seed(seed)
    kind = point.removesuffix("-own")
    if kind in ("global", "positions"):
        head: AttentionDecoder | Segmental = decoder(2, positions=kind == "positions")
        model = local({"attention": head})
        done = train(model, objectives(AttentionObjective(0.7)), data, seed=seed, steps=STEPS, alone=ALONE)
        return model, model.search("attention", beam_size=BEAM), done
    head = segmental(BOUNDARIES[kind])
    model = local({"segmental": head})
    alignment = OwnAlignment(CTCAlignment(), REALIGNED) if kind != point else CTCAlignment()
    done = train(model, objectives(SegmentalObjective(alignment, 0.7)), data, seed=seed, steps=STEPS, alone=ALONE)
    end = model.tokenizer.end
    return model, SegmentalBeam(head, BEAM, sos=end, eos=end, never=(0,)), done


def run(point: str, seed: int, data: Data) -> dict[str, Any]:
    model, search, done = trained(point, seed, data)
    found: dict[str, Any] = {"parameters": done.parameters, "training_s": done.seconds}
    for n in TIMES if point in POINTS else TIMES[:1]:
        errors = count(model, search, data.joined(n), size=16 if n < 10 else 4)
        found |= {f"wer_{n}": errors.rate, "words": errors.words}
    ctc = count(model, model.search("ctc", beam_size=1), data.joined(1))
    return found | {"ctc": ctc.rate}


def report(results: Results) -> Section:
    said = {"positions": "global, frames have positions", "global": "global", "segmental": "segmental"}
    rows = [
        [
            said[p],
            *(spread([one[f"wer_{n}"] for one in results[p]], 2) for n in TIMES),
            f"{results[p][0]['parameters']:,}",
        ]
        for p in POINTS
    ]
    words = results["global"][0]["words"]
    text = (
        f"Word error rate in % on {words} words with so many strings in one utterance, a beam of {BEAM} with attention "
        "alone (CTC is trained beside it, and gives the segmental head its alignment); mean and "
        "standard deviation over "
        "three seeds. Training heard single strings.\n\n"
        + table(["attention", *(f"{n}x" for n in TIMES), "parameters"], rows)
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for p in POINTS:
            axes.plot(TIMES, [mean(one[f"wer_{n}"] for one in results[p]) for n in TIMES], "o-", label=said[p])
        axes.set(xlabel="strings in one utterance", ylabel="WER %", xscale="log", xticks=TIMES, xticklabels=TIMES)
        axes.legend()

    return Section("Segmental attention generalises to 20 times longer input, global attention collapses", text, draw)
