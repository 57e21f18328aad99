"""`speechattn attention AUDIO`: a picture of where a model looks, and when it was sure."""

from __future__ import annotations

import argparse
import json
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from speechattn.analysis.picture import FORMATS, draw, need_matplotlib, save
from speechattn.analysis.view import summary, view
from speechattn.audio.read import Recording, open_recording
from speechattn.audio.resample import Resampler, Samples
from speechattn.cli.options import add_model_options, build_model
from speechattn.errors import InputError

__all__ = ["add_parser"]

DIGITS = 9  # of an index
LONGEST_S = 30.0  # of one picture, and of what Whisper hears at once


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser(
        "attention", help="a picture of where a model looks, and when it was sure", allow_abbrev=False
    )
    parser.add_argument("audio", metavar="AUDIO", help=f"WAV, FLAC, OGG, MP3; at most {LONGEST_S:.0f} s of it")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="begin there (default 0)")
    parser.add_argument("--end", type=float, metavar="S", help="and end there (default: the end)")
    parser.add_argument(
        "--layers", metavar="N,N", help="of the decoder, or of the encoder without one, from 0 (default: mean of all)"
    )
    parser.add_argument("--heads", metavar="N,N", help="in each of these layers, from 0 (default: mean of all)")
    parser.add_argument(
        "--output", "-o", metavar="FILE", help=f"{', '.join(FORMATS)} (default NAME.attention.png, or none with --json)"
    )
    parser.add_argument("--json", metavar="FILE", help="the numbers: words, tokens, weights, statistics")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Listen, look, draw; what cannot be written is said before the work begins."""
    layers, heads = indices("--layers", options.layers), indices("--heads", options.heads)
    path = Path(options.audio)
    output = Path(options.output) if options.output else None if options.json else Path(f"{path.stem}.attention.png")
    apart({"AUDIO": path, "--output": output, "--json": Path(options.json) if options.json else None})
    if output is not None:
        need_matplotlib()
        if output.suffix.lower() not in FORMATS:
            raise InputError(f"--output {output}: a picture ends in {', '.join(FORMATS)}")
        writable(output)
    if options.json:
        writable(Path(options.json))
    recording = open_recording(path)  # before a model is loaded
    first, last = stretch(options.start, options.end, recording.duration_s)
    model = build_model(options)
    samples = at_rate(between(recording, first, last), recording.rate, model.sample_rate)
    piece = samples[: round(last * model.sample_rate) - round(first * model.sample_rate)]
    seen = view(model, piece, name=Path(options.model).name, layers=layers, heads=heads)
    if options.json:
        text = json.dumps(summary(seen), ensure_ascii=False) + "\n"
        Path(options.json).write_text(text, encoding="utf-8")
        print(options.json)
    if output is not None:
        save(draw(seen), output)
        print(output)
    return 0


def indices(name: str, text: str | None) -> list[int] | None:
    """`0,2,5` -> numbers; InputError for anything else."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{name} {text[:40]}: wanted numbers from 0 with commas between, as in 0,2")
    if (digits := max(map(len, parts))) > DIGITS:
        raise InputError(f"{name}: a number of {digits} digits; no model has so many")
    return [int(part) for part in parts]


def stretch(start: float, end: float | None, duration_s: float) -> tuple[float, float]:
    """The seconds that are looked at; InputError where there are none, or too many."""
    last = duration_s if end is None else min(end, duration_s)
    if not 0 <= start < last:
        raise InputError(f"--start {start:g}, end {last:g}: no sound between them ({duration_s:.1f} s are there)")
    if last - start > LONGEST_S:
        raise InputError(
            f"{last - start:.1f} s are too long for one picture: choose {LONGEST_S:.0f} s with --start and --end"
        )
    return start, last


def between(recording: Recording, first: float, last: float) -> Samples:
    """Samples from one second up to another; nothing else is kept, and what comes behind is not read."""
    start, end = round(first * recording.rate), round(last * recording.rate)
    kept, at = [np.zeros(0, np.float32)], 0
    for block in recording.blocks():
        kept.append(block[max(0, start - at) : max(0, end - at)])
        at += len(block)
        if at >= end:
            break
    return np.concatenate(kept)


def at_rate(samples: Samples, rate: int, wanted: int) -> Samples:
    """All samples at another rate."""
    resampler = Resampler(rate, wanted)
    return np.concatenate([resampler.feed(samples), resampler.feed(samples[:0], last=True)])


def apart(files: dict[str, Path | None]) -> None:
    """InputError where two of the named files are the same one, which would be overwritten."""
    there = [(name, os.path.realpath(path), path) for name, path in files.items() if path is not None]
    for (one, real, path), (other, real_other, path_other) in combinations(there, 2):
        linked = path.exists() and path_other.exists() and path.samefile(path_other)
        if real == real_other or linked:
            raise InputError(f"{other} {path_other}: the same file as {one}, which would be overwritten")


def writable(path: Path) -> None:
    """InputError where a file of that name cannot be made; one that is there is not touched."""
    try:
        new = not path.exists()
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
