"""Recordings from files and pipes, block by block: memory does not grow with their length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from speechattn.audio.resample import Samples, to_mono
from speechattn.errors import InputError

__all__ = ["Recording", "open_recording", "read_pcm"]

BLOCK_S = 0.1


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


def open_recording(path: Path) -> Recording:
    """WAV, FLAC, OGG, MP3 and whatever else libsndfile reads; InputError says why a file is none of these."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder, not an audio file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        info = soundfile.info(str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except soundfile.LibsndfileError as error:
        raise InputError(
            f"{path}: not audio that can be read ({error.error_string}); WAV, FLAC, OGG and MP3 are"
        ) from error
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
