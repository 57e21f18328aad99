"""Several short utterances as a long one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from speechattn.audio.resample import Samples
from speechattn.data.cuts import Utterance

__all__ = ["Join"]

Heard = tuple[Samples, Utterance]


@dataclass(frozen=True)
class Join:
    """Joins the utterances of a batch, in random order and with pauses, into ones of up to `most_s`; with chance `p`.

    A model that has only heard short utterances fails on long ones. Pauses are silent and uniform in `shortest_gap_s`
    to `longest_gap_s`; behind the last part there are up to `end_s` of silence. The text is that of the parts with
    spaces between, the id theirs with plus signs between.

    Law: a pure function of the utterances and the generator, after which each of them is there exactly once, and the
    batch, padded, has no more samples than `limit`. So fewer are joined where the limit asks for it, down to none.
    """

    most_s: float = 15.0
    p: float = 0.5
    shortest_gap_s: float = 0.0
    longest_gap_s: float = 0.3
    end_s: float = 0.0

    def __call__(
        self, heard: Sequence[Heard], rate: int, *, limit: int, generator: np.random.Generator
    ) -> list[Heard]:  # fmt: skip
        """Samples [N] and what is said -> fewer and longer ones."""
        chance, order = generator.random(), generator.permutation(len(heard))
        gaps = np.round(generator.uniform(self.shortest_gap_s, self.longest_gap_s, len(heard)) * rate).astype(int)
        last = np.round(generator.uniform(0, self.end_s, len(heard)) * rate).astype(int) if self.end_s else 0 * gaps
        if chance >= self.p:
            return list(heard)
        sizes = np.array([len(x) for x, _ in heard]) + gaps
        for rows in range(1, len(heard)):
            groups = np.array_split(order, rows)
            spaces = [np.append(gaps[group[:-1]], last[group[-1]]) for group in groups]
            longest = max(int(sizes[group].sum() - gaps[group[-1]] + last[group[-1]]) for group in groups)
            if longest <= self.most_s * rate and longest * rows <= limit:
                pairs = zip(groups, spaces, strict=True)
                return [joined([heard[i] for i in group], gap, rate) for group, gap in pairs]
        return list(heard)


def joined(parts: Sequence[Heard], gaps: np.ndarray, rate: int) -> Heard:
    """One utterance of several; each is followed by a gap of so many samples."""
    pieces: list[Samples] = []
    for (x, _), gap in zip(parts, gaps, strict=True):
        pieces += [x, np.zeros(gap, np.float32)]
    x, said = np.concatenate(pieces), [utterance for _, utterance in parts]
    translations = [utterance.translation for utterance in said if utterance.translation is not None]
    whole = replace(
        said[0], id="+".join(utterance.id for utterance in said), duration_s=len(x) / rate, cut=None,
        text=" ".join(utterance.text for utterance in said if utterance.text),
        translation=" ".join(translations) if len(translations) == len(said) else None,
    )  # fmt: skip
    return x, whole
