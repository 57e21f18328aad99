"""Loops, found before they are committed."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["loop_start"]


def loop_start(tokens: Sequence[int], *, longest: int = 24) -> int | None:
    """Where the second round of a loop begins, or None.

    A loop is a run of 1 to `longest` tokens that is said four times in a row, or three times if it is five or
    longer, and reaches eight tokens in all: people do say "no, no, no".
    """
    n = len(tokens)
    for start in range(n):
        for period in range(1, min(longest, (n - start) // 3) + 1):
            rounds = 3 if period >= 5 else 4
            length = max(rounds * period, 8)
            if start + length <= n and all(
                tokens[i] == tokens[i + period] for i in range(start, start + length - period)
            ):
                return start + period
    return None
