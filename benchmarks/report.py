"""How benchmarks report: a table for people, then one line of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median

__all__ = ["Report", "interleaved"]


class Report:
    """Figures in the order in which they were measured."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def row(
        self, name: str, value: float, unit: str, note: str, goal: str = "", ok: Callable[[float], bool] | None = None
    ) -> None:
        """One figure; `ok` says whether it reaches the goal."""
        self.rows.append(
            {"name": name, "value": value, "unit": unit, "goal": goal, "ok": ok(value) if ok else None, "note": note}
        )

    def print(self) -> None:
        """The table, then all rows as one JSON list."""
        width = max(len(str(row["name"])) for row in self.rows)
        for row in self.rows:
            mark = {True: "ok", False: "MISSED", None: ""}[row["ok"]]  # type: ignore[index]
            figure = f"{row['value']:>9.4g} {row['unit']:<6} {row['goal']:<22}"
            print(f"{row['name']:<{width}}  {figure} {mark:<7} {row['note']}")
        print(json.dumps(self.rows))


def interleaved(runs: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """Milliseconds of each, the median of several turns after one to warm up; processor time of this process."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(times + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if turn:
                took[name].append(1e3 * (time.process_time() - began))
    return {name: median(values) for name, values in took.items()}
