"""`speechattn demo`: a real actor speaks, words appear as they become certain, and the numbers follow."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from speechattn.audio.read import open_recording
from speechattn.audio.resample import Samples
from speechattn.cli.display import Display, Plain, Terminal
from speechattn.cli.stream import play
from speechattn.data.fotaq import RATE, default_folder, prepare, read_split
from speechattn.data.streams import Stream, join, read_word_ends
from speechattn.errors import InputError
from speechattn.live.events import Event
from speechattn.live.session import Session
from speechattn.live.streaming import Streaming
from speechattn.model import load_model
from speechattn.model.load import DEFAULT
from speechattn.score.lag import measure_lag
from speechattn.score.wer import word_errors

__all__ = ["add_parser"]

DIALOGUE = "FAYE2"


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("demo", help="watch a dialogue being recognised", allow_abbrev=False)
    parser.add_argument("file", nargs="?", metavar="FILE", help="your own recording instead of the dialogue")
    parser.add_argument("--fast", action="store_true", help="do not wait for the actor")
    parser.add_argument("--clips", type=int, default=20, help="how many lines of the dialogue (default 20: a minute)")
    parser.set_defaults(run=run)


class Both:
    """Shows events and keeps them."""

    def __init__(self, display: Display) -> None:
        self.display, self.events, self.busy_s = display, list[Event](), 0.0

    def __enter__(self) -> Both:
        self.display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.display.__exit__(*error)

    def show(self, events: Sequence[Event], heard_s: float, busy_s: float) -> None:
        """Both."""
        self.events += events
        self.busy_s += busy_s
        self.display.show(events, heard_s, busy_s)


def run(options: argparse.Namespace) -> int:
    """Stream, then score against the script."""
    if options.clips < 1:
        raise InputError(f"--clips {options.clips}: at least 1")
    stream = None if options.file else dialogue(options.clips)
    torch.set_num_threads(1)
    model = load_model()
    display = Both(Terminal() if sys.stdout.isatty() else Plain())
    session = Session(model)
    if stream is None:
        recording = open_recording(Path(options.file))
        print(f"{recording.path.name}, {recording.duration_s:.0f} s; {heard_by(session)}\n")
        play(session, recording.blocks(), recording.rate, display, paced=not options.fast)
        print(f"\nreal-time factor {display.busy_s / session.audio_s:.2f}")
        return 0
    print(f"Flight of the Amazon Queen, dialogue {stream.name}, {stream.duration_s:.0f} s; {heard_by(session)}\n")
    play(session, blocks(stream), RATE, display, paced=not options.fast)
    report(stream, display, session)
    return 0


def heard_by(session: Session) -> str:
    """The model, and how much sound it waits for."""
    listener = session.listener
    assert isinstance(listener, Streaming)
    return f"{DEFAULT}, chunks of {1e3 * listener.block / session.model.sample_rate:.0f} ms"


def dialogue(clips: int) -> Stream:
    """Lines of one dialogue of the test split."""
    print("preparing the recordings (once, 35 MB) ...", file=sys.stderr)
    try:
        folder = prepare(default_folder(), ("test",))
    except InputError as error:
        raise InputError(f"{error}. Give a recording of your own: speechattn demo FILE (make demo FILE=...)") from error
    lines = [line for line in read_split(folder, "test") if line.dialogue == DIALOGUE]
    return join(DIALOGUE, lines[:clips])


def blocks(stream: Stream) -> Iterator[Samples]:
    """Tenths of a second."""
    yield from (stream.samples[at : at + RATE // 10] for at in range(0, len(stream.samples), RATE // 10))


def report(stream: Stream, shown: Both, session: Session) -> None:
    """Errors against the script, lag against an independent alignment, cost."""
    errors = word_errors([stream.text], ["".join(event.committed for event in shown.events)])
    lag = measure_lag(shown.events, stream.heard(read_word_ends()))
    print(
        f"\nWER {100 * errors.rate:.1f} % of {errors.n} words against the script "
        f"({errors.substitutions} substituted, {errors.insertions} inserted, {errors.deletions} deleted; "
        f"{errors.normaliser})\n"
        f"lag from the end of a word to its commit: mean {lag.mean:.2f} s, p95 {lag.percentile(95):.2f} s "
        f"({len(lag.seconds)} correct words of {lag.said} aligned)\n"
        f"real-time factor {shown.busy_s / session.audio_s:.2f}"
    )
