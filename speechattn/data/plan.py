"""Which utterances make up which batch: a pure function of the durations, the seed and the epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from speechattn.errors import InputError

__all__ = ["Plan"]

Indices = NDArray[np.int64]
SPREAD = 1.1  # lengths that differ by less than this factor, squared, may meet in one batch


@dataclass(frozen=True, eq=False)
class Plan:
    """The batches of every epoch. `durations_s` [N]; each batch is dealt to `shares` devices.

    Laws: in every epoch each utterance is in exactly one share; all shares of all batches have an utterance; padded to
    its longest utterance no share exceeds `max_seconds`, nor has it more than `max_utterances`; all epochs have equally
    many batches. The utterances of a batch are of about equal length.

    How: utterances are sorted by their duration times a random factor of up to sqrt(SPREAD) either way. The i-th of
    them is then at most SPREAD times as long as the i-th longest, so what fits is known by place, without drawing lots,
    and the cuts between batches are the same in every epoch. Without a seed: longest first, no lots (validation).
    """

    durations_s: NDArray[np.float64]
    max_seconds: float
    shares: int = 1
    max_utterances: int | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        longest = float(self.durations_s.max(initial=0))
        if longest > self.max_seconds:
            raise InputError(f"an utterance of {longest:.2f} s does not fit into max_seconds={self.max_seconds:g}")
        if len(self.durations_s) < self.shares:
            raise InputError(f"{len(self.durations_s)} utterances cannot be dealt to {self.shares} devices")
        object.__setattr__(self, "places", self._places())

    places: tuple[Indices, ...] = field(init=False)  # of each batch, places in the sorted order, longest first

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.places)

    def _places(self) -> tuple[Indices, ...]:
        """Cut the sorted utterances, longest first: as many as would fit if all were as long as the first may be."""
        sizes = np.sort(self.durations_s)[::-1]
        if self.seed is not None:
            sizes = np.minimum(sizes * SPREAD, sizes[:1])
        most = np.floor(self.max_seconds / np.maximum(sizes, 1e-9) + 1e-9)
        most = np.minimum(most, self.max_utterances or len(sizes)).astype(np.int64) * self.shares
        cuts, at = [0], 0
        while at < len(sizes):
            at = min(at + int(most[at]), len(sizes))
            cuts.append(at)
        batches = [np.arange(a, b) for a, b in pairwise(cuts)]
        return tuple(self._fill(batches))

    def _fill(self, batches: list[Indices]) -> list[Indices]:
        """Bring the last batch to one utterance for each share, with utterances of batches that have more than that.

        Each share has one then, so it fits, however long it is.
        """
        missing = self.shares - len(batches[-1])
        for i in range(len(batches) - 2, -1, -1):
            if missing <= 0:
                break
            spare = min(missing, len(batches[i]) - self.shares)
            if spare > 0:
                batches[-1] = np.concatenate([batches[i][len(batches[i]) - spare :], batches[-1]])
                batches[i] = batches[i][: len(batches[i]) - spare]
                missing -= spare
        if missing > 0:
            raise InputError(
                f"{len(self.durations_s)} utterances cannot be dealt to {self.shares} devices in equally many batches "
                f"of at most {self.max_seconds:g} s: raise max_seconds"
            )
        return batches

    def epoch(self, epoch: int) -> list[Indices]:
        """The batches of an epoch: indices of utterances, longest first; share s of a batch is `batch[s::shares]`."""
        if self.seed is None:
            order = np.argsort(-self.durations_s, kind="stable")
            return [order[places] for places in self.places]
        lots = np.random.default_rng([self.seed, epoch])
        factors = np.exp(lots.uniform(-0.5, 0.5, len(self.durations_s)) * np.log(SPREAD))
        # The second key parts utterances of no length by lot, and ties of any other kind.
        order = np.lexsort((lots.permutation(len(factors)), -self.durations_s * factors))
        return [order[self.places[i]] for i in lots.permutation(len(self.places))]
