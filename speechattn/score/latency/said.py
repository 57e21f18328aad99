"""What was said of one utterance, and when.

Times are milliseconds of the source. U units (words, or characters) were said; unit i at `delays[i]`, when so much of
the source had been read, and at `elapsed[i]`, when computing is counted too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from speechattn.errors import InputError

__all__ = ["PLAIN", "SIMULEVAL", "SIMULSTREAM", "Counting", "Said", "Unit", "units_of"]

Unit = Literal["word", "char"]


@dataclass(frozen=True)
class Said:
    """`units` [U] with `delays` [U] and `elapsed` [U] (empty when unknown), of a source of `source_length` ms.

    `reference_length` counts the units of the reference, None without one. `to_end` is the time from the beginning of
    the utterance to the end of its recording; more than `source_length` where the utterance is a piece of a talk.
    InputError when the numbers do not belong together, or the source is read backwards.
    """

    units: tuple[str, ...]
    delays: tuple[float, ...]
    source_length: float
    elapsed: tuple[float, ...] = ()
    reference: str | None = None
    reference_length: int | None = None
    name: str = ""
    unit: Unit = "word"
    to_end: float = math.inf

    def __post_init__(self) -> None:
        if len(self.delays) != len(self.units):
            raise InputError(f"{len(self.units)} {self.unit}s and {len(self.delays)} delays: they must pair up")
        if self.elapsed and len(self.elapsed) != len(self.units):
            raise InputError(f"{len(self.units)} {self.unit}s and {len(self.elapsed)} elapsed times: they must pair up")
        if not all(math.isfinite(time) for time in (*self.delays, *self.elapsed, self.source_length)):
            raise InputError("a time is not a finite number")
        if any(late < early for early, late in zip(self.delays, self.delays[1:], strict=False)):
            raise InputError("delays go back in time: they must not decrease")

    @property
    def wanted(self) -> int:
        """Units of the reference, or as many as were said where there is none."""
        return len(self.units) if self.reference_length is None else self.reference_length

    @property
    def text(self) -> str:
        """What was said in one string."""
        return (" " if self.unit == "word" else "").join(self.units)

    def times(self, *, aware: bool) -> tuple[float, ...]:
        """`elapsed` or `delays`; none when they are not known."""
        return self.elapsed if aware else self.delays

    def against(self, reference: str, length: int) -> Said:
        """The same with another reference of so many units."""
        return replace(self, reference=reference, reference_length=length)


def units_of(text: str, unit: Unit) -> list[str]:
    """Words between white space, or characters that are none."""
    return text.split() if unit == "word" else [letter for letter in text if not letter.isspace()]


def blank_pieces(text: str, unit: Unit) -> list[str]:
    """Words between blanks, or all characters with the blanks, as simulstream has them."""
    return [word for word in text.split(" ") if word] if unit == "word" else list(text)


def simuleval_units(reference: str, unit: Unit) -> int:
    """Units of a reference as SimulEval and OmniSTEval count: words between single blanks; characters with blanks.

    Two blanks in a row make an empty word, which counts; an empty reference has one word. Output is counted otherwise.
    """
    return len(reference.split(" ")) if unit == "word" else len(reference.strip())


@dataclass(frozen=True)
class Counting:
    """How a tool cuts text into units, and how many of them it counts in a reference."""

    split: Callable[[str, Unit], list[str]]
    count: Callable[[str, Unit], int]


PLAIN = Counting(units_of, lambda reference, unit: len(units_of(reference, unit)))
SIMULEVAL = Counting(units_of, simuleval_units)
SIMULSTREAM = Counting(blank_pieces, lambda reference, unit: len(blank_pieces(reference, unit)))
