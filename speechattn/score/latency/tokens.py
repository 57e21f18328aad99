"""Average token delay: how long after the end of a piece of source the word that stands for it ends."""

from __future__ import annotations

from itertools import groupby

from speechattn.score.latency.clocks import Cumulative
from speechattn.score.latency.said import Said

__all__ = ["average_token_delay"]

PIECE_MS = 300.0  # a word of speech, as the metric has it


def average_token_delay(said: Said, *, aware: bool = False) -> float | None:
    """ATD (Kano et al. 2023, arXiv 2211.13173) of text said of speech.

    What was read before each output is cut into pieces of 300 ms, a shorter rest is one too. Word t of chunk c stands
    for piece t - max(0, words before c - pieces before c), at most the last one read. A word has no length; when
    computing counts, each takes what `Cumulative` says of `elapsed`, as in SimulEval.
    """
    if not said.units or (aware and not said.elapsed):
        return None
    computes = Cumulative().computes(said.delays, said.elapsed) if aware else [0.0] * len(said.units)
    ends, read = pieces([delay for delay, _ in groupby(said.delays)])
    chunk, words_before, chunks = -1, 0, list[tuple[int, int]]()  # of every word: its chunk, the words before that
    for i, delay in enumerate(said.delays):
        if not i or delay != said.delays[i - 1]:
            chunk, words_before = chunk + 1, i
        chunks.append((chunk, words_before))
    total = last = 0.0
    for i, (delay, compute, (c, before)) in enumerate(zip(said.delays, computes, chunks, strict=True)):
        last = max(delay, last) + compute
        piece = min(i + 1 - max(0, before - read[c]), read[c + 1])
        total += last - ends[piece]
    return total / len(said.units)


def pieces(delays: list[float]) -> tuple[list[float], list[int]]:
    """End of every piece of source (a 0 before them), and how many there are before each chunk and after the last."""
    ends, read, begin = [0.0], [0], 0.0
    for delay in delays:
        whole, rest = divmod(delay - begin, PIECE_MS)
        for length in [PIECE_MS] * int(whole) + ([rest] if rest else []):
            ends.append(ends[-1] + length)
        read.append(len(ends) - 1)
        begin = delay
    return ends, read
