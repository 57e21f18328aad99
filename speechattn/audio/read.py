"""Recordings from files and pipes, block by block: memory does not grow with their length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from speechattn.audio.resample import Samples, to_mono
from speechattn.audio.vision import begins, pyav
from speechattn.errors import InputError

__all__ = ["Contained", "Recording", "open_recording", "read_pcm"]

BLOCK_S = 0.1
READS = "WAV, FLAC, OGG and MP3 are"
LEAST_GAP_S, LONGEST_GAP_S = 0.05, 600.0  # between two frames of sound: shorter ones are inexact times
LACKING_S = 0.5  # of what a container announces, before it counts as cut off


class Forward(soundfile.SoundFile):  # type: ignore[misc]
    """Never seeks: soundfile seeks after every read of a seekable file, and in an MP3 that lands somewhere else."""

    def seekable(self) -> bool:
        """No."""
        return False


@dataclass(frozen=True)
class Recording:
    """Mono blocks of an audio file, its rate in Hz and its announced length in seconds."""

    path: Path
    rate: int
    duration_s: float
    channels: int
    format: str

    def blocks(self) -> Iterator[Samples]:
        """Blocks [n] of 0.1 s; InputError where the file ends before it said it would, after all that is there."""
        n = 0
        try:
            with Forward(self.path) as file:
                while len(block := file.read(round(BLOCK_S * self.rate), dtype="float32", always_2d=True)):
                    n += len(block)
                    yield to_mono(block)
        except soundfile.LibsndfileError as error:
            raise InputError(f"{self.path}: damaged after {n / self.rate:.1f} s ({error.error_string})") from error
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        if n < (self.duration_s - 0.1) * self.rate:
            raise InputError(
                f"{self.path}: cut off: it announces {self.duration_s:.1f} s, and {n / self.rate:.1f} s are there"
            )


@dataclass(frozen=True)
class Contained(Recording):
    """The first sound of a file that libsndfile does not read, by PyAV; `pictures`: it holds a video as well.

    Time 0 is where sound or picture begins, whichever is earlier, and there is silence until the sound begins.
    """

    announced_s: float = 0.0  # of the sound alone; 0 where the file does not say
    pictures: bool = False

    def blocks(self) -> Iterator[Samples]:
        """Blocks [n], as long as the frames of the file; InputError as for other recordings."""
        av, n = pyav(), 0
        try:
            with av.open(str(self.path)) as file:
                stream, began = file.streams.audio[0], min(begins(file), default=Fraction(0))
                floating = av.AudioResampler(format="fltp", layout=stream.layout, rate=self.rate)
                for frame in file.decode(stream):
                    if frame.is_corrupt:
                        raise InputError(f"damaged after {n / self.rate:.1f} s")
                    for gap in (silence(frame, began, n, self.rate), *map(mono, floating.resample(frame))):
                        n += len(gap)
                        yield gap
                for rest in map(mono, floating.resample(None)):
                    n += len(rest)
                    yield rest
        except av.error.FFmpegError as error:
            raise InputError(f"{self.path}: damaged after {n / self.rate:.1f} s ({error.strerror})") from error
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        if n < (self.announced_s - LACKING_S) * self.rate:
            raise InputError(
                f"{self.path}: cut off: it announces {self.announced_s:.1f} s, and {n / self.rate:.1f} s are there"
            )


def mono(frame: Any) -> Samples:
    """Samples [n] of a frame in floating point."""
    return to_mono(frame.to_ndarray().T)


def silence(frame: Any, began: Fraction, n: int, rate: int) -> Samples:
    """What is missing between the `n` samples so far and a frame. InputError where that is too much."""
    missing = 0 if frame.time is None else round((Fraction(frame.pts) * frame.time_base - began) * rate) - n
    if missing > LONGEST_GAP_S * rate:
        raise InputError(f"damaged: no sound for {missing / rate:.1f} s after {n / rate:.1f} s")
    return np.zeros(missing if missing > (LEAST_GAP_S * rate if n else 0) else 0, np.float32)


def open_contained(path: Path, reason: str) -> Contained:
    """Sound of a video, or of what else FFmpeg reads; InputError for others, with the `reason` of libsndfile."""
    said = f"{path}: not audio that can be read ({reason}); {READS}"
    try:
        av = pyav()
    except InputError as error:
        raise InputError(f"{said}; for others, {error}") from error
    try:
        with av.open(str(path)) as file:
            if not file.streams.audio:
                kinds = ", ".join(one.type for one in file.streams)
                raise InputError(f"{path}: no sound in it; it has {kinds or 'nothing'}")
            stream = file.streams.audio[0]
            late = (stream.start_time or 0) * stream.time_base - min(begins(file), default=Fraction(0))
            own = None if stream.duration is None else stream.duration * stream.time_base + late
            whole = Fraction(file.duration or 0, 1_000_000)
            pictures = any(not one.disposition & av.stream.Disposition.attached_pic for one in file.streams.video)
            return Contained(
                path, stream.rate, float(whole if own is None else own), stream.channels,
                f"{stream.codec.name} in {file.format.name}",
                announced_s=float(whole) if own is None and len(file.streams) == 1 else float(own or 0),
                pictures=pictures,
            )  # fmt: skip
    except av.error.FFmpegError as error:
        raise InputError(said) from error


def open_recording(path: Path) -> Recording:
    """WAV, FLAC, OGG, MP3 and whatever else libsndfile reads, and with PyAV what FFmpeg reads, videos as well.

    InputError says why a file is none of these.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder, not an audio file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        info = soundfile.info(str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except soundfile.LibsndfileError as error:
        return open_contained(path, error.error_string)
    if info.frames == 0:
        raise InputError(f"{path}: holds no samples")
    return Recording(path, info.samplerate, info.frames / info.samplerate, info.channels, info.subtype_info)


def read_pcm(file: BinaryIO, rate: int, channels: int = 1) -> Iterator[Samples]:
    """Blocks of raw s16le samples as they come through a pipe, 0.1 s at most each."""
    read = getattr(file, "read1", file.read)
    width, rest = 2 * channels, b""
    while data := read(width * round(BLOCK_S * rate)):
        data = rest + data
        whole = len(data) // width * width
        rest = data[whole:]
        if whole:
            yield to_mono(np.frombuffer(data[:whole], "<i2").reshape(-1, channels))
    if rest:
        raise InputError(f"standard input ended inside a sample: {len(rest)} bytes are left of {width}")
