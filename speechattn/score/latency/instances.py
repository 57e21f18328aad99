"""`instances.log` of SimulEval, which OmniSTEval reads too: one line of JSON for each utterance, times in ms."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from speechattn.errors import InputError
from speechattn.score.latency.said import SIMULEVAL, Said, Unit, units_of

__all__ = ["instance", "instance_line", "read_instances", "write_instances"]


def read_instances(lines: Iterable[str], *, where: str = "instances.log", unit: Unit = "word") -> list[Said]:
    """What was said of each utterance, in the order of the lines; InputError names the line that cannot be read.

    Reference words are counted as SimulEval does. Times of a log with `unit` characters belong to
    those that are no white space.
    """
    found = list[Said]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(instance(json.loads(line), unit=unit))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{where}, line {number}: not an instance ({what})") from error
        except InputError as error:
            raise InputError(f"{where}, line {number}: {error}") from error
    return found


def instance(row: dict[str, Any], *, unit: Unit = "word") -> Said:
    """One line, or one of OmniSTEval's `instances.resegmented.jsonl`, whose sentences begin at 0.

    Its name is the first line of `source`. Times of zero for every word are none.
    """
    reference, source = row.get("reference"), row.get("source") or ""
    delays = row.get("delays", row.get("emission_cu"))
    elapsed = [float(time) for time in row.get("elapsed", row.get("emission_ca")) or ()]
    return Said(
        units=tuple(units_of(row["prediction"], unit)),
        delays=tuple(float(time) for time in delays or ()),
        source_length=float(row["source_length"]),
        elapsed=tuple(elapsed) if any(elapsed) else (),
        reference=reference,
        reference_length=None if reference is None else SIMULEVAL.count(reference, unit),
        name=str(source[0] if isinstance(source, list) else source),
        unit=unit,
        to_end=float(row.get("time_to_recording_end", math.inf)),
    )


def write_instances(path: str | Path, utterances: Sequence[Said]) -> None:
    """A file that SimulEval (`--score-only`) and OmniSTEval score; they take `elapsed` for that of `Cumulative`."""
    lines = [instance_line(said, index) for index, said in enumerate(utterances)]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def instance_line(said: Said, index: int) -> str:
    """One line of JSON; times that are not known are zeros, as SimulEval has them."""
    row = {
        "index": index,
        "prediction": said.text,
        "delays": list(said.delays),
        "elapsed": list(said.elapsed) or [0] * len(said.units),
        "prediction_length": len(said.units),
        "reference": said.reference or "",
        "source": [said.name],
        "source_length": said.source_length,
    }
    return json.dumps(row, ensure_ascii=False)
