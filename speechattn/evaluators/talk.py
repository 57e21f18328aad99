"""One recording after the other, as simulstream's speech processors hear them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from speechattn.audio.resample import Samples
from speechattn.errors import InputError
from speechattn.evaluators.shown import Output, Shown, string_of
from speechattn.evaluators.voice import Voice
from speechattn.score.latency.simulstream import Tokens

__all__ = ["RATE", "Talk", "add_talk_options"]

RATE = 16000  # samples a second, always


def add_talk_options(parser: argparse.ArgumentParser) -> None:
    """What is shown, and how."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--speech-chunk-size", type=float, default=0.5, metavar="S", help="seconds of sound for each step (default 0.5)"
    )
    group.add_argument(
        "--latency-unit", choices=get_args(Tokens), default="spm",
        help="tokens are words, characters, or pieces that begin with U+2581 where a word does (default spm)",
    )  # fmt: skip
    group.add_argument(
        "--unstable", action="store_true", help="show the rest of the hypothesis too, which may be deleted again"
    )


class Talk:
    """The recording that is heard now. `clear` begins another one, in the model's own languages."""

    def __init__(self, voice: Voice) -> None:
        self.voice, self.chunk_s = voice, float(voice.options.speech_chunk_size)
        if not 0.01 <= self.chunk_s <= 60:
            raise InputError(f"speech_chunk_size {self.chunk_s}: 0.01 to 60 s")
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        options = self.voice.options
        self.shown, self.empty = Shown(options.latency_unit, unstable=options.unstable), True
        self.source: str | None = None
        self.target: str | None = None
        self.session = self.voice.session()

    def speak(self, *, source: str | None = None, target: str | None = None) -> None:
        """The recording is in `source`, its text is wanted in `target`; InputError for others than the model's.

        Only before its first sound.
        """
        source, target = source or self.source, target or self.target
        if (source, target) == (self.source, self.target):
            return
        if self.session.audio_s or self.session.closed:
            raise InputError("the language of a recording cannot change once it has begun")
        self.session, self.source, self.target = self.voice.session(source, target), source, target

    def hear(self, samples: Samples) -> Output:
        """More sound [n] at `RATE`."""
        self.empty = self.shown.empty
        output = self.shown.show(self.session.feed(samples, RATE))
        if len(samples) < self.chunk_s * RATE and self.shown.loose and not output.new_tokens:
            # simulstream 1.0.0 joins what its last chunk and its end say, and loses what the end deletes where the
            # chunk has no new tokens.
            return self.shown.again(output)
        return output

    def end(self) -> Output:
        """No more sound: everything is committed."""
        return self.shown.show(self.session.finish())

    def text(self, tokens: Sequence[str]) -> str:
        """The text of what a chunk, or the end behind it, brought: with a blank before it where a text stood there."""
        return string_of(tokens, self.voice.options.latency_unit, begun=not self.empty)
