"""What the paths of a CTC search have said: followed back, and written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.search.beam import Prefixes

__all__ = ["Spoken", "extended", "traced", "written"]

MIX = -7046029254386353131, -4658895280553007687  # odd numbers of 64 bits


class Spoken(NamedTuple):
    """What N paths did in T frames [B, N, T]: frames of a token, those that begin one, which, its log-probability."""

    label: Tensor
    first: Tensor
    token: Tensor
    log_prob: Tensor


def traced(steps: Sequence[tuple[Tensor, ...]], live: Tensor) -> tuple[Tensor, Spoken]:
    """Follow all paths back: the paths [B, N] that they began as, and what they said since then.

    A step is the path [B, N] that each goes on with, and [B, N / 2] where a token begins, which, its log-probability.
    """
    at = torch.arange(steps[0][0].shape[1], device=live.device).expand(len(live), -1)
    found = []
    for t in reversed(range(len(steps))):
        source, first, token, log_prob = steps[t]
        which = at // 2
        label = (at % 2 == 0) & live[:, t, None]
        found.append((label, label & first.gather(1, which), token.gather(1, which), log_prob.gather(1, which)))
        at = torch.where(live[:, t, None], source.gather(1, at), at)
    return at, Spoken(*(torch.stack(parts[::-1], 2) for parts in zip(*found, strict=True)))


def written(said: Prefixes, new: Spoken, frames: Tensor) -> Prefixes:
    """What N paths have said, and behind it what is new in `frames` [B, T].

    A token that goes on is prolonged; where it is committed it is not there any more.
    """
    old, spans = said.length[..., None], frames[:, None].expand(new.label.shape)
    index = old + new.first.cumsum(2) - 1
    length = said.length + new.first.sum(2)
    cap = said.tokens.shape[2]
    need = int(length.max()) if length.numel() else 0
    if need > cap:
        cap = need + max(16, cap // 2)
    room = cap + 1 - said.tokens.shape[2]  # the last place is for what is not kept
    anew, goes = torch.where(new.first, index, cap), torch.where(new.label & (index >= 0), index, cap)
    tokens, starts, ends, log_probs = (
        F.pad(x, [0, room]) for x in (said.tokens, said.starts, said.ends, said.log_probs)
    )
    at = torch.arange(cap + 1, device=frames.device)
    log_probs = torch.where(at < old, log_probs, -torch.inf)
    log_probs = log_probs.scatter_reduce(2, goes, new.log_prob.to(log_probs.dtype), "amax")
    kept = (at < length[..., None])[..., :cap]

    def done(x: Tensor) -> Tensor:
        return torch.where(kept, x[..., :cap], 0)

    return Prefixes(
        done(tokens.scatter(2, anew, new.token)), done(starts.scatter(2, anew, spans)),
        done(ends.scatter_reduce(2, goes, spans + 1, "amax")), done(log_probs), length,
    )  # fmt: skip


def extended(key: Tensor, token: Tensor) -> Tensor:
    """The key of a prefix [...] and one token more: 64 bits that mix all that was said."""
    key = (key ^ ((token + 1) * MIX[0])) * MIX[1]
    return key ^ ((key >> 32) & 0xFFFFFFFF)
