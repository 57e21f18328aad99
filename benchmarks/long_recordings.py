"""Hours of sound through one session: what a minute costs, what is remembered, what is recognised."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from report import Report

from speechattn import tree
from speechattn.live import Session
from speechattn.model import Recognizer, load_model
from speechattn.score.wer import word_errors

DIGITS = Path(__file__).parents[1] / "tests" / "digits"
GAP_S = 0.8
BEAM = 4


@dataclass
class Round:
    """Once through the recordings: what it cost, what was wrong, how much was remembered behind it."""

    seconds: float
    took_s: float
    errors: int
    words: int
    ends: int
    bytes: int


def utterances() -> list[tuple[str, np.ndarray]]:
    """Text and samples of the recordings whose words were trained."""
    said = json.loads((DIGITS / "transcripts.json").read_text(encoding="utf-8"))
    return [(one["text"], soundfile.read(DIGITS / one["file"], dtype="float32")[0]) for one in said if not one["rare"]]


def rounds(model: Recognizer, kind: str, minutes: float) -> Iterator[Round]:
    """Listen to the recordings again and again, with gaps, in one session."""
    spoken = utterances()
    session = Session(model, search=model.search(kind, beam_size=BEAM))
    gap = np.zeros(round(GAP_S * model.sample_rate), np.float32)
    reference = " ".join(text for text, _ in spoken)
    seconds = sum(len(samples) + len(gap) for _, samples in spoken) / model.sample_rate
    total = 0.0
    while total < 60 * minutes:
        events, began = [], time.process_time()
        for _, samples in spoken:
            events += session.feed(samples, model.sample_rate)
            events += session.feed(gap, model.sample_rate)
        took, total = time.process_time() - began, total + seconds
        found = word_errors([reference], ["".join(event.committed for event in events)], normalise="none")
        errors = found.substitutions + found.insertions + found.deletions
        size = sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(session.listener.row))  # type: ignore[union-attr]
        yield Round(seconds, took, errors, found.n, sum(event.final for event in events), size)


def figures(report: Report, quick: bool) -> None:
    """Three hours by CTC, one by the transducer and by the joint beam; what the first and the last rounds cost."""
    model = load_model(DIGITS)
    assert isinstance(model, Recognizer)
    for kind, hours in (("ctc", 3), ("transducer", 1), ("joint", 1)):
        done = list(rounds(model, kind, 2 if quick else 60 * hours))
        few = max(1, len(done) // 10)
        first, last = done[1 : 1 + few], done[-few:]
        cost = [sum(r.took_s for r in part) / sum(r.seconds for r in part) for part in (first, last)]
        errors = [100 * sum(r.errors for r in part) / sum(r.words for r in part) for part in (first, last)]
        n, total = len(utterances()), sum(r.seconds for r in done)
        note = f"{total / 60:.0f} min: {len(done)} rounds of {n} synthetic utterances, gaps of {GAP_S} s, beam {BEAM}"
        report.row(f"long_{kind}_cost", 1e3 * cost[1], "ms", f"CPU time of a second of sound; {note}")
        report.row(f"long_{kind}_growth", cost[1] / cost[0], "x", "cost of the last tenth over the first",
                   "at most 1.1", lambda x: x <= 1.1)  # fmt: skip
        report.row(
            f"long_{kind}_errors_first",
            errors[0],
            "%",
            f"word errors in the first tenth; {first[0].words} words a round",
        )
        report.row(f"long_{kind}_errors_last", errors[1], "%", "and in the last one", "at most 0.5 more",
                   lambda x, most=errors[0] + 0.5: x <= most)  # fmt: skip
        report.row(f"long_{kind}_state", max(r.bytes for r in done[1:]) / done[0].bytes, "x",
                   "largest state over that of the first round", "at most 1.2", lambda x: x <= 1.2)  # fmt: skip
        gaps, ends = n * len(done), sum(r.ends for r in done)
        report.row(f"long_{kind}_ends", ends, "", f"ends of utterances in {gaps} gaps; the last may come later",
                   f"{gaps}", lambda x, gaps=gaps: gaps - 1 <= x <= gaps)  # fmt: skip
