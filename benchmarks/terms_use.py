"""What retrieved terms do to a live transcript: terms, other words, a bank of wrong terms, an hour.

    python benchmarks/terms_use.py     # the shipped model and tiny.en on the sets of benchmarks/terms.py, and an hour
    python benchmarks/terms_use.py --limit 40 --minutes 4 --models speechattn/en-tiny-stream

Each utterance is a session of its own, with a bank of 1,000 (recipes/terms/banks.py: what the set says, and words near
in sound). Wrong terms: 1,000 others of the same file, none of which the set says. Differences are paired; intervals are
95 % bootstraps over utterances. The hour: FOTAQ's test clips, again and again, with a bank of wrong terms; every term
in the transcript is a false insertion.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from model_runs import RATE, pieces
from report import Report
from tqdm import tqdm

from speechattn import Session, load_model
from speechattn.cli.terms import read_bank, retriever_of
from speechattn.data.fotaq import read_split
from speechattn.live import Terms
from speechattn.model.load import DEFAULT
from speechattn.score.significance import compare
from speechattn.score.terms import figures, ratio
from speechattn.score.utterances import read_utterances
from speechattn.task.terms import said_in, worded
from speechattn.terms import Bank, Term, read_terms

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "embedded"))
import testsets

SETS = {"test": Path("data/terms/test_cuts_test.jsonl.gz"), "fotaq": Path("data/fotaq/fotaq_cuts_test.jsonl.gz")}
SIZE = 1000


def read(path: Path, limit: int) -> tuple[list[str], list[np.ndarray]]:
    """Texts and samples of a manifest."""
    utterances = read_utterances(path)[:limit]
    return [one.text for one in utterances], [one.sound.read()[0] for one in utterances]


def heard(model: object, sounds: Sequence[np.ndarray], terms: Terms | None, what: str) -> list[str]:
    """The live transcript of each."""
    texts = []
    for x in tqdm(sounds, desc=what, disable=None):
        session = Session(model, terms=terms)
        events = session.feed(x, RATE) + session.finish()
        texts.append("".join(event.committed for event in events))
    return texts


def use(report: Report, name: str, given: argparse.Namespace) -> None:
    """One model on both sets, without terms, with them, and with wrong ones."""
    model = load_model(name)
    matcher = read_bank(retriever_of(name, given.retriever), str(given.banks / "test_bank.txt"))[0].matcher
    for kind, path in SETS.items():
        texts, sounds = read(path, given.limit)
        every = [worded(term.source) for term in read_terms(given.banks / f"{kind}_bank.txt")]
        said = {term for term in every if any(said_in(term, worded(text)) for text in texts)}
        bank, wrong = every[:SIZE], [term for term in every if term not in said][-SIZE:]
        banks = {"without": None, "with": bank, "wrong": wrong}
        found = {}
        for how, names in banks.items():
            terms = None if names is None else Terms(Bank(matcher, [Term(one) for one in names]))
            found[how] = heard(model, sounds, terms, f"{name} {kind} {how}")
        tell(report, f"{name}, {kind}", texts, found, sorted(said & {*bank}), wrong)


def tell(
    report: Report, name: str, texts: list[str], found: dict[str, list[str]], said: list[str], wrong: list[str]
) -> None:
    """Figures of one set."""
    stats = {how: figures(texts, hypotheses, said) for how, hypotheses in found.items()}
    for figure in ("term accuracy", "false insertions", "WER of other words"):
        for how in ("without", "with"):
            rate = ratio(figure, stats[how][figure])
            report.row(f"{name}: {figure} {how}", 100 * rate.value, "%", str(rate))

    def share(sums: np.ndarray) -> np.ndarray:
        return 100 * sums[:, 0] / sums[:, 1]

    def relative(sums: np.ndarray) -> np.ndarray:
        return 100 * np.log(np.maximum(sums[:, 0], 0.5) / sums[:, 1])

    a, b = (stats[how]["term accuracy"] for how in ("without", "with"))
    gain = compare(a, b, relative)
    value = 100 * (np.exp(gain.value / 100) - 1)
    low, high = (100 * (np.exp(end / 100) - 1) for end in (gain.low, gain.high))
    note = f"[{low:+.1f}, {high:+.1f}], p = {gain.p:.2g}"
    report.row(f"{name}: term accuracy, relative gain", float(value), "%", note, ">= 6", lambda v: v >= 6)
    gap = compare(stats["without"]["WER of other words"], stats["with"]["WER of other words"], share)
    report.row(
        f"{name}: WER of other words, with minus without", gap.value, "points", str(gap), "<= 0.3", lambda v: v <= 0.3
    )
    every = {how: figures(texts, found[how], wrong)["WER of other words"] for how in ("without", "wrong")}
    gap = compare(every["without"], every["wrong"], share)
    report.row(f"{name}: WER with 1,000 wrong terms, minus without", gap.value, "points", str(gap), "<= 0.5",
               lambda v: v <= 0.5)  # fmt: skip
    rate = ratio("false insertions", figures(texts, found["wrong"], wrong)["false insertions"])
    report.row(f"{name}: false insertions of wrong terms", 100 * rate.value, "%", str(rate))


def hour(report: Report, name: str, given: argparse.Namespace) -> None:
    """False insertions by quarter."""
    lines = read_split(Path("data/fotaq"), "test")
    stream = testsets.hour(lines, given.minutes)
    every = [worded(term.source) for term in read_terms(given.banks / "fotaq_bank.txt")]
    words = " ".join(worded(line.text) for line in lines)
    wrong = [term for term in every if not said_in(term, words)][-SIZE:]
    matcher = read_bank(retriever_of(name, given.retriever), str(given.banks / "test_bank.txt"))[0].matcher
    session = Session(load_model(name), terms=Terms(Bank(matcher, [Term(one) for one in wrong])))
    for piece in tqdm([*pieces(stream.samples)], desc=f"{name} hour", disable=None):
        session.feed(piece, RATE)
    session.finish()
    uses, count = session.terms() or [], np.zeros(4)
    for one in uses:
        for start, _ in one.said:
            count[min(3, int(start // (15 * given.minutes)))] += 1
    quarters = f"{count.astype(int).tolist()} in quarters of {given.minutes / 4:g} min"
    report.row(f"{name}: false insertions, last quarter minus first", float(count[3] - count[0]), "",
               f"{quarters}; {len(uses)} of {SIZE} wrong terms were retrieved at some time", "no drift: <= 2",
               lambda v: v <= 2)  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[DEFAULT, "tiny.en"])
    parser.add_argument("--retriever", type=Path, help="default: the model's own")
    parser.add_argument("--banks", type=Path, default=Path("data/terms"))
    parser.add_argument("--limit", type=int, default=10**6, metavar="N", help="utterances of a set")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the hour; 0: none")
    given = parser.parse_args()
    torch.set_num_threads(1)
    report = Report()
    for name in given.models:
        use(report, name, given)
    if given.minutes:
        hour(report, given.models[0], given)
    report.print()


if __name__ == "__main__":
    main()
