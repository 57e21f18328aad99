"""`speechattn stream [FILE | - | mic]`: words as they become certain."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from speechattn.audio.microphone import listen
from speechattn.audio.read import open_recording, read_pcm
from speechattn.audio.resample import HIGHEST_RATE, LOWEST_RATE, Samples
from speechattn.audio.vision import Image
from speechattn.cli.display import Display, JsonLines, Plain, Terminal
from speechattn.cli.options import (
    add_backend_option,
    add_model_options,
    add_session_options,
    add_trace_option,
    build_live_model,
    build_session,
    resolved,
)  # fmt: skip
from speechattn.cli.terms import tell_terms
from speechattn.cli.video import add_video_options, pictures
from speechattn.errors import InputError
from speechattn.live.lips import beside
from speechattn.live.session import Session

__all__ = ["LIVE", "add_parser", "add_source_options", "choose_display", "play", "show", "source"]

LIVE: dict[str, Callable[[], Display]] = {"live": Terminal, "text": Plain, "jsonl": JsonLines}


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("stream", help="live: a file, a pipe or the microphone", allow_abbrev=False)
    parser.add_argument(
        "source", nargs="?", default="mic", metavar="FILE|-|mic",
        help="a recording (at speaking speed), raw s16le samples on standard input, or the microphone (default)",
    )  # fmt: skip
    parser.add_argument("--format", default=None, choices=tuple(LIVE), help="default live in a terminal, else text")
    parser.add_argument("--fast", action="store_true", help="a recording as fast as it goes")
    add_source_options(parser)
    add_video_options(parser)
    add_model_options(parser)
    add_backend_option(parser)
    add_session_options(parser)
    add_trace_option(parser)
    parser.set_defaults(run=run, task="transcribe")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """What standard input and the microphone give."""
    parser.add_argument(
        "--rate", type=int, help="samples per second on standard input or of the microphone (default 16000)"
    )
    parser.add_argument("--channels", type=int, help="channels on standard input (default 1)")
    parser.add_argument("--input-device", help="microphone by number or name (see speechattn doctor)")


def run(options: argparse.Namespace) -> int:
    """At speaking speed, if that of a recording is not to be `--fast`."""
    if options.fast and options.source in ("-", "mic"):
        raise InputError(f"--fast does not go with {options.source}: it belongs to files")
    rate, blocks = source(options, options.source)
    display = choose_display(options.format)
    model = build_live_model(options)
    lips = pictures(options, model, options.source)
    session = build_session(options, model, trace=options.trace)
    return show(options, session, display, rate, blocks, paced=not options.fast, lips=lips)


def show(
    options: argparse.Namespace, session: Session, display: Display, rate: int, blocks: Iterator[Samples], *,
    paced: bool, lips: Image | None = None,
) -> int:  # fmt: skip
    """Listen until the source ends; Ctrl-C ends a microphone, and interrupts a file. Only a file can be `paced`."""
    print(f"speechattn: {resolved(options, session)}", file=sys.stderr)
    paced = paced and options.source not in ("-", "mic")
    try:
        play(session, blocks, rate, display, paced=paced, lips=lips)
    except KeyboardInterrupt:
        if options.source == "mic":
            return 0
        raise InputError(f"interrupted after {session.audio_s:.1f} s; what was committed until then is above") from None
    finally:
        tell_terms(session)
    return 0


def source(options: argparse.Namespace, name: str) -> tuple[int, Iterator[Samples]]:
    """Rate and blocks of a file, of standard input (-) or of the microphone (mic).

    InputError for options that belong to another source.
    """
    kind = name if name in ("-", "mic") else "a file"
    for option, kinds in (("rate", ("-", "mic")), ("channels", ("-",)), ("input_device", ("mic",))):
        if getattr(options, option) is not None and kind not in kinds:
            said = f"--{option.replace('_', '-')} does not go with {kind}"
            raise InputError(f"{said}: it belongs to {' and '.join(kinds)}")
    rate = 16000 if options.rate is None else options.rate
    channels = 1 if options.channels is None else options.channels
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise InputError(f"--rate {rate}: speech needs {LOWEST_RATE} to {HIGHEST_RATE} Hz")
    if not 1 <= channels <= 32:
        raise InputError(f"--channels {channels}: 1 to 32")
    if kind == "mic":
        device = options.input_device
        return rate, listen(rate, int(device) if device and device.isdigit() else device)
    if kind == "-":
        return rate, read_pcm(sys.stdin.buffer, rate, channels)
    recording = open_recording(Path(name))
    return recording.rate, recording.blocks()


def choose_display(name: str | None) -> Display:
    """Two colours in a terminal, plain text in a pipe, or events as JSON."""
    return LIVE[name or ("live" if sys.stdout.isatty() else "text")]()


def play(
    session: Session, blocks: Iterator[Samples], rate: int, display: Display, *, paced: bool, lips: Image | None = None
) -> None:
    """Feed and show; `paced` holds sound and lips [T, S, S] back until the moment they would have been spoken.

    Whatever ends the source, the words that remain are committed and shown.
    """
    began, heard = time.perf_counter(), 0.0
    with display:
        try:
            for block, seen in beside(blocks, rate, lips):
                heard += len(block) / rate
                if paced:
                    time.sleep(max(0.0, heard - (time.perf_counter() - began)))
                busy = time.perf_counter()
                events = session.feed(block, rate, seen)
                display.show(events, heard, time.perf_counter() - busy)
        finally:
            busy = time.perf_counter()
            display.show(session.finish(), heard, time.perf_counter() - busy)
