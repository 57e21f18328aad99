"""A resampler for streams, and samples of any kind as mono float32."""

from __future__ import annotations

import numpy as np
import soxr
from numpy.typing import NDArray

from speechattn.errors import InputError

__all__ = ["HIGHEST_RATE", "LOWEST_RATE", "Resampler", "Samples", "to_mono"]

Samples = NDArray[np.float32]

LOWEST_RATE = 4000
HIGHEST_RATE = 768000


class Resampler:
    """Samples at one rate in, at another out (band-limited, libsoxr).

    Law: any split of the input gives exactly the same output samples, bit for bit.
    """

    def __init__(self, rate: int, target: int) -> None:
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise InputError(f"sample rate {rate} Hz: speech needs {LOWEST_RATE} to {HIGHEST_RATE} Hz")
        self.rate, self.target = rate, target
        self.stream = None if rate == target else soxr.ResampleStream(rate, target, 1, dtype="float32")

    def feed(self, samples: Samples, *, last: bool = False) -> Samples:
        """Samples [n] -> those [m] that can be said now; `last` flushes, and nothing may follow."""
        if self.stream is None:
            return samples
        return np.asarray(self.stream.resample_chunk(samples, last=last), np.float32)


LOUDEST = 1e6  # generous to who forgot to scale integers, and small enough for powers in float32


def to_mono(samples: object) -> Samples:
    """Samples [n] or [n, channels], float or integer -> float32 [n], integers scaled to [-1, 1).

    InputError for other shapes and types, and for NaN or infinity.
    """
    x = np.asarray(samples)
    if x.ndim not in (1, 2) or x.shape[1:] == (0,):
        raise InputError(f"samples of shape {x.shape}: wanted [n] or [n, channels]")
    if x.dtype == np.uint8:
        x = (x.astype(np.float32) - 128) / 128
    elif np.issubdtype(x.dtype, np.signedinteger):
        x = x.astype(np.float32) / -float(np.iinfo(x.dtype).min)
    elif not np.issubdtype(x.dtype, np.floating):
        raise InputError(f"samples of type {x.dtype}: wanted floating point, signed integers or uint8")
    finite = np.isfinite(x)
    bad = np.flatnonzero(~(finite.all(1) if x.ndim == 2 else finite))
    if len(bad):
        raise InputError(f"sample {bad[0]} is not a finite number ({len(bad)} such samples in this piece)")
    if x.size and np.abs(x).max() > LOUDEST:
        raise InputError(f"a sample of {np.abs(x).max():g}: sound in floating point lies between -1 and 1")
    return (x.mean(1) if x.ndim == 2 else x).astype(np.float32)
