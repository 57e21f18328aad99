"""The corpus of Beneath a Steel Sky: its packed speech, and which of Whisper's texts are labels."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from math import log
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.cross.soft import Soft, SoftState
from speechattn.errors import InputError
from speechattn.frames import Frames, Memory

ROOT = Path(__file__).parents[1]
Step = tuple[bytes, int, int]  # literals, and how far back a copy of so many bytes begins


def recipe() -> ModuleType:
    sys.path.insert(0, str(ROOT / "recipes" / "embedded"))
    try:
        return import_module("steel_sky")
    finally:
        sys.path.pop(0)


sky = recipe()


class Packer:
    """Writes what `Packed` reads: a word's place is kept free when its first bit is written."""

    def __init__(self) -> None:
        self.out, self.place, self.room = bytearray(), 0, 0

    def bits(self, value: int, n: int) -> None:
        for i in range(n):
            if not self.room:
                self.place, self.room = len(self.out), 16
                self.out += bytes(2)
            at = 16 - self.room
            self.out[self.place + at // 8] |= (value >> i & 1) << at % 8
            self.room -= 1

    def codes(self) -> None:
        """Symbol s has the code of s ones and a zero; the last two are of one length."""
        self.bits(15, 5)
        for length in [*range(1, 15), 14]:
            self.bits(length, 4)

    def value(self, value: int) -> None:
        symbol = value.bit_length()
        self.bits((1 << symbol) - 1, min(symbol + 1, 14))
        if symbol > 1:
            self.bits(value - (1 << symbol - 1), symbol - 1)

    def block(self, steps: Sequence[Step], rest: bytes) -> None:
        for _ in range(3):
            self.codes()
        self.bits(len(steps) + 1, 16)
        for literals, back, count in steps:
            self.value(len(literals))
            self.out += literals
            self.value(back - 1)
            self.value(count - 2)
        self.value(len(rest))
        self.out += rest


def packed(blocks: Sequence[tuple[Sequence[Step], bytes]]) -> tuple[bytes, bytes]:
    """What `blocks` are packed, and what they are unpacked, byte by byte."""
    packer, plain = Packer(), bytearray()
    packer.bits(0, 2)
    for steps, rest in blocks:
        packer.block(steps, rest)
        for literals, back, count in steps:
            plain += literals
            for _ in range(count):
                plain.append(plain[-back])
        plain += rest
    head = struct.pack(">4sIIHHBB", b"RNC\1", len(plain), len(packer.out), 0, 0, 0, len(blocks))
    return head + bytes(packer.out), bytes(plain)


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[list[Step], bytes]]:
    blocks, size = [], 0
    for _ in range(draw(st.integers(1, 3))):
        steps = []
        for _ in range(draw(st.integers(0, 6))):
            literals = draw(st.binary(min_size=0 if size else 1, max_size=40))
            size += len(literals)
            steps.append((literals, draw(st.integers(1, size)), draw(st.integers(2, 90))))
            size += steps[-1][2]
        rest = draw(st.binary(max_size=20))
        size += len(rest)
        blocks.append((steps, rest))
    return blocks


@settings(deadline=None, max_examples=60)
@given(streams())
def test_unpacks_literals_and_copies_that_run_into_themselves(blocks: list[tuple[list[Step], bytes]]) -> None:
    data, plain = packed(blocks)
    assert sky.Packed(data).unpack() == plain


def test_what_is_not_packed_or_broken_is_said() -> None:
    data, _ = packed([([(b"abc", 2, 5)], b"d")])
    with pytest.raises(InputError, match="not packed"):
        sky.Packed(b"RIFF" + data[4:])
    with pytest.raises(InputError, match="9 bytes unpacked, 10 expected"):
        sky.Packed(data[:7] + b"\x0a" + data[8:]).unpack()


def wave(samples: int) -> bytes:
    return (128 + 100 * np.sin(np.arange(samples) * 0.3)).astype(np.uint8).tobytes()


def make_game(folder: Path, sounds: dict[int, bytes]) -> None:
    """Synthetic: every second file lies where only units of 16 bytes can say."""
    table, disk = struct.pack("<I", len(sounds)), bytearray(b"front")
    for i, (number, sound) in enumerate(sounds.items()):
        body = bytes(22) + packed([([], sound[:4000]), ([], sound[4000:])])[0]
        disk += bytes(-len(disk) % 16)
        place = len(disk) // 16 | 1 << 23 if i % 2 else len(disk)
        table += struct.pack("<H", number) + place.to_bytes(3, "little") + (len(body) | 1 << 22).to_bytes(3, "little")
        disk += body
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sky.dnr").write_bytes(table)
    (folder / "sky.dsk").write_bytes(disk)


def test_speech_is_found_and_heard(tmp_path: Path) -> None:
    make_game(tmp_path, {50007: wave(8000), 51000: wave(6600), 60111: wave(7000), 12: wave(6000)})
    game = sky.Game(tmp_path)
    assert game.clips() == [50007, 51000]
    for number, samples in ((50007, 8000), (51000, 6600)):
        x = game.audio(number)
        assert abs(len(x) - samples * 16000 / 11025) <= 1
        at = np.arange(2000, 8000)
        want = 100 / 128 * np.sin(at * 0.3 * 11025 / 16000)
        assert np.abs(x[at] - want).max() < 0.02
    (tmp_path / "sky.dnr").write_bytes(b"\1\0\0\0")
    with pytest.raises(InputError, match="not the table"):
        sky.Game(tmp_path)


def test_files_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_game(tmp_path, {50007: wave(8000)})
    with pytest.raises(InputError, match=r"sky\.dnr: its SHA-256 is"):
        sky.fetch(tmp_path)
    sums = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in sky.SHA256}
    monkeypatch.setattr(sky, "SHA256", sums)
    assert sky.fetch(tmp_path).clips() == [50007]


@pytest.mark.parametrize(
    ("first", "second", "seconds", "fault"),
    [
        ("I'm the bouncer.", "i am the bouncer", 1.2, None),
        ("", "", 1.0, "empty"),
        ("Never mind.", "Never mine.", 1.0, "two texts"),
        ("Never mind.", "", 1.0, "two texts"),
        ("one way in and one way out of the town", "one way in and one way out of a town", 3.0, None),  # 1 in 10
        ("way in and one way out of the town", "way in and one way out of a town", 3.0, "two texts"),  # 1 in 9
        ("Thanks, Ann. Thanks, Ann. Thanks, Ann.", "Thanks, Ann. Thanks, Ann. Thanks, Ann.", 3.0, "a loop"),
        ("No, no, no!", "No, no, no!", 1.0, None),
        ("I see the door over there now", "I see the door over there now", 1.0, "no pace of speech"),  # 7 words
        ("Well.", "Well.", 2.1, "no pace of speech"),
    ],
)
def test_a_label_is_what_was_heard_twice(first: str, second: str, seconds: float, fault: str | None) -> None:
    assert sky.Label("a", first, second).fault(seconds) == fault


def test_listening_goes_on_and_the_parts_hold_every_clip_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_game(tmp_path, {50001: wave(9000), 50002: wave(14000), 50003: wave(10000), 50004: wave(4000)})
    sums = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in sky.SHA256}
    monkeypatch.setattr(sky, "SHA256", sums)
    heard: list[list[int]] = []

    class Teacher:
        def __init__(self, model: object) -> None: ...

        def texts(self, clips: Sequence[np.ndarray]) -> list[str]:
            heard.append([len(clip) for clip in clips])
            return [{50002: "Two words."}.get(50002 if len(x) > 18000 else 0, f"{len(x)} of it.") for x in clips]

    monkeypatch.setattr(sky, "Teacher", Teacher)
    monkeypatch.setattr(sky, "load", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["steel_sky.py", str(tmp_path)])
    (tmp_path / "labels.jsonl").write_text(json.dumps({"id": "50001", "first": "", "second": ""}) + "\n")
    sky.main()
    assert len(heard) == 2
    (slow, fast) = heard
    assert np.allclose(np.array(slow) / fast, 1.1, atol=1e-3)
    assert len(slow) == 2
    rows = {part: cuts(tmp_path, part) for part in ("all", "train", "unlabelled")}
    assert [(row["id"], row["text"]) for row in rows["train"]] == [("50002", "Two words.")]
    assert [(row["id"], row["text"]) for row in rows["unlabelled"]] == [("50001", "?"), ("50003", "?")]
    assert [row["id"] for row in rows["all"]] == ["50001", "50002", "50003"]
    assert "50004\t0.36 s: shorter than 0.5 s" in (tmp_path / "steelsky_skipped_all.tsv").read_text()
    assert "'kept': 1, 'two texts': 1" in capsys.readouterr().out
    sky.main()
    assert len(heard) == 2


def cuts(folder: Path, part: str) -> list[dict[str, str]]:
    with gzip.open(folder / f"steelsky_cuts_{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["supervisions"][0] for line in file]


def test_batches_hold_every_clip_once_and_like_with_like(tmp_path: Path) -> None:
    def clips() -> Iterator[Path]:
        for i in range(11):
            soundfile.write(tmp_path / f"{i}.wav", np.zeros(100 * (i * 7 % 11 + 1)), 16000)
            yield tmp_path / f"{i}.wav"

    found = sky.batches(list(clips()), 3)
    lengths = sorted(sorted(soundfile.info(path).frames for path in batch) for batch in found)
    assert lengths == [[100, 200, 300], [400, 500, 600], [700, 800, 900], [1000, 1100]]


def test_frames_that_are_read_as_one_weigh_as_many() -> None:
    torch.manual_seed(0)
    soft, sound = Soft(8, 2), torch.randn(3, 7, 8)
    silence = torch.randn(1, 4, 8)

    def read(x: torch.Tensor) -> SoftState:
        return soft.read(Memory.of(Frames(x, torch.ones(x.shape[:2], dtype=torch.bool))))

    own, query = read(sound), torch.randn(3, 1, 8)
    whole = own.then(read(silence.repeat_interleave(sky.THIN, 1)), 0)
    thin = sky.Teacher.thinned(read(silence.repeat_interleave(sky.THIN, 1)))
    assert thin.key.shape[2] == 4
    assert torch.allclose(thin.mask, torch.tensor(log(sky.THIN)))
    short = SoftState(own.key, own.value, torch.zeros(own.mask.shape)).then(thin, 0)
    want, _ = soft.attend(query, whole, (), heads=[])
    got, _ = soft.attend(query, short, (), heads=[])
    torch.testing.assert_close(got.context, want.context)
