"""How benchmarks report: a table for people, then one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

__all__ = ["Report"]


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
