"""Where in the sound each token of a known text is said: the best CTC path."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from speechattn.errors import InputError

__all__ = ["TokenSpan", "align"]


class TokenSpan(NamedTuple):
    """A token, its first and last-plus-one frame, and the mean log-probability that these give to it."""

    token: int
    first: int
    last: int
    log_prob: float


def align(log_probs: Tensor, tokens: Sequence[int], *, blank: int = 0) -> list[TokenSpan]:
    """The most probable path of log-probabilities [T, V] that says `tokens`, by torchaudio's `forced_align`.

    InputError when the sound is too short for the text (one frame for each token, one more between equal ones), or a
    token is not in the vocabulary.
    """
    frames, vocab = log_probs.shape
    if wrong := [token for token in tokens if not 0 <= token < vocab or token == blank]:
        raise InputError(f"tokens {wrong} cannot be aligned: wanted 0 to {vocab - 1}, and not blank ({blank})")
    least = len(tokens) + sum(a == b for a, b in pairwise(tokens))
    if frames < least:
        raise InputError(f"the sound is too short for its text: {frames} frames, {len(tokens)} tokens need {least}")
    if not len(tokens):
        return []
    from torchaudio.functional import forced_align

    values = log_probs.detach() if log_probs.dtype in (torch.float32, torch.float64) else log_probs.detach().float()
    # a lower bound keeps what is impossible comparable, so that a path is found
    values = values.clamp(min=-1e4)[None].contiguous()
    path, scores = forced_align(values, torch.tensor([list(tokens)], device=values.device), blank=blank)
    return merged(path[0].tolist(), scores[0].tolist(), blank)


def merged(path: list[int], scores: list[float], blank: int) -> list[TokenSpan]:
    """Runs of one token in a path of T frames."""
    spans = []
    at = 0
    while at < len(path):
        end = at
        while end < len(path) and path[end] == path[at]:
            end += 1
        if path[at] != blank:
            spans.append(TokenSpan(path[at], at, end, sum(scores[at:end]) / (end - at)))
        at = end
    return spans
