"""All utterances together: scores offline and streamed, and whether the difference is more than chance.

N utterances, K statistics of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from speechattn.errors import InputError
from speechattn.score.alignment import Edit, edits
from speechattn.score.listening import Heard
from speechattn.score.metrics import BLEU, ChrF, ErrorRate, Metric, Scored, compared, scored
from speechattn.score.significance import Array, Difference
from speechattn.score.utterances import Utterance
from speechattn.score.wer import normaliser

__all__ = ["Evaluation", "Figure", "aligned_table", "judges", "write_texts"]

WAYS = ("offline", "streamed")


def judges(name: str, *, normalise: str) -> tuple[Metric, ...]:
    """`wer` comes with CER, `bleu` with chrF; the first is the main one."""
    if name == "wer":
        return ErrorRate("word", normalise=normalise), ErrorRate("character", normalise=normalise)
    if name == "bleu":
        return BLEU(), ChrF()
    raise InputError(f"metric {name}: wanted wer or bleu")


@dataclass(frozen=True)
class Figure:
    """One metric: a score for each way of hearing, and streamed minus offline; None where nothing was streamed."""

    offline: Scored
    streamed: Scored | None
    difference: Difference | None


@dataclass(frozen=True)
class Evaluation:
    """What was heard of the `utterances` that could be heard, in their order, and of those that `failed`."""

    utterances: tuple[Utterance, ...]
    heard: tuple[Heard, ...]
    failed: tuple[Heard, ...]
    metrics: tuple[Metric, ...]
    normalise: str

    @classmethod
    def of(
        cls, utterances: Sequence[Utterance], heard: Mapping[str, Heard], *, metric: str, normalise: str
    ) -> Evaluation:
        """InputError where nothing could be heard at all, with the first reason."""
        found = [(one, heard[one.id]) for one in utterances]
        failed = tuple(said for _, said in found if said.failed)
        good = [(one, said) for one, said in found if not said.failed]
        if not good:
            raise InputError(f"none of {len(failed)} utterances could be heard: {failed[0].failed}")
        return cls(
            tuple(one for one, _ in good), tuple(said for _, said in good), failed,
            judges(metric, normalise=normalise), normalise,
        )  # fmt: skip

    @property
    def translates(self) -> bool:
        """Judged against translations."""
        return isinstance(self.metrics[0], BLEU)

    @property
    def streams(self) -> bool:
        """Every utterance was streamed as well."""
        return all(said.streamed is not None for said in self.heard)

    @cached_property
    def references(self) -> list[str]:
        """What was really said, or its translation."""
        return [one_line((one.translation or "") if self.translates else one.text) for one in self.utterances]

    def texts(self, way: str) -> list[str]:
        """Hypotheses, `offline` or `streamed`."""
        return [one_line(said.offline if way == "offline" else said.streamed or "") for said in self.heard]

    @property
    def ways(self) -> tuple[str, ...]:
        """Those in which the model can hear."""
        return WAYS if self.streams else WAYS[:1]

    @cached_property
    def stats(self) -> dict[str, tuple[Array, ...]]:
        """For each metric by name, statistics [N, K] of each way."""
        return {
            how.name: tuple(how.stats(self.references, self.texts(way)) for way in self.ways) for how in self.metrics
        }

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Each metric by name."""
        found = {}
        for how in self.metrics:
            stats = self.stats[how.name]
            scores = [scored(how, part) for part in stats]
            found[how.name] = (
                Figure(scores[0], scores[1], compared(how, stats[0], stats[1]))
                if self.streams
                else Figure(scores[0], None, None)
            )
        return found

    def edits(self, way: str) -> list[list[Edit]]:
        """Alignment of each utterance with its reference, of normalised words; of the words as they are for BLEU."""
        clean = str if self.translates else normaliser(self.normalise)[0]
        pairs = zip(self.references, self.texts(way), strict=True)
        return [edits(clean(reference), clean(text)) for reference, text in pairs]

    @property
    def audio_s(self) -> float:
        """Seconds of sound that were heard."""
        return sum(said.duration_s for said in self.heard)

    def rtf(self, way: str) -> float:
        """Seconds of computing for each second of sound."""
        took = sum(said.offline_s if way == "offline" else said.streamed_s for said in self.heard)
        return took / self.audio_s if self.audio_s else float("nan")

    @property
    def delay_s(self) -> float:
        """Mean time from the end of a streamed word, as the model hears it, to its commit."""
        words = sum(said.words for said in self.heard)
        return sum(said.delay_s for said in self.heard) / words if words else float("nan")

    @property
    def label(self) -> str:
        """The normaliser, or the signatures: what a figure must state."""
        if self.translates:
            return ", ".join(f"{how.name} {how.label}" for how in self.metrics)
        return f"normaliser {self.metrics[0].label}"

    def rows(self) -> list[dict[str, Any]]:
        """One line of `utterances.jsonl` for each utterance, failed ones behind the others."""
        how = self.metrics[-1] if self.translates else self.metrics[0]
        found = []
        for i, (one, said) in enumerate(zip(self.utterances, self.heard, strict=True)):
            errors = {
                way: dict(zip(("errors", "words"), stats[i].tolist(), strict=True))
                if not self.translates
                else {how.name: float(how.score(stats[i][None])[0])}
                for way, stats in zip(self.ways, self.stats[how.name], strict=True)
            }
            found.append({**asdict(said), "reference": self.references[i], "speaker": one.speaker, "scores": errors})
        return found + [asdict(said) for said in self.failed]

    def summary(self) -> dict[str, Any]:
        """All figures as plain numbers."""
        return {
            **{name: asdict(figure) for name, figure in self.figures.items()},
            "rtf": {way: number(self.rtf(way)) for way in self.ways},
            "delay_s": number(self.delay_s),
            "utterances": len(self.heard), "failed": [said.id for said in self.failed], "audio_s": self.audio_s,
            "label": self.label,
        }  # fmt: skip

    def table(self) -> list[list[str]]:
        """Header and rows of the summary."""
        rows = [["", "offline", "streamed", "streamed - offline"][: 4 if self.streams else 2]]
        for how in self.metrics:
            figure = self.figures[how.name]
            unit = " %" if how.sign < 0 else ""
            row = [f"{how.name}{unit}", str(figure.offline)]
            rows.append(row + ([str(figure.streamed), str(figure.difference)] if self.streams else []))
        row = ["real-time factor", *(f"{self.rtf(way):.3f}" for way in self.ways)]
        rows.append(row + ([""] if self.streams else []))
        if self.streams:
            rows.append(["mean delay of words", "", f"{self.delay_s:.2f} s", ""])
        return rows


def number(value: float) -> float | None:
    """What JSON can say."""
    return value if isfinite(value) else None


def one_line(text: str) -> str:
    """Without line ends, so that files of texts stay aligned."""
    return " ".join(text.split())


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def write_texts(evaluation: Evaluation, folder: Path) -> None:
    """`references.txt` and `hypotheses.WAY.txt`, line for line; a reference that is empty stays an empty line."""
    texts = {"references.txt": evaluation.references}
    texts |= {f"hypotheses.{way}.txt": evaluation.texts(way) for way in evaluation.ways}
    for name, lines in texts.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
