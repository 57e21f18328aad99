"""Sound and lips in babble, and attention sinks of a speech language model, on synthetic clips of drawn mouths.

    make bench-av                       # needs the set that recipes/av/README.md makes; trains what is not in runs/av
    python benchmarks/audio_visual.py --quick    # one run of each kind, of a few steps

Nobody speaks and nobody is filmed in these data: voices of flite and espeak-ng read commands of GRID's grammar, and a
drawn mouth moves with their phones. The figures say that the machinery works, and nothing of lips of people.

The encoders are trained once, on clean clips (recipes/av/synthetic.yaml). All runs that are compared start from them,
take less than four minutes of one core each, two at a time, and have three seeds: `av` and `sound`, with and without
pictures, in babble (babble.yaml), and for each rate of compression a language model over the frozen encoders (llm.yaml)
with and without the decorrelation loss; the rate of 4 frames, at which other remedies are tried, has one seed. Test
sets are the same 300 clips, clean and in babble. WER: errors over words, seeds together; intervals: 95 %, bootstrap
over clips, paired for differences.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from report import Report
from torch import nn

from speechattn.audio.clip import Clip
from speechattn.data.batch import Batch
from speechattn.data.corpus import Corpus
from speechattn.frames import Frames
from speechattn.model import Recognizer, load_model
from speechattn.multimodal.sinks_report import Report as Sinks
from speechattn.multimodal.sinks_report import Tally
from speechattn.score.significance import Array, compare, interval
from speechattn.score.wer import error_counts

RECIPES, DATA, RUNS = Path("recipes/av"), Path("data/av"), Path("runs/av")
LEVELS = {"clean": "", "5 dB": "_5dB", "0 dB": "_0dB", "-5 dB": "_-5dB", "-10 dB": "_-10dB", "-15 dB": "_-15dB"}
SEEDS = (0, 1, 2)
RATES = (2, 4, 8, 16)  # frames of 40 ms in a place: 4, 8, 16 and 32 at the 50 a second of published rates
WEIGHT = 10.0  # of the decorrelation loss
ATTENTION = "lm.init_args.attention"
REMEDIES: dict[str, dict[str, object]] = {
    "sink tokens": {"sinks": 4},
    "off by one": {ATTENTION: "speechattn.multimodal.attention.OffByOne"},
    "gated": {ATTENTION: "speechattn.multimodal.attention.Gated"},
}
COMMON = 4  # the rate at which remedies are compared, with one seed
HEARD: dict[str, tuple[Recognizer, list[tuple[Batch, Frames]]]] = {}
CHANCE = 100 * (1 - (4 / 4 + 1 / 24 + 1 / 10) / 6)  # of words, when always the same is said in each place


@dataclass(frozen=True)
class Run:
    """A training by the name of its folder, from the model of the run `start`.

    `head` are arguments of the language model's head that are not those of the recipe, by dotted names; `weight` that
    of the decorrelation loss.
    """

    name: str
    recipes: tuple[str, ...]
    seed: int = 0
    start: str | None = None
    head: Mapping[str, object] = field(default_factory=dict)
    weight: float = 0.0

    @property
    def model(self) -> Path:
        """The folder of what came out."""
        return RUNS / self.name / "model"

    def train(self, steps: int | None = None) -> None:
        """Unless it is there."""
        if (self.model / "config.yaml").exists():
            return
        began, place = time.time(), RUNS / self.name
        parts = ("model.init_args", "data.init_args")
        seeds = [f"--seed_everything={self.seed}", *(f"--{part}.seed={self.seed}" for part in parts)]
        place.mkdir(parents=True, exist_ok=True)
        configs = [word for recipe in self.recipes for word in ("--config", str(self.written(RECIPES / recipe)))]
        start = [] if self.start is None else ["--init-from", str(RUNS / self.start / "model")]
        short = [] if steps is None else [f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=1"]
        command = [
            sys.executable, "-m", "speechattn", "fit", *configs, *seeds, *start, *short, "--resume",
            f"--trainer.default_root_dir={place}", "--trainer.enable_progress_bar=false",
        ]  # fmt: skip
        export = [sys.executable, "-m", "speechattn", "export", f"{place}/checkpoints/last.ckpt", str(self.model)]
        with (place / "log.txt").open("a") as log:
            for one in (command, export):
                subprocess.run(one, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        (place / "seconds.txt").write_text(f"{time.time() - began:.0f}\n")
        print(f"{self.name}: trained in {time.time() - began:.0f} s", file=sys.stderr)

    def written(self, recipe: Path) -> Path:
        """The recipe, or a copy with what is changed in it."""
        if not self.head and not self.weight:
            return recipe
        made = yaml.safe_load(recipe.read_text())
        model = made["model"]["init_args"]
        model["objectives"][0]["init_args"] = {"decorrelate": self.weight}
        model["keep"] = str(RUNS / "frames")
        for name, value in self.head.items():
            at, *path = model["heads"]["llm"]["init_args"], *name.split(".")
            for part in path[:-1]:
                at = at[part]
            at[path[-1]] = value
        path = RUNS / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(made, sort_keys=False))
        return path


ENCODERS = Run("synthetic", ("synthetic.yaml",))


def recognisers(seed: int) -> dict[str, Run]:
    """With pictures and without."""
    return {
        "av": Run(f"av-{seed}", ("babble.yaml",), seed, "synthetic"),
        "sound": Run(f"sound-{seed}", ("babble.yaml", "sound.yaml"), seed, "synthetic"),
    }


def language_model(
    rate: int, seed: int, weight: float, more: Mapping[str, object] | None = None, name: str = ""
) -> Run:  # fmt: skip
    """Over the frozen encoders."""
    head = {f"{side}.init_args.every": rate for side in ("sound", "lips")} | dict(more or {})
    name = f"{name or f'llm-{rate}-{weight:g}'}-{seed}".replace(" ", "-")
    return Run(name, ("llm.yaml",), seed, "synthetic", head, weight)


def seeds_of(rate: int, seeds: Sequence[int]) -> Sequence[int]:
    """Of the runs at a rate."""
    return seeds[:1] if rate == COMMON else seeds


@cache
def batches(part: str) -> list[Batch]:
    """A test set."""
    corpus = Corpus(valid={"test": DATA / f"avsynth_cuts_{part}.jsonl.gz"}, max_seconds=60, workers=0)
    return list(corpus.val_dataloader()[0])


def encoded(model: Recognizer, part: str) -> list[tuple[Batch, Frames]]:
    """What the encoders of a language model say of a test set; all have the same, so it is computed once."""
    if part not in HEARD:
        with torch.inference_mode():
            HEARD[part] = model, [(batch, model.listening(batch.sound)) for batch in batches(part)]
    first, found = HEARD[part]
    mine, theirs = model.encoder.state_dict(), first.encoder.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs), "another encoder"
    return found


def given(sound: Frames, without: str | None) -> Frames:
    """A clip, or one that lacks a sense."""
    assert isinstance(sound, Clip)
    if without == "lips":
        return sound.sound
    if without == "sound":
        return Clip(0 * sound.values, sound.mask & False, sound.lips)
    return sound


@torch.inference_mode()
def errors(model: Recognizer, part: str, search: str, without: str | None = None) -> Array:
    """Errors and words of each clip [N, 2], in the order of their names."""
    found: dict[str, tuple[str, str]] = {}
    how = model.search(search, beam_size=1)
    if search == "llm":
        each = encoded(model, part)
    else:
        each = [(batch, model.listening(given(batch.sound, without))) for batch in batches(part)]
    for batch, frames in each:
        rows = how.decode(frames)
        said = [model.tokenizer.decode(row[0].tokens) if row else "" for row in rows]
        found |= dict(zip(batch.ids, zip(batch.texts, said, strict=True), strict=True))
    order = sorted(found)
    counts = error_counts([found[i][0] for i in order], [found[i][1] for i in order], normalise="none")
    return np.stack([counts[:, :3].sum(1), counts[:, 3]], 1)


def rate_of(sums: Array) -> Array:
    """WER in percent of sums [..., 2]."""
    return 100 * sums[..., 0] / sums[..., 1]


def wer(report: Report, name: str, stats: Array, note: str = "", goal: str = "", ok: object = None) -> None:
    """A row of a report."""
    low, high = interval(stats, rate_of)
    value = float(rate_of(stats.sum(0)))
    report.row(name, value, "% WER", f"[{low:.1f}, {high:.1f}] {note}".rstrip(), goal, ok)  # type: ignore[arg-type]


def below_chance(value: float) -> bool:
    """Of a WER."""
    return value < CHANCE


def babble(report: Report, seeds: Sequence[int], levels: Sequence[str]) -> dict[str, list[float]]:
    """Recognisers at each level; the curves for a picture."""
    views = {"av": ("av", None), "av without lips": ("av", "lips"), "av without sound": ("av", "sound"),
             "sound": ("sound", "lips")}  # fmt: skip
    models = {seed: {name: load_model(run.model) for name, run in recognisers(seed).items()} for seed in seeds}
    curves: dict[str, list[float]] = {name: [] for name in views}
    for level in levels:
        each: dict[str, Array] = {}
        for name, (which, without) in views.items():
            if without == "sound" and level != "clean":  # the pictures are the same
                curves[name].append(curves[name][0])
                continue
            rows = [errors(models[seed][which], f"test{LEVELS[level]}", "ctc", without) for seed in seeds]
            each[name] = np.sum(rows, 0)
            spread = ", ".join(f"{rate_of(row.sum(0)):.1f}" for row in rows)
            curves[name].append(float(rate_of(each[name].sum(0))))
            goal, ok = (f"< {CHANCE:.1f}, chance", below_chance) if without == "sound" else ("", None)
            wer(report, f"{level}: {name}", each[name], f"seeds {spread}", goal, ok)
        gap = compare(each["sound"], each["av"], rate_of)
        below = level.startswith("-")
        goal = "< 0, interval too" if below else "not worse"
        good = gap.high < 0 if below else gap.low <= 0
        report.row(f"{level}: av minus sound", gap.value, "points", str(gap), goal, lambda _, good=good: good)
    return curves


@torch.inference_mode()
def sunk(model: Recognizer, part: str) -> Sinks:
    """What attention does in the language model."""
    tally = Tally()
    for batch, frames in encoded(model, part):
        rows = [torch.tensor(model.tokenizer.encode(text)) for text in batch.texts]
        lengths = torch.tensor([len(row) for row in rows])
        tally.add(*model.heads["llm"].inspect(frames, nn.utils.rnn.pad_sequence(rows, True), lengths))  # type: ignore[operator]
    return tally.result()


def alike(found: Sinks) -> float:
    """Mean cos^2 to BOS over the layers and places that the loss counts."""
    layers = found.states[1:-1]
    kinds = ("mark", "sound", "lips", "prompt")
    counts = {kind: found.places.get(kind, 0.0) for kind in kinds}
    total = sum(state.cosine2.get(kind, 0.0) * n for state in layers for kind, n in counts.items())
    return total / (sum(counts.values()) * len(layers))


def between(found: Sinks) -> float:
    """Intermediate sinks in a sequence, in the layer that has most."""
    return max(found.between(layer.sinks) for layer in found.layers)


def largest(found: Sinks) -> float:
    """The largest activation anywhere, in medians of its layer."""
    return max(max(state.ratio.values()) for state in found.states[1:-1])


def told(found: Sinks) -> str:
    """Of a report."""
    massive = sum(sum(state.massive.values()) for state in found.states[1:-1])
    return f"{between(found):.2f} sinks between, largest / median {largest(found):.0f}, {massive:.2f} massive"


def sinks(report: Report, rates: Sequence[int], seeds: Sequence[int]) -> None:
    """Language models at each rate, with the loss and without."""
    for rate in rates:
        stats: dict[float, Array] = {}
        found: dict[float, list[Sinks]] = {}
        for weight in (0.0, WEIGHT):
            models = [load_model(language_model(rate, seed, weight).model) for seed in seeds_of(rate, seeds)]
            rows = [errors(model, "test", "llm") for model in models]
            stats[weight] = np.sum(rows, 0)
            found[weight] = [sunk(model, "test") for model in models]
            spread = ", ".join(f"{rate_of(row.sum(0)):.1f}" for row in rows)
            name = f"every {rate}: {'decorrelated' if weight else 'plain'}"
            wer(report, name, stats[weight], f"seeds {spread}; {'; '.join(map(told, found[weight]))}")
        plain, less = (float(np.mean([alike(one) for one in found[weight]])) for weight in (0.0, WEIGHT))
        report.row(f"every {rate}: cos^2 to BOS, plain / decorrelated", plain / max(less, 1e-12), "times",
                   f"{plain:.4f} / {less:.6f}", ">= 10", lambda value: value >= 10)  # fmt: skip
        counts = [float(np.mean([between(one) for one in found[weight]])) for weight in (0.0, WEIGHT)]
        report.row(f"every {rate}: intermediate sinks, decorrelated", counts[1], "each", f"plain {counts[0]:.2f}",
                   "none", lambda value: value < 0.05)  # fmt: skip
        heights = [float(np.mean([largest(one) for one in found[weight]])) for weight in (0.0, WEIGHT)]
        report.row(f"every {rate}: largest / median, plain", heights[0], "times", f"decorrelated {heights[1]:.0f}")
        gap = compare(stats[0.0], stats[WEIGHT], rate_of)
        wide = rate >= 8
        good = gap.high < 0 if wide else gap.low <= 0
        report.row(f"every {rate}: decorrelated minus plain", gap.value, "points", str(gap),
                   "< 0, interval too" if wide else "not worse", lambda _, good=good: good)  # fmt: skip
    print(f"plain, every {rates[0]}: {found_of(rates[0], seeds[0]).summary()}", file=sys.stderr)


def found_of(rate: int, seed: int) -> Sinks:
    """The plain model's report."""
    return sunk(load_model(language_model(rate, seed, 0.0).model), "test")


def remedies(report: Report) -> None:
    """Other ways against sinks, one seed."""
    for name, options in REMEDIES.items():
        model = load_model(language_model(COMMON, 0, 0.0, options, name).model)
        found = sunk(model, "test")
        wer(report, f"every {COMMON}: {name}", errors(model, "test", "llm"), f"cos^2 {alike(found):.4f}; {told(found)}")


def picture(curves: dict[str, list[float]], path: Path) -> None:
    """WER over the level of babble."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    plot = figure.subplots()
    for name, values in curves.items():
        plot.plot([*LEVELS][: len(values)], values, marker="o", label=name)
    plot.axhline(CHANCE, color="#8a8a8a", linewidth=0.8, linestyle="--")
    plot.text(0, CHANCE + 1, "chance", fontsize=8, color="#8a8a8a")
    plot.set(xlabel="speech to babble (synthetic test clips)", ylabel="WER, %", ylim=(0, 100))
    plot.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train what is missing, judge, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, two rates, a few steps in runs/av-quick")
    parser.add_argument("--picture", type=Path, help="write WER over the level of babble there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    global RUNS
    steps, seeds, rates, levels = None, SEEDS, RATES, [*LEVELS]
    if options.quick:
        RUNS, steps, seeds, rates, levels = Path("runs/av-quick"), 20, SEEDS[:1], (4, 8), ["clean", "-5 dB"]
    ENCODERS.train(steps)
    each = [(rate, seed) for rate in rates for seed in seeds_of(rate, seeds)]
    first, *runs = [language_model(rate, seed, weight) for rate, seed in each for weight in (0.0, WEIGHT)]
    first.train(steps)  # it writes what the frozen encoders say, and all others read it
    runs += [run for seed in seeds for run in recognisers(seed).values()]
    runs += [language_model(COMMON, 0, 0.0, more, name) for name, more in REMEDIES.items()] if not options.quick else []
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: run.train(steps), runs))
    report = Report()
    curves = babble(report, seeds, levels)
    sinks(report, rates, seeds)
    if not options.quick:
        remedies(report)
    if options.picture:
        picture(curves, options.picture)
    report.print()


if __name__ == "__main__":
    main()
