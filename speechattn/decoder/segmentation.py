"""CTC segmentation (arXiv 2007.09127): where in a long recording each utterance of its text is said, and how surely.

The best monotone path through a trellis of frames and tokens:

    token  2 |              . . 2 2 2 2 -      stay: blank or the token again; behind the last token
    token  1 |      . 1 1 1 / . .              of an utterance for free, whatever is heard (-)
    start  0 | 0 0 0 /                         before the text: free
              ----------------------------
               frames

A frame costs one operation on a band of tokens around the diagonal, and one bit of memory for each of them. The band
is made twice as wide, and all is done again, while the path comes near its edge: an hour of 25 frames a second and
15,000 tokens needs 45 MB and some seconds in the first band of 4,096 tokens, 170 MB in the widest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechattn.errors import InputError

__all__ = ["Segment", "segment"]

Array = np.ndarray[Any, Any]
LEAST = -1e4  # log-probability of what is impossible, so that paths through it stay comparable


@dataclass(frozen=True)
class Segment:
    """One utterance: first and last-plus-one frame, the frames of its tokens, and how surely it is there.

    `confidence` is the lowest mean log-probability per frame of any 30 frames (arXiv 2007.09127, section 2.3), or of
    all of them where there are fewer. `tokens` are (first, last + 1) frames.
    """

    start: int
    end: int
    confidence: float
    tokens: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Trellis:
    """What is aligned: log-probabilities [T, V], tokens [J] of all utterances, where one ends [J]."""

    log_probs: Array
    tokens: Array
    last: Array
    blank: int
    free_gaps: bool

    def frame(self, t: int, span: slice) -> tuple[Array, Array]:
        """What it is worth to come to some of the tokens in frame t, and to stay in them."""
        x = np.maximum(self.log_probs[t].astype(np.float64), LEAST)
        come = x[self.tokens[span]]
        stay = np.maximum(come, x[self.blank])
        if self.free_gaps:
            stay[self.last[span]] = 0.0
        return come, stay


def segment(
    log_probs: Tensor, utterances: Sequence[Sequence[int]], *, blank: int = 0, free_gaps: bool = True,
    margin: int = 0, window: int = 30, band: int = 4096,
) -> list[Segment]:  # fmt: skip
    """Find the `utterances` (tokens) one behind the other in log-probabilities [T, V] of a recording.

    What comes before the first and behind the last costs nothing; with `free_gaps` nor does what is said between two.
    An utterance reaches from its first token to the end of its last one and up to `margin` frames further, but not
    beyond the middle of the gap. A token ends where blank becomes more probable. `window` is that of the confidence.

    InputError for an utterance without tokens or with one that is not there, and for a recording of fewer frames than
    tokens.
    """
    frames, vocab = log_probs.shape
    flat = [token for utterance in utterances for token in utterance]
    if not all(len(utterance) for utterance in utterances):
        raise InputError("an utterance without tokens has no place in a recording")
    if wrong := sorted({token for token in flat if not 0 <= token < vocab or token == blank}):
        raise InputError(f"tokens {wrong} cannot be aligned: wanted 0 to {vocab - 1}, and not blank ({blank})")
    if len(flat) > frames:
        raise InputError(f"the recording is too short for its text: {frames} frames, {len(flat)} tokens")
    if not flat:
        return []
    ends = np.cumsum([len(utterance) for utterance in utterances])
    last = np.zeros(len(flat), np.bool_)
    last[ends - 1] = True
    values = log_probs.detach().cpu()
    trellis = Trellis(
        (values if values.dtype == torch.float64 else values.float()).numpy(), np.array(flat), last, blank, free_gaps
    )
    first = entered(trellis, band)
    spans, worth = spans_of(trellis, first)
    firsts = np.concatenate([[0], ends[:-1]])
    bounds = [(spans[a][0], spans[b - 1][1]) for a, b in zip(firsts, ends, strict=True)]
    before, behind = [0, *(end for _, end in bounds[:-1])], [*(start for start, _ in bounds[1:]), frames]
    found = []
    for i, (start, end) in enumerate(bounds):
        # half of a gap belongs to each side; the gaps at the ends of the recording have one side
        left = before[i] if i == 0 else (before[i] + start + 1) // 2
        right = behind[i] if i == len(bounds) - 1 else (end + behind[i]) // 2
        found.append(Segment(
            max(start - margin, left), min(end + margin, right), surest(worth[start:end], window),
            tuple(spans[firsts[i] : ends[i]]),
        ))  # fmt: skip
    return found


def surest(worth: Array, window: int) -> float:
    """The lowest mean of any `window` frames of `worth` [T], or of all where there are fewer."""
    if len(worth) <= window:
        return float(worth.mean())
    total = np.concatenate([[0.0], worth.cumsum()])
    return float((total[window:] - total[:-window]).min() / window)


def entered(trellis: Trellis, band: int) -> Array:
    """The frame in which the best path comes to each token [J]."""
    states = len(trellis.tokens) + 1
    while True:
        band = min(band, states)
        low, bits, end = filled(trellis, band)
        path = None if end is None else followed(low, bits, end, states)
        if path is not None:
            frames, at = path
            margin = min(band // 8, 256)
            edge = low[frames[1:]]  # the first one may stand before the recording
            near = (at[1:] - edge < margin) & (edge > 0)
            near |= (edge + band - 1 - at[1:] < margin) & (edge + band < states)
            if band == states or not near.any():
                first: Array = frames[1:][at[1:] > at[:-1]]
                return first
        band *= 2


def filled(trellis: Trellis, band: int) -> tuple[Array, Array, int | None]:
    """Forward: the first state of each frame's band [T], bits [T, band / 8] of who came from the state below, and the
    first frame at which the whole text has its best score; None when no path in the band comes there.

    State 0 is before the text, state j in token j - 1.
    """
    frames, states = len(trellis.log_probs), len(trellis.tokens) + 1
    low = (np.arange(frames) * (states / frames) - band / 2).astype(np.int64).clip(0, states - band)
    low[-1] = states - band
    bits = np.zeros((frames, (band + 7) // 8), np.uint8)
    score = np.full(states, -np.inf)
    score[0] = 0.0
    best, end = -np.inf, None
    for t in range(frames):
        a, b = max(int(low[t]), 1), int(low[t]) + band
        span = slice(a - 1, b - 1)  # of tokens
        come, stay = trellis.frame(t, span)
        stays, comes = score[a:b] + stay, score[span] + come
        came = comes > stays
        score[a:b] = np.where(came, comes, stays)
        if low[t]:
            score[low[t] - 1] = -np.inf  # it is outside from now on
            bits[t] = np.packbits(came)
        else:
            bits[t] = np.packbits(np.concatenate([[False], came]))
        if b == states and score[-1] > best:
            best, end = score[-1], t
    return low, bits, end


def followed(low: Array, bits: Array, end: int, states: int) -> tuple[Array, Array]:
    """Backward from frame `end`: the path's frames in order, from the last one before the text, and its states."""
    frames, at = [end], [states - 1]
    t, state = end, states - 1
    while state > 0:
        place = state - int(low[t])
        state -= int(bits[t, place >> 3] >> (7 - (place & 7))) & 1
        t -= 1
        frames.append(t)
        at.append(state)
    return np.array(frames[::-1]), np.array(at[::-1])


def spans_of(trellis: Trellis, first: Array) -> tuple[list[tuple[int, int]], Array]:
    """First and last-plus-one frame of each token, and what the path's frames are worth [T]."""
    x = trellis.log_probs
    until = np.append(first[1:], len(x))
    spans, worth = [], np.zeros(len(x))
    for token, a, b in zip(trellis.tokens, first, until, strict=True):
        quiet = np.flatnonzero(x[a + 1 : b, token] <= x[a + 1 : b, trellis.blank])
        spans.append((int(a), int(a + 1 + quiet[0] if len(quiet) else b)))
        worth[a:b] = np.maximum(x[a:b, token], x[a:b, trellis.blank])
        worth[a] = x[a, token]
    return spans, np.maximum(worth, LEAST)
