"""What was said instead of what: edits of one text into another, and the most frequent of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, cast

import jiwer

from speechattn.errors import InputError

__all__ = ["UNITS", "Edit", "confusions", "counts", "edits"]

UNITS = ("word", "character")

Kind = Literal["equal", "substitute", "delete", "insert"]


@dataclass(frozen=True)
class Edit:
    """One unit of the reference beside one of the hypothesis; the side that has none is empty."""

    kind: Kind
    reference: str
    hypothesis: str


def edits(reference: str, hypothesis: str, *, unit: str = "word") -> list[Edit]:
    """A minimum-edit alignment (Levenshtein), word by word or character by character; spaces are characters."""
    if unit not in UNITS:
        raise InputError(f"unit {unit}: wanted {' or '.join(UNITS)}")
    reference, hypothesis = " ".join(reference.split()), " ".join(hypothesis.split())
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    found = process(reference, hypothesis)
    said, heard = found.references[0], found.hypotheses[0]
    return [
        Edit(cast(Kind, chunk.type), wanted, got)
        for chunk in found.alignments[0]
        for wanted, got in zip_longest(
            said[chunk.ref_start_idx : chunk.ref_end_idx], heard[chunk.hyp_start_idx : chunk.hyp_end_idx], fillvalue=""
        )
    ]


def counts(found: Iterable[Edit]) -> tuple[int, int, int, int]:
    """Substitutions, insertions, deletions, units of the reference."""
    kinds = Counter(edit.kind for edit in found)
    s, i, d = kinds["substitute"], kinds["insert"], kinds["delete"]
    return s, i, d, kinds["equal"] + s + d


def confusions(found: Iterable[Sequence[Edit]], *, most: int = 20) -> list[tuple[Edit, int]]:
    """The most frequent errors with their number, in a fixed order where numbers are equal."""
    all_edits = Counter(edit for row in found for edit in row if edit.kind != "equal")
    ranked = sorted(all_edits.items(), key=lambda item: (-item[1], item[0].kind, item[0].reference, item[0].hypothesis))
    return ranked[:most]
