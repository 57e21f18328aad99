"""LRS3 from copies in both layouts, of noise: texts, times, pictures, and what is left out."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare_speech import rows, run

from speechattn.audio.vision import Box, read_video, write_video
from speechattn.data.cuts import Manifest, load_lips
from speechattn.data.prepare.lrs3 import Word, cut, find_clips, prepare, read_text, said
from speechattn.data.prepare.manifests import manifest_path
from speechattn.errors import InputError

av = pytest.importorskip("av")

RATE, FACE = 16000, 224
FLASH = 10  # the picture in which all is bright, and whose sound is loud


def film(path: Path, n: int, *, flash: int = FLASH, seed: int = 0) -> None:
    """Faces as they are published: H.264 and AAC, 25 a second; random and dark, but for one picture and its sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    maker = np.random.default_rng(seed)
    heard = (0.01 * maker.standard_normal(n * RATE // 25)).astype(np.float32)
    heard[flash * 640 : (flash + 1) * 640] *= 50
    with av.open(str(path), "w", format="mp4") as file:
        seen = file.add_stream("h264", rate=25)
        seen.height = seen.width = FACE
        seen.pix_fmt = "yuv420p"
        sound = file.add_stream("aac", rate=RATE, layout="mono")
        for i in range(n):
            shade = 200 if i == flash else 40
            image = np.full((FACE, FACE, 3), shade, np.uint8)
            image[:, : FACE // 2] //= 2  # the left half is darker
            image[::32] += maker.integers(0, 20, (7, FACE, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            file.mux(seen.encode(frame))
        file.mux(seen.encode())
        frame = av.AudioFrame.from_ndarray(heard[None], "fltp", "mono")
        frame.rate, frame.pts = RATE, 0
        file.mux(sound.encode(frame))
        file.mux(sound.encode())


def write_text(path: Path, text: str, words: list[tuple[str, float, float]] | None = None) -> None:
    lines = [f"Text:  {text}", "Conf:  4", ""]
    if words is not None:
        lines += ["WORD START END ASDSCORE", *(f"{word} {start:.2f} {end:.2f} 5.1" for word, start, end in words)]
    path.write_text("\n".join(lines) + "\n")


LONG = [("SO", 0.2, 0.4), ("WE", 0.4, 0.6), ("GO", 1.2, 1.4), ("ON", 1.4, 1.6), ("{LG}", 1.6, 1.7), ("NOW", 2.6, 2.8)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lrs3")
    for split, talks in (("trainval", ("aaa", "bbb")), ("test", ("ccc",))):
        for talk in talks:
            for number in ("00001", "00002"):
                film(root / split / talk / f"{number}.mp4", 20 + int(number), seed=int(number))
                write_text(root / split / talk / f"{number}.txt", "IT'S 20 {NS} {YEARS}")
    film(root / "pretrain" / "ddd" / "00001.mp4", 75, flash=35)  # of the second piece
    write_text(root / "pretrain" / "ddd" / "00001.txt", "SO WE GO ON {LG} NOW", LONG)
    film(root / "pretrain" / "ddd" / "00002.mp4", 20)
    write_text(root / "pretrain" / "ddd" / "00002.txt", "SHORT", [("SHORT", 0.1, 0.3)])
    return root


def skipped(folder: Path, split: str) -> dict[str, str]:
    lines = manifest_path(folder, "lrs3", "skipped", split).read_text().splitlines()[1:]
    return dict(line.split("\t") for line in lines)


def heard(row: dict[str, Any]) -> np.ndarray:
    samples, rate = soundfile.read(row["recording"]["sources"][0]["source"], dtype="float32")
    assert rate == RATE
    assert samples.ndim == 1
    return samples


def video(row: dict[str, Any]) -> np.ndarray:
    found = read_video(Path(row["supervisions"][0]["custom"]["video"]), size=96)
    assert found.source_rate == 25
    return found.frames


def together(samples: np.ndarray, frames: np.ndarray, n: int) -> bool:
    """Picture and 40 ms of sound number `n` are those that stand out."""
    loud = np.square(samples[: len(samples) // 640 * 640]).reshape(-1, 640).mean(1)
    assert loud.max() > 20 * np.median(loud)
    bright = frames.mean((1, 2))
    return int(loud.argmax()) == int(bright.argmax()) == n


def test_a_part_as_published(source: Path, tmp_path: Path) -> None:
    assert run("lrs3", source, tmp_path, "--split", "trainval", "--jobs", 2) == 0
    found = rows(tmp_path, "lrs3", "trainval")
    assert [row["id"] for row in found] == [f"trainval-{t}-{n}" for t in ("aaa", "bbb") for n in ("00001", "00002")]
    for row, n in zip(found, [21, 22, 21, 22], strict=True):
        (supervision,) = row["supervisions"]
        assert supervision["text"] == "IT'S 20 YEARS"
        assert (supervision["speaker"], supervision["language"]) == (row["id"].split("-")[1], "en")
        assert row["duration"] == pytest.approx(n / 25, abs=0.07)  # AAC comes in frames of 64 ms
        frames = video(row)
        assert frames.shape == (n, 96, 96)
        assert together(heard(row), frames, FLASH)
    assert not skipped(tmp_path, "trainval")
    manifest = Manifest.read([manifest_path(tmp_path, "lrs3", "cuts", "trainval")])
    lips = load_lips(manifest[0], round(found[0]["duration"] * RATE), size=96)
    assert lips is not None
    assert np.array_equal(lips[:21], video(found[0]))


def test_the_box_is_what_is_seen(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path, "test")
    (middle, _) = (video(row) for row in rows(tmp_path, "lrs3", "test"))
    left, right = (middle[0][:, side].mean() for side in (slice(0, 40), slice(56, 96)))
    assert left < right - 10, "the edge between the halves is in the middle"
    prepare(source, tmp_path, "test", box=Box(112, 0, 112, 112))
    found = rows(tmp_path, "lrs3", "test")
    assert abs(float(video(found[0])[0][:, :40].mean()) - float(right)) < 8, "the right half alone"
    with pytest.raises(InputError, match="does not lie in a picture of 224 x 224"):
        prepare(source, tmp_path / "out", "test", box=Box(150, 0, 112, 112))
    with pytest.raises(SystemExit):
        run("lrs3", source, tmp_path, "--split", "test", "--box", "1,2,3")


def test_long_clips_are_cut_between_words(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path, "pretrain", longest_s=1.5)
    found = {row["id"]: row for row in rows(tmp_path, "lrs3", "pretrain")}
    said = {name: row["supervisions"][0]["text"] for name, row in found.items()}
    assert said == {
        "pretrain-ddd-00001-0": "SO WE", "pretrain-ddd-00001-1": "GO ON", "pretrain-ddd-00001-2": "NOW",
        "pretrain-ddd-00002": "SHORT",
    }  # fmt: skip
    first, second, third = (found[f"pretrain-ddd-00001-{i}"] for i in range(3))
    assert [row["duration"] for row in (first, second)] == [22 / 25, 32 / 25]  # the middle of a pause, 0.9 s; 2.15 s
    assert [len(video(row)) for row in (first, second)] == [22, 32]
    assert together(heard(second), video(second), 35 - 22)
    assert third["duration"] == pytest.approx(75 / 25 - 54 / 25, abs=0.05)


def test_what_cannot_be_used_is_listed(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "trainval" / "aaa"
    copy.mkdir(parents=True)
    for number in range(1, 6):
        (copy / f"{number}.mp4").write_bytes((source / "trainval" / "aaa" / "00001.mp4").read_bytes())
        write_text(copy / f"{number}.txt", "FINE")
    (copy / "2.txt").unlink()
    (copy / "3.mp4").write_bytes(b"no video" * 100)
    (copy / "4.mp4").unlink()
    (copy / "5.txt").write_text("said without a mark\n")
    prepare(tmp_path / "copy", tmp_path / "out", "trainval")
    assert [row["id"] for row in rows(tmp_path / "out", "lrs3", "trainval")] == ["trainval-aaa-1"]
    found = {name[-1]: reason for name, reason in skipped(tmp_path / "out", "trainval").items()}
    assert [*found] == ["2", "3", "4", "5"]
    for number, reason in (("2", "No such file"), ("3", "not"), ("4", "no such file"), ("5", "Text:")):
        assert reason in found[number]
    for split, reason in (("test", "no folder test"), ("dev", "wanted one of pretrain, trainval, test")):
        with pytest.raises(InputError, match=reason):
            prepare(tmp_path / "copy", tmp_path / "out", split)
    (tmp_path / "copy" / "test").mkdir()
    with pytest.raises(InputError, match=r"no TALK/NUMBER\.mp4"):
        prepare(tmp_path / "copy", tmp_path / "out", "test")


def test_some_talks_are_left_for_validation_and_a_second_run_makes_nothing(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path, "trainval", valid_talks=1) == ["trainval", "valid"]
    parts = {name: {row["supervisions"][0]["speaker"] for row in rows(tmp_path, "lrs3", name)}
             for name in ("trainval", "valid")}  # fmt: skip
    assert parts == {"trainval": {"aaa"}, "valid": {"bbb"}}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    prepare(source, tmp_path, "trainval", valid_talks=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    gone, kept, *_ = sorted(tmp_path.glob("video/*/trainval/*/*.mkv"))
    gone.unlink()
    prepare(source, tmp_path, "trainval", valid_talks=1)
    assert gone.is_file()
    assert kept.stat().st_mtime_ns == before[kept]
    with pytest.raises(InputError, match="there are 2"):
        prepare(source, tmp_path, "trainval", valid_talks=2)


def test_mouths_that_others_have_cut_out_are_used_where_they_lie(tmp_path: Path) -> None:
    maker = np.random.default_rng(0)
    videos = tmp_path / "lrs3" / "lrs3_video_seg16s" / "pretrain" / "eee"
    texts = tmp_path / "lrs3" / "lrs3_text_seg16s" / "pretrain" / "eee"
    videos.mkdir(parents=True)
    texts.mkdir(parents=True)
    for i, size in enumerate((96, 96, 80)):
        write_video(videos / f"0000{i}_00.mp4", maker.integers(0, 255, (15, size, size), np.uint8))
        soundfile.write(videos / f"0000{i}_00.wav", 0.1 * maker.standard_normal(15 * 640), RATE)
        (texts / f"0000{i}_00.txt").write_text(f"WORDS {i}")
    out = tmp_path / "out"
    prepare(tmp_path / "lrs3", out, "pretrain")
    found = rows(out, "lrs3", "pretrain")
    assert [row["supervisions"][0]["text"] for row in found] == ["WORDS 0", "WORDS 1"]
    assert [row["supervisions"][0]["custom"]["video"] for row in found] == [
        str(videos / f"0000{i}_00.mp4") for i in (0, 1)
    ]
    assert found[0]["recording"]["sources"][0]["source"] == str(videos / "00000_00.wav")
    assert "80 x 80" in skipped(out, "pretrain")["pretrain-eee-00002_00"]
    assert not (out / "video").exists()
    with pytest.raises(InputError, match="no box"):
        prepare(tmp_path / "lrs3", out, "pretrain", box=Box(0, 0, 96, 96))
    (tmp_path / "lrs3" / "lrs3_video_seg24s").mkdir()
    with pytest.raises(InputError, match="seg16s and lrs3_video_seg24s"):
        find_clips(tmp_path / "lrs3", "pretrain")


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "SO WE GO ON {LG} NOW", LONG)
    text, words = read_text(path)
    assert text == "SO WE GO ON NOW"
    assert words[0] == Word("SO", 0.2, 0.4)
    assert len(words) == 6
    write_text(path, "A", [("A", 0.5, 0.1)])
    with pytest.raises(InputError, match="go back"):
        read_text(path)
    path.write_text("Text: A\n\nWORD START END ASDSCORE\nA here 0.2 1\n")
    with pytest.raises(InputError, match="line 4"):
        read_text(path)
    assert said("{NS} a {B}{CG} c") == "a B c"
    with pytest.raises(InputError, match=r"a word of 3\.0 s: LONG"):
        cut([Word("LONG", 0.0, 3.0)], 4.0, 2.0)


@given(
    lengths=st.lists(st.tuples(st.floats(0, 3), st.floats(0.05, 1)), min_size=1, max_size=30),
    longest=st.integers(2, 8), rest=st.floats(0, 5),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_pieces_are_all_words_in_order_and_none_is_longer(
    lengths: list[tuple[float, float]], longest: int, rest: float
) -> None:
    words, at = [], 0.0
    for i, (pause, length) in enumerate(lengths):
        words.append(Word(f"w{i}", at + pause, at + pause + length))
        at += pause + length
    pieces = cut(words, at + rest, longest)
    assert " ".join(piece.text for piece in pieces) == " ".join(word.text for word in words)
    times = {word.text: word for word in words}
    end = 0
    for piece in pieces:
        assert piece.last is not None
        assert end <= piece.first < piece.last <= piece.first + 25 * longest
        inside = [times[name] for name in piece.text.split()]
        assert piece.first / 25 <= inside[0].start_s + 0.021
        assert piece.last / 25 >= inside[-1].end_s - 0.021
        end = piece.last


def test_lhotse_reads_them(source: Path, tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    prepare(source, tmp_path, "test")
    path = manifest_path(tmp_path, "lrs3", "cuts", "test")
    for cut_ in lhotse.CutSet.from_file(path):
        lhotse.qa.validate(cut_)
    with gzip.open(path, "rt") as file:
        assert len([json.loads(line) for line in file]) == 2
