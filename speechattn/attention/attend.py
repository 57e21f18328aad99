"""Attention over any pattern, by the first backend that can."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from speechattn.attention.flex import Flex
from speechattn.attention.fused import Fused
from speechattn.attention.pattern import Pattern
from speechattn.attention.position import Position
from speechattn.attention.reference import Reference
from speechattn.attention.triton import Triton
from speechattn.attention.window import Windowed

__all__ = ["BACKENDS", "Backend", "attend", "choose"]


class Backend(Protocol):
    """One way to compute attention; all give the same numbers."""

    name: str

    def supports(self, q: Tensor, pattern: Pattern, position: Position | None) -> str | None:
        """None if it can, else the reason why not."""

    def preferred(self, q: Tensor) -> bool:
        """Is it what "auto" wants for such queries?"""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, valid: Tensor, position: Position | None
    ) -> Tensor:
        """As `attend`, of keys and values that are zero where they are not valid.

        If they are only finite there, so is what a query gets that sees nothing.
        """


BACKENDS: dict[str, Backend] = {b.name: b for b in (Triton(), Windowed(), Fused(), Reference(), Flex())}


def choose(q: Tensor, pattern: Pattern, position: Position | None, backend: str) -> Backend:
    """The named backend, or with "auto" the first that is preferred and supports the call.

    ValueError gives the reason why the named one does not.
    """
    if backend == "auto":
        return next(b for b in BACKENDS.values() if b.preferred(q) and b.supports(q, pattern, position) is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend}: wanted auto or one of {', '.join(BACKENDS)}")
    reason = BACKENDS[backend].supports(q, pattern, position)
    if reason:
        raise ValueError(f"the backend {backend} cannot do this: {reason}")
    return BACKENDS[backend]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, valid: Tensor, position: Position | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """q [B, H, T, D], k and v [B, G, N, D] with G dividing H, valid [B, N] -> [B, H, T, D].

    The keys are [sinks | history | T | right]: first the kept sinks, then what came before the first query, which
    starts a chunk, then the T frames of the queries, then the look-ahead. With `left` frames of context the history
    is exactly that long. What is not valid may be anything, NaN too; a query that sees nothing gets zeros.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if k.shape[2] < pattern.sinks + q.shape[2] + pattern.right or valid.shape[-1] != k.shape[2]:
        raise ValueError(f"{k.shape[2]} keys, {valid.shape[-1]} of them known to be valid or not, for {q.shape[2]} "
                         f"queries, {pattern.sinks} sinks and {pattern.right} frames of look-ahead")  # fmt: skip
    chosen = choose(q, pattern, position, backend)
    if not q.shape[2]:
        return q
    wide = valid[:, None, :, None]
    k, v = k.masked_fill(~wide, 0.0), v.masked_fill(~wide, 0.0)
    return chosen(q, k, v, pattern=pattern, valid=valid, position=position)
