"""`speechattn translate FILE... | - | mic`: speech to text in another language, as it becomes certain."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from speechattn.audio.resample import Samples
from speechattn.cli.options import (
    add_backend_option,
    add_model_options,
    add_session_options,
    add_trace_option,
    build_live_model,
    build_session,
)  # fmt: skip
from speechattn.cli.stream import LIVE, add_source_options, choose_display, show, source
from speechattn.cli.transcribe import alone, places, recorded, write_all
from speechattn.cli.video import add_video_options, pictures, sees
from speechattn.errors import InputError
from speechattn.live.formats import FORMATS
from speechattn.live.session import Session
from speechattn.model import Recognizer
from speechattn.model.searches import possible

__all__ = ["add_parser"]

ENDLESS = ("-", "mic")


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("translate", help="speech to text in another language", allow_abbrev=False)
    parser.add_argument(
        "sources", nargs="+", metavar="FILE|-|mic",
        help="recordings, raw s16le samples on standard input, or the microphone",
    )  # fmt: skip
    parser.add_argument(
        "--format", "--output-format", choices=(*LIVE, *sorted(FORMATS)),
        help="live, text and jsonl as it comes, the others when the source ends (default txt for recordings, else live "
        "in a terminal and text in a pipe)",
    )  # fmt: skip
    parser.add_argument("--output-dir", "-o", metavar="DIR", help="write DIR/<stem>.<format> (default: print)")
    parser.add_argument("--paced", action="store_true", help="a recording at speaking speed (live, text, jsonl)")
    parser.add_argument("--offline", action="store_true", help="commit whole utterances: slower to appear, no policy")
    add_source_options(parser)
    add_video_options(parser)
    add_model_options(parser, translate=True)
    add_backend_option(parser)
    add_session_options(parser)
    add_trace_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """As `transcribe` where a whole text is wanted, as `stream` where words are shown as they come."""
    endless = [name for name in options.sources if name in ENDLESS]
    if endless and len(options.sources) > 1:
        raise InputError(f"{endless[0]} is a source of its own: name no others")
    kind = options.format or (("live" if sys.stdout.isatty() else "text") if endless else "txt")
    live = kind in LIVE
    for name, given, goes in (
        ("several sources", len(options.sources) > 1, not live), ("--output-dir", options.output_dir, not live),
        ("--paced", options.paced, live and not endless),
    ):  # fmt: skip
        if given and not goes:
            kind = f"{kind} of {endless[0]}" if endless else kind
            raise InputError(f"{name} does not go with --format {kind}")
    paths = places(options.sources, kind, options.output_dir)
    model = build_live_model(options)
    alone(options, options.sources)
    seen = partial(pictures, options, model)
    sees(options, model)
    if isinstance(model, Recognizer):
        follow(options, model)

    def begin() -> Session:
        return build_session(options, model, offline=options.offline, trace=options.trace)

    def opened(name: str) -> tuple[int, Iterator[Samples]]:
        return source(options, name) if live or endless or wrong(options) else recorded(name)

    if not live:
        return write_all(options.sources, kind, paths, begin, opened, seen)
    (options.source,) = options.sources
    rate, blocks = opened(options.source)
    lips = seen(options.source)
    return show(options, begin(), choose_display(kind), rate, blocks, paced=options.paced, lips=lips)


def wrong(options: argparse.Namespace) -> bool:
    """Options that no file has: `source` says so."""
    return any(getattr(options, name) is not None for name in ("rate", "channels", "input_device"))


def follow(options: argparse.Namespace, model: Recognizer) -> None:
    """Unless another search or a beam is asked for, attention follows the sound and asks a policy, where it can."""
    streams = model.listening.plan().block is not None
    if streams and options.offline:
        raise InputError("--offline is for models that read windows; --search attention commits whole utterances")
    if streams and options.search is None and options.beam_size is None and "aligned" in possible(model.heads):
        options.search = "aligned"
