"""`speechattn transcribe FILE...`: recordings to txt, srt, vtt, json or tsv."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechattn.audio.read import Recording, open_recording
from speechattn.cli.options import (
    add_backend_option,
    add_model_options,
    add_session_options,
    build_live_model,
    build_session,
    folder,
)  # fmt: skip
from speechattn.errors import InputError
from speechattn.live.events import Event
from speechattn.live.formats import FORMATS, segments
from speechattn.live.session import Session

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("transcribe", help="recordings to text or subtitles", allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG, MP3")
    parser.add_argument("--format", "--output-format", default="txt", choices=sorted(FORMATS), help="default txt")
    parser.add_argument("--output-dir", "-o", metavar="DIR", help="write DIR/<stem>.<format> (default: print)")
    parser.add_argument("--offline", action="store_true", help="commit whole utterances: slower to appear, no policy")
    add_model_options(parser)
    add_backend_option(parser)
    add_session_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Each file in turn; one that cannot be read does not stop the others, but the exit code is 2."""
    place = folder(options.output_dir) if options.output_dir else None
    stems = [Path(name).stem for name in options.files]
    if place and len(set(stems)) < len(stems):
        raise InputError("two files have the same name, and one transcript would overwrite the other")
    model = build_live_model(options)
    failed = []
    for name in options.files:
        events: list[Event] = []
        interrupted = False
        try:
            recording = open_recording(Path(name))
            session = build_session(options, model, offline=options.offline)
            session.on_event = events.append
            listen(session, recording)
        except InputError as error:
            failed.append(str(error))
        except KeyboardInterrupt:
            interrupted = True
            failed.append(f"{name}: interrupted; what was committed until then is written")
        if events:
            try:
                write(options.format, events, place / f"{Path(name).stem}.{options.format}" if place else None)
            except InputError as error:  # the other files may still be written
                failed.append(str(error))
        for event in events:
            if event.kind == "withheld":
                print(
                    f"speechattn: {name}: withheld a loop at {event.audio_s:.1f} s: {event.withheld[:80]}",
                    file=sys.stderr,
                )
        if interrupted:
            break
    for message in failed:
        print(f"speechattn: {message}", file=sys.stderr)
    return 2 if failed else 0


def listen(session: Session, recording: Recording) -> None:
    """Feed the recording, with a bar; what is damaged at the end still leaves what was before it."""
    bar = tqdm(
        total=round(recording.duration_s, 1), unit="s", desc=recording.path.name,
        disable=not sys.stderr.isatty(), bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]",
    )  # fmt: skip
    try:
        with bar:
            for block in recording.blocks():
                session.feed(block, recording.rate)
                bar.update(len(block) / recording.rate)
    except InputError:
        session.finish()
        raise
    session.finish()


def write(name: str, events: list[Event], path: Path | None) -> None:
    """Write the transcript; where the disk refuses, print it, so that it is not lost, and say so."""
    text = FORMATS[name](segments(events))
    if path is None:
        print(text, end="")
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(text, end="")
        raise InputError(f"{path}: {error.strerror or error}; the transcript was printed instead") from error
