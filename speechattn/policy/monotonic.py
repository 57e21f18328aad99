"""A decoder with monotonic heads decides itself (MMA, arXiv 1909.12406)."""

from __future__ import annotations

from dataclasses import dataclass

from speechattn.decoder.attention import Head
from speechattn.errors import InputError
from speechattn.policy import Source
from speechattn.search import Draft

__all__ = ["Stopped"]


@dataclass(frozen=True)
class Stopped:
    """Commit tokens up to the first for which a monotonic head is waiting: it found no frame to stop at.

    There is nothing to set: how long heads wait was trained (`cross.latency`). InputError for a draft of a decoder
    whose heads never wait.
    """

    heads: tuple[Head, ...] = ()

    def initial(self) -> None:
        """Nothing to remember."""

    def accept(self, draft: Draft, source: Source, state: None) -> tuple[int, None]:
        """Tokens for which every head has stopped."""
        if source.finished:
            return len(draft.tokens), None
        if draft.waiting is None:
            raise InputError("this policy is that of decoders with monotonic heads: others never wait")
        waits = draft.waiting.nonzero()
        return int(waits[0, 0]) if len(waits) else len(draft.tokens), None

    def why(self, draft: Draft, source: Source, state: None, n: int) -> str:
        """A head has not stopped."""
        before = draft.waiting is None or not bool(draft.waiting[: n + 1].any())
        return "" if before else "a monotonic head waits for the frame at which it stops"
