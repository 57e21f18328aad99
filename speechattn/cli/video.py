"""Options about pictures of lips, and the pictures that they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from speechattn.audio.clip import AudioVisual, eyes
from speechattn.audio.read import Contained, open_recording
from speechattn.audio.vision import Box, Image, read_video
from speechattn.errors import InputError
from speechattn.model import Recognizer
from speechattn.pretrained.whisper import WhisperModel

__all__ = ["add_video_options", "pictures", "sees"]


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Where the pictures are, for `pictures`."""
    group = parser.add_argument_group("pictures (models that see lips; without these those of the recording, if any)")
    group.add_argument("--video", metavar="FILE", help="the video of a recording; both begin together")
    group.add_argument(
        "--box", metavar="LEFT,TOP,WIDTH,HEIGHT", help="where the mouth is, in pixels (of all but 88 x 88 pictures)"
    )


def sees(options: argparse.Namespace, model: Recognizer | WhisperModel) -> AudioVisual | None:
    """What a model sees with; InputError for options about pictures where it sees nothing."""
    found = eyes(model.front_end)
    given = [f"--{name}" for name in ("video", "box", "without") if getattr(options, name, None) is not None]
    if given and found is None:
        raise InputError(f"{given[0]} does nothing with {options.model}, which sees no lips")
    return found


def pictures(options: argparse.Namespace, model: Recognizer | WhisperModel, name: str) -> Image | None:
    """Those that go with a recording [T, S, S]; None where there are none, or nobody looks."""
    seeing, path, box = sees(options, model), options.video, options.box
    if name in ("-", "mic"):
        if path or box:
            raise InputError(f"--{'video' if path else 'box'} does not go with {name}: it belongs to files")
        return None
    if seeing is None:
        return None
    if path is None:
        recording = open_recording(Path(name))
        path = name if isinstance(recording, Contained) and recording.pictures else None
    if path is None:
        if box is not None:
            raise InputError(f"--box: no pictures in {name}; --video names them")
        return None
    return read_video(Path(path), box=None if box is None else corners(box), size=seeing.size).frames


def corners(said: str) -> Box:
    """InputError for what is no box."""
    parts = said.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"--box {said}: wanted LEFT,TOP,WIDTH,HEIGHT in pixels, as 280,310,96,96")
    return Box(*map(int, parts))
