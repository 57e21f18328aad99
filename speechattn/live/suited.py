"""Which policy a search can have."""

from __future__ import annotations

from dataclasses import replace

from speechattn.errors import InputError
from speechattn.policy import Policy
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.monotonic import Stopped
from speechattn.search import Search
from speechattn.search.monotonic import MonotonicBeam

__all__ = ["THRESHOLD", "TRANSLATING", "suited"]

# Frames of 20 ms. On 100 clips of the dev part of FOTAQ (chunks of 640 ms, `silence_s` 0.8) 8, 12, 16, 20 and 24 gave
# 16.5, 15.3, 14.1, 14.0 and 13.5 % of wrong words, and a mean lag of 0.54, 0.56, 0.59, 0.63 and 0.68 s.
THRESHOLD = 16
# The same of translators. On 16 streams of the dev part (English to Portuguese, chunks of 640 ms) 4, 16, 24, 40 and 60
# gave 37.6, 39.9, 41.8, 41.4 and 41.4 chrF at a StreamLAAL of 0.38, 0.79, 0.99, 1.29 and 1.74 s.
TRANSLATING = 24


def suited(policy: Policy | None, search: Search) -> Policy | None:
    """The policy, or AlignAtt where nobody gives one to a search that tells where it looks; InputError."""
    if policy is None and search.reorders:
        return replace(AlignAtt.fbk(0, 1, TRANSLATING), heads=search.heads)
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
