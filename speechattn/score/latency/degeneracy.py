"""Is the latency that of a policy, or of one that waits for the end?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from speechattn.score.latency.lagging import yaal
from speechattn.score.latency.said import Said

__all__ = ["Degeneracy", "degeneracy"]

MOST = 20.0  # percent


@dataclass(frozen=True)
class Degeneracy:
    """Percent of the words said before the source ended (`simultaneous`), and what the lag lets expect (`expected`).

    A policy that lags 2 s behind utterances of 5 s says about 60 percent before the end. One that is quick with a few
    words and keeps the rest for the end does not: its average lag says little.
    """

    simultaneous: float
    expected: float

    @property
    def gap(self) -> float:
        """Expected minus simultaneous."""
        return self.expected - self.simultaneous

    @property
    def likely(self) -> bool:
        """The two are more than 20 points apart."""
        return abs(self.gap) > MOST


def degeneracy(utterances: Sequence[Said]) -> Degeneracy:
    """SWF and EFSW (Polak et al. 2025, arXiv 2509.17349) of whole utterances, computing not counted; NaN without words.

    SWF = words with d < X over all words; EFSW = sum of max(0, X - YAAL) over the sum of X, where YAAL is defined.
    """
    words = sum(len(said.units) for said in utterances)
    early = sum(time < said.source_length for said in utterances for time in said.delays)
    lags = [(said.source_length, lag) for said in utterances if (lag := yaal(said)) is not None]
    heard = math.fsum(length for length, _ in lags)
    left = math.fsum(max(0.0, length - lag) for length, lag in lags)
    return Degeneracy(100 * early / words if words else math.nan, 100 * left / heard if heard else math.nan)
