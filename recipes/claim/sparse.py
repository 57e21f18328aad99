"""Heads that learn how sparse they are (arXiv 2209.15176; arXiv 1909.00015, section 5)."""

from __future__ import annotations

from functools import partial
from statistics import mean, stdev
from typing import Any

import torch

from claim.attention import ALONE, DIM, VOCAB, decoder, objectives
from claim.report import Results, Section, spread, table
from claim.strings import MELS, batch
from claim.training import Data, count, recogniser, train
from speechattn.attention import SelfAttention, Span
from speechattn.attention.entmax import Entmax
from speechattn.attention.sparse import SparseSelfAttention
from speechattn.cross import CrossMaker
from speechattn.cross.soft import Soft
from speechattn.decoder.ctc import CTC
from speechattn.encoder import Conformer, Encoder
from speechattn.encoder.layers import Subsample
from speechattn.frames import Frames
from speechattn.task.objectives import AttentionObjective

POINTS = {"softmax": 3, "sparse": 3}
SAID = {
    "softmax": "softmax", "sparse": "alpha-entmax in encoder and decoder",
}  # fmt: skip
STEPS, BEAM = 750, 4
VERDICT = """\
**It holds, but for the spread.** Heads give weight to a quarter of the frames, and errors are fewer with attention,
and no more with CTC; but alphas differ by less than 0.05 from head to head, since they hardly move in so short a
training."""


def run(point: str, seed: int, data: Data) -> dict[str, Any]:
    torch.manual_seed(seed)
    front = Subsample(MELS, DIM, factor=4, channels=24)
    kind = SelfAttention if point == "softmax" else SparseSelfAttention
    encoder = Conformer(MELS, DIM, 4, 4, 192, span=Span.full(), kernel=9, attention=kind, subsample=front)
    cross: CrossMaker = Soft if point == "softmax" else partial(Soft, normaliser=Entmax)
    head = decoder(2, cross, positions=True)
    model = recogniser(encoder, {"ctc": CTC(DIM, VOCAB), "attention": head})
    done = train(model, objectives(AttentionObjective(0.7)), data, seed=seed, steps=STEPS, alone=ALONE)
    search = model.search("attention", beam_size=BEAM)
    errors = count(model, search, data.joined(1))
    found = {"wer": errors.rate, "words": errors.words, "parameters": done.parameters, "training_s": done.seconds}
    found["ctc"] = count(model, model.search("ctc", beam_size=1), data.joined(1)).rate
    if point != "softmax":
        found |= support(encoder, batch(data.joined(1)[:32])[0])
    found["cross_alpha"] = [
        alpha for layer in head.layers if isinstance(layer.cross, Soft) and layer.cross.normaliser is not None
        for alpha in layer.cross.normaliser.alpha.tolist()
    ]  # fmt: skip
    return found


@torch.inference_mode()
def support(encoder: Encoder, x: Frames) -> dict[str, Any]:
    """Of all heads of the encoder: alpha, and the share of the visible frames that get a weight."""
    alphas, shares, x = [], [], encoder.subsample(x)
    for layer in encoder.layers.members:
        macaron, attention = layer.members[0], layer.members[1]
        found = attention.first.support(macaron(x))
        alphas.append(found.alpha.tolist())
        shares.append((found.keys / found.visible).tolist())
        x = layer(x)
    return {"alpha": alphas, "share": shares}


def report(results: Results) -> Section:
    rows = []
    for p in POINTS:
        each = results[p]
        alphas = [[a for layer in one.get("alpha", []) for a in layer] for one in each]
        shares = [[a for layer in one.get("share", []) for a in layer] for one in each]
        rows.append([
            SAID[p], spread([one["wer"] for one in each], 2), spread([one["ctc"] for one in each], 2),
            spread([stdev(a) for a in alphas], 3) if alphas[0] else "0",
            f"{min(min(a) for a in alphas):.2f} to {max(max(a) for a in alphas):.2f}" if alphas[0] else "1",
            f"{100 * mean(mean(s) for s in shares):.0f} %" if shares[0] else "100 %", str(len(each)),
        ])  # fmt: skip
    one = results["sparse"][0]
    crosses = [a for r in results["sparse"] for a in r["cross_alpha"]]
    head = ["attention", "WER %", "its CTC head, WER %", "alpha: deviation over heads", "alpha"]
    head += ["frames with weight", "seeds"]
    text = (
        f"Word error rate in % on {one['words']} words, a beam of {BEAM} with attention alone; mean "
        f"and standard deviation "
        "over the seeds. Sixteen heads in the encoder, over the whole utterance; alpha began at 1.5 in each.\n\n"
        + table(head, rows)
        + f"\n\nAlphas of the decoder's heads: {min(crosses):.2f} to {max(crosses):.2f}."
    )  # fmt: skip

    def draw(figure: Any) -> None:
        first, second = figure.subplots(1, 2)
        for layer, (alphas, shares) in enumerate(zip(one["alpha"], one["share"], strict=True)):
            first.plot([layer] * len(alphas), alphas, "o")
            second.plot([layer] * len(shares), [100 * s for s in shares], "o")
        first.set(xlabel="layer", ylabel="alpha of each head (seed 0)", xticks=range(len(one["alpha"])))
        second.set(xlabel="layer", ylabel="frames with weight, %", xticks=range(len(one["alpha"])))

    return Section("Adaptive sparse attention: heads differ, look at fewer frames, and are no worse", text, draw)
