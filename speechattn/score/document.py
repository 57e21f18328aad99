"""A report as blocks, written as Markdown or as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from speechattn.score.alignment import Edit

__all__ = ["Aligned", "Block", "Picture", "Table", "Text", "Title", "to_html", "to_markdown"]

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1e; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #e4e4e7; text-align: left; vertical-align: top;
         overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid #999; } td.n, th.n { text-align: right; white-space: nowrap; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.aligned { margin: .3rem 0 .3rem 0; padding-left: 6rem; position: relative; }
.aligned b { position: absolute; left: 0; font-weight: 600; color: #666; }
.case { margin-top: 1.2rem; font-weight: 600; }
del { background: #fde2e1; color: #8c1d18; text-decoration: line-through; border-radius: 3px; padding: 0 .2em; }
ins { background: #dcf3e1; color: #0b5d24; text-decoration: none; border-radius: 3px; padding: 0 .2em; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Title:
    """A heading; level 1 is that of the document, 3 names one case among many."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; columns from `numbers` on are right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 1


@dataclass(frozen=True)
class Picture:
    """An SVG drawing, and in words what it shows."""

    name: str
    svg: str
    says: str


@dataclass(frozen=True)
class Aligned:
    """A text with its errors: what is missing is struck out, what was said instead or besides stands out."""

    label: str
    edits: Sequence[Edit]


Block = Title | Text | Table | Picture | Aligned


def to_html(blocks: Sequence[Block]) -> str:
    """One self-contained page."""
    title = next((block.text for block in blocks if isinstance(block, Title)), "report")
    body = "\n".join(html_of(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def html_of(block: Block) -> str:
    """One block."""
    if isinstance(block, Title):
        text = escape(block.text)
        return f'<p class="case">{text}</p>' if block.level > 2 else f"<h{block.level}>{text}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Table):
        return html_table(block)
    if isinstance(block, Picture):
        data = base64.b64encode(block.svg.encode()).decode()
        return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(block.says)}">'
    parts = [html_edit(edit) for edit in block.edits]
    return f'<p class="aligned"><b>{escape(block.label)}</b>{" ".join(parts) or "&nbsp;"}</p>'


def html_table(table: Table) -> str:
    """Numbers to the right."""

    def row(cells: Sequence[str], tag: str) -> str:
        marks = [' class="n"' if i >= table.numbers else "" for i in range(len(cells))]
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    head = f"<thead><tr>{row(table.header, 'th')}</tr></thead>\n" if any(table.header) else ""
    return f"<table>{head}<tbody>\n{body}\n</tbody></table>"


def html_edit(edit: Edit) -> str:
    """What was wanted and what was said, where they differ."""
    if edit.kind == "equal":
        return escape(edit.reference)
    wanted = f"<del>{escape(edit.reference)}</del>" if edit.reference else ""
    said = f"<ins>{escape(edit.hypothesis)}</ins>" if edit.hypothesis else ""
    return f"{wanted} {said}".strip()


def to_markdown(blocks: Sequence[Block], *, pictures: str) -> str:
    """The same; pictures are files in the folder `pictures`."""
    return "\n\n".join(markdown_of(block, pictures) for block in blocks) + "\n"


def markdown_of(block: Block, pictures: str) -> str:
    """One block."""
    if isinstance(block, Title):
        return f"{'#' * block.level} {plain(block.text)}"
    if isinstance(block, Text):
        return plain(block.text)
    if isinstance(block, Table):
        marks = [":--" if i < block.numbers else "--:" for i in range(len(block.header))]
        lines = [list(map(plain, block.header)), marks, *(list(map(plain, row)) for row in block.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if isinstance(block, Picture):
        return f"![{plain(block.says)}]({pictures}/{block.name}.svg)"
    return f"- {plain(block.label)}: {' '.join(markdown_edit(edit) for edit in block.edits)}"


def markdown_edit(edit: Edit) -> str:
    """What was wanted is struck out, what was said is bold."""
    if edit.kind == "equal":
        return plain(edit.reference)
    wanted = f"~~{plain(edit.reference)}~~" if edit.reference else ""
    said = f"**{plain(edit.hypothesis)}**" if edit.hypothesis else ""
    return f"{wanted} {said}".strip()


def plain(text: str) -> str:
    """Text in which no character is a mark of Markdown."""
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", text)
