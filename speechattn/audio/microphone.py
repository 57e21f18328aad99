"""Sound from a microphone."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from types import ModuleType

import numpy as np

from speechattn.audio.resample import Samples, to_mono
from speechattn.errors import InputError

__all__ = ["backend", "listen"]

BLOCK_S = 0.1


def backend() -> ModuleType:
    """The sounddevice module; InputError says which part is not installed."""
    try:
        import sounddevice
    except ImportError as error:
        raise InputError("the microphone needs sounddevice: pip install 'speechattn[live]'") from error
    except OSError as error:
        raise InputError("the microphone needs the PortAudio library: apt-get install libportaudio2") from error
    module: ModuleType = sounddevice
    return module


def listen(rate: int, device: str | int | None = None) -> Iterator[Samples]:
    """Blocks of 0.1 s at `rate` Hz, until the caller stops; InputError when the device cannot be opened.

    A block that was lost because nobody took it in time is an error too: words would be missing.
    """
    sound = backend()
    blocks: queue.Queue[Samples] = queue.Queue(maxsize=600)  # a minute

    def take(data: Samples, frames: int, time: object, status: object) -> None:
        blocks.put_nowait(np.array(data))

    try:
        stream = sound.InputStream(
            samplerate=rate, channels=1, dtype="float32", blocksize=round(BLOCK_S * rate), device=device, callback=take
        )
    except (sound.PortAudioError, ValueError) as error:
        raise InputError(f"no microphone can be opened: {error}; `speechattn doctor` lists what there is") from error
    with stream:
        while stream.active or not blocks.empty():
            try:
                yield to_mono(blocks.get(timeout=0.5))
            except queue.Empty:
                continue
    raise InputError("the microphone stopped: computing is slower than speech, or the device is gone")
