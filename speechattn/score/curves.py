"""Quality against latency: what a policy makes of the same streams at several of its settings.

N utterances, or streams of several sentences; K statistics of quality for each. A lag is kept as a sum over sentences
and their number [N, 2], so that both are drawn together when utterances are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speechattn.live.events import Event
from speechattn.score.evaluation import judges, one_line
from speechattn.score.latency import lagging
from speechattn.score.latency.events import said_of, shown_erasure
from speechattn.score.latency.said import PLAIN, Said, Unit
from speechattn.score.latency.segmenter import WordErrors, latin_runs
from speechattn.score.latency.segments import Sentence, resegmented
from speechattn.score.latency.soft import Soft
from speechattn.score.latency.table import Mean
from speechattn.score.latency.table import Metric as Lag
from speechattn.score.metrics import Metric
from speechattn.score.significance import Array, interval
from speechattn.score.utterances import CutSound, Utterance

__all__ = ["Point", "Setting", "Streams", "Timed", "average"]

SHORT: dict[str, Lag] = {
    "LAAL": lagging.length_adaptive_average_lagging, "YAAL": lagging.yaal, "AP": lagging.average_proportion,
    "DAL": lagging.differentiable_average_lagging, "first word": lagging.first_word,
}  # fmt: skip
FEWEST_ERRORS: dict[str, Lag] = {
    "StreamLAAL": lagging.length_adaptive_average_lagging, "first word": lagging.first_word,
}  # fmt: skip
SOFTLY: dict[str, Lag] = {
    "LongYAAL": lagging.long_yaal, "LongAP": lagging.average_proportion,
    "LongDAL": lagging.differentiable_average_lagging,
}  # fmt: skip
LONG = ("StreamLAAL", "LongYAAL", "LongAP", "LongDAL", "first word")


@dataclass(frozen=True)
class Setting:
    """A policy with a value of what is swept (an option's name, None: as it is); `curve` names those it is one of."""

    policy: str
    option: str | None = None
    value: float | None = None

    @property
    def curve(self) -> str:
        """The policy, and what is swept where its name does not say it."""
        option = (self.option or self.policy).replace("_", "-")
        return self.policy if option == self.policy else f"{self.policy} {option}"

    @property
    def name(self) -> str:
        """Of a folder."""
        return self.curve.replace(" ", "-") + ("" if self.value is None else f"-{self.value:g}")


@dataclass(frozen=True)
class Timed:
    """A lag in seconds (average proportion: a ratio), computing not counted and counted: sum and number [N, 2]."""

    unaware: Array
    aware: Array

    def of(self, *, aware: bool) -> Array:
        """One of both."""
        return self.aware if aware else self.unaware


@dataclass(frozen=True)
class Point:
    """One setting: statistics of each metric of quality [N, K], lags by name, what was taken back and said [N, 2],
    and seconds of computing and of sound [N, 2]."""

    setting: Setting
    quality: Mapping[str, Array]
    lags: Mapping[str, Timed]
    erasure: Array
    computing: Array


def average(stats: Array) -> Mean | None:
    """Sum over number of `stats` [N, 2], with a 95 % interval over the N that have any; None where none has."""
    some = stats[stats[:, 1] > 0]
    if not len(some):
        return None
    low, high = interval(some, lambda sums: sums[:, 0] / sums[:, 1])
    return Mean(float(some[:, 0].sum() / some[:, 1].sum()), low, high, len(some), len(stats) - len(some))


class Streams:
    """The references of utterances, by which everything that is said of them is judged.

    `metric` is wer (of each whole utterance) or bleu (of each sentence, cut with the fewest word errors; so is chrF).
    Utterances with one sentence have LAAL, streams of several StreamLAAL and the long forms.
    """

    def __init__(
        self, utterances: Sequence[Utterance], *, metric: str, normalise: str = "whisper-english", unit: Unit = "word"
    ) -> None:
        self.utterances, self.unit = tuple(utterances), unit
        self.metrics: tuple[Metric, ...] = judges(metric, normalise=normalise)
        self.translates = metric == "bleu"
        self.sentences = [sentences_of(one, translated=self.translates) for one in utterances]
        self.long = any(len(row) > 1 for row in self.sentences)
        self.lag = LONG[0] if self.long else "LAAL"
        self.cut = WordErrors(pieces=latin_runs if unit == "char" else None)

    def quality(self, texts: Sequence[Sequence[str]]) -> dict[str, Array]:
        """Of what was said, the sentences [S] of each of the N (WER: any pieces of it)."""
        if not self.translates:
            wanted = [" ".join(sentence.reference for sentence in row) for row in self.sentences]
            return {how.name: how.stats(wanted, [one_line(" ".join(row)) for row in texts]) for how in self.metrics}
        references = [one_line(sentence.reference) for row in self.sentences for sentence in row]
        hypotheses = [one_line(text) for row in texts for text in row]
        first = np.cumsum([0, *(len(row) for row in self.sentences[:-1])])
        return {how.name: np.add.reduceat(how.stats(references, hypotheses), first) for how in self.metrics}

    def point(self, setting: Setting, logs: Sequence[Sequence[Event]], computing: Sequence[float]) -> Point:
        """From the events of all N, and the seconds of computing."""
        said = [said_of(log, unit=self.unit, name=one.id) for log, one in zip(logs, self.utterances, strict=True)]
        parts = [
            resegmented(one, row, self.cut) if len(row) > 1 else [one.against(row[0].reference, words(row[0], one))]
            for one, row in zip(said, self.sentences, strict=True)
        ]
        texts = [[part.text for part in row] for row in parts] if self.translates else [[text(log)] for log in logs]
        shown = [shown_erasure(log, unit=self.unit) for log in logs]
        return Point(
            setting, self.quality(texts), self.lags(said, parts),
            np.array([(one.erased, one.last) for one in shown], float),
            np.array([(took, one.duration_s) for took, one in zip(computing, self.utterances, strict=True)]),
        )  # fmt: skip

    def lags(self, said: Sequence[Said], parts: Sequence[Sequence[Said]]) -> dict[str, Timed]:
        """By name; `parts` are the sentences of what was `said`."""
        if not self.long:
            return {name: timed(parts, lag, name) for name, lag in SHORT.items()}
        soft = Soft(exact=self.unit == "char")
        softly = [resegmented(one, row, soft) for one, row in zip(said, self.sentences, strict=True)]
        found = {name: timed(parts, lag, name) for name, lag in FEWEST_ERRORS.items()}
        found |= {name: timed(softly, lag, name) for name, lag in SOFTLY.items()}
        return {name: found[name] for name in LONG}


def sentences_of(one: Utterance, *, translated: bool) -> list[Sentence]:
    """A sentence for each supervision of a cut; all of any other utterance."""
    whole = [Sentence(one.id, 0.0, 1000 * one.duration_s, (one.translation or "") if translated else one.text)]
    if not isinstance(one.sound, CutSound):
        return whole
    rows = sorted(one.sound.said.cut.supervisions, key=lambda row: row.start)
    if len(rows) < 2:
        return whole
    return [
        Sentence(
            one.id, 1000 * row.start, 1000 * row.duration,
            str((row.custom or {}).get("translation", "")) if translated else row.text or "",
        )
        for row in rows
    ]  # fmt: skip


def words(sentence: Sentence, said: Said) -> int:
    """Units of the reference."""
    return PLAIN.count(sentence.reference, said.unit)


def text(log: Sequence[Event]) -> str:
    """All that was committed."""
    return "".join(event.committed for event in log)


def timed(parts: Sequence[Sequence[Said]], lag: Lag, name: str) -> Timed:
    """Sum and number of the sentences' lags of each of the N."""
    scale = 1.0 if name.endswith("AP") else 1e-3

    def sums(*, aware: bool) -> Array:
        found = [[value for one in row if (value := lag(one, aware=aware)) is not None] for row in parts]
        return np.array([(scale * sum(row), len(row)) for row in found], float)

    return Timed(sums(aware=False), sums(aware=True))
