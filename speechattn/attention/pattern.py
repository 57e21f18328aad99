"""Who may look at whom: one frozen value with one integer predicate, from which every backend derives its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Blocks", "Pattern", "Span", "constant", "draw", "visible"]


SMALL = 1 << 23  # bytes of a table that is worth remembering
ROOM = 1 << 26  # bytes of all that one function remembers


@runtime_checkable
class Pattern(Protocol):
    """`allowed(q, k)`: may the query at index q see the key at index k? Integer arithmetic only; it broadcasts."""

    @property
    def sinks(self) -> int:
        """First valid frames of a row that stay visible."""

    @property
    def right(self) -> int:
        """Frames of look-ahead behind the own chunk."""

    def allowed(self, q: Tensor, k: Tensor) -> Tensor:
        """True where query index `q` may see key index `k`."""


@dataclass(frozen=True)
class Span:
    """A band. Key k is visible to query q if

        floor(q / chunk) * chunk - left  <=  k  <  (floor(q / chunk) + 1) * chunk + right

    and (q - k) is a multiple of `dilation`; the row's first `sinks` valid frames stay visible when they have left the
    band (arXiv 2309.17453), at the distance that they would have if they stood right before it. `left = None` is
    everything before; `chunk = None` the whole utterance. Rows are queries, columns keys:

        sliding(2, 1)    causal()         chunked(2, 2)    chunked(2, 2, right=1)   dilated(4, 2)    sliding(1) sinks=1
        ##......         #.......         ##......         ###.....                 #.......         #.......
        ###.....         ##......         ##......         ###.....                 .#......         ##......
        ####....         ###.....         ####....         #####...                 #.#.....         ###.....
        .####...         ####....         ####....         #####...                 .#.#....         #.##....
        ..####..         #####...         ..####..         ..#####.                 #.#.#...         #..##...
        ...####.         ######..         ..####..         ..#####.                 .#.#.#..         #...##..
        ....####         #######.         ....####         ....####                 ..#.#.#.         #....##.
        .....###         ########         ....####         ....####                 ...#.#.#         #.....##
    """

    left: int | None
    chunk: int | None = 1
    right: int = 0
    dilation: int = 1
    sinks: int = 0

    def __post_init__(self) -> None:
        for name, least in (("left", 0), ("chunk", 1), ("right", 0), ("dilation", 1), ("sinks", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: at least {least} is needed")
        if self.chunk is None and (self.left is not None or self.right):
            raise ValueError("a chunk that is the whole utterance leaves nothing to its left or right")
        if self.left is None and self.sinks:
            raise ValueError("with everything before visible there are no sinks to keep")

    @classmethod
    def full(cls) -> Span:
        """Everybody sees everybody."""
        return cls(None, None)

    @classmethod
    def causal(cls) -> Span:
        """Everybody sees the past."""
        return cls(None)

    @classmethod
    def sliding(cls, left: int, right: int = 0, *, sinks: int = 0) -> Span:
        """`left` frames back, `right` ahead (arXiv 2002.02562)."""
        return cls(left, 1, right, 1, sinks)

    @classmethod
    def chunked(cls, left: int | None, chunk: int, *, right: int = 0) -> Span:
        """The own chunk, `left` frames before it, `right` behind it (arXiv 2012.05481)."""
        return cls(left, chunk, right)

    @classmethod
    def dilated(cls, left: int, dilation: int) -> Span:
        """Every `dilation`-th frame, as far as `left` back."""
        return cls(left, 1, 0, dilation)

    def allowed(self, q: Tensor, k: Tensor) -> Tensor:
        """True where query index `q` may see key index `k`; sinks apart, which depend on what is valid."""
        seen = (q - k) % self.dilation == 0
        if self.chunk is not None:
            begin = torch.div(q, self.chunk, rounding_mode="floor") * self.chunk
            seen = seen & (k < begin + self.chunk + self.right)
            if self.left is not None:
                seen = seen & (k >= begin - self.left)
        return seen

    def scaled(self, rate: int) -> Span:
        """The same stretch of time in frames that are `rate` times as short; dilation and sinks count frames."""
        left, chunk = (None if n is None else n * rate for n in (self.left, self.chunk))
        return replace(self, left=left, chunk=chunk, right=self.right * rate)


@dataclass(frozen=True)
class Blocks:
    """A static layout: frames in blocks of `size`; block i of queries sees block j of keys if `table[i][j]`.

    Indices are absolute, so it needs the whole utterance, of at most `size * len(table)` frames.

        Blocks(2, ((1, 0), (1, 1)))    ##..
                                       ##..
                                       ####
                                       ####
    """

    size: int
    table: tuple[tuple[bool, ...], ...]
    sinks: ClassVar[int] = 0
    right: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.size < 1 or any(len(row) != len(self.table) for row in self.table):
            raise ValueError(f"blocks of {self.size} frames: wanted at least 1, and a square table")

    def allowed(self, q: Tensor, k: Tensor) -> Tensor:
        """True where query index `q` may see key index `k`."""
        table = torch.tensor(self.table, dtype=torch.bool, device=q.device).view(len(self.table), -1)
        return table[torch.div(q, self.size, rounding_mode="floor"), torch.div(k, self.size, rounding_mode="floor")]


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make each table once: all layers of a batch use it. The last 64 are remembered, as far as they are small.

    Not while tracing, whose tensors stand for others, and never as an inference tensor, which no gradient may meet.
    """
    remembered: dict[Any, Tensor] = {}

    @wraps(make)
    def table(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*args)
        found = remembered.get(args)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = make(*args)
            if found.nbytes <= SMALL and type(found) is Tensor:
                while len(remembered) >= 64 or sum(x.nbytes for x in list(remembered.values())) > ROOM - SMALL:
                    remembered.pop(next(iter(remembered)), None)
                remembered[args] = found
        return found

    return table


@constant
def visible(pattern: Pattern, queries: range, keys: range, device: torch.device | None = None) -> Tensor:
    """The predicate over two ranges of indices [Q, K], without sinks."""
    q = torch.arange(queries.start, queries.stop, device=device)
    k = torch.arange(keys.start, keys.stop, device=device)
    return pattern.allowed(q[:, None], k[None])


def draw(pattern: Pattern, frames: int) -> str:
    """The pattern over an utterance of so many frames: rows are queries, `#` is a visible key."""
    seen = visible(pattern, range(frames), range(frames))
    seen = seen.clone()
    seen[:, : pattern.sinks] |= torch.ones(frames, frames, dtype=torch.bool).tril()[:, : pattern.sinks]
    return "\n".join("".join("#" if cell else "." for cell in row) for row in seen.tolist())
