"""Term retrieval: recall in banks of 100, 1,000 and 10,000 terms, beside the vector index, and the time of a query.

    make bench-terms                     # needs the matchers of recipes/terms and the sets that its page makes
    python benchmarks/terms.py --quick   # the time of a query alone

Test sets: `test`, synthetic, voices and words that no matcher was trained on; `fotaq`, the test characters of FOTAQ.
The bank of 100 of an utterance is what is said of it and the first others of the bank; those of 1,000 and 10,000 are
one for all, with two lemmas near in sound for each term (recipes/terms/banks.py). An utterance without a term of the
bank does not count. Times: processor time of one thread, median of several queries after one to warm up.

Probabilities, of a retriever and in the bank of 1,000, are judged over all utterances: how often a term of 0.5 or more
was said, how many of those said have so much, and the expected calibration error (Naeini et al. 2015; ten bins of equal
width) over the ten likeliest of each utterance, for nearly all others are near 0.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from report import Report, interleaved
from torch import Tensor

from speechattn.data.corpus import Corpus
from speechattn.frames import Frames
from speechattn.model import load_model
from speechattn.model.matcher import load_matcher
from speechattn.score.significance import compare, interval
from speechattn.score.terms import precision_at, recall_at
from speechattn.task.kept import Kept
from speechattn.task.terms import said_in, worded
from speechattn.terms import Bank, Hearing, RawRetriever, Retriever, Spelling, Term, VectorIndex, read_terms

SETS = {"test": "data/terms/test_cuts_test.jsonl.gz", "fotaq": "data/fotaq/fotaq_cuts_test.jsonl.gz"}
SIZES = (100, 1000, 10000)
SURE, LIKELIEST, BINS = 0.5, 10, 10
BASELINE = "index"
GOAL, AHEAD, FASTEST = 85.0, 10.0, 50.0


def heard(path: Path, keep: Path, encoder: str) -> list[tuple[str, Frames]]:
    """Texts of a manifest, and what the encoder says of each."""
    kept, found = Kept(keep, load_model(encoder)), []
    corpus = Corpus(valid={"all": path}, max_seconds=60, max_utterances=16, workers=0)
    for batch in corpus.val_dataloader()[0]:
        with torch.no_grad():
            frames = kept(batch).frames
        for row, text in enumerate(batch.texts):
            there = frames.mask[row : row + 1]
            found.append((worded(text), Frames(frames.values[row : row + 1, there[0]], there[:, there[0]])))
    return found


def judged(
    matcher: Retriever | VectorIndex, terms: list[str], said: list[tuple[str, Frames]]
) -> tuple[Tensor, list[list[int]]]:
    """The score of each term [B, N], and the terms that were said."""
    bank = Bank(matcher, [Term(term) for term in terms])
    gold = [[i for i, term in enumerate(terms) if said_in(term, text)] for text, _ in said]
    return torch.cat([bank.odds(x) for _, x in said]), gold


def small(odds: Tensor, gold: list[list[int]], size: int) -> tuple[Tensor, list[list[int]]]:
    """Banks of `size` for each utterance: what is said, and then the first others that no utterance says."""
    never = [i for i in range(odds.shape[1]) if i not in {i for terms in gold for i in terms}]
    rows = [terms + never[: size - len(terms)] for terms in gold]
    return torch.stack([x[row] for x, row in zip(odds, rows, strict=True)]), [[*range(len(terms))] for terms in gold]


def figures(report: Report, name: str, found: dict[str, tuple[Tensor, list[list[int]]]]) -> None:
    """Recall and precision of every matcher, and how far each is ahead of the index."""
    for size in SIZES:
        each: dict[str, np.ndarray] = {}
        for kind, (odds, gold) in found.items():
            odds, gold = small(odds, gold, size) if size == SIZES[0] else (odds[:, :size], gold)
            for k in (1, 10):
                values = np.array(recall_at(odds, gold, k))
                if k == 10:
                    each[kind] = values
                stats = np.stack([values, np.ones(len(values))], 1)
                low, high = interval(stats, lambda sums: sums[:, 0] / sums[:, 1])
                ours = name == "test" and size == 1000 and k == 10 and kind != BASELINE
                report.row(
                    f"{name}: recall@{k} of {size}, {kind}", float(100 * values.mean()), "%",
                    f"[{100 * low:.1f}, {100 * high:.1f}], {len(values)} utterances, {sum(map(len, gold))} terms; "
                    f"precision@{k} {100 * np.mean(precision_at(odds, gold, k)):.1f} %",
                    f">= {GOAL:g}" if ours else "", (lambda v: v >= GOAL) if ours else None,
                )  # fmt: skip
        for kind, values in each.items():
            if kind != BASELINE and BASELINE in each:
                gap = compare(stats_of(each[BASELINE]), stats_of(values), lambda sums: 100 * sums[:, 0] / sums[:, 1])
                goal = AHEAD if (name, size) == ("test", 1000) else 0.0
                wanted = size == 1000
                report.row(
                    f"{name}: {kind} minus {BASELINE}, recall@10 of {size}", gap.value, "points", str(gap),
                    f">= {goal:g}" if wanted else "", (lambda v, goal=goal: v >= goal) if wanted else None,
                )  # fmt: skip


def calibrated(report: Report, name: str, kind: str, odds: Tensor, gold: list[list[int]]) -> None:
    """What the probabilities of a bank mean."""
    p, said = odds.sigmoid(), torch.zeros(odds.shape, dtype=torch.bool)
    for row, terms in zip(said, gold, strict=True):
        row[terms] = True
    hits = np.stack([(said & (p >= SURE)).sum(1), (p >= SURE).sum(1), said.sum(1)], 1).astype(float)
    for what, of in (("precision", 1), ("recall", 2)):
        low, high = interval(hits, lambda sums, of=of: sums[:, 0] / np.maximum(sums[:, of], 1))
        value = 100 * hits[:, 0].sum() / max(1, hits[:, of].sum())
        report.row(
            f"{name}: {what} at a probability of {SURE}, {kind}", value, "%",
            f"[{100 * low:.1f}, {100 * high:.1f}], {hits[:, of].sum():.0f} terms, {len(hits)} utterances",
        )  # fmt: skip
    top, at = p.topk(LIKELIEST, dim=1)
    right = said.gather(1, at).double().flatten()
    place = (top.flatten() * BINS).long().clamp(max=BINS - 1)
    gaps = [abs(float((top.flatten()[place == i].double() - right[place == i]).sum())) for i in range(BINS)]
    value = 100 * sum(gaps) / len(right)
    report.row(f"{name}: expected calibration error, {kind}", value, "points", f"{len(right)} pairs")


def stats_of(values: np.ndarray) -> np.ndarray:
    """Statistics [N, 2] of a mean."""
    return np.stack([values, np.ones(len(values))], 1)


def speed(report: Report, matcher: Retriever | VectorIndex, terms: list[str], times: int) -> None:
    """5 s of sound against banks of several sizes."""
    torch.set_num_threads(1)
    x = Frames(torch.randn(1, 250, 384), torch.ones(1, 250, dtype=torch.bool))
    banks = {n: Bank(matcher, [Term(term) for term in terms[:n]]) for n in (2500, 5000, 10000)}
    took = interleaved({str(n): lambda bank=bank: bank.odds(x) for n, bank in banks.items()}, times)
    for n in banks:
        last = n == 10000
        report.row(
            f"one query, {n} terms", took[str(n)], "ms", f"5 s of sound, {len(banks[n].embedding.query)} tokens",
            f"<= {FASTEST:g}" if last else "", (lambda v: v <= FASTEST) if last else None,
        )  # fmt: skip
    share = took["10000"] / took["2500"]
    report.row("10,000 terms beside 2,500", share, "x", "linear in the bank: 4", "<= 4.4", lambda v: v <= 4.4)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/terms"), help="the folder of the trained matchers")
    parser.add_argument("--kinds", nargs="+", default=["raw", "retriever", "index"])
    parser.add_argument("--banks", type=Path, default=Path("data/terms"))
    parser.add_argument("--keep", type=Path, default=Path("runs/terms/frames"))
    parser.add_argument("--quick", action="store_true", help="the time of a query, with weights that know nothing")
    given = parser.parse_args()
    report = Report()
    torch.manual_seed(0)
    lots = random.Random(0)
    invented = [
        f"{i:05d}".translate(str.maketrans("0123456789", "aeioubdfgk")) + lots.choice("lmnrst") * 3
        for i in range(10000)
    ]
    if given.quick:
        speed(report, RawRetriever(Hearing(384, 128, layers=2), Spelling(128, stride=4), 128, 1).eval(), invented, 9)
        report.print()
        return
    matchers = {kind: load_matcher(given.models / kind / "model") for kind in given.kinds}
    for name, path in SETS.items():
        said = heard(Path(path), given.keep, next(iter(matchers.values()))[1])
        terms = [worded(term.source) for term in read_terms(given.banks / f"{name}_bank.txt")]
        found = {kind: judged(matcher, terms, said) for kind, (matcher, _) in matchers.items()}
        figures(report, name, found)
        for kind, (odds, gold) in found.items():
            if isinstance(matchers[kind][0], Retriever):
                calibrated(report, name, kind, odds[:, :1000], [[i for i in row if i < 1000] for row in gold])
    speed(report, matchers[given.kinds[0]][0], [term.source for term in read_terms(given.banks / "test_bank.txt")], 9)
    report.print()


if __name__ == "__main__":
    main()
