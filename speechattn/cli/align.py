"""`speechattn align AUDIO TEXT`: where each line of a text is said in a recording."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechattn.audio.read import open_recording
from speechattn.cli.options import add_model_options, build_model
from speechattn.errors import InputError
from speechattn.live.formats import Segment, srt
from speechattn.model import Recognizer
from speechattn.model.align import Aligned, align
from speechattn.model.searches import LETTERS

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("align", help="a recording and its text to times", allow_abbrev=False)
    parser.add_argument("audio", metavar="AUDIO", help="WAV, FLAC, OGG, MP3, of any length")
    parser.add_argument("text", metavar="TEXT", help="what is said in it, in order, one utterance a line")
    parser.add_argument("--format", "--output-format", default="srt", choices=tuple(FORMATS), help="default srt")
    parser.add_argument("--output", "-o", metavar="FILE", help="default: print")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Times of every line, with a warning for lines that are probably not there."""
    recording = open_recording(Path(options.audio))
    try:
        lines = Path(options.text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{options.text}: {getattr(error, 'strerror', None) or error}") from error
    model = build_model(options)
    if not isinstance(model, Recognizer) or not {"ctc", LETTERS} & model.heads.keys():
        raise InputError(f"{options.model} has no CTC head, which alignment needs: give a model folder with --model")
    bar = tqdm(
        total=round(recording.duration_s, 1), unit="s", desc=recording.path.name,
        disable=not sys.stderr.isatty(), bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]",
    )  # fmt: skip
    with bar:
        found = align(model, recording, lines, on_sound=bar.update)
    text = FORMATS[options.format](found)
    if options.output:
        try:
            Path(options.output).write_text(text, encoding="utf-8")
        except OSError as error:
            print(text, end="")
            raise InputError(f"{options.output}: {error.strerror or error}; it was printed instead") from error
    else:
        print(text, end="")
    for one in found:
        if one.confidence < UNSURE:
            print(f"speechattn: not sure ({one.confidence:.1f}) at {one.start:.1f} s: {one.text}", file=sys.stderr)
    return 0


UNSURE = -2.0


def as_srt(found: Sequence[Aligned]) -> str:
    """SubRip, a line a subtitle."""
    return srt([Segment(one.start, one.end, one.text, ()) for one in found])


def as_json(found: Sequence[Aligned]) -> str:
    """A list of lines with words and confidences; times to the millisecond."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [short(item) for item in value]
        return round(value, 3) if isinstance(value, float) else value

    return json.dumps([short(asdict(one)) for one in found], ensure_ascii=False, indent=1) + "\n"


def as_textgrid(found: Sequence[Aligned]) -> str:
    """Praat's TextGrid: a tier of lines and one of words, with empty intervals between."""
    end = max(one.end for one in found)
    tiers = {
        "utterances": [(one.start, one.end, one.text) for one in found],
        "words": [(word.start, word.end, word.text) for one in found for word in one.words],
    }
    text = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {end:.3f}"]
    text += ["tiers? <exists>", f"size = {len(tiers)}", "item []:"]
    for i, (name, spans) in enumerate(tiers.items(), 1):
        filled = intervals(spans, end)
        text += [f"    item [{i}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        text += ["        xmin = 0", f"        xmax = {end:.3f}", f"        intervals: size = {len(filled)}"]
        for k, (begin, until, label) in enumerate(filled, 1):
            quoted = label.replace('"', '""')
            text += [f"        intervals [{k}]:", f"            xmin = {begin:.3f}", f"            xmax = {until:.3f}"]
            text += [f'            text = "{quoted}"']
    return "\n".join(text) + "\n"


def intervals(spans: Sequence[tuple[float, float, str]], end: float) -> list[tuple[float, float, str]]:
    """The spans, and empty ones where there is nothing, from 0 to the end."""
    filled, at = list[tuple[float, float, str]](), 0.0
    for begin, until, label in spans:
        if begin > at + 5e-4:
            filled.append((at, begin, ""))
        filled.append((max(at, begin), until, label))
        at = until
    if end > at + 5e-4:
        filled.append((at, end, ""))
    return filled


FORMATS: dict[str, Callable[[Sequence[Aligned]], str]] = {"srt": as_srt, "json": as_json, "textgrid": as_textgrid}
