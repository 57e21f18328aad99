"""A talking mouth drawn in 88 x 88 grey pixels: shapes of a mouth and the person who makes them -> video frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechattn.data.prepare.mouth import SHAPES, Numbers

__all__ = ["SIZE", "Face", "Image", "draw"]

SIZE = 88  # pixels of an edge
Image = NDArray[np.uint8]
Plane = NDArray[np.floating[Any]]  # [T, 88, 88]
WIGGLES = 3  # sines that make up each slow movement
SHINE, TEETH, TONGUE, DARK = 0.16, 0.86, 0.5, 0.08  # grey, from 0 to 1


@dataclass(frozen=True)
class Face:
    """Who speaks and how they are filmed; lengths in pixels, greys from 0 to 1, all drawn from lots of the clip."""

    skin: float
    lips: float
    wide: float  # half the width of the mouth at rest
    upper: float  # thickness of the lips
    lower: float
    jaw: float  # how far the mouth opens
    vigour: float  # of all movement
    lean: float  # one corner is higher
    centre: tuple[float, float]
    tilt: float  # radians
    light: tuple[float, float]  # brighter to the right and downwards, grey over the whole picture
    flicker: float
    noise: float  # deviation of each pixel
    wander: float  # 1: pixels and about 0.04 radians of head movement
    beard: float

    @classmethod
    def drawn(cls, lots: np.random.Generator) -> Face:
        """A person."""
        skin = lots.uniform(0.35, 0.75)
        return cls(
            skin=skin, lips=skin * lots.uniform(0.6, 0.85), wide=lots.uniform(20, 28), upper=lots.uniform(3.5, 6.5),
            lower=lots.uniform(4.5, 8.5), jaw=lots.uniform(18, 27), vigour=lots.uniform(0.75, 1.1),
            lean=lots.normal(0, 0.6), centre=(44 + lots.normal(0, 1.5), 42 + lots.normal(0, 1.5)),
            tilt=lots.normal(0, 0.06), light=(lots.normal(0, 0.09), lots.normal(0, 0.06)),
            flicker=lots.uniform(0, 0.03), noise=lots.uniform(0.004, 0.02), wander=lots.uniform(0.3, 1.5),
            beard=lots.uniform(0, 0.08),
        )  # fmt: skip


def draw(shapes: Numbers, face: Face, rate: float, lots: np.random.Generator) -> Image:
    """Shapes [T, 7] at `rate` frames a second -> frames [T, 88, 88]; a pure function of its arguments.

    `lots` gives head movement, texture, changes of light and noise.
    """
    times = np.arange(len(shapes)) / rate
    x, y = placed(times, face, lots)
    opening, width, rounding, press, tuck, teeth, tongue = (
        (face.vigour * shapes[:, i])[:, None, None].astype(np.float32) for i in range(len(SHAPES))
    )
    press = press.clip(0, 1)
    gape = face.jaw * opening * (1 - press * press * (3 - 2 * press))
    half = face.wide * (1 + 0.2 * width - 0.3 * rounding)
    inner = half * 0.9
    y = y - face.lean * x / face.wide
    arch = np.sqrt((1 - (x / inner) ** 2).clip(0))  # how open the mouth is here, from 0 at the corners to 1
    brow = np.sqrt((1 - (x / half) ** 2).clip(0))
    top, bottom = -0.35 * gape * arch, 0.65 * gape * arch * (1 - 0.75 * tuck)
    bow = 1 - 0.25 * np.exp(-((x / 4) ** 2))
    upper = face.upper * (1 + 0.35 * rounding - 0.35 * press) * brow * bow
    lower = face.lower * (1 + 0.35 * rounding - 0.3 * press - 0.5 * tuck) * brow
    inside = edge(y - top) * edge(bottom - y) * (np.abs(x) < inner)
    mouth = edge(y - top + upper) * edge(bottom + lower - y) * (np.abs(x) < half)

    grey = skin(x, y, face, gape, lots)
    height = (bottom - y) / np.maximum(lower, 0.5)  # from 0 at the mouth to -1 below the lip
    lips = face.lips + SHINE * np.exp(-((height + 0.45) ** 2) / 0.05) - 0.12 * np.exp(-np.abs(y - bottom) / 1.2)
    grey = grey + mouth * (lips - grey)
    grey = grey + inside * (cavity(x, y, top, bottom, gape, teeth, tongue, inner) - grey)
    bright = 1 + sway(times, lots)[:, None, None] * face.flicker
    noise = lots.standard_normal(grey.shape, np.float32) * np.float32(face.noise)
    found: Image = np.round((grey * bright + noise).clip(0, 1) * 255).astype(np.uint8)
    return found


def placed(times: Numbers, face: Face, lots: np.random.Generator) -> tuple[Plane, Plane]:
    """Coordinates [T, 88, 88] of each pixel around the mouth, x to the right and y downwards, as the head moves."""
    drift = np.stack([sway(times, lots) for _ in range(4)]) * face.wander
    right, down = drift[0] * 1.4 + face.centre[0], drift[1] * 1.2 + face.centre[1]
    turn, grow = face.tilt + 0.04 * drift[2], 1 + 0.03 * drift[3]
    down_of, right_of = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    u = right_of - right[:, None, None].astype(np.float32)
    v = down_of - down[:, None, None].astype(np.float32)
    cos, sin = ((f(turn) / grow)[:, None, None].astype(np.float32) for f in (np.cos, np.sin))
    return u * cos + v * sin, v * cos - u * sin


def sway(times: Numbers, lots: np.random.Generator) -> Numbers:
    """A slow movement [T] around 0 with a deviation of about 1."""
    speed, phase = lots.uniform(0.1, 0.9, WIGGLES), lots.uniform(0, 2 * np.pi, WIGGLES)
    found: Numbers = np.sin(2 * np.pi * speed * times[:, None] + phase).sum(1) * np.sqrt(2 / WIGGLES)
    return found


def edge(inside: Plane) -> Plane:
    """1 inside, 0 outside, over about two pixels."""
    soft: Plane = (inside / 1.6 + 0.5).clip(0, 1)
    return soft


def skin(x: Plane, y: Plane, face: Face, gape: Plane, lots: np.random.Generator) -> Plane:
    """Light, texture, nose, the fold under the lip, and a chin that goes down with the jaw."""
    grey = face.skin + face.light[0] * x / SIZE + face.light[1] * y / SIZE
    for _ in range(6):
        a, b = lots.normal(0, 0.35, 2).astype(np.float32)
        grey = grey + np.float32(0.008) * np.sin(a * x + b * y + np.float32(lots.uniform(0, 6.3)))
    around = x / (face.wide * 1.5)
    shadow = blot(around, (y - face.lower - 4 - 0.65 * gape) / 4)
    chin = blot(x / 26, (y - 34 - 0.8 * gape) / 6)
    nose = blot((np.abs(x) - 6) / 4, (y + 31) / 3)
    stubble = 1 + 0.6 * np.sin(2.1 * x + 1.3 * y) * np.sin(1.7 * y - 0.9 * x)
    hair = np.float32(face.beard) * (y / 24).clip(0, 1) * stubble
    return grey * (1 - 0.16 * shadow - 0.3 * chin - 0.45 * nose) - hair  # type: ignore[no-any-return]


def blot(x: Plane, y: Plane) -> Plane:
    """A soft round spot of size 1."""
    spot: Plane = np.exp(-0.5 * (x * x + y * y))
    return spot


def cavity(
    x: Plane, y: Plane, top: Plane, bottom: Plane,
    gape: Plane, teeth: Plane, tongue: Plane, inner: Plane,
) -> Plane:  # fmt: skip
    """What is seen between the lips: dark, the upper teeth, the tongue."""
    reach = edge(top + 1 + 5 * teeth - y) * (0.25 + 0.75 * teeth.clip(0, 1)) * edge(0.8 * inner - np.abs(x))
    gaps = 1 - 0.12 * (np.abs(np.sin(x * np.float32(0.62))) < 0.15)
    grey = np.float32(DARK) + (np.float32(TEETH) * gaps - np.float32(DARK)) * reach
    tip = bottom - (0.2 + 0.7 * tongue) * gape * 0.8
    seen = edge(y - tip - (x / (0.55 * inner)) ** 2 * 3) * (0.35 + 0.65 * tongue.clip(0, 1))
    return grey + seen * (np.float32(TONGUE) - grey) * (1 - 0.6 * reach)  # type: ignore[no-any-return]
