"""Pictures of lips: from files, changed in training, and as features that stream."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from speechattn.audio import vision
from speechattn.audio.lips import LipAugment
from speechattn.audio.vision import Box, Image, nearest, read_video, write_video
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.testing import random_frames

av = pytest.importorskip("av")

NTSC = Fraction(30000, 1001)


def numbered(n: int, size: int = 88) -> Image:
    """Frames [n, size, size] that tell their number by their grey."""
    ramp = np.arange(size, dtype=np.uint8) % 2
    return (3 * np.arange(n, dtype=np.uint8)[:, None, None] + ramp[None, None]) * np.ones((1, size, 1), np.uint8)


def film(path: Path, images: Image, *, rate: Fraction | int = 25, sound_s: float = 0, late_s: float = 0) -> Path:
    """An MP4 as others make it, with or without sound; pictures begin `late_s` after it."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=rate, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:], "yuv420p"
        sound = file.add_stream("aac", rate=16000) if sound_s else None
        if sound is not None:
            heard = av.AudioFrame.from_ndarray(np.zeros((1, int(16000 * sound_s)), np.float32), "fltp", "mono")
            heard.rate, heard.pts = 16000, 0
            file.mux(sound.encode(heard) + sound.encode(None))
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "gray").reformat(format="yuv420p")
            frame.time_base = 1 / Fraction(rate)
            frame.pts = i + round(late_s * rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def numbers(images: Image) -> list[int]:
    return [round(float(image.mean() - 0.5) / 3) for image in images]


def test_frames_come_back_as_they_were_and_so_do_bytes(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 88, 88), np.uint8)
    for name in "ab":
        write_video(tmp_path / name, images)
    video = read_video(tmp_path / "a")
    assert np.array_equal(video.frames, images)
    assert video.source_rate == 25
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("rate", [24, Fraction(24000, 1001), 25, NTSC, 30, 50, Fraction(60000, 1001)])
@pytest.mark.parametrize("n", [1, 2, 60, 77])
def test_other_rates_become_25_in_exact_time(rate: Fraction | int, n: int) -> None:
    times = [i / Fraction(rate) for i in range(n)]
    found = nearest(times, n / Fraction(rate), Fraction(25))
    assert len(found) == max(1, int(Fraction(25 * n) / rate + Fraction(1, 2)))
    for k, i in enumerate(found):
        least = min(abs(time - Fraction(k, 25)) for time in times)
        assert i == min(j for j in range(n) if abs(times[j] - Fraction(k, 25)) == least)


@pytest.mark.parametrize(
    ("rate", "first"),
    [(24, [0, 1, 2, 3, 4, 5]), (NTSC, [0, 1, 2, 4, 5, 6]), (50, [0, 2, 4, 6, 8, 10]), (25, [0, 1, 2, 3, 4, 5])],
)
def test_files_of_other_rates(rate: Fraction | int, first: list[int], tmp_path: Path) -> None:
    video = read_video(film(tmp_path / "x.mp4", numbered(72), rate=rate))
    assert video.source_rate == rate
    assert len(video.frames) == int(72 * 25 / Fraction(rate) + Fraction(1, 2))
    assert numbers(video.frames)[:6] == first
    assert numbers(video.frames)[-1] in (70, 71)


def test_pictures_that_begin_after_the_sound_stay_in_time_with_it(tmp_path: Path) -> None:
    video = read_video(film(tmp_path / "x.mp4", numbered(40), sound_s=3, late_s=0.2))
    assert numbers(video.frames)[:8] == [0, 0, 0, 0, 0, 0, 1, 2]
    assert len(video.frames) == 45


def test_times_count_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    """As of a broadcast, whose clock was not at 0."""
    video = read_video(film(tmp_path / "x.ts", numbered(40), late_s=5))
    assert numbers(video.frames) == list(range(40))


def test_a_box_is_cut_out_and_scaled(tmp_path: Path) -> None:
    images = np.zeros((3, 120, 160), np.uint8)
    images[:, 20:64, 30:74] = np.random.default_rng(0).integers(0, 256, (44, 44), np.uint8)
    path = film(tmp_path / "x.mp4", images)
    part = read_video(path, box=Box(30, 20, 44, 44), size=44).frames
    assert np.abs(part.astype(int) - images[:, 20:64, 30:74]).mean() < 8
    smaller = read_video(path, box=Box(30, 20, 44, 44), size=22).frames
    means = images[:, 20:64, 30:74].reshape(3, 22, 2, 22, 2).mean((2, 4))
    assert smaller.shape == (3, 22, 22)
    assert np.corrcoef(smaller.ravel(), means.ravel())[0, 1] > 0.9
    for box in (Box(120, 20, 44, 44), Box(-1, 0, 9, 9), Box(0, 0, 0, 9)):
        with pytest.raises(InputError, match="does not lie in a picture of 160 x 120"):
            read_video(path, box=box)
    with pytest.raises(InputError, match="160 x 120 pixels, not 88 x 88: say in which box the mouth is"):
        read_video(path)


def test_what_is_no_video_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = film(tmp_path / "good.mp4", numbered(75))
    data = good.read_bytes()
    write_video(tmp_path / "whole.mkv", numbered(75))
    cut = (tmp_path / "whole.mkv").read_bytes()
    holed = bytearray(data)
    holed[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    noise = np.random.default_rng(0).integers(0, 256, (30, 88, 88), np.uint8)
    flipped = bytearray(film(tmp_path / "noise.mp4", noise).read_bytes())
    flipped[len(flipped) // 2] ^= 0x55
    files: dict[str, tuple[bytes, str]] = {
        "text.mp4": (b"hello" * 99, "not a video that can be read"),
        "empty.mp4": (b"", "not a video that can be read"),
        "half.mp4": (data[: len(data) // 2], "not a video that can be read"),
        "half.mkv": (cut[: len(cut) // 2], "cut off: it announces 3.0 s, and 1."),
        "holed.mp4": (bytes(holed), r"damaged after \d\.\d s"),
        "flipped.mp4": (bytes(flipped), r"damaged after 0\.[4-7] s"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_video(tmp_path / name)
    for path, message in ((tmp_path / "none.mp4", "no such file"), (tmp_path, "a folder, not a video")):
        with pytest.raises(InputError, match=message):
            read_video(path)
    with pytest.raises(InputError, match=r"longer than 2 s; cut it into utterances"):
        read_video(good, longest_s=2)
    monkeypatch.setattr(vision, "MOST_PIXELS", 87 * 88)
    with pytest.raises(InputError, match="88 x 88 pixels; at most"):
        read_video(good)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install speechattn\[video\]"):
        read_video(good)


def test_videos_without_lips_are_named(tmp_path: Path) -> None:
    black = np.zeros((30, 88, 88), np.uint8)
    write_video(tmp_path / "black.mkv", black)
    with pytest.raises(InputError, match="nothing is to be seen"):
        read_video(tmp_path / "black.mkv")
    with pytest.raises(InputError, match=r"5\.00 frames a second; lips need at least 10"):
        read_video(film(tmp_path / "slow.mp4", numbered(30), rate=5))
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        sound = file.add_stream("aac", rate=16000)
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        heard.rate = 16000
        file.mux(sound.encode(heard) + sound.encode(None))
    with pytest.raises(InputError, match="no video in it; it has audio"):
        read_video(tmp_path / "sound.mp4")
    with av.open(str(tmp_path / "gap.mkv"), "w", format="matroska") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 88, 88, "gray"
        for i, image in enumerate(numbered(30)):
            frame = av.VideoFrame.from_ndarray(image, "gray")
            frame.pts, frame.time_base = i + 9 * (i > 15), Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(InputError, match=r"damaged: no frames between 0\.60 and 1\.00 s"):
        read_video(tmp_path / "gap.mkv")


def mouths(*lengths: int, size: int = 12) -> Frames:
    """Random pictures; padding is zero."""
    return random_frames(lengths, size, size)


def test_without_training_the_middle_is_cut_out() -> None:
    x = mouths(9, 6)
    y = LipAugment(size=8).eval()(x)
    assert torch.equal(y.values, x.values[:, :, 2:10, 2:10])
    with pytest.raises(ValueError, match="smaller than 13"):
        LipAugment(size=13).eval()(x)
    with pytest.raises(ValueError, match="wanted a probability"):
        LipAugment(flip=2)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("flip", [0.0, 1.0, 0.5])
def test_rows_are_cut_out_at_random_places_and_mirrored(flip: float) -> None:
    x, seen = mouths(*[4] * 60, size=11), set()
    change = LipAugment(size=8, flip=flip, degrees=0, longest=0)
    y = change(x, generator=torch.Generator().manual_seed(0)).values
    for row, whole in zip(y, x.values, strict=True):
        fits = [
            (top, left, mirrored) for top in range(4) for left in range(4) for mirrored in (False, True)
            if (part := whole[:, top : top + 8, left : left + 8]) is not None
            and torch.allclose(row, part.flip(2) if mirrored else part, rtol=0, atol=1e-9)
        ]  # fmt: skip
        assert len(fits) == 1
        seen.add(fits[0])
    assert {place[0] for place in seen} == {place[1] for place in seen} == {0, 1, 2, 3}
    assert {place[2] for place in seen} == {0.0: {False}, 1.0: {True}, 0.5: {False, True}}[flip]
    again = change(x, generator=torch.Generator().manual_seed(0)).values
    assert torch.equal(again, y)


@pytest.mark.usefixtures("precise")
def test_pictures_are_turned_about_their_middle() -> None:
    """A ramp of direction d becomes one of a direction that is turned by at most the angle."""
    places = torch.arange(21.0) - 10
    down, right = places[:, None].expand(21, 21), places.expand(21, 21)
    x = Frames(torch.stack([right, down]).expand(50, 2, 21, 21).contiguous(), torch.ones(50, 2, dtype=torch.bool))
    y = LipAugment(size=21, flip=0, degrees=20, longest=0)(x, generator=torch.Generator().manual_seed(1)).values
    inner = y[:, :, 6:15, 6:15]
    slope_x, slope_y = (inner.diff(dim=n).mean((2, 3)) for n in (3, 2))
    angle = torch.atan2(slope_y[:, 0], slope_x[:, 0]) * 180 / torch.pi
    torch.testing.assert_close(torch.hypot(slope_x[:, 0], slope_y[:, 0]), torch.ones(50), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.atan2(slope_y[:, 1], slope_x[:, 1]) * 180 / torch.pi, angle + 90)
    assert inner[:, :, 4, 4].abs().max() < 1e-9
    assert 15 < angle.abs().max() <= 20
    assert angle.min() < -10 < 10 < angle.max()


@pytest.mark.usefixtures("precise")
def test_stretches_of_time_become_the_mean_picture() -> None:
    lengths = [60, 0, 25, 3] * 50
    x = mouths(*lengths, size=3)
    y = LipAugment(size=3, flip=0, degrees=0)(x, generator=torch.Generator().manual_seed(2))
    assert torch.equal(y.mask, x.mask)
    most = {60: 0, 25: 0, 3: 0}
    for row, whole, n in zip(y.values, x.values, lengths, strict=True):
        changed = [t for t in range(60) if not torch.allclose(row[t], whole[t], rtol=0, atol=1e-9)]
        assert all(t < n for t in changed)
        for t in changed:
            torch.testing.assert_close(row[t], whole[:n].mean(0))
        if n:
            most[n] = max(most[n], len(changed))
    assert most[3] == 3
    assert most[25] == 10
    assert 20 < most[60] <= 30
