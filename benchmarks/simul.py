"""Simultaneous recognition and translation: latency that agrees with the tools, and curves of all policies.

    make bench-simul           # the figures that are quoted (within 30 minutes on 2 cores)
    python benchmarks/simul.py --fast
    python benchmarks/simul.py --translator MODEL --manifest STREAMS.jsonl.gz --only translator

Stages: `metrics` (golden vectors; what SimulEval, OmniSTEval and simulstream said of the logs in `tests/latency`),
`window` (Whisper tiny.en, which encodes again at every look) and `stream` (the shipped model) on joined dialogues of
FOTAQ's test split, the first `--streams` of 36 (5 or more have all five characters); `translator` where a model is
given; `cost` of a decision; `hour`: tiny.en under StreamAtt's history for an hour in which no pause ends anything. Logs
stay in `--output-dir`, and a run that was cut off goes on there. Computing is counted in processor time, so that two
processes can share the work. Intervals are 95 % bootstraps over streams, in pairs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from model_runs import through
from report import Report
from simul_cost import costs
from simul_metrics import golden, golden_policies, tools

from speechattn import Session, load_model
from speechattn.audio.vad import AlwaysSpeech
from speechattn.cli.curves import Curves, curves, tell, write
from speechattn.cli.main import parser as command_line
from speechattn.data.fotaq import default_folder, prepare, read_split
from speechattn.data.prepare.joined import write_streams
from speechattn.data.streams import read_word_ends
from speechattn.live.windowed import Settings
from speechattn.model.load import DEFAULT
from speechattn.policy.stream_att import Words
from speechattn.score.curves_plot import by_curve
from speechattn.score.metrics import compared
from speechattn.score.wer import word_errors

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "embedded"))
import testsets

STAGES = ("metrics", "window", "stream", "translator", "cost", "hour")
SWEEPS = {
    "window": {
        "alignatt": "5,20,50,150", "local-agreement:min-chunk-size": "0.5,1,2,3", "wait-k": "1,3,6",
        "edatt": "0.6,0.1,0.02", "hold-n": "2,8", "retranslation": "0",
    },
    "stream": {
        "alignatt": "0,16,40,80,160", "local-agreement:chunk-ms": "160,320,640,1280", "wait-k": "1,3,6",
        "edatt": "0.6,0.1,0.02", "hold-n": "2,8", "retranslation": "0",
    },
    "translator": {
        "alignatt": "2,4,8,16,32", "local-agreement:min-chunk-size": "0.5,1,2,3", "wait-k": "1,3,5,7,9",
        "edatt": "0.6,0.2,0.1,0.03", "hold-n": "2,6,12", "retranslation": "0",
    },
}  # fmt: skip
FAST = {"window": "min-chunk-size=1,2", "stream": "chunk-ms=320,640", "translator": "min-chunk-size=1,2"}
LOOK_MS = 20  # processor time of a piece of sound at which the model looked
RIVALS = ("local-agreement", "wait-k")


def measured(given: argparse.Namespace, stage: str, model: str, manifest: Path) -> Curves:
    """All points of a model; what is finished stands on disk."""
    option, _, values = FAST[stage].partition("=")
    sweeps = {"alignatt": "5,40", f"local-agreement:{option}": values} if given.fast else SWEEPS[stage]
    policies = dict.fromkeys(name.partition(":")[0] for name in sweeps)
    place = given.output_dir / f"{stage}{'-fast' if given.fast else ''}"
    words = ["curves", model, str(manifest), "--output-dir", str(place), "--policies", ",".join(policies)]
    words += ["--timer", "processor", "--limit", str(1 if given.fast else given.streams)]
    words += [word for name, values in sweeps.items() for word in ("--sweep", f"{name}={values}")]
    words += ["--processes", "1" if given.fast else str(given.processes)]
    words += ["--metric", "bleu"] if stage == "translator" else []
    options = command_line().parse_args(words)
    found = curves(options)
    write(options, found)
    print(f"\n{model}, {place}", file=sys.stderr)
    tell(found)
    return found


def report_curves(report: Report, stage: str, found: Curves) -> None:
    """Offline, AlignAtt at its most patient beside it, and AlignAtt against its rivals at the same lag."""
    how = found.streams.metrics[-1 if found.streams.translates else 0]
    unit, n = ("points" if found.streams.translates else "%"), len(found.streams.utterances)
    minutes = sum(one.duration_s for one in found.streams.utterances) / 60
    score = found.offline[how.name]
    report.row(f"{stage}_offline", score.value, unit, f"{how.name} {score}; sentence by sentence; {score.label}")
    for name, points in by_curve(found.points).items():
        best, lag = points[-1], points[-1].lags[found.streams.lag].unaware.sum(0)
        last = float(how.score(best.quality[how.name].sum(0)[None])[0])
        report.row(f"{stage}_{name.replace(' ', '_')}_last", last, unit,
                   f"{how.name} at {best.setting.value:g}, {found.streams.lag} {lag[0] / lag[1]:.2f} s")  # fmt: skip
    patient = by_curve(found.points)["alignatt frame-threshold"][-1]
    gap = compared(how, patient.quality[how.name], found.whole[how.name])  # offline minus live
    low, high = sorted((how.sign * gap.low, how.sign * gap.high))
    where = f"{n} streams, {minutes:.1f} min"
    note = f"[{low:+.2f}, {high:+.2f}] worse than offline at {patient.setting.value:g} frames; {where}"
    report.row(f"{stage}_alignatt_patient_loss", how.sign * gap.value, "points", note, "at most 1", lambda v: v <= 1)
    for name, area in found.areas.items():
        rival = next((one for one in RIVALS if f"against {one}" in name), None)
        if rival is None:
            continue
        key = f"{stage}_alignatt_over_{rival.replace('-', '_')}{'' if name.endswith('not counted') else '_aware'}"
        if area is None:
            report.row(key, float("nan"), "points", "the curves do not overlap from 1 to 3 s", "at least 0")
            continue
        note = f"{area}, area {area.value:+.2f}; {name}; {where}; {100 * area.drawn:.0f} % of draws overlap"
        report.row(key, area.mean, "points", note, "at least 0", lambda v: v >= 0)


def dialogues(given: argparse.Namespace) -> Path:
    """FOTAQ's test split as streams, made where it is prepared."""
    folder = prepare(given.fotaq or default_folder(), ("test",))
    made = folder / "fotaq_streams_test.jsonl.gz"
    if not made.is_file():
        write_streams(folder / "fotaq_cuts_test.jsonl.gz", made, word_ends=read_word_ends())
    return made


def report_metrics(report: Report) -> None:
    """Golden vectors, and the tools."""
    error, count = golden()
    report.row("golden_lags", error, "ms", f"largest difference of {count} numbers", "at most 0.0001",
               lambda v: v <= 1e-4)  # fmt: skip
    wrong, count = golden_policies()
    report.row("golden_policies", wrong, "", f"wrong decisions of {count}: AlignAtt and EDAtt", "0", lambda v: v == 0)
    for tool, (difference, count) in tools().items():
        note = f"largest relative difference of {count} numbers"
        report.row(f"agreement_{tool}", difference, "", note, "at most 1e-6", lambda v: v <= 1e-6)


def report_hour(report: Report, given: argparse.Namespace) -> None:
    """Does StreamAtt's history bound what is kept, where no pause ever ends an utterance?"""
    lines = read_split(prepare(given.fotaq or default_folder(), ("dev",)), "dev")
    stream = testsets.hour(lines, 2.0 if given.fast else 60.0)
    settings = Settings(history=Words(20), max_window_s=28.0)
    heard = through(Session(load_model("tiny.en"), settings=settings, vad=AlwaysSpeech()), stream.samples)
    looks = [[ms for ms in part if ms > LOOK_MS] for part in np.array_split(np.array(heard.step_ms), 4)]
    first, last = (float(np.mean(part)) for part in (looks[0], looks[-1]))
    note = f"mean look of the last quarter / of the first: {last:.0f} and {first:.0f} ms; {heard.seconds / 60:.0f} min"
    report.row("hour_step_growth", last / first, "x", note, "flat: at most 1.1", lambda v: v <= 1.1)
    report.row("hour_memory_slope", *heard.growth(), "flat: at most 20", lambda v: v <= 20)
    whole = word_errors([stream.text], [heard.text])
    report.row("hour_wer", 100 * whole.rate, "%", f"{whole}; FOTAQ dev, {len(stream.lines)} clips, again and again")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one stream, few points, for development")
    parser.add_argument("--only", help=f"stages, with commas between them: {', '.join(STAGES)}")
    parser.add_argument("--streams", type=int, default=10, metavar="N", help="of 36 (default 10)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--fotaq", type=Path, help="where FOTAQ is or will be prepared (default: the user's cache)")
    parser.add_argument("--translator", metavar="MODEL", help="a folder: the curves of a translator")
    parser.add_argument("--manifest", type=Path, help="of joined streams with translations, for --translator")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/simul"), help="logs and pictures (runs/simul)")
    given = parser.parse_args()
    stages = given.only.split(",") if given.only else list(STAGES)
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--only {','.join(sorted(unknown))}: stages are {', '.join(STAGES)}")
    if (given.translator is None) != (given.manifest is None):
        parser.error("--translator and --manifest go together")
    report = Report()
    if "metrics" in stages:
        report_metrics(report)
    for stage, model in (("window", "tiny.en"), ("stream", DEFAULT)):
        if stage in stages:
            report_curves(report, stage, measured(given, stage, model, dialogues(given)))
    if "translator" in stages and given.translator is not None:
        report_curves(report, "translator", measured(given, "translator", given.translator, given.manifest))
    if "cost" in stages:
        costs(report, fast=given.fast)
    if "hour" in stages:
        report_hour(report, given)
    report.print()


if __name__ == "__main__":
    main()
