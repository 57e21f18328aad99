"""`speechattn score wer REF HYP` and `speechattn score latency LOG`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from speechattn.errors import InputError
from speechattn.live.events import Event
from speechattn.score.lag import Heard, measure_lag
from speechattn.score.wer import NORMALISERS, word_errors

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Options of the two commands."""
    parser = commands.add_parser("score", help="word error rate and latency", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    wer = kinds.add_parser("wer", help="word errors with a 95 %% interval", allow_abbrev=False)
    wer.add_argument("reference", metavar="REF", help="text file, one utterance a line")
    wer.add_argument("hypothesis", metavar="HYP", help="text file of as many lines, or a JSONL event log")
    wer.add_argument("--normaliser", default="whisper-english", choices=NORMALISERS)
    wer.add_argument("--json", action="store_true", help="print JSON")
    wer.set_defaults(run=run_wer)
    latency = kinds.add_parser("latency", help="lag of each word behind its end", allow_abbrev=False)
    latency.add_argument("log", metavar="LOG", help="events of `speechattn stream --format jsonl`")
    latency.add_argument("--words", metavar="FILE", help='true word ends, JSONL of {"word": str, "end": seconds}')
    latency.add_argument("--json", action="store_true", help="print JSON")
    latency.set_defaults(run=run_latency)


def read_text(name: str) -> str:
    """A text file; InputError when it is none."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from error


def read_events(name: str) -> list[Event]:
    """An event log; InputError names the line that is none."""
    events = []
    for number, line in enumerate(read_text(name).splitlines(), 1):
        try:
            events.append(Event.from_json(line))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{name}, line {number}: not an event ({error})") from error
    return events


def run_wer(options: argparse.Namespace) -> int:
    """Line against line; an event log counts as one utterance, and so does the whole reference then."""
    reference, hypothesis = read_text(options.reference), read_text(options.hypothesis)
    if hypothesis.lstrip().startswith("{"):
        references = [" ".join(reference.splitlines())]
        hypotheses = ["".join(event.committed for event in read_events(options.hypothesis))]
    else:
        references, hypotheses = reference.splitlines(), hypothesis.splitlines()
    errors = word_errors(references, hypotheses, normalise=options.normaliser)
    print(json.dumps(asdict(errors)) if options.json else errors)
    return 0


def run_latency(options: argparse.Namespace) -> int:
    """Against true word ends where they are given, else against the log's own word ends (and says so)."""
    events = read_events(options.log)
    if options.words:
        try:
            heard = [Heard(**json.loads(line)) for line in read_text(options.words).splitlines()]
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
