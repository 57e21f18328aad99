"""A small model of random weights that hears and sees; and videos to show it."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechattn.audio.resample import Samples
from speechattn.audio.vision import Image, pyav
from speechattn.model import Recognizer, from_config
from speechattn.text.pieces import Pieces

__all__ = ["CONFIG", "PIECES", "SIZE", "lip_reader", "movie", "pictures", "voice"]

SIZE, MELS, RATE = 32, 20, 16000
PIECES = Pieces(["<blank>", "▁", *"abcdefghijklmnopqrstuvwxyz"])


def part(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"speechattn.{name}", "init_args": arguments}


SPECTRUM = part("audio.spectrum.LogMel", mels=MELS, low=20.0, floor=1e-6, right=159)
SPAN = part("attention.Span", left=8, chunk=4)
LAYERS = {"depth": 1, "heads": 2, "inner": 12, "kernel": 3, "span": SPAN}
CONFIG = {
    "format": 1,
    "sample_rate": RATE,
    "language": "en",
    "front_end": part(
        "audio.clip.AudioVisual", size=SIZE,
        sound=part("stream.Serial.of", members={
            "spectrum": SPECTRUM, "stack": part("encoder.layers.Stack", frames=4, stride=4),
        }),
    ),
    "encoder": part("encoder.Conformer", dim=8, **LAYERS, subsample=part("stream.Serial.of", members={
        "senses": part(
            "encoder.senses.Senses", heard=4 * MELS, size=SIZE,
            sound=part("encoder.Conformer", dim=8, **LAYERS, subsample=part(
                "encoder.senses.Ears", mels=MELS, dim=8, channels=4,
            )),
            lips=part("encoder.senses.Eyes", features=8, dim=6, net=part(
                "audio.lips.LipNet", channels=[4, 8], blocks=[1, 1], shrink=4,
            )),
        ),
        "fusion": part("encoder.senses.Fusion", inputs=14, dim=8, inner=16),
    })),
    "heads": {"ctc": part("decoder.ctc.CTC", dim=8, vocab=PIECES.size)},
}  # fmt: skip


def lip_reader(size: int = SIZE) -> Recognizer:
    """It says what it likes, of what it hears and sees in pictures of this size."""
    torch.manual_seed(0)
    model = from_config(json.loads(json.dumps(CONFIG).replace(f'"size": {SIZE}', f'"size": {size}')), PIECES)
    with torch.no_grad():
        for parameter in model.heads["ctc"].parameters():
            parameter.normal_(std=3)
    return model.eval().requires_grad_(False)


def voice(seconds: float, seed: int = 0) -> Samples:
    """Noise whose loudness and colour change ten times a second."""
    maker = np.random.default_rng(seed)
    x = maker.standard_normal(round(seconds * RATE))
    level = np.repeat(maker.uniform(0.001, 0.3, round(seconds * 10) + 1), RATE // 10)[: len(x)]
    return (level * np.convolve(x, [1, 0.9], "same")).astype(np.float32)


def pictures(n: int, seed: int = 0, size: int = SIZE) -> Image:
    """Squares of other greys ten times a second."""
    maker = np.random.default_rng(seed)
    few = maker.integers(0, 256, (n // 3 + 1, 4, 4), np.uint8)
    return np.repeat(np.kron(few, np.ones((1, size // 4, size // 4), np.uint8)), 3, 0)[:n]


def movie(
    path: Path, images: Image | None, samples: Samples | None, *, rate: Fraction | int = 25, late_s: float = 0.0,
) -> Path:  # fmt: skip
    """A file with both, as they are (FFV1 and PCM in Matroska); the sound begins `late_s` after the pictures."""
    av = pyav()
    with av.open(str(path), "w", format="matroska") as file:
        if images is not None:
            seen = file.add_stream("ffv1", rate=Fraction(rate))
            seen.height, seen.width, seen.pix_fmt = *images.shape[1:], "gray"
        if samples is not None:
            heard = file.add_stream("pcm_f32le", rate=RATE, layout="mono")
            frame = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
            frame.rate, frame.pts = RATE, round(late_s * RATE)
        for i, image in enumerate(() if images is None else images):
            one = av.VideoFrame.from_ndarray(image, "gray")
            one.pts, one.time_base = i, 1 / Fraction(rate)
            file.mux(seen.encode(one))
        if images is not None:
            file.mux(seen.encode())
        if samples is not None:
            file.mux(heard.encode(frame) + heard.encode(None))
    return path
