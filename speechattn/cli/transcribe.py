"""`speechattn transcribe FILE...`: recordings to txt, srt, vtt, json or tsv."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechattn.audio.read import open_recording
from speechattn.audio.resample import Samples
from speechattn.audio.vision import Image
from speechattn.cli.display import Written
from speechattn.cli.options import (
    add_backend_option,
    add_model_options,
    add_session_options,
    add_trace_option,
    build_live_model,
    build_session,
    folder,
)  # fmt: skip
from speechattn.cli.stream import play
from speechattn.cli.terms import tell_terms
from speechattn.cli.video import add_video_options, pictures, sees
from speechattn.errors import InputError
from speechattn.live.formats import FORMATS
from speechattn.live.session import Session

__all__ = ["add_parser", "alone", "places", "recorded", "write_all"]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("transcribe", help="recordings to text or subtitles", allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG, MP3; with PyAV videos as well")
    parser.add_argument("--format", "--output-format", default="txt", choices=sorted(FORMATS), help="default txt")
    parser.add_argument("--output-dir", "-o", metavar="DIR", help="write DIR/<stem>.<format> (default: print)")
    parser.add_argument("--offline", action="store_true", help="commit whole utterances: slower to appear, no policy")
    add_video_options(parser)
    add_model_options(parser)
    add_backend_option(parser)
    add_session_options(parser)
    add_trace_option(parser)
    parser.set_defaults(run=run, task="transcribe")


def run(options: argparse.Namespace) -> int:
    """Each file in turn."""
    paths = places(options.files, options.format, options.output_dir)
    model = build_live_model(options)
    alone(options, options.files)
    sees(options, model)

    def begin() -> Session:
        return build_session(options, model, offline=options.offline, trace=options.trace)

    return write_all(options.files, options.format, paths, begin, recorded, partial(pictures, options, model))


def alone(options: argparse.Namespace, names: list[str]) -> None:
    """InputError where a video belongs to several recordings."""
    if options.video is not None and len(names) > 1:
        raise InputError(f"--video {options.video}: it belongs to one recording, and {len(names)} are named")


def places(names: list[str], kind: str, into: str | None) -> list[Path | None]:
    """Where each transcript goes; InputError where two would go into one file."""
    place, stems = folder(into) if into else None, [Path(name).stem for name in names]
    if place and len(set(stems)) < len(stems):
        raise InputError("two files have the same name, and one transcript would overwrite the other")
    return [place / f"{stem}.{kind}" if place else None for stem in stems]


def write_all(
    names: list[str], kind: str, paths: list[Path | None], begin: Callable[[], Session],
    opened: Callable[[str], tuple[int, Iterator[Samples]]], seen: Callable[[str], Image | None],
) -> int:  # fmt: skip
    """Each source in turn as text, with what is `seen` of it.

    One that cannot be read does not stop the others, but the exit code is 2. What is damaged at the end still leaves
    what was before it, and so does an interrupt; a microphone ends so.
    """
    failed = []
    for name, path in zip(names, paths, strict=True):
        display, interrupted, session = Written(kind, name, path), False, None
        try:
            rate, blocks = opened(name)
            lips = seen(name)
            session = begin()
            play(session, blocks, rate, display, paced=False, lips=lips)
        except InputError as error:
            failed.append(str(error))
        except KeyboardInterrupt:
            interrupted = True
            if name != "mic":
                failed.append(f"{name}: interrupted; what was committed until then is written")
        told = None if path is None else path.with_suffix(".terms.tsv")
        several = name if len(names) > 1 else ""
        for write in (display.write, partial(tell_terms, session, told, name=several) if session else None):
            try:
                if write is not None:
                    write()
            except InputError as error:  # the other files may still be written
                failed.append(str(error))
        if interrupted:
            break
    for message in failed:
        print(f"speechattn: {message}", file=sys.stderr)
    return 2 if failed else 0


def recorded(name: str) -> tuple[int, Iterator[Samples]]:
    """Rate and blocks of a recording, with a bar."""
    recording = open_recording(Path(name))

    def blocks() -> Iterator[Samples]:
        bar = tqdm(
            total=round(recording.duration_s, 1), unit="s", desc=recording.path.name,
            disable=not sys.stderr.isatty(), bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]",
        )  # fmt: skip
        with bar:
            for block in recording.blocks():
                yield block
                bar.update(len(block) / recording.rate)

    return recording.rate, blocks()
