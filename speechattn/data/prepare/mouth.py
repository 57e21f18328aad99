"""How a mouth moves: phones -> seven numbers for each video frame, by overlapping dominance (Cohen & Massaro 1993).

Not anatomy: it has what tells visemes apart (lips that close, spread, round and push forward, a lip under the teeth,
teeth and tongue that show), so that models can learn to read it, and nothing that a real face would add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speechattn.data.prepare.phones import PHONES, Phone

__all__ = ["SHAPES", "VISEMES", "Viseme", "movement"]

Numbers = NDArray[np.float64]

SHAPES = ("opening", "width", "rounding", "press", "tuck", "teeth", "tongue")
FADE_S = 0.035  # in this time before and after a phone, its dominance falls to 1/e
REST_S = 0.15  # what lies before and after a sound


@dataclass(frozen=True)
class Viseme:
    """What a mouth aims at, each from 0 to 1 (width from -1, narrow, to 1, spread), and how much this viseme insists.

    `press` closes the lips, `tuck` brings the lower lip to the upper teeth.
    """

    phones: tuple[str, ...]
    opening: float
    width: float = 0.0
    rounding: float = 0.0
    press: float = 0.0
    tuck: float = 0.0
    teeth: float = 0.0
    tongue: float = 0.0
    dominance: float = 1.0


VISEMES = (
    Viseme(("pau",), 0.02, press=0.3, dominance=0.7),
    Viseme(("b", "m", "p"), 0.0, press=1.0, dominance=9),
    Viseme(("f", "v"), 0.12, tuck=1.0, teeth=0.9, dominance=7),
    Viseme(("dh", "th"), 0.22, teeth=0.6, tongue=1.0, dominance=4),
    Viseme(("d", "n", "t"), 0.18, 0.2, teeth=0.6, tongue=0.5, dominance=1.2),
    Viseme(("l",), 0.3, 0.15, teeth=0.5, tongue=0.8, dominance=1.5),
    Viseme(("s", "z"), 0.12, 0.45, teeth=1.0, dominance=2.5),
    Viseme(("ch", "jh", "sh", "zh"), 0.2, -0.35, 0.7, teeth=0.8, dominance=4),
    Viseme(("r",), 0.2, -0.45, 0.55, teeth=0.2, dominance=2.5),
    Viseme(("w",), 0.08, -0.9, 1.0, dominance=5),
    Viseme(("g", "hh", "k", "ng", "y"), 0.25, 0.1, teeth=0.2, tongue=0.1, dominance=0.35),
    Viseme(("aa",), 1.0, 0.05, dominance=2),
    Viseme(("ae",), 0.75, 0.5, teeth=0.4, dominance=2),
    Viseme(("eh",), 0.55, 0.45, teeth=0.4, dominance=1.6),
    Viseme(("ah",), 0.5, dominance=1.4),
    Viseme(("ax",), 0.32, dominance=0.7),
    Viseme(("ih",), 0.3, 0.5, teeth=0.5, dominance=1.2),
    Viseme(("iy",), 0.22, 0.95, teeth=0.7, dominance=2),
    Viseme(("ao",), 0.7, -0.45, 0.5, dominance=2),
    Viseme(("er",), 0.3, -0.3, 0.4, dominance=1.6),
    Viseme(("uh",), 0.3, -0.5, 0.6, dominance=1.6),
    Viseme(("uw",), 0.14, -0.85, 0.95, dominance=2.5),
)
OF = {phone: viseme for viseme in VISEMES for phone in viseme.phones}
assert sorted(OF) == sorted(PHONES)


def movement(phones: Sequence[Phone], times_s: Numbers) -> Numbers:
    """The shape of the mouth [T, 7] (in the order of `SHAPES`) at each of `times_s` [T], in seconds of the sound.

    A mean of what all phones aim at, each with the weight of its dominance, which falls exponentially before its start
    and after its end; so a shape begins before its sound and lasts after it. Before and after all there is rest.
    """
    end = phones[-1].end_s
    marks = [Phone("pau", -REST_S, 0.0), *phones, Phone("pau", end, end + REST_S)]
    starts, ends = (np.array([getattr(mark, name) for mark in marks]) for name in ("start_s", "end_s"))
    aims = np.array([[getattr(OF[mark.name], shape) for shape in SHAPES] for mark in marks])
    strength = np.array([OF[mark.name].dominance for mark in marks])
    away = np.maximum(starts - times_s[:, None], times_s[:, None] - ends).clip(0, REST_S * 5)
    weights = strength * np.exp(-away / FADE_S)
    found: Numbers = (weights / weights.sum(1, keepdims=True)) @ aims
    return found
