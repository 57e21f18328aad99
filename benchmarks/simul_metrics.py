"""Latency metrics and policies against known numbers: golden vectors, and what tools said of the same logs.

The logs lie in `tests/latency` with what SimulEval, OmniSTEval and simulstream said of them (`run_tools.py` there).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from speechattn.policy import Source
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.ed_att import EDAtt
from speechattn.score.latency.clocks import Apart, Cumulative, InOrder, retimed
from speechattn.score.latency.instances import read_instances
from speechattn.score.latency.said import SIMULEVAL, SIMULSTREAM, Said
from speechattn.score.latency.segments import by_talk, read_sentences, resegmented
from speechattn.score.latency.simulstream import read_simulstream
from speechattn.score.latency.soft import Soft
from speechattn.score.latency.table import LONG, METRICS, mean, talk_figures
from speechattn.search import Draft

__all__ = ["golden", "golden_policies", "tools"]

LOGS = Path(__file__).parents[1] / "tests" / "latency"
DELAYS, ELAPSED = (1000.0, 1000, 2000, 3000, 4000, 4000), (1200.0, 1250, 2300, 3350, 4500, 4550)
GOLDEN = {  # R: metric: computing not counted, counted (None: not known)
    5: {"AL": (600, 920), "LAAL": (866.66667, 1186.66667), "AP": (0.75, None), "DAL": (1111.11111, 1436.11111),
        "YAAL": (750, 1025), "ATD": (1550, None)},
    8: {"AL": (1200, None), "LAAL": (1200, None), "AP": (0.46875, None), "DAL": (1111.11111, None),
        "YAAL": (1000, None)},
}  # fmt: skip
ROWS = (
    (0.40, 0.30, 0.10, 0.05, 0.05, 0.10), (0.05, 0.50, 0.20, 0.10, 0.05, 0.10), (0.05, 0.05, 0.50, 0.20, 0.10, 0.10),
    (0.05, 0.05, 0.10, 0.20, 0.40, 0.20), (0.02, 0.03, 0.05, 0.10, 0.20, 0.60),
)  # fmt: skip
HEAD = ((0, 0),)
DECISIONS = [
    *((AlignAtt.fbk(0, 1, f), n) for f, n in ((1, 3), (2, 3), (3, 2))),
    *((EDAtt(HEAD, alpha), n) for alpha, n in ((0.6, 3), (0.2, 1), (0.1, 0))),
]  # policy, and how many of the five tokens pass


def golden() -> tuple[float, int]:
    """Largest difference in ms from the numbers that were worked out by hand, and how many there are."""
    found = []
    for wanted, metrics in GOLDEN.items():
        said = Said(tuple("abcdef"), DELAYS, 4000, ELAPSED, reference_length=wanted)
        for name, values in metrics.items():
            for aware, value in zip((False, True), values, strict=True):
                ours = METRICS[name](said, aware=aware)
                if value is not None:
                    found.append(abs((ours if ours is not None else float("inf")) - value))
    return max(found), len(found)


def golden_policies() -> tuple[int, int]:
    """Wrong decisions on five tokens whose attention is known, and how many decisions there are."""
    rows = torch.tensor([*ROWS, [0.0] * 6])[None]
    draft = Draft(torch.arange(5), torch.zeros(5), rows, HEAD, 0, True)
    source = Source(frames=6, frame_s=0.04, finished=False)
    wrong = sum(policy.accept(draft, source, policy.initial())[0] != wanted for policy, wanted in DECISIONS)
    return wrong, len(DECISIONS)


def tools() -> dict[str, tuple[float, int]]:
    """The largest relative difference from what each tool said, and of how many numbers."""
    found = {}
    for tool, pairs in (("simuleval", simuleval()), ("omnisteval", omnisteval()), ("simulstream", simulstream())):
        gaps = [abs(ours - theirs) / max(1.0, abs(theirs)) for ours, theirs in pairs]
        found[tool] = max(gaps), len(gaps)
    return found


def numbers(tool: str) -> Any:
    """What a tool said."""
    (path,) = LOGS.glob(f"{tool}-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def lines(name: str) -> list[str]:
    """Of a file."""
    return (LOGS / name).read_text(encoding="utf-8").splitlines()


def value(said: Iterable[Said], metric: Any, *, aware: bool) -> float:
    """The mean; infinity where there is none."""
    found = mean(list(said), metric, aware=aware)
    return float("inf") if found is None else found.value


def simuleval() -> Iterator[tuple[float, float]]:
    """Ours and theirs: means over the utterances of two logs."""
    names = {"StartOffset": "first word", "EndOffset": "finalisation"}
    for name, unit in (("words.instances.log", "word"), ("letters.instances.log", "char")):
        said = read_instances(lines(name), unit=unit)  # type: ignore[arg-type]
        for metric in ("AL", "LAAL", "AP", "DAL", "ATD", "StartOffset", "EndOffset"):
            for aware in (False, True):
                theirs = numbers("simuleval")[f"{name}/{metric}{'_CA' if aware else ''}"]["mean"]
                yield value(said, METRICS[names.get(metric, metric)], aware=aware), theirs


def omnisteval() -> Iterator[tuple[float, float]]:
    """Of utterances, and of talks with its times and with those that it repairs."""
    said = read_instances(lines("words.instances.log"))
    theirs = numbers("omnisteval")
    for metric in ("AL", "LAAL", "AP", "DAL", "YAAL"):
        for aware in (False, True):
            key = f"{'ca_' * aware}{metric.lower()}"
            yield value(said, METRICS[metric], aware=aware), theirs["words.instances.log"][key]
    talks = by_talk(
        read_instances(lines("talks.instances.log")), read_sentences(LOGS / "talks.yaml", lines("talks.txt"))
    )
    for fixed in (False, True):
        parts = list[Said]()
        for talk, sentences in talks:
            told = retimed(talk, Cumulative(), InOrder()) if fixed else talk
            parts += resegmented(told, sentences, Soft(), counting=SIMULEVAL)
        for name, metric in LONG.items():
            for aware in (False, True):
                key = f"{'ca_' * aware}long_{name.removeprefix('Long').lower()}"
                yield value(parts, metric, aware=aware), theirs[f"talks{'/fixed' * fixed}"]["scores"][key]


def simulstream() -> Iterator[tuple[float, float]]:
    """StreamLAAL and normalised erasure of three logs."""
    for name, tokens, unit in (("words", "word", "word"), ("pieces", "spm", "word"), ("zh", "char", "char")):
        theirs, recordings = numbers("simulstream")[name], read_simulstream(lines(f"{name}.simulstream.jsonl"))
        told: list[Any] = [one.said(tokens=tokens, unit=unit, clock=Apart()) for one in recordings]  # type: ignore[arg-type]
        which = "zh" if name == "zh" else "talks"
        talks = by_talk(told, read_sentences(LOGS / f"{which}.yaml", lines(f"{which}.txt")))
        first = talk_figures(talks, counting=SIMULSTREAM)[0]
        for ours, stream_laal in zip((first.unaware, first.aware), theirs["stream_laal"], strict=True):
            yield (float("inf") if ours is None else ours.value / 1000), stream_laal
        gone = [one.erasure(tokens=tokens, unit=unit) for one in recordings]  # type: ignore[arg-type]
        yield sum(one.erased for one in gone) / sum(one.last for one in gone), theirs["normalized_erasure"]
