"""Changes to the sound of an utterance, in training: each a pure function of the samples and of lots of its own."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
import soxr

from speechattn.audio.resample import Samples, to_mono
from speechattn.errors import InputError

__all__ = [
    "Augmentation",
    "ColouredNoise",
    "Level",
    "Noise",
    "Reverberation",
    "Speed",
    "Telephone",
    "augmented",
    "lots",
]

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")
TELEPHONE_RATE, LAW = 8000, 255.0  # Hz; mu of ITU-T G.711
DECAY = 3 * np.log(10)  # of the amplitude in the time in which the power falls by 60 dB


class Augmentation(Protocol):
    """Changes samples [N].

    Law: a pure function of the samples and the generator. Samples become at most `stretch` times as many, and where
    their number changes all is slower or faster alike: pictures that go with them are taken so.
    """

    stretch: float

    def __call__(self, samples: Samples, rate: int, generator: np.random.Generator) -> Samples:
        """The changed samples [N']. InputError when it needs something that cannot be read."""
        ...


def lots(seed: int, epoch: int, name: str) -> np.random.Generator:
    """The random numbers of one utterance in one epoch, the same in every process."""
    return np.random.default_rng([seed, epoch, zlib.crc32(name.encode())])


def augmented(x: Samples, rate: int, augment: Sequence[Augmentation], *, key: tuple[int, int, str]) -> Samples:
    """Samples [N] after each augmentation in turn, by lots of `key` (seed, epoch, id)."""
    generator = lots(*key)
    for change in augment:
        x = np.ascontiguousarray(change(x, rate, generator), np.float32)
    return x


class Speed:
    """Faster or slower by one of `factors`, all alike likely; pitch changes too (Ko et al., Interspeech 2015)."""

    def __init__(self, *, factors: Sequence[float] = (0.9, 1.0, 1.1), p: float = 1.0) -> None:
        if not factors or min(factors) <= 0:
            raise ValueError(f"speed factors {factors}: wanted positive numbers")
        self.factors, self.p = tuple(factors), p
        self.stretch = max(1.0, 1 / min(factors))

    def __call__(self, samples: Samples, rate: int, generator: np.random.Generator) -> Samples:
        """Samples [N] -> [floor(N / factor)]."""
        chance, factor = generator.random(), self.factors[generator.integers(len(self.factors))]
        if chance >= self.p or factor == 1:
            return samples
        return np.asarray(soxr.resample(samples, factor * rate, rate)[: max(1, int(len(samples) / factor))], np.float32)


class Level:
    """Louder or softer by a uniform number of decibels, but not so loud that a sample leaves [-1, 1]."""

    stretch = 1.0

    def __init__(self, *, lowest_db: float = -15.0, highest_db: float = 10.0, p: float = 1.0) -> None:
        self.lowest_db, self.highest_db, self.p = lowest_db, highest_db, p

    def __call__(self, samples: Samples, rate: int, generator: np.random.Generator) -> Samples:
        """Samples [N] times a factor."""
        chance, level = generator.random(), generator.uniform(self.lowest_db, self.highest_db)
        if chance >= self.p:
            return samples
        peak = float(np.abs(samples).max(initial=1e-9))
        return samples * np.float32(min(10 ** (level / 20), max(1.0, 1.0 / peak)))


class ColouredNoise:
    """Synthetic stationary noise whose power falls with frequency as 1/f^a: a uniform in 0 (white) to 2 (brown).

    The ratio of speech to noise is uniform in decibels.
    """

    stretch = 1.0

    def __init__(self, *, lowest_db: float = 10.0, highest_db: float = 40.0, p: float = 0.5) -> None:
        self.lowest_db, self.highest_db, self.p = lowest_db, highest_db, p

    def __call__(self, samples: Samples, rate: int, generator: np.random.Generator) -> Samples:
        """Samples [N] and noise."""
        chance, ratio = generator.random(), generator.uniform(self.lowest_db, self.highest_db)
        if chance >= self.p:
            return samples
        spectrum = np.fft.rfft(generator.standard_normal(quick_size(len(samples)), np.float32))
        spectrum *= np.arange(len(spectrum)).clip(1) ** (-generator.uniform(0, 2) / 2)
        spectrum[0] = 0
        return mixed(samples, np.fft.irfft(spectrum)[: len(samples)], ratio)


class Noise:
    """A random piece of a random recording of `source`, a folder of sound files or a manifest of lhotse.

    The ratio of speech to noise is uniform in decibels; a recording that is too short is repeated. With several
    `talkers` it is babble: the sum of as many pieces, all alike loud.
    """

    stretch = 1.0

    def __init__(
        self, source: str | Path, *, lowest_db: float = 5.0, highest_db: float = 25.0, p: float = 0.5, talkers: int = 1
    ) -> None:  # fmt: skip
        if talkers < 1:
            raise ValueError(f"talkers {talkers}: wanted at least one")
        self.lowest_db, self.highest_db, self.p, self.talkers = lowest_db, highest_db, p, talkers
        self.paths = sound_files(Path(source))

    def __call__(self, samples: Samples, rate: int, generator: np.random.Generator) -> Samples:
        """Samples [N] and noise."""
        chance, ratio = generator.random(), generator.uniform(self.lowest_db, self.highest_db)
        drawn = [(self.paths[generator.integers(len(self.paths))], generator.random()) for _ in range(self.talkers)]
        if chance >= self.p:
            return samples
        pieces = [piece(path, len(samples), rate, place) for path, place in drawn]
        return mixed(samples, sum((x / max(power(x), 1e-20) ** 0.5 for x in pieces), np.zeros_like(samples)), ratio)


class Reverberation:
    """A synthetic room: the sound itself, and an exponentially decaying tail of noise (Polack's model).

    The time in which the tail falls by 60 dB is uniform in seconds, the ratio of the direct sound to the tail in
    decibels. Length and power stay; what rings on after the end is cut.
    """

    stretch = 1.0

    def __init__(
        self, *, shortest_s: float = 0.1, longest_s: float = 0.8, lowest_db: float = 0.0, highest_db: float = 15.0,
        p: float = 0.3,
    ) -> None:  # fmt: skip
        self.shortest_s, self.longest_s = shortest_s, longest_s
        self.lowest_db, self.highest_db, self.p = lowest_db, highest_db, p

    def __call__(self, samples: Samples, rate: int, generator: np.random.Generator) -> Samples:
        """Samples [N] in a room."""
        chance, seconds = generator.random(), generator.uniform(self.shortest_s, self.longest_s)
        ratio = generator.uniform(self.lowest_db, self.highest_db)
        if chance >= self.p:
            return samples
        n = max(2, round(seconds * rate))
        tail = generator.standard_normal(n) * np.exp(-DECAY / n * np.arange(n))
        room = tail * 10 ** (-ratio / 20) / np.sqrt(np.square(tail).sum())
        room[0] = 1.0
        size = quick_size(len(samples) + n)
        wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(room, size))[: len(samples)]
        return np.asarray(wet * np.sqrt(power(samples) / max(power(wet), 1e-20)), np.float32)


class Telephone:
    """As a telephone passes it on: 300 to 3400 Hz at a rate of 8 kHz, in 8 bits of the mu-law (the formula of G.711).

    The edges of the band fall to zero within `edge` of their frequency. Length stays.
    """

    stretch = 1.0

    def __init__(self, *, low_hz: float = 300.0, high_hz: float = 3400.0, edge: float = 0.15, p: float = 0.1) -> None:
        if not 0 < low_hz < high_hz < TELEPHONE_RATE / 2:
            raise ValueError(f"a band of {low_hz:g} to {high_hz:g} Hz: wanted 0 < low < high < {TELEPHONE_RATE // 2}")
        self.low_hz, self.high_hz, self.edge, self.p = low_hz, high_hz, edge, p

    def __call__(self, samples: Samples, rate: int, generator: np.random.Generator) -> Samples:
        """Samples [N] over a line."""
        if generator.random() >= self.p:
            return samples
        x = np.asarray(soxr.resample(samples, rate, TELEPHONE_RATE), np.float64)
        size = quick_size(len(x) + TELEPHONE_RATE // 10)
        frequency = np.fft.rfftfreq(size, 1 / TELEPHONE_RATE)
        rise = (frequency / self.low_hz - 1 + self.edge) / self.edge
        fall = (1 + self.edge - frequency / self.high_hz) / self.edge
        band = np.minimum(rise, fall).clip(0, 1)
        line = mu_law(np.fft.irfft(np.fft.rfft(x, size) * band, size)[: len(x)].clip(-1, 1))
        back = np.asarray(soxr.resample(line, TELEPHONE_RATE, rate), np.float32)[: len(samples)]
        return np.pad(back, [0, len(samples) - len(back)])


def mu_law(x: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as they come back from 8 bits."""
    code = np.round(127 * np.sign(x) * np.log1p(LAW * np.abs(x)) / np.log1p(LAW)) / 127
    back: np.ndarray = np.sign(code) * np.expm1(np.abs(code) * np.log1p(LAW)) / LAW
    return back


def power(x: np.ndarray) -> float:
    """Mean square of samples [N]."""
    return float(np.square(x, dtype=np.float64).mean())


def mixed(samples: Samples, noise: np.ndarray, ratio_db: float) -> Samples:
    """Samples [N] and noise [N], `ratio_db` below them; silent noise changes nothing."""
    factor = np.sqrt(power(samples) / max(power(noise), 1e-20)) * 10 ** (-ratio_db / 20)
    return (samples + factor * noise if power(noise) > 1e-20 else samples).astype(np.float32)


def quick_size(n: int) -> int:
    """The next power of two: Fourier transforms of other sizes can be slow."""
    return 1 << max(1, n - 1).bit_length()


def sound_files(source: Path) -> list[Path]:
    """The recordings below a folder or in a manifest; InputError when there are none."""
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    elif source.is_file():
        from lhotse.serialization import open_best

        with open_best(source, "r") as file:
            rows = [json.loads(line) for line in file]
        recordings = [row.get("recording", row) for row in rows]
        paths = [source.parent / part["source"] for row in recordings for part in row.get("sources", ())]
    else:
        raise InputError(f"{source}: no such folder or manifest of noises")
    if not paths:
        raise InputError(f"{source}: no recordings of noise in it")
    return paths


def piece(path: Path, n: int, rate: int, place: float) -> Samples:
    """`n` samples of a recording at `rate`, from `place` (0 to 1) on; repeated where it is too short."""
    try:
        with soundfile.SoundFile(path) as file:
            wanted = -(-n * file.samplerate // rate) + 1
            file.seek(int(place * max(0, file.frames - wanted)))
            x, found = to_mono(file.read(wanted, dtype="float32", always_2d=True)), file.samplerate
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError(f"the noise {path} cannot be read ({error})") from error
    if not len(x):
        raise InputError(f"the noise {path} holds no samples")
    if found != rate:
        x = np.asarray(soxr.resample(x, found, rate), np.float32)
    return np.resize(x, n)
