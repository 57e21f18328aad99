"""A table, a picture, and the section of docs/claims.md that they make."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["Results", "Section", "spread", "table", "write"]

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # of each point, what each seed gave


@dataclass(frozen=True)
class Section:
    """`title` names the claim, `text` is Markdown, `draw` fills a matplotlib figure."""

    title: str
    text: str
    draw: Callable[[Any], None]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and with several seeds their standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(
    page: Path,
    name: str,
    section: Section,
    verdict: str,
    results: Results,
    command: str,
) -> None:
    """Put the section into its place on the page, or behind the others, with picture and figures beside."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "claims"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    section.draw(figure)
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(pictures / f"{name}.svg", metadata={"Date": None})
    (pictures / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    body = f"{section.text}\n\n{verdict}\n\n![{section.title}](claims/{name}.svg)\n\n`{command}`\n"
    parts = page.read_text(encoding="utf-8").split("\n## ")
    made = f"{section.title}\n\n{body}"
    at = [i for i, part in enumerate(parts) if part.startswith(f"{section.title}\n")]
    parts[at[0] if at else len(parts) :] = [made, *parts[at[0] + 1 :]] if at else [made]
    page.write_text("\n## ".join(part.rstrip("\n") + "\n" for part in parts), encoding="utf-8")
