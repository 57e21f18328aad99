"""`speechattn evaluate MODEL MANIFEST`: offline and streamed side by side, and whether they differ."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from speechattn.cli.options import add_running_options, add_session_options, build_model, build_session, folder
from speechattn.cli.policies import SETTINGS
from speechattn.cli.terms import build_terms
from speechattn.cli.video import sees
from speechattn.errors import InputError
from speechattn.live.session import Session
from speechattn.live.streaming import Streaming
from speechattn.model import Recognizer
from speechattn.model.load import DEFAULT, located
from speechattn.pretrained.whisper import WhisperModel
from speechattn.score.evaluation import Evaluation, aligned_table, write_texts
from speechattn.score.journal import Journal, fingerprint
from speechattn.score.listening import BySession, Ears, Heard, WholeUtterances
from speechattn.score.metrics import BLEU
from speechattn.score.plots import need_matplotlib
from speechattn.score.report import write_report
from speechattn.score.shards import batches, hear_all
from speechattn.score.utterances import Utterance, read_utterances
from speechattn.score.wer import NORMALISERS
from speechattn.version import __version__

__all__ = ["add_parser", "changed", "command", "commit", "ears", "judged_by", "settings"]

FREE = ("command", "run", "processes", "normaliser", "limit", "output_dir", "metric", "json")  # may change in between
POLICY = ("policy", *SETTINGS, "min_chunk_size")
SEARCH = ("search", "beam_size")
LISTS = {"hotwords_file": "hotwords", "terms": "terms", "terms_model": "retriever"}  # files that options name
Keep = Callable[[Sequence[Heard]], None]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser(
        "evaluate", help="a model on a manifest, offline and streamed side by side", allow_abbrev=False
    )
    parser.add_argument(
        "model", nargs="?", default=DEFAULT, metavar="MODEL",
        help=f"name or path, as --model of other commands (default {DEFAULT})",
    )  # fmt: skip
    parser.add_argument("manifest", metavar="MANIFEST", help="cuts of lhotse (.jsonl.gz), or JSONL of {audio, text}")
    parser.add_argument("--output-dir", "-o", metavar="DIR", help="results and report; the same command goes on there")
    parser.add_argument("--metric", choices=("wer", "bleu"), help="default: bleu for --task translate, else wer")
    parser.add_argument("--normaliser", default="whisper-english", choices=NORMALISERS, help="of texts, for WER")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N utterances")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="each with its own model (default 1)")
    parser.add_argument("--batch-seconds", type=float, default=60.0, metavar="S", help="offline batches (default 60)")
    parser.add_argument("--chunk", type=float, default=0.1, metavar="S", help="live sound comes so (default 0.1 s)")
    parser.add_argument(
        "--without", choices=("sound", "lips"), help="what a model that sees lips is not given, to see what it is worth"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_running_options(parser.add_argument_group("model"))
    add_session_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Hear what is not finished yet, then judge everything."""
    for name, least in (("processes", 1), ("limit", 1), ("batch_seconds", 0.001), ("chunk", 0.001)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least {least}")
    utterances = read_utterances(Path(options.manifest))[: options.limit]
    metric = judged_by(options, utterances)
    if metric == "bleu":
        BLEU()  # which needs a package: say so before the work
    place = None if options.output_dir is None else folder(options.output_dir)
    heard: dict[str, Heard] = {}
    if place is None:
        hear(options, utterances, heard, lambda results: None)
        evaluation = Evaluation.of(utterances, heard, metric=metric, normalise=options.normaliser)
    else:
        need_matplotlib()
        with Journal(place, settings(options, place)) as journal:
            heard |= journal.done
            hear(options, utterances, heard, journal.add)
            evaluation = Evaluation.of(utterances, heard, metric=metric, normalise=options.normaliser)
            wanted = {one.id for one in utterances}
            others = [asdict(said) for name, said in heard.items() if name not in wanted]
            journal.rewrite([*evaluation.rows(), *others])
            write(options, evaluation, place)
    tell(options, evaluation, place)
    return 0


def judged_by(options: argparse.Namespace, utterances: list[Utterance]) -> str:
    """wer or bleu; InputError where translations are needed and missing."""
    metric: str = options.metric or ("bleu" if options.task == "translate" else "wer")
    if metric == "bleu":
        without = [one.id for one in utterances if one.translation is None]
        if without:
            raise InputError(
                f"{options.manifest}: {without[0]} and {len(without) - 1} others have no translation, which BLEU needs"
            )
    return metric


def hear(options: argparse.Namespace, utterances: list[Utterance], heard: dict[str, Heard], keep: Keep) -> None:
    """Add what is missing to `heard`; `keep` gets it batch by batch."""
    missing = [one for one in utterances if one.id not in heard]
    if not missing:
        return

    def add(results: Sequence[Heard]) -> None:
        keep(results)
        for said in results:
            heard[said.id] = said
            if said.failed:
                print(f"speechattn: skipped {said.failed}", file=sys.stderr)

    make = partial(ears, options)
    if options.processes > 1:
        ears(options)  # what is wrong with the model or the options is said here
    hear_all(make, batches(missing, seconds=options.batch_seconds), add, processes=options.processes)


def ears(options: argparse.Namespace) -> Ears:
    """How the model of the options hears; a module-level function, so that other processes can call it."""
    model = build_model(options)
    seeing, deaf = sees(options, model), options.without == "sound"
    size = None if seeing is None or options.without == "lips" else seeing.size
    if isinstance(model, WhisperModel):
        return whisper_ears(options, model)
    streams = model.listening.plan().block is not None
    if streams:
        listener, terms = build_session(options, model).listener, build_terms(options)
        assert isinstance(listener, Streaming)
        search, how = listener.search, listener.settings
        return Ears(
            WholeUtterances(model, search, deaf=deaf),
            lambda: Session(model, policy=listener.policy, settings=how, search=search, terms=terms),
            model.sample_rate, options.chunk, size, deaf,
        )  # fmt: skip
    given = {"beam_size": options.beam_size} if options.beam_size is not None else {}
    search = model.search(options.search, **given)
    live = windowed(options, model) if size is None else None  # sessions in windows are given no pictures
    offline = WholeUtterances(model, search, deaf=deaf)
    return Ears(offline, live, model.sample_rate, options.chunk, size, deaf)


def windowed(options: argparse.Namespace, model: Recognizer) -> Callable[[], Session] | None:
    """Sessions of a recogniser that needs whole utterances: of its attention decoder; None where it has none."""
    if model.windowed() is None:
        return None
    live = changed(options, SEARCH)  # which are for the offline half
    build_session(live, model)  # what is wrong with the options is said here
    return lambda: build_session(live, model)


def whisper_ears(options: argparse.Namespace, model: WhisperModel) -> Ears:
    """Offline a window as long as it can be, live a policy; a language that was not given is detected each time."""
    whole = changed(options, POLICY)

    def session(how: argparse.Namespace, offline: bool) -> Session:
        if options.language is None and model.network.config.multilingual:
            model.language = None
        return build_session(how, model, offline=offline)

    session(options, False)
    return Ears(
        BySession(partial(session, whole, True)), partial(session, options, False), model.sample_rate, options.chunk
    )


def changed(options: argparse.Namespace, names: tuple[str, ...]) -> argparse.Namespace:
    """The same options without some."""
    return argparse.Namespace(**{**vars(options), **dict.fromkeys(names)})


def settings(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """What the texts depend on: all options but the free ones, and what their files hold."""
    said = {name: value for name, value in vars(options).items() if name not in FREE}
    for name in ("model", "manifest", *LISTS):  # the same file from another folder is the same
        if said[name] is not None and Path(said[name]).expanduser().exists():
            said[name] = str(Path(said[name]).expanduser().resolve())
    said["contents of the model"] = fingerprint(located(options.model), but=place)
    said["contents of the manifest"] = fingerprint(options.manifest)
    said |= {
        f"contents of the {what}": fingerprint(getattr(options, name))
        for name, what in LISTS.items()
        if said[name] is not None
    }
    return said


def write(options: argparse.Namespace, evaluation: Evaluation, place: Path) -> None:
    """Texts, figures, report."""
    write_texts(evaluation, place)
    facts = provenance(options, evaluation)
    summary = {**evaluation.summary(), "how": facts}
    (place / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    title = f"{Path(options.model).name or options.model} on {Path(options.manifest).name}"
    write_report(evaluation, place, title=title, facts=facts)


def provenance(options: argparse.Namespace, evaluation: Evaluation) -> Mapping[str, str]:
    """How the figures came about."""
    return {
        "command": command(options),
        "speechattn": f"{__version__}, commit {commit()}",
        "judged by": evaluation.label,
        "utterances": f"{len(evaluation.heard)} heard, {len(evaluation.failed)} not",
        "sound": f"{evaluation.audio_s:.1f} s",
        "computing": f"{options.device} {options.dtype}, {options.processes} processes of {options.threads} threads, "
        f"offline in batches of {options.batch_seconds:g} s, live in pieces of {options.chunk:g} s",
    }


def command(options: argparse.Namespace) -> str:
    """The command line with all that was given or is usual."""
    words = ["speechattn", options.command, options.model, options.manifest]
    for name, value in vars(options).items():
        if name not in ("command", "run", "model", "manifest") and value is not None and value is not False:
            for each in value if isinstance(value, list) else [value]:  # an option that may come again and again
                given = each if isinstance(each, tuple) else () if each is True else (each,)
                words += [f"--{name.replace('_', '-')}", *map(str, given)]
    return shlex.join(words)


def commit() -> str:
    """Of the source tree that runs, with a mark where files differ from it; unknown where it is installed."""
    place = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=place, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (" and changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def tell(options: argparse.Namespace, evaluation: Evaluation, place: Path | None) -> None:
    """The summary, last; what it leaves out goes before it."""
    if options.json:
        print(json.dumps(evaluation.summary(), ensure_ascii=False))
        return
    if evaluation.failed:
        print(f"{len(evaluation.failed)} utterances could not be heard and do not count")
    if not evaluation.streams:
        print(f"{options.model} needs whole utterances and was not streamed")
    if place is not None:
        print(f"report: {place / 'report.html'}")
    print(f"{len(evaluation.heard)} utterances, {evaluation.audio_s:.1f} s of sound; {evaluation.label}\n")
    print(aligned_table(evaluation.table()))
