"""Latent positions against global soft attention on utterances like those of training (arXiv 2103.16710, table 5)."""

from __future__ import annotations

from statistics import mean
from typing import Any

from claim.report import Results, Section, spread, table
from claim.segmental import run as run

FOLDER = "segmental"  # whose trainings are these, too
POINTS = {"positions": 3, "segmental": 3, "window": 1, "hard": 1, "segmental-own": 1}
SAID = {
    "positions": "global soft attention",
    "segmental": "segment, aligned by CTC", "window": "local window, aligned by CTC", "hard": "hard, aligned by CTC",
    "segmental-own": "segment, re-aligned by itself",
}  # fmt: skip
VERDICT = """\
TO BE WRITTEN"""


def report(results: Results) -> Section:
    wer = {p: [one["wer_1"] for one in results[p]] for p in POINTS}
    rows = [
        [SAID[p], spread(wer[p], 2), spread([one["ctc"] for one in results[p]], 2), str(len(wer[p]))] for p in POINTS
    ]
    text = (
        f"Word error rate in % on {results['positions'][0]['words']} words, a beam of four; mean and "
        f"standard deviation over "
        "the seeds. The CTC head beside it is greedy. Re-aligned: in the second half of the training the best segments "
        "by the head itself.\n\n" + table(["attention", "WER %", "its CTC head, WER %", "seeds"], rows)
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.barh([SAID[p] for p in POINTS], [mean(wer[p]) for p in POINTS])
        for i, p in enumerate(POINTS):
            axes.plot(wer[p], [i] * len(wer[p]), "k.")
        axes.set(xlabel="WER %")
        axes.invert_yaxis()

    return Section("Latent monotonic and segmental models match global soft attention", text, draw)
