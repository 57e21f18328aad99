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
from speechattn.cli.display import Display, JsonLines, Plain, Terminal
from speechattn.cli.options import (
    add_backend_option,
    add_model_options,
    add_session_options,
    build_live_model,
    build_session,
    resolved,
)  # fmt: skip
from speechattn.errors import InputError
from speechattn.live.session import Session

__all__ = ["add_parser", "play"]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("stream", help="live: a file, a pipe or the microphone", allow_abbrev=False)
    parser.add_argument(
        "source", nargs="?", default="mic", metavar="FILE|-|mic",
        help="a recording (at speaking speed), raw s16le samples on standard input, or the microphone (default)",
    )  # fmt: skip
    parser.add_argument(
        "--format", default=None, choices=("live", "text", "jsonl"), help="default live in a terminal, else text"
    )
    parser.add_argument("--fast", action="store_true", help="a recording as fast as it goes")
    parser.add_argument(
        "--rate", type=int, help="samples per second on standard input or of the microphone (default 16000)"
    )
    parser.add_argument("--channels", type=int, help="channels on standard input (default 1)")
    parser.add_argument("--input-device", help="microphone by number or name (see speechattn doctor)")
    add_model_options(parser)
    add_backend_option(parser)
    add_session_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Listen until the source ends; Ctrl-C ends a microphone, and interrupts a file."""
    rate, blocks = source(options)
    display = choose_display(options.format)
    session = build_session(options, build_live_model(options))
    print(f"speechattn: {resolved(options, session)}", file=sys.stderr)
    paced = options.source not in ("-", "mic") and not options.fast
    try:
        play(session, blocks, rate, display, paced=paced)
    except KeyboardInterrupt:
        if options.source == "mic":
            return 0
        raise InputError(f"interrupted after {session.audio_s:.1f} s; what was committed until then is above") from None
    return 0


def source(options: argparse.Namespace) -> tuple[int, Iterator[Samples]]:
    """Rate and blocks of what the options name; InputError for options that belong to another source."""
    kind = options.source if options.source in ("-", "mic") else "a file"
    for name, kinds in (("rate", ("-", "mic")), ("channels", ("-",)), ("input_device", ("mic",))):
        if getattr(options, name) is not None and kind not in kinds:
            raise InputError(f"--{name.replace('_', '-')} does not go with {kind}: it belongs to {' and '.join(kinds)}")
    if options.fast and kind != "a file":
        raise InputError(f"--fast does not go with {kind}: it belongs to files")
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
    recording = open_recording(Path(options.source))
    return recording.rate, recording.blocks()


def choose_display(name: str | None) -> Display:
    """Two colours in a terminal, plain text in a pipe, or events as JSON."""
    name = name or ("live" if sys.stdout.isatty() else "text")
    kinds: dict[str, Callable[[], Display]] = {"live": Terminal, "text": Plain, "jsonl": JsonLines}
    return kinds[name]()


def play(session: Session, blocks: Iterator[Samples], rate: int, display: Display, *, paced: bool) -> None:
    """Feed and show; `paced` holds sound back until the moment it would have been spoken.

    Whatever ends the source, the words that remain are committed and shown.
    """
    began, heard = time.perf_counter(), 0.0
    with display:
        try:
            for block in blocks:
                heard += len(block) / rate
                if paced:
                    time.sleep(max(0.0, heard - (time.perf_counter() - began)))
                busy = time.perf_counter()
                events = session.feed(block, rate)
                display.show(events, heard, time.perf_counter() - busy)
        finally:
            busy = time.perf_counter()
            display.show(session.finish(), heard, time.perf_counter() - busy)
