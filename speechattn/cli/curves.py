"""`speechattn curves MODEL MANIFEST`: quality against latency of policies at several settings, table and picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speechattn.analysis.picture import save
from speechattn.cli.curves_hear import OFFLINE, TIMERS, hear, live, log_of
from speechattn.cli.evaluate import command, commit, judged_by
from speechattn.cli.options import add_running_options, add_session_options, build_model, folder
from speechattn.cli.policies import SETTINGS
from speechattn.cli.sweeps import POLICIES_OF_A_PICTURE, at, parse_sweeps, settings_of
from speechattn.errors import InputError
from speechattn.model import Recognizer
from speechattn.model.load import DEFAULT
from speechattn.score.curves import Point, Setting, Streams
from speechattn.score.curves_area import Area, area
from speechattn.score.curves_plot import by_curve, drawn, header, row
from speechattn.score.evaluation import aligned_table
from speechattn.score.journal import replace_text
from speechattn.score.latency.logs import read_events
from speechattn.score.listening import Heard
from speechattn.score.metrics import BLEU, Scored, scored
from speechattn.score.plots import need_matplotlib
from speechattn.score.significance import Array
from speechattn.score.utterances import read_utterances
from speechattn.score.wer import NORMALISERS

__all__ = ["Curves", "add_parser", "curves", "tell", "write"]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser(
        "curves", help="quality against latency of policies at several settings", allow_abbrev=False
    )
    parser.add_argument(
        "model", nargs="?", default=DEFAULT, metavar="MODEL",
        help=f"name or path, as --model of other commands (default {DEFAULT})",
    )  # fmt: skip
    parser.add_argument("manifest", metavar="MANIFEST", help="cuts of lhotse (.jsonl.gz), or JSONL of {audio, text}")
    parser.add_argument(
        "--output-dir", "-o", metavar="DIR", required=True, help="logs, table, picture; the same command goes on there"
    )
    parser.add_argument(
        "--policies", default=",".join(POLICIES_OF_A_PICTURE), metavar="NAME,NAME", help="default %(default)s"
    )
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="POLICY[:OPTION]=VALUE,VALUE",
        help="in place of the usual values; more than one for a policy are more curves",
    )  # fmt: skip
    parser.add_argument(
        "--range", type=float, nargs=2, default=(1.0, 3.0), metavar="S",
        help="of lag, in which the first policy is compared with the others (default 1 3)",
    )  # fmt: skip
    parser.add_argument("--metric", choices=("wer", "bleu"), help="default: bleu for --task translate, else wer")
    parser.add_argument("--normaliser", default="whisper-english", choices=NORMALISERS, help="of texts, for WER")
    parser.add_argument("--unit", default="word", choices=("word", "char"), help="what lag counts (default word)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N utterances")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="each with its own model (default 1)")
    parser.add_argument(
        "--timer", default="wall", choices=tuple(TIMERS),
        help="how computing is timed: processor is for a CPU that is shared (default wall)",
    )  # fmt: skip
    parser.add_argument("--chunk", type=float, default=0.1, metavar="S", help="live sound comes so (default 0.1 s)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    add_running_options(parser.add_argument_group("model"))
    add_session_options(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Curves:
    """What was measured of the streams: points, statistics of what was heard offline by metric, and `areas` of the
    first curve minus another, by name and clock."""

    streams: Streams
    points: tuple[Point, ...]
    whole: Mapping[str, Array]
    areas: Mapping[str, Area | None]

    @property
    def offline(self) -> dict[str, Scored]:
        """Each sentence heard as a whole, by metric."""
        return {how.name: scored(how, self.whole[how.name]) for how in self.streams.metrics}

    def table(self) -> list[dict[str, Any]]:
        """A row for each point."""
        return [row(point, self.streams.metrics) for point in self.points]

    def figures(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "points": self.table(),
            "offline": {name: asdict(score) for name, score in self.offline.items()},
            "areas": {name: None if found is None else asdict(found) for name, found in self.areas.items()},
            "label": ", ".join(how.label for how in self.streams.metrics[:1]),
        }


def run(options: argparse.Namespace) -> int:
    """Measure what is not measured yet; write everything."""
    need_matplotlib()
    folder(options.output_dir)
    found = curves(options)
    write(options, found)
    if options.json:
        print(json.dumps(found.figures(), ensure_ascii=False))
    else:
        tell(found)
    return 0


def curves(options: argparse.Namespace) -> Curves:
    """Of the options of the command."""
    check(options)
    options.range = tuple(options.range)
    utterances = read_utterances(Path(options.manifest))[: options.limit]
    metric = judged_by(options, utterances)
    if metric == "bleu":
        BLEU()  # which needs a package: say so before the work
    wanted = points_of(options)
    heard = hear(options, wanted, utterances)
    good = [one for one in utterances if all(one.id in logs for logs in heard.values())]
    if not good:
        raise InputError(f"{options.manifest}: no utterance could be heard at every point")
    streams = Streams(good, metric=metric, normalise=options.normaliser, unit=options.unit)
    points = tuple(measured(options, streams, setting, heard[setting]) for setting in wanted)
    quality = streams.quality([heard[None][one.id].offline.split("\n") for one in good])
    return Curves(streams, points, quality, areas(options, streams, points))


def check(options: argparse.Namespace) -> None:
    """InputError for numbers that make no sense, and for what is said by --policies and --sweep."""
    for name, least in (("processes", 1), ("limit", 1), ("chunk", 0.001)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise InputError(f"--{name} {value}: at least {least}")
    if not options.range[0] < options.range[1]:
        raise InputError(f"--range {options.range[0]:g} {options.range[1]:g}: wanted a smaller and a larger lag")
    if options.policy is not None:
        raise InputError("--policy: curves are of --policies")


def points_of(options: argparse.Namespace) -> list[Setting]:
    """All points, each of which is a session that can be made; else InputError."""
    policies, model = options.policies.split(","), build_model(options)
    windows = not isinstance(model, Recognizer) or model.listening.plan().block is None
    wanted = settings_of(policies, parse_sweeps(options.sweep), windows=windows)
    for name in SETTINGS:
        if getattr(options, name) is not None and all(getattr(at(options, one), name) is None for one in wanted):
            raise InputError(f"--{name.replace('_', '-')}: none of {options.policies} has such a setting")
    for setting in wanted:
        live(at(options, setting), model)
    return wanted


def measured(options: argparse.Namespace, streams: Streams, setting: Setting, heard: Mapping[str, Heard]) -> Point:
    """A point from its logs."""
    paths = [log_of(options, setting, one) for one in streams.utterances]
    logs = [read_events(path.read_text(encoding="utf-8").split("\n")[:-1], str(path)) for path in paths]
    return streams.point(setting, logs, [heard[one.id].streamed_s for one in streams.utterances])


def areas(options: argparse.Namespace, streams: Streams, points: Sequence[Point]) -> dict[str, Area | None]:
    """The first curve minus each other one, computing not counted and counted."""
    (name, first), *others = by_curve(points).items()
    how, (least, most) = streams.metrics[-1 if streams.translates else 0], options.range
    return {
        f"{how.name}, {name} against {other}, computing {'counted' if aware else 'not counted'}":
        area(first, second, how, streams.lag, aware=aware, least_s=least, most_s=most)
        for other, second in others
        for aware in (False, True)
    }  # fmt: skip


def write(options: argparse.Namespace, found: Curves) -> None:
    """`curves.tsv`, `curves.json`, and a picture for each metric as SVG and PNG."""
    place, rows, streams = Path(options.output_dir), found.table(), found.streams
    names = header(streams.metrics, list(found.points[0].lags))
    lines = ["\t".join("" if one[name] is None else str(one[name]) for name in names) for one in rows]
    replace_text(place / "curves.tsv", "".join(f"{line}\n" for line in ["\t".join(names), *lines]))
    figures = {**found.figures(), "command": command(options), "commit": commit()}
    replace_text(place / "curves.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    minutes = sum(one.duration_s for one in streams.utterances) / 60
    title = (
        f"{Path(options.model).name}, {Path(options.manifest).name}: n = {len(streams.utterances)}, {minutes:.1f} min"
    )
    for how in streams.metrics[: 2 if streams.translates else 1]:
        figure = drawn(found.points, how, streams.lag, found.offline[how.name], title)
        for ending in (".svg", ".png"):
            save(figure, place / f"{how.name.lower()}{ending}")


def tell(found: Curves) -> None:
    """The table, shortened, and the areas."""
    streams = found.streams
    names = [how.name for how in streams.metrics]
    lag = streams.lag
    rows = [["", *names, f"{lag} s", "computing counted", "first word s", "erasure", "real-time factor"]]
    for one in found.table():
        name = f"{Setting(one['policy'], one['option']).curve} {one['value']:g}"
        timed = [f"{lag} unaware", f"{lag} aware"]
        rows.append([
            name, *(interval_text(one, key) for key in [*names, *timed]), *(plain(one[key]) for key in (
                "first word unaware", "normalised erasure", "real-time factor")),
        ])  # fmt: skip
    rows.append([OFFLINE, *(str(found.offline[name]) for name in names), *[""] * 5])
    print(aligned_table(rows))
    for name, difference in found.areas.items():
        print(f"{name}: {difference or 'they do not overlap in this range'}")


def interval_text(one: Mapping[str, Any], name: str) -> str:
    """A figure of a row with its interval."""
    value, low, high = (one[f"{name}{end}"] for end in ("", " low", " high"))
    return "-" if value is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def plain(value: float | None) -> str:
    """A figure alone."""
    return "-" if value is None else f"{value:.2f}"
