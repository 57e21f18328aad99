"""`speechattn score wer|bleu|chrf REF HYP [--against HYP2]` and `speechattn score latency LOG`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from speechattn.errors import InputError
from speechattn.live.events import Event
from speechattn.score.lag import Heard, measure_lag
from speechattn.score.metrics import BLEU, ChrF, ErrorRate, Metric, Scored, compared, scored
from speechattn.score.significance import Difference
from speechattn.score.wer import NORMALISERS, WordErrors, word_errors

__all__ = ["add_parser"]

TEST = "paired bootstrap interval, approximate randomisation"


def add_parser(commands: Any) -> None:
    """Options of the commands."""
    parser = commands.add_parser("score", help="word errors, BLEU, chrF and latency", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    wer = kinds.add_parser("wer", help="word errors with a 95 %% interval", allow_abbrev=False)
    texts(wer, hypothesis="text file of as many lines, or a JSONL event log")
    wer.add_argument("--normaliser", default="whisper-english", choices=NORMALISERS)
    wer.add_argument("--cer", action="store_true", help="characters instead of words")
    wer.set_defaults(run=run_wer)
    for name, what in (("bleu", "BLEU and chrF"), ("chrf", "chrF alone")):
        bleu = kinds.add_parser(name, help=f"{what} of translations with 95 %% intervals", allow_abbrev=False)
        texts(bleu, hypothesis="text file of as many lines")
        if name == "bleu":
            bleu.add_argument("--tokenize", default="13a", metavar="NAME", help="sacrebleu's tokenizer (default 13a)")
        bleu.add_argument("--lowercase", action="store_true", help="judge lower-case text")
        bleu.set_defaults(run=run_bleu)
    latency = kinds.add_parser("latency", help="lag of each word behind its end", allow_abbrev=False)
    latency.add_argument("log", metavar="LOG", help="events of `speechattn stream --format jsonl`")
    latency.add_argument("--words", metavar="FILE", help='true word ends, JSONL of {"word": str, "end": seconds}')
    latency.add_argument("--json", action="store_true", help="print JSON")
    latency.set_defaults(run=run_latency)


def texts(parser: Any, *, hypothesis: str) -> None:
    """What both kinds of comparison take."""
    parser.add_argument("reference", metavar="REF", help="text file, one utterance a line")
    parser.add_argument("hypothesis", metavar="HYP", help=hypothesis)
    parser.add_argument("--against", metavar="HYP2", help="another system: is the difference more than chance?")
    parser.add_argument("--json", action="store_true", help="print JSON")


def read_text(name: str) -> str:
    """A text file; InputError when it is none."""
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from error


def lines_of(text: str) -> list[str]:
    """The lines of a file; other line ends of Unicode may stand inside of them."""
    return text.removesuffix("\n").split("\n") if text else []


def read_events(name: str) -> list[Event]:
    """An event log; InputError names the line that is none."""
    events = []
    for number, line in enumerate(lines_of(read_text(name)), 1):
        try:
            events.append(Event.from_json(line))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{name}, line {number}: not an event ({error})") from error
    return events


def read_pairs(reference: str, hypothesis: str) -> tuple[list[str], list[str]]:
    """Line against line; an event log counts as one utterance, and so does the whole reference then."""
    wanted, said = read_text(reference), read_text(hypothesis)
    if said.lstrip().startswith("{"):
        return [" ".join(lines_of(wanted))], ["".join(event.committed for event in read_events(hypothesis))]
    return paired(reference, lines_of(wanted), hypothesis, lines_of(said))


def paired(reference: str, wanted: list[str], hypothesis: str, said: list[str]) -> tuple[list[str], list[str]]:
    """The lines of both; InputError when they cannot belong together."""
    if len(wanted) != len(said):
        raise InputError(
            f"{reference} has {len(wanted)} lines, {hypothesis} has {len(said)}: they must pair up, "
            f"{len(wanted)} references and {len(said)} hypotheses"
        )
    return wanted, said


def run_wer(options: argparse.Namespace) -> int:
    """Errors of one system, or of two and their difference."""
    unit = "character" if options.cer else "word"
    names = [options.hypothesis, *([options.against] if options.against is not None else [])]
    pairs = [read_pairs(options.reference, name) for name in names]
    errors = [word_errors(*pair, normalise=options.normaliser, unit=unit) for pair in pairs]
    if options.against is None:
        print(json.dumps(asdict(errors[0])) if options.json else errors[0])
        return 0
    if len(pairs[0][0]) != len(pairs[1][0]):
        raise InputError(f"{names[0]} and {names[1]}: an event log is one utterance, a text file one a line")
    how = ErrorRate(unit, normalise=options.normaliser)
    gap = compared(how, *(how.stats(*pair) for pair in pairs))
    if options.json:
        said = {"first": asdict(errors[0]), "second": asdict(errors[1]), "difference": asdict(gap)}
        print(json.dumps(said))
    else:
        tell(how, names, errors, gap)
    return 0


def run_bleu(options: argparse.Namespace) -> int:
    """BLEU and chrF of one system, or of two and their differences."""
    wanted = lines_of(read_text(options.reference))
    names = [options.hypothesis, *([options.against] if options.against is not None else [])]
    systems = [paired(options.reference, wanted, name, lines_of(read_text(name)))[1] for name in names]
    found = {}
    for how in judges(options):
        stats = [how.stats(wanted, said) for said in systems]
        scores = [scored(how, part) for part in stats]
        gap = compared(how, *stats) if len(stats) == 2 else None
        found[how.name] = [asdict(score) for score in scores] + ([asdict(gap)] if gap else [])
        if not options.json:
            tell(how, names, [f"{how.name} {score} ({score.n} lines; {score.label})" for score in scores], gap)
    if options.json:
        keys = ["first", "second", "difference"]
        print(json.dumps({
            name: dict(zip(keys, rows, strict=False)) if len(rows) > 1 else rows[0] for name, rows in found.items()
        }))  # fmt: skip
    return 0


def judges(options: argparse.Namespace) -> list[Metric]:
    """BLEU and chrF, or chrF alone."""
    chrf = ChrF(lowercase=options.lowercase)
    if options.kind == "chrf":
        return [chrf]
    return [BLEU(tokenize=options.tokenize, lowercase=options.lowercase), chrf]


def tell(how: Metric, names: list[str], scores: Sequence[WordErrors | Scored | str], gap: Difference | None) -> None:
    """One line for each system, with its name where there are two, and one for their difference."""
    if gap is None:
        print(scores[0])
        return
    for name, score in zip(names, scores, strict=True):
        print(f"{name}: {score}")
    print(f"{how.name} of {names[1]} minus {names[0]}: {gap} ({gap.n} utterances; {TEST})")


def run_latency(options: argparse.Namespace) -> int:
    """Against true word ends where they are given, else against the log's own word ends (and says so)."""
    events = read_events(options.log)
    if options.words:
        try:
            heard = [Heard(**json.loads(line)) for line in lines_of(read_text(options.words))]
        except (ValueError, TypeError) as error:
            raise InputError(f"{options.words}: not word ends ({error})") from error
        lag = measure_lag(events, heard)
        seconds, against = np.array(lag.seconds), f"true word ends, {len(lag.seconds)} correct of {lag.said} words"
    else:
        seconds = np.array([event.emitted_s - word.end for event in events for word in event.words])
        against = f"the log's own word ends, {len(seconds)} words"
    if not len(seconds):
        raise InputError(f"{options.log}: no words to measure")
    said = {
        "mean_s": float(seconds.mean()), "p50_s": float(np.median(seconds)),
        "p95_s": float(np.percentile(seconds, 95)), "n": len(seconds), "against": against,
    }  # fmt: skip
    text = "lag mean {mean_s:.2f} s, p50 {p50_s:.2f} s, p95 {p95_s:.2f} s (against {against}; queueing included)"
    print(json.dumps(said) if options.json else text.format(**said))
    return 0
