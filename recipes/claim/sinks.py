"""A rolling cache with the first frames kept, against one without, for hours (arXiv 2309.17453, figure 3).

The encoder is trained to see all that came before, as in the paper, and listens with a window.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torchaudio.functional import edit_distance

from claim.report import Results, Section, spread, table
from claim.strings import MELS, String, tokenizer
from claim.training import Data, batch, recogniser, train
from speechattn.attention import Span, set_span
from speechattn.decoder.ctc import CTC
from speechattn.encoder import Transformer
from speechattn.encoder.layers import Subsample
from speechattn.model import Recognizer
from speechattn.task.objectives import CTCObjective

CHUNK, WINDOW, SINKS = 8, 48, 4
SPANS = {
    "window": Span(WINDOW, CHUNK), "sinks": Span(WINDOW - SINKS, CHUNK, sinks=SINKS), "all": Span(None, CHUNK),
}  # fmt: skip
POINTS = {"trained on all": 3}
STEPS, HOURS = 800, 2.0
ALL_S = 300  # so long the encoder may see everything
VERDICT = """\
**It does not hold for this encoder.** The window alone is as good as with sinks, and stays so for two hours; what
fails is the attention that it was trained with: to all that came before, on streams longer than its training of up to
some ten seconds. The claim is about language models that learn to rest on their first token; this one, trained on
speech with relative positions, hears what is near, and shows no need of the first frames. Tried: three trainings, and
no other size of window or number of sinks."""


def run(point: str, seed: int, data: Data) -> dict[str, Any]:
    torch.manual_seed(seed)
    front = Subsample(MELS, 96, factor=4, channels=24)
    encoder = Transformer(MELS, 96, 4, 4, 192, span=SPANS["all"], subsample=front)
    model = recogniser(encoder, {"ctc": CTC(96, tokenizer().size)})
    done = train(model, [CTCObjective()], data, seed=seed, steps=STEPS, joined=3, size=10)
    found: dict[str, Any] = {"parameters": done.parameters}
    minutes = data.joined(20)
    for name, span in SPANS.items():
        set_span(encoder, span)
        hours = HOURS / 60 if data.quick else HOURS
        found[name] = listen(model, minutes, ALL_S if name == "all" else 3600 * hours)
    return found


@torch.inference_mode()
def listen(model: Recognizer, minutes: list[String], seconds: float) -> list[dict[str, float]]:
    """Recordings one after the other, again and again, as one stream: where each ends (s), its edits and words."""
    encoder, done, at = model.encoder, [], 0.0
    first = batch(minutes[:1])[0]
    state = encoder.init_state(first)
    block = encoder.plan().block
    while at < seconds:
        for string in minutes:
            frames = len(string.features) // block * block
            x, _, _ = batch([String(string.features[:frames], string.tokens)])
            y, state = encoder.step(x, state)
            said = model.heads["ctc"](y).values[0].argmax(1).tolist()
            tokens = [t for i, t in enumerate(said) if t and (i == 0 or said[i - 1] != t)]
            at += frames / 100
            done.append({"end_s": at, "edits": edit_distance(list(string.tokens), tokens), "words": len(string.tokens)})
            if at >= seconds:
                break
    return done


def per(found: list[dict[str, float]], part: float) -> list[float]:
    """Word error rate in % of stretches of so many seconds."""
    edits, words = dict[int, float](), dict[int, float]()
    for one in found:
        at = int((one["end_s"] - 1e-6) // part)
        edits[at], words[at] = edits.get(at, 0) + one["edits"], words.get(at, 0) + one["words"]
    return [100 * edits[at] / words[at] for at in sorted(words)]


def rate(found: list[dict[str, float]]) -> float:
    """Word error rate in %."""
    return 100 * sum(one["edits"] for one in found) / max(sum(one["words"] for one in found), 1)


def report(results: Results) -> Section:
    runs = results["trained on all"]
    hours = max(one["end_s"] for one in runs[0]["window"]) / 3600
    begin = {name: [rate([one for one in r[name] if one["end_s"] <= ALL_S]) for r in runs] for name in SPANS}
    rest = {
        name: [rate([one for one in r[name] if one["end_s"] > ALL_S]) for r in runs] for name in SPANS if name != "all"
    }
    said = {
        "all": "all that came before (as trained)", "window": f"window of {WINDOW} frames",
        "sinks": f"{SINKS} sinks and a window of {WINDOW - SINKS}",
    }  # fmt: skip
    rows = [
        [said[n], spread(begin[n], 2), spread(rest[n], 2) if n in rest else "not run: it costs more and more"]
        for n in ("all", "window", "sinks")
    ]
    text = (
        f"Word error rate of greedy CTC in % over one stream of {hours:.1f} h, chunks of {CHUNK} "
        f"frames of 40 ms; mean and "
        f"standard deviation over {len(runs)} trainings on strings of at most some seconds, with "
        f"everything before in sight.\n\n" + table(["the encoder sees", f"first {ALL_S // 60} min", "after that"], rows)
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name in ("window", "sinks"):
            lines = [per(r[name], 600) for r in runs]
            middle = [mean(line[i] for line in lines) for i in range(min(map(len, lines)))]
            axes.plot([10 * (i + 1) for i in range(len(middle))], middle, "o-", label=said[name])
        axes.axhline(mean(begin["all"]), color="gray", linestyle="--", label=said["all"] + f", {ALL_S // 60} min")
        axes.set(xlabel="minutes of the stream", ylabel="WER %")
        axes.set_ylim(bottom=0)
        axes.legend()

    return Section("A rolling cache with sinks stays stable for hours where the window alone fails", text, draw)
