"""How well terms are retrieved, and how well they are recognised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from speechattn.errors import InputError
from speechattn.score.alignment import Edit, edits
from speechattn.score.significance import Array, interval
from speechattn.score.wer import normaliser

__all__ = ["Rate", "figures", "precision_at", "recall_at", "recognised", "retrieved"]


@dataclass(frozen=True)
class Rate:
    """A share (or a mean of `n` utterances) with its 95 % interval; `count` is what it is a share of."""

    name: str
    value: float
    low: float
    high: float
    count: int
    n: int

    def __str__(self) -> str:
        said = f"{100 * self.value:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]"
        return f"{self.name} {said} ({self.count} of {self.n} utterances)"


def recall_at(odds: Tensor, gold: Sequence[Sequence[int]], k: int) -> list[float]:
    """Of each utterance with terms that were said (`gold`, places in the bank): the share of them that is among the k
    best of `odds` [B, N]. The mean is recall@k, a macro average (arXiv 2508.18701). The earlier of equals is better.
    """
    best = odds.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()
    return [share(top, terms, len({*terms})) for top, terms in zip(best, gold, strict=True) if terms]


def precision_at(odds: Tensor, gold: Sequence[Sequence[int]], k: int) -> list[float]:
    """Of each utterance with terms that were said: the share of the k best (of all, where there are fewer) that was."""
    best = odds.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()
    return [share(top, terms, len(top)) for top, terms in zip(best, gold, strict=True) if terms]


def share(top: Sequence[object], terms: Sequence[object], of: int) -> float:
    """How many are in both."""
    return len({*top} & {*terms}) / of if of else 0.0


def retrieved(
    references: Sequence[str], ranked: Sequence[Sequence[str]], terms: Sequence[str], ks: Sequence[int], *,
    normalise: str = "whisper-english",
) -> list[Rate]:  # fmt: skip
    """Recall@k and precision@k of ranked lists of terms, over the utterances that say one of `terms`."""
    clean, _ = normaliser(normalise)
    bank = phrases(terms, normalise)
    gold = [{*said(clean(text).split(), bank)} for text in references]
    found = []
    for k in ks:
        tops = [[*dict.fromkeys(clean(term) for term in row)][:k] for row in ranked]
        both = [(top, terms) for top, terms in zip(tops, gold, strict=True) if terms]
        if not both:
            raise InputError("no reference says any of the terms")
        size = sum(len(terms) for _, terms in both)
        found.append(averaged(f"recall@{k}", [share(top, [*terms], len(terms)) for top, terms in both], size))
        found.append(averaged(f"precision@{k}", [share(top, [*terms], len(top)) for top, terms in both], size))
    return found


def recognised(
    references: Sequence[str], hypotheses: Sequence[str], terms: Sequence[str], *, normalise: str = "whisper-english"
) -> list[Rate]:
    """What became of terms in a recogniser's texts, after the normaliser.

    `term accuracy`: of the terms said, those that stand in the hypothesis of that utterance, each as often as it was
    said. `term precision`: of the terms in hypotheses, those that were said. `false insertions`: terms in hypotheses
    that were not said, for each word of the references. `WER of term words` and `WER of other words`: substitutions and
    deletions of the reference words inside and outside of terms, and insertions of words inside and outside of terms in
    the hypothesis, for each such word of the reference.
    """
    stats = figures(references, hypotheses, terms, normalise=normalise)
    if not stats["term accuracy"][:, 1].any():
        raise InputError("no reference says any of the terms")
    return [ratio(name, each) for name, each in stats.items() if each[:, 1].any()]


def figures(
    references: Sequence[str], hypotheses: Sequence[str], terms: Sequence[str], *, normalise: str = "whisper-english"
) -> dict[str, Array]:
    """The same as counts of each utterance [N, 2]: the figure is the sum of the first divided by that of the second."""
    clean, _ = normaliser(normalise)
    bank = phrases(terms, normalise)
    rows = np.array([
        counted(clean(a).split(), clean(b).split(), bank) for a, b in zip(references, hypotheses, strict=True)
    ], float).reshape(-1, 8)  # fmt: skip
    said, right, heard, false, words, wrong, inside, others = rows.T
    parts = {
        "term accuracy": (right, said), "term precision": (right, heard), "false insertions": (false, words),
        "WER of term words": (wrong, inside), "WER of other words": (others, words - inside),
    }  # fmt: skip
    return {name: np.stack(part, 1) for name, part in parts.items()}


def counted(said_words: Sequence[str], heard_words: Sequence[str], bank: frozenset[tuple[str, ...]]) -> list[int]:
    """Terms said; of these recognised; terms heard; of these not said; words; errors of term words; term words; errors
    of other words.
    """
    terms, heard = said(said_words, bank), said(heard_words, bank)
    right = sum(min(terms.count(term), heard.count(term)) for term in {*terms})
    inside, inside_heard = covered(said_words, bank), covered(heard_words, bank)
    wrong, other, i, j = 0, 0, 0, 0
    for edit in aligned(said_words, heard_words):
        here = inside_heard[j] if edit.kind == "insert" else inside[i]
        wrong += here and edit.kind != "equal"
        other += not here and edit.kind != "equal"
        i += edit.kind != "insert"
        j += edit.kind != "delete"
    return [len(terms), right, len(heard), len(heard) - right, len(said_words), wrong, sum(inside), other]


def aligned(said_words: Sequence[str], heard_words: Sequence[str]) -> list[Edit]:
    """Edits, also where one side is empty."""
    if not said_words:
        return [Edit("insert", "", word) for word in heard_words]
    return edits(" ".join(said_words), " ".join(heard_words))


def phrases(terms: Sequence[str], normalise: str) -> frozenset[tuple[str, ...]]:
    """The words of each normalised term. InputError where nothing is left of one."""
    clean, _ = normaliser(normalise)
    found = {tuple(clean(term).split()): term for term in terms}
    if () in found:
        raise InputError(f"nothing is left of the term {found[()]!r} by the normaliser {normalise}")
    return frozenset(found)


def places(words: Sequence[str], bank: frozenset[tuple[str, ...]]) -> list[tuple[int, int]]:
    """Where terms are said: begin and end, the longest first at each place, none inside another."""
    sizes = sorted({len(term) for term in bank}, reverse=True)
    found, at = [], 0
    while at < len(words):
        size = next((n for n in sizes if tuple(words[at : at + n]) in bank and at + n <= len(words)), 0)
        if size:
            found.append((at, at + size))
        at += size or 1
    return found


def said(words: Sequence[str], bank: frozenset[tuple[str, ...]]) -> list[str]:
    """The terms in a text, one after the other."""
    return [" ".join(words[a:b]) for a, b in places(words, bank)]


def covered(words: Sequence[str], bank: frozenset[tuple[str, ...]]) -> list[bool]:
    """Which words are parts of terms."""
    inside = [False] * len(words)
    for a, b in places(words, bank):
        inside[a:b] = [True] * (b - a)
    return inside


def ratio(name: str, stats: Array) -> Rate:
    """Sums of numerators by sums of denominators [N, 2]; utterances are drawn."""
    low, high = interval(stats, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1e-9))
    top, bottom = stats.sum(0)
    return Rate(name, float(top / bottom), low, high, int(bottom), len(stats))


def averaged(name: str, values: Sequence[float], count: int) -> Rate:
    """The mean over utterances."""
    stats = np.stack([np.array(values, float), np.ones(len(values))], 1)
    low, high = interval(stats, lambda sums: sums[:, 0] / sums[:, 1])
    return Rate(name, float(np.mean(values)), low, high, count, len(values))
