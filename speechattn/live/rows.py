"""What is remembered of streams between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from speechattn import tree
from speechattn.search import Beam
from speechattn.tree import node

__all__ = ["Place", "Row", "Rows", "joined"]


@node
class Row:
    """One stream for each row: states of encoder and search, and three counts of frames [B].

    `quiet` since something was said, `since` the search began, and `spoke` how often something was said since then.
    """

    stream: Any
    beam: Beam
    quiet: Tensor
    since: Tensor
    spoke: Tensor


class Rows:
    """The rows of `n` streams that step together; they are taken apart when one of them goes its own way."""

    def __init__(self, row: Row, n: int) -> None:
        self.row, self.n = row, n
        self.apart: list[Row] | None = [row] if n == 1 else None

    def __getitem__(self, i: int) -> Row:
        if self.apart is None:
            self.apart = tree.split(self.row)
        return self.apart[i]


class Place:
    """Row `i` of `rows`."""

    def __init__(self, rows: Rows, i: int) -> None:
        self.rows, self.i = rows, i

    @property
    def row(self) -> Row:
        """By itself, with memory of its own."""
        return self.rows[self.i]


def joined(places: Sequence[Place]) -> Row:
    """All of them as one batch; as they are, where they stepped together and nobody is missing."""
    rows = places[0].rows
    if rows.n == len(places) and all(p.rows is rows and p.i == i for i, p in enumerate(places)):
        return rows.row
    together: Row = tree.concat([place.row for place in places])
    return together
