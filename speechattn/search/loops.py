"""Loops, found before they are committed."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LONGEST", "loop_end", "loop_start"]

LONGEST = 24  # tokens of a round


def least(period: int) -> int:
    """Tokens that rounds of so many must fill to be a loop."""
    return max((3 if period >= 5 else 4) * period, 8)


def loop_start(tokens: Sequence[int], *, longest: int = LONGEST) -> int | None:
    """Where the second round of a loop begins, or None.

    A loop is a run of 1 to `longest` tokens that is said four times in a row, or three times if it is five or
    longer, and reaches eight tokens in all: people do say "no, no, no".
    """
    n = len(tokens)
    for start in range(n):
        for period in range(1, min(longest, (n - start) // 3) + 1):
            length = least(period)
            if start + length <= n and all(
                tokens[i] == tokens[i + period] for i in range(start, start + length - period)
            ):
                return start + period
    return None


def loop_end(tokens: Sequence[int], *, longest: int = LONGEST) -> int | None:
    """The same of tokens that were no loop before the last of them was said, in less time."""
    n, found = len(tokens), []
    for period in range(1, min(longest, n // 3) + 1):
        start = n - least(period)
        if start >= 0 and tokens[start : n - period] == tokens[start + period :]:
            found.append((start, period))
    return sum(min(found)) if found else None
