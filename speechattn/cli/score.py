"""`speechattn score wer|bleu|chrf REF HYP [--against HYP2]`, `score latency LOG` and `score terms REF HYP`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from speechattn.cli.score_terms import add_terms
from speechattn.errors import InputError
from speechattn.live.events import Event
from speechattn.score.lag import Heard, measure_lag
from speechattn.score.latency.clocks import CLOCKS
from speechattn.score.latency.degeneracy import Degeneracy, degeneracy
from speechattn.score.latency.logs import Log, read_events, read_log, referred
from speechattn.score.latency.moses import moses
from speechattn.score.latency.segments import by_talk, read_sentences
from speechattn.score.latency.table import Figure, figures, talk_figures, text_table
from speechattn.score.metrics import BLEU, ChrF, ErrorRate, Metric, Scored, compared, scored
from speechattn.score.significance import Difference
from speechattn.score.wer import NORMALISERS, WordErrors, word_errors

__all__ = ["add_parser"]

TEST = "paired bootstrap interval, approximate randomisation"
LAG = "lag mean {mean_s:.2f} s, p50 {p50_s:.2f} s, p95 {p95_s:.2f} s (against {against}; queueing included)"


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
    latency = kinds.add_parser("latency", help="lag of words behind the speaker", allow_abbrev=False)
    add_latency(latency)
    add_terms(kinds)


def add_latency(parser: Any) -> None:
    """Options of `score latency`."""
    parser.add_argument(
        "log", metavar="LOG",
        help="events of `speechattn stream --format jsonl`, an instances.log of SimulEval, or a log of simulstream",
    )  # fmt: skip
    parser.add_argument("--words", metavar="FILE", help='true word ends, JSONL of {"word": str, "end": seconds}')
    parser.add_argument("--reference", metavar="FILE", help="text, a line for each utterance (or segment)")
    parser.add_argument(
        "--segments", metavar="FILE", help="sentences of talks: YAML or JSON list of {wav, offset, duration} in seconds"
    )
    parser.add_argument(
        "--lang", metavar="CODE",
        help="compare pieces of words, as OmniSTEval does with its --lang (needs the package mosestokenizer)",
    )  # fmt: skip
    parser.add_argument("--unit", default="word", choices=("word", "char"), help="what is counted (default word)")
    parser.add_argument(
        "--tokens", default="word", choices=("word", "char", "spm"), help="how tokens of a simulstream log make a text"
    )
    parser.add_argument("--clock", choices=tuple(CLOCKS), help="how computing is counted (default: as the log's tool)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_latency)


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


def read_pairs(reference: str, hypothesis: str) -> tuple[list[str], list[str]]:
    """Line against line; an event log counts as one utterance, and so does the whole reference then."""
    wanted, said = read_text(reference), read_text(hypothesis)
    if said.lstrip().startswith("{"):
        return [" ".join(lines_of(wanted))], [
            "".join(event.committed for event in read_events(lines_of(said), hypothesis))
        ]
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
    """The metrics that the log and the reference allow; of an event log also the lag behind the ends of its words."""
    lines = lines_of(read_text(options.log))
    log = read_log(lines, where=options.log, unit=options.unit, tokens=options.tokens, clock=options.clock)
    said: dict[str, Any] = {}
    if log.kind == "speechattn":
        said = word_lag(read_events(lines, options.log), options)
    elif options.words:
        raise InputError(f"--words goes with an event log; {options.log} is one of {log.kind}")
    found, trouble = metrics_of(log, options)
    erased = None if log.erasure is None else log.erasure.normalised
    if options.json:
        latency = {
            "log": log.kind, "clock": log.clock, "utterances": len(log.said),
            "metrics": {figure.name: asdict(figure) for figure in found},
            "degeneracy": None if trouble is None else {**asdict(trouble), "likely": trouble.likely},
            "normalised_erasure": erased,
        }  # fmt: skip
        print(json.dumps({**said, "latency": latency}))
        return 0
    if said:
        print(LAG.format(**said))
    print(f"{len(log.said)} utterances of a log of {log.kind}; computing by the clock of {log.clock}")
    print(f"\n{text_table(found)}")
    if erased is not None:
        print(f"normalised erasure {erased:.3f}")
    if trouble is not None and trouble.likely:
        print(degenerate(trouble))
    return 0


def metrics_of(log: Log, options: argparse.Namespace) -> tuple[list[Figure], Degeneracy | None]:
    """Of talks with their segments, or of utterances; these with the test of how far their mean can be believed."""
    lines = lines_of(read_text(options.reference)) if options.reference else None
    if options.segments:
        if lines is None:
            raise InputError("--segments needs --reference, a line for each segment")
        both = by_talk(log.said, read_sentences(options.segments, lines))
        cut = None if options.lang is None else moses(options.lang)
        return talk_figures(both, counting=log.counting, pieces=cut), None
    if options.lang is not None:
        raise InputError("--lang says how the words of talks are compared: it needs --segments")
    if lines is not None:
        log = referred(log, lines, options.reference)
    pieces = any(np.isfinite(said.to_end) for said in log.said)
    with_reference = any(said.reference_length is not None for said in log.said)
    return figures(log.said), degeneracy(log.said) if with_reference and not pieces else None


def degenerate(found: Degeneracy) -> str:
    """A warning."""
    return (
        f"warning: {found.simultaneous:.0f} % of the words came before the source ended, where the lag lets expect "
        f"{found.expected:.0f} %: the mean lag says little about this policy"
    )


def word_lag(events: Sequence[Event], options: argparse.Namespace) -> dict[str, Any]:
    """Against true word ends where they are given, else against the log's own word ends (and says so)."""
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
    return {
        "mean_s": float(seconds.mean()), "p50_s": float(np.median(seconds)),
        "p95_s": float(np.percentile(seconds, 95)), "n": len(seconds), "against": against,
    }  # fmt: skip
