"""Pictures of a mouth from video files: 25 grey frames a second, however the file counts them.

Bring pictures of mouths, or say where the mouth is: nothing here finds faces.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from speechattn.errors import InputError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["RATE", "SIZE", "Box", "Video", "nearest", "read_video", "write_video"]

RATE = 25  # frames a second
SIZE = 88  # pixels of an edge
LONGEST_S = 600.0
MOST_PIXELS = 4096 * 4096
SLOWEST = 10  # frames a second below which lips cannot be read
WIDEST_S = Fraction(1, 4)  # between two frames
LEAD_S = Fraction(2)  # before a stretch, so that no frame of it lacks those that it is told by
LACKING_S = Fraction(1, 2)  # of what a file announces, before it counts as cut off

Image = NDArray[np.uint8]


class Box(NamedTuple):
    """A part of the picture, in pixels from its left upper corner."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Video:
    """Grey frames [T, S, S] at 25 a second, from the beginning of the file on; `source_rate` is the file's own."""

    frames: Image
    source_rate: Fraction


class Stretch(NamedTuple):
    """A part of a video: its time `begin_s` + k / `rate` for each k, less than `most` of them."""

    begin_s: Fraction = Fraction(0)
    most: int | None = None
    rate: Fraction = Fraction(RATE)

    @property
    def last_s(self) -> Fraction | None:
        """The last time."""
        return None if self.most is None else self.begin_s + (self.most - 1) / self.rate


WHOLE = Stretch()


class Wanted(NamedTuple):
    """What is to be read of a video."""

    stretch: Stretch
    box: Box | None
    size: int
    longest_s: float


def read_video(
    path: Path, *, box: Box | None = None, size: int = SIZE, longest_s: float = LONGEST_S, stretch: Stretch = WHOLE
) -> Video:
    """The mouth in a video, `size` pixels wide and high.

    A picture that is `size` pixels wide and high is taken as it is; of all others `box` is the part to be scaled. Other
    rates become 25 by taking the frame that is nearest in time, in exact fractions: every frame lasts until the next
    one, nothing drifts. Time 0 is where sound or picture begins, whichever is earlier. Of a `stretch` there are as many
    as the file has. InputError for a file without video, without frames or times, one that is damaged or cut off
    (unless the decoder hides it), one that ends before the stretch, and for what exceeds the limits.
    """
    av = pyav()
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, not a video' if path.is_dir() else 'no such file'}")
    try:
        with av.open(str(path)) as file:
            stream = picture(path, file)
            rate = Fraction(stream.average_rate or stream.guessed_rate or 0)
            check_rate(path, rate)
            began = min(begins(file), default=None)
            if began is None:
                raise InputError(f"{path}: a picture, not a video: it tells no times")
            part = Wanted(stretch, box, size, longest_s)
            place = stretch.begin_s - LEAD_S if stretch.begin_s > LEAD_S else None
            times, frames = decoded(path, file, stream, began, part, place)
            if place is not None and (not times or times[0] > stretch.begin_s):  # some formats are not sought exactly
                with av.open(str(path)) as anew:
                    times, frames = decoded(path, anew, picture(path, anew), began, part, None)
            if not frames:
                raise InputError(f"{path}: a video without frames")
            end, first = times[-1] + 1 / rate, starts(stream)
            lasts = end - (times[0] if first is None else first - began)
            announced = announced_s(file, stream)
    except av.error.FFmpegError as error:
        raise InputError(f"{path}: not a video that can be read ({error.strerror})") from error
    enough = stretch.last_s is not None and times[-1] >= stretch.last_s
    if not enough and announced is not None and lasts < announced - LACKING_S:
        raise InputError(f"{path}: cut off: it announces {float(announced):.1f} s, and {float(end):.1f} s are there")
    if end <= stretch.begin_s:
        raise InputError(f"{path}: it ends after {float(end):.2f} s, before second {float(stretch.begin_s):.2f}")
    images: Image = np.stack(frames)
    if images.min() == images.max():
        raise InputError(f"{path}: nothing is to be seen: every pixel of every frame is alike")
    if stretch.most is not None:
        wanted = stretch.begin_s + stretch.most / stretch.rate
        end = wanted if enough else min(end, wanted)
    return Video(images[nearest(times, end, stretch.rate, stretch.begin_s)], rate)


def pyav() -> Any:
    """The package that reads videos."""
    try:
        import av
    except ImportError as error:
        raise InputError("videos need PyAV: pip install speechattn[video]") from error
    return av


def picture(path: Path, file: InputContainer) -> VideoStream:
    """The first stream of pictures; InputError where there is none, or one beyond the limits."""
    if not file.streams.video:
        raise InputError(f"{path}: no video in it; it has {', '.join(one.type for one in file.streams) or 'nothing'}")
    stream = file.streams.video[0]
    stream.thread_type = "NONE"
    if stream.width * stream.height > MOST_PIXELS:
        raise InputError(f"{path}: {stream.width} x {stream.height} pixels; at most {MOST_PIXELS} in all can be read")
    return stream


def check_rate(path: Path, rate: Fraction) -> None:
    """InputError for a rate at which lips cannot be read, or none at all."""
    if rate < SLOWEST:
        raise InputError(f"{path}: {float(rate):.2f} frames a second; lips need at least {SLOWEST}")


def starts(stream: Any) -> Fraction | None:
    """When a stream begins, in seconds; None where it does not say."""
    return None if stream.start_time is None else stream.start_time * Fraction(stream.time_base)


def begins(file: InputContainer) -> list[Fraction]:
    """When each stream of a file begins, in seconds, as far as they say."""
    return [start for one in file.streams if (start := starts(one)) is not None]


def announced_s(file: InputContainer, stream: VideoStream) -> Fraction | None:
    """How long the pictures are, by what the file says of itself; None where it says nothing of them."""
    if stream.duration is not None:
        return stream.duration * Fraction(stream.time_base or 0)
    if len(file.streams) == 1 and file.duration is not None:
        return Fraction(file.duration, 1_000_000)
    return None


def decoded(
    path: Path, file: InputContainer, stream: VideoStream, began: Fraction, wanted: Wanted, seek_s: Fraction | None
) -> tuple[list[Fraction], list[Image]]:
    """Times in seconds since `began`, and the mouth at each [S, S]: from the last before the stretch to its end."""
    begin, last = wanted.stretch.begin_s, wanted.stretch.last_s
    if seek_s is not None:
        file.seek(int((began + seek_s) / Fraction(stream.time_base or 1)), stream=stream)
    times: list[Fraction] = []
    frames: list[Image] = []
    for frame in whole_frames(path, file, stream, times, sought=seek_s is not None):
        if frame.pts is None or frame.time_base is None:
            raise InputError(f"{path}: frame {len(times)} has no time")
        time = frame.pts * Fraction(frame.time_base) - began
        if times and time <= times[-1]:
            raise InputError(f"{path}: damaged: frame {len(times)} is not later than the one before it")
        if times and time > times[-1] + WIDEST_S:
            raise InputError(f"{path}: damaged: no frames between {float(times[-1]):.2f} and {float(time):.2f} s")
        if time > begin + wanted.longest_s:
            raise InputError(f"{path}: longer than {wanted.longest_s:g} s; cut it into utterances")
        if time <= begin:
            times.clear()
            frames.clear()
        times.append(time)
        frames.append(mouth(path, frame.to_ndarray(format="gray"), wanted.box, wanted.size))
        if last is not None and time >= last:
            break
    return times, frames


def whole_frames(
    path: Path, file: InputContainer, stream: VideoStream, times: Sequence[Fraction], *, sought: bool
) -> Iterator[Any]:
    """Frames as they are decoded; InputError says after how many seconds (the last of `times`) they are damaged.

    The first ones behind a place that was `sought` lack those before them.
    """
    av = pyav()
    try:
        for frame in file.decode(stream):
            if frame.is_corrupt and sought and not times:
                continue
            if frame.is_corrupt:
                raise InputError(f"{path}: damaged after {float(times[-1] if times else 0):.1f} s")
            yield frame
    except av.error.FFmpegError as error:
        after = float(times[-1] if times else 0)
        raise InputError(f"{path}: damaged after {after:.1f} s ({error.strerror})") from error


def mouth(path: Path, image: Image, box: Box | None, size: int) -> Image:
    """The box of a grey picture [H, W], scaled to [S, S]; without one the picture itself."""
    height, width = image.shape
    if box is None:
        if (height, width) != (size, size):
            raise InputError(f"{path}: {width} x {height} pixels, not {size} x {size}: say in which box the mouth is")
        return image
    right, bottom = box.left + box.width, box.top + box.height
    if min(box) < 0 or box.width < 1 or box.height < 1 or right > width or bottom > height:
        raise InputError(f"{path}: the box {tuple(box)} does not lie in a picture of {width} x {height} pixels")
    part = image[box.top : bottom, box.left : right]
    if part.shape == (size, size):
        return np.ascontiguousarray(part)
    grey = torch.from_numpy(np.ascontiguousarray(part)).float()[None, None]
    scaled: Tensor = F.interpolate(grey, (size, size), mode="bilinear", align_corners=False, antialias=True)
    found: Image = scaled[0, 0].round().clamp(0, 255).to(torch.uint8).numpy()
    return found


def nearest(
    times: Sequence[Fraction], end: Fraction, rate: Fraction, begin: Fraction = Fraction(0)
) -> list[int]:  # fmt: skip
    """For each time `begin` + k / `rate` up to `end` the frame whose time is nearest, the earlier of two; `times` rise.

    As many as lie between, rounded half up, and at least one.
    """
    found = []
    for k in range(max(1, floor((end - begin) * rate + Fraction(1, 2)))):
        wanted = begin + k / rate
        after = bisect(times, wanted)
        near = [i for i in (after - 1, after) if 0 <= i < len(times)]
        found.append(min(near, key=lambda i: abs(times[i] - wanted)))
    return found


def write_video(path: Path, frames: Image, *, rate: Fraction | int = RATE) -> None:
    """Grey frames [T, H, W] into a file of Matroska, without loss (FFV1); the same frames give the same bytes."""
    av = pyav()
    with av.open(str(path), "w", format="matroska", options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream("ffv1", rate=Fraction(rate), options={"level": "3", "slicecrc": "1", "threads": "1"})
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt, stream.codec_context.gop_size = "gray", 1  # damage to one frame stays there
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for image in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray")))
        file.mux(stream.encode())
