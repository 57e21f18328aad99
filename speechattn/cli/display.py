"""What a live session looks like."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from speechattn.errors import InputError
from speechattn.live.events import Event
from speechattn.live.formats import FORMATS, segments

__all__ = ["Display", "JsonLines", "Plain", "Terminal", "Written"]


class Display(Protocol):
    """Shows events while the source is open."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, events: Sequence[Event], heard_s: float, busy_s: float) -> None:
        """New events, seconds of sound so far, seconds of computing since the last call."""


def tell(event: Event, source: str = "") -> None:
    """What is no text, on standard error: a loop that was withheld, and why words wait."""
    if event.withheld:
        print(f"speechattn: {source}withheld a loop at {event.audio_s:.1f} s: {event.withheld[:80]}", file=sys.stderr)
    if event.trace:
        print(f"speechattn: {source}{event.audio_s:.2f} s: {event.trace}", file=sys.stderr)


class Plain:
    """Committed text only, one line an utterance, as it comes."""

    def __init__(self) -> None:
        self.open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.open:
            print(flush=True)

    def show(self, events: Sequence[Event], heard_s: float, busy_s: float) -> None:
        """Print what is new."""
        for event in events:
            tell(event)
            if event.committed:
                print(event.committed if self.open else event.committed.lstrip(), end="", flush=True)
                self.open = True
            if event.final and self.open:
                print(flush=True)
                self.open = False


class Written:
    """Nothing until the source ends, then all of it in one of `FORMATS`: into the file `path`, or printed."""

    def __init__(self, name: str, source: str, path: Path | None) -> None:
        self.name, self.source, self.path, self.events = name, f"{source}: ", path, list[Event]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, events: Sequence[Event], heard_s: float, busy_s: float) -> None:
        """Keep them."""
        self.events += events
        for event in events:
            tell(event, self.source)

    def write(self) -> None:
        """The text; where the disk refuses, print it, so that it is not lost, and say so."""
        if not self.events:
            return
        text = FORMATS[self.name](segments(self.events))
        if self.path is None:
            print(text, end="")
            return
        try:
            self.path.write_text(text, encoding="utf-8")
        except OSError as error:
            print(text, end="")
            raise InputError(f"{self.path}: {error.strerror or error}; the transcript was printed instead") from error


class JsonLines(Plain):
    """One event a line."""

    def show(self, events: Sequence[Event], heard_s: float, busy_s: float) -> None:
        """Print the events."""
        for event in events:
            print(event.to_json(), flush=True)


class Terminal:
    """Committed text in bold, the unstable tail in grey behind it, and a status line."""

    def __init__(self) -> None:
        try:
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text
        except ImportError as error:
            raise InputError("the live view needs rich: pip install 'speechattn[live]', or --format text") from error
        self.text = Text
        self.console = Console()
        self.live = Live(console=self.console, refresh_per_second=8, transient=True)
        self.line = ""
        self.busy_s = 0.0
        self.lags: list[float] = []

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()
        if self.line:
            self.console.print(self.text(self.line.strip(), style="bold"))

    def show(self, events: Sequence[Event], heard_s: float, busy_s: float) -> None:
        """Finished utterances scroll up; the current one is redrawn."""
        self.busy_s += busy_s
        unstable = None
        for event in events:
            self.line += event.committed
            unstable = event.unstable
            self.lags = [*self.lags, *(event.emitted_s - word.end for word in event.words)][-100:]
            if event.withheld:
                self.console.print(self.text(f"withheld: {event.withheld[:80]}", style="yellow"))
            if event.trace:
                self.console.print(self.text(f"{event.audio_s:.2f} s: {event.trace}", style="bright_black"))
            if event.final:
                if self.line.strip():
                    self.console.print(self.text(self.line.strip(), style="bold"))
                self.line = ""
        if unstable is not None:
            lag = f"lag {np.mean(self.lags):.1f} s" if self.lags else "lag -"
            status = f"{heard_s:6.1f} s heard   {lag}   real-time factor {self.busy_s / max(heard_s, 1e-9):.2f}"
            self.live.update(
                self.text.assemble((self.line.strip(), "bold"), (unstable, "bright_black"), "\n", (status, "cyan"))
            )
