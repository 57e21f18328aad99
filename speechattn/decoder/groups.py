"""Source and target in one sequence: when the source is read, who sees whom, and where everybody stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Grouped", "Interleaved", "Positions", "Schedule", "Wait", "group_ids", "group_mask", "reads"]


class Schedule(Protocol):
    """When to write: a pure function."""

    def needed(self, tokens: Tensor) -> Tensor:
        """Source frames that must have been read before the tokens of these numbers, from 0, are written.

        They never become fewer from one token to the next. Where the source ends earlier, all of it is enough.
        """


@dataclass(frozen=True)
class Wait:
    """`first` frames before the first token, and `every` more before each other one (wait-k, arXiv 1810.08398).

    Wait(2).needed      2 3 4 5 ...      Wait(8, 4).needed      8 12 16 20 ...
    """

    first: int
    every: int = 1

    def __post_init__(self) -> None:
        if min(self.first, self.every) < 0:
            raise ValueError(f"wait for {self.first} frames, then for {self.every}: wanted 0 or more")

    def needed(self, tokens: Tensor) -> Tensor:
        """Of any shape -> the same shape."""
        return self.first + self.every * tokens


def reads(schedule: Schedule, sources: Tensor, tokens: int) -> Tensor:
    """What of sources of `sources` [B] frames has been read when each of so many tokens is written [B, U]."""
    return schedule.needed(torch.arange(tokens, device=sources.device)).minimum(sources[:, None])


class Positions(Protocol):
    """The place of a frame or token, from how many frames were `read` and how many tokens `written` before it."""

    def source(self, read: Tensor, written: Tensor) -> Tensor:
        """Of a frame."""

    def target(self, read: Tensor, written: Tensor) -> Tensor:
        """Of a token."""


@dataclass(frozen=True)
class Grouped:
    """Each group counts for itself: frames from 0, tokens from `first` (arXiv 2505.16983).

    So nobody's place depends on how reads and writes take turns, and what was made of a frame is never made again.
    """

    first: int = 0

    def source(self, read: Tensor, written: Tensor) -> Tensor:
        """Frames before it."""
        return read

    def target(self, read: Tensor, written: Tensor) -> Tensor:
        """Tokens before it."""
        return self.first + written


@dataclass(frozen=True)
class Interleaved:
    """One count for all in the order in which they come; for comparison.

    Frames stand the farther apart, the more was written between them, so what is made of them depends on the schedule.
    """

    def source(self, read: Tensor, written: Tensor) -> Tensor:
        """All that came before it."""
        return read + written

    def target(self, read: Tensor, written: Tensor) -> Tensor:
        """All that came before it."""
        return read + written


def group_ids(reads: Tensor, sources: int, positions: Positions) -> Tensor:
    """Places [B, T + U] of T = `sources` frames and behind them U tokens, written behind `reads` [B, U] of the frames.

    For `Grouped` they are 0 ... T - 1, first ... first + U - 1 in every row. Tokens that a row does not have stand
    behind all of its frames.
    """
    frames, tokens = (torch.arange(n, device=reads.device) for n in (sources, reads.shape[1]))
    written = (reads[:, None] <= frames[:, None]).sum(2)
    heard, said = frames.expand_as(written), tokens.expand_as(reads)
    return torch.cat([positions.source(heard, written), positions.target(reads, said)], 1)


def group_mask(reads: Tensor, sources: int) -> Tensor:
    """Who sees whom among T = `sources` frames and behind them U tokens [B, T + U, T + U]; rows are queries.

    A frame sees frames up to itself, and no token. A token sees tokens up to itself, and of the frames the first
    `reads` [B, U]. Its own row says the token behind it, so `reads` are those of that one (in the authors' code the
    rows are moved up by one). With `Wait(2)`, 4 frames and 3 tokens:

        #......
        ##.....
        ###....
        ####...
        ##..#..
        ###.##.
        #######
    """
    rows, n = len(reads), sources + reads.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool, device=reads.device).tril().repeat(rows, 1, 1)
    seen[:, sources:, :sources] = torch.arange(sources, device=reads.device) < reads[..., None]
    return seen
