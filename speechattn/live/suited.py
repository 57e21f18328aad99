"""Which policy a search can have."""

from __future__ import annotations

from dataclasses import replace

from speechattn.errors import InputError
from speechattn.policy import Policy
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.monotonic import Stopped
from speechattn.search import Search
from speechattn.search.monotonic import MonotonicBeam

__all__ = ["THRESHOLD", "suited"]

# Frames of 20 ms. On 100 clips of the dev part of FOTAQ (chunks of 640 ms, `silence_s` 0.8) 8, 12, 16, 20 and 24 gave
# 16.5, 15.3, 14.1, 14.0 and 13.5 % of wrong words, and a mean lag of 0.54, 0.56, 0.59, 0.63 and 0.68 s.
THRESHOLD = 16


def suited(policy: Policy | None, search: Search) -> Policy | None:
    """The policy, or AlignAtt where nobody gives one to a search that tells where it looks; InputError."""
    if policy is None and search.reorders:
        return replace(AlignAtt.fbk(0, 1), heads=search.heads)
    if policy is None:
        return AlignAtt.whisper(search.heads, THRESHOLD) if search.heads else None
    if missing := [head for head in policy.heads if head not in search.heads]:
        name, gives = type(policy).__name__, list(search.heads)
        if not gives:
            raise InputError(f"{name} looks at attention, which the search of this model does not give")
        raise InputError(
            f"{name} looks at attention of heads {missing}, which {type(search).__name__} gives only heads {gives}"
        )
    if not search.prompt:
        raise InputError(f"{type(search).__name__} lags behind the sound: it takes no policy")
    if isinstance(policy, Stopped) and not isinstance(search, MonotonicBeam):
        raise InputError(f"{type(search).__name__} has no monotonic heads, which could stop")
    return policy
