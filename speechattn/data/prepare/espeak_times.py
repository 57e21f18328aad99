"""What espeak-ng says and when, through its library: a program of its own, of Python's own modules alone.

    python espeak_times.py VOICE WORDS_A_MINUTE OUTPUT.wav < TEXT

writes the sound and prints JSON: `[[phoneme, start_s], ...]` in IPA, "" for a pause. The program `espeak-ng` does not
tell times. Each text has a process of its own, because what the library synthesises depends on what it said before.
"""

from __future__ import annotations

import ctypes
import json
import sys
import wave
from typing import Any, ClassVar

__all__ = ["main"]

LIBRARIES = ("libespeak-ng.so.1", "libespeak-ng.so", "libespeak-ng.dylib", "libespeak-ng.1.dylib", "libespeak-ng.dll")
SYNCHRONOUS, PHONEMES, IPA, STAY = 2, 1, 2, 0x8000  # of espeak-ng/speak_lib.h
UTF8, RATE, END, PHONEME = 1, 1, 0, 7


class Event(ctypes.Structure):
    """`espeak_EVENT`; the last member is a union, of which a phoneme's name fills 8 bytes."""

    _fields_: ClassVar = [
        ("type", ctypes.c_int), ("unique", ctypes.c_uint), ("text", ctypes.c_int), ("length", ctypes.c_int),
        ("audio_ms", ctypes.c_int), ("sample", ctypes.c_int), ("user", ctypes.c_void_p), ("name", ctypes.c_char * 8),
    ]  # fmt: skip


class Wanted(ctypes.Structure):
    """`espeak_VOICE`, of which only the language is asked for."""

    _fields_: ClassVar = [
        ("name", ctypes.c_char_p), ("languages", ctypes.c_char_p), ("identifier", ctypes.c_char_p),
        ("numbers", ctypes.c_ubyte * 4), ("score", ctypes.c_int), ("spare", ctypes.c_void_p),
    ]  # fmt: skip


def library() -> Any:
    """The shared library; OSError where none is installed."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError("the library of espeak-ng is not installed (on Debian and Ubuntu: apt install libespeak-ng1)")


def say(voice: str, words: int, text: str) -> tuple[bytes, int, list[tuple[str, float]]]:
    """Samples in 16 bits, their rate in Hz, and each phoneme with its start in seconds."""
    espeak = library()
    rate = espeak.espeak_Initialize(SYNCHRONOUS, 0, None, PHONEMES | IPA | STAY)
    if rate <= 0:
        raise OSError("espeak-ng finds no data")
    sound = bytearray()
    said: list[tuple[str, float]] = []

    def heard(samples: int | None, count: int, events: Any) -> int:
        if samples and count:
            sound.extend(ctypes.string_at(samples, 2 * count))
        at = 0
        while events[at].type != END:
            if events[at].type == PHONEME:
                said.append((events[at].name.decode("utf-8", "ignore"), events[at].sample / rate))
            at += 1
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event))(heard)
    espeak.espeak_SetSynthCallback(callback)
    named = voice.encode()
    if espeak.espeak_SetVoiceByName(named) and espeak.espeak_SetVoiceByProperties(
        ctypes.byref(Wanted(languages=named))
    ):  # as the program does
        raise OSError(f"espeak-ng has no voice {voice}")
    espeak.espeak_SetParameter(RATE, words, 0)
    told = ctypes.create_string_buffer(text.encode())
    if espeak.espeak_Synth(told, ctypes.c_size_t(len(told)), 0, 0, 0, UTF8, None, None):
        raise OSError("espeak-ng did not speak")
    return bytes(sound), rate, said


def main(arguments: list[str]) -> int:
    """Exit code 1 and one line on standard error where nothing can be said."""
    voice, words, path = arguments
    try:
        sound, rate, said = say(voice, int(words), sys.stdin.read())
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    with wave.open(path, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", "not compressed"))
        file.writeframes(sound)
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
