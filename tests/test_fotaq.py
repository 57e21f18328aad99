"""The corpus: its script, its recordings, its manifests."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechattn.data import fotaq as corpus
from speechattn.data.fotaq import Game, prepare, read_split, split_line
from speechattn.data.streams import join, read_word_ends
from speechattn.errors import InputError
from speechattn.score.lag import lag_words


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Hello.*02", ["Hello.", ""]),
        ("One*03 two", ["One", "two"]),
        ("*AO*02Eep!", ["", "", "Eep!"]),
        ("Go*XY00(237,112) there*FL", ["Go", "there", ""]),
        ("", [""]),
    ],
)
def test_every_command_ends_a_segment_also_an_empty_one(text: str, parts: list[str]) -> None:
    assert split_line(text) == parts


def make_game(path: Path, lines: list[tuple[int, str]]) -> list[str]:
    """A game of one dialogue, written independently of the reader; the names of its recordings."""
    body = bytearray(struct.pack(">5h", 0, 0, 57, 0, len(lines)) + bytes(22))
    struct.pack_into(">H", body, 22, 32)
    for number, text in lines:
        body += struct.pack(">HHB", 0, number, len(text)) + text.encode()
        body += bytes(-len(body) % 4)
    sound = io.BytesIO()
    soundfile.write(sound, np.random.default_rng(0).standard_normal(11025) * 0.1, 11025, format="MP3")
    names = [f"57{number:04X}P{k + 1:X}" for number, text in lines for k in range(text.count("*") + 1)]
    files = {"TAM1.DOG": bytes(20) + bytes(body), **{f"{name}.SB": sound.getvalue() for name in names[::2]}}
    table, blob, offset = b"", b"", 15 + 21 * len(files)
    for name, data in files.items():
        table += struct.pack(">12sBII", name.encode(), 0, offset + len(blob), len(data))
        blob += data
    path.write_bytes(b"QTBLCEM10\0" + bytes(2) + b"\1" + struct.pack(">H", len(files)) + table + blob)
    return names[::2]


def test_clips_of_a_small_game_and_their_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = make_game(tmp_path / "queen.1c", [(1, "Hello Joe.*02How are you?*AOFine."), (10, "Bye.*WTGo")])
    game = Game(tmp_path / "queen.1c")
    clips = {clip.name: clip for clip in game.clips()}
    assert list(clips) == recorded
    assert clips["570001P1"].text == "Hello Joe."
    assert clips["570001P3"].text == "Fine."
    assert clips["57000AP2"].text == "Go"
    assert {clip.split for clip in clips.values()} == {"test"}
    monkeypatch.setattr(corpus, "SHA256", hashlib.sha256((tmp_path / "queen.1c").read_bytes()).hexdigest())
    prepare(tmp_path, ("test",))
    monkeypatch.setattr(corpus, "fetch", lambda folder: pytest.fail("prepared already"))
    prepare(tmp_path, ("test",))
    lines = read_split(tmp_path, "test")
    assert [line.text for line in lines] == ["Hello Joe.", "Fine.", "Go"]
    assert soundfile.info(lines[0].path).samplerate == 16000
    lhotse = pytest.importorskip("lhotse")
    recordings = lhotse.RecordingSet.from_file(tmp_path / "fotaq_recordings_test.jsonl.gz")
    supervisions = lhotse.SupervisionSet.from_file(tmp_path / "fotaq_supervisions_test.jsonl.gz")
    lhotse.validate_recordings_and_supervisions(recordings, supervisions)
    cuts = lhotse.CutSet.from_file(tmp_path / "fotaq_cuts_test.jsonl.gz")
    lhotse.validate(cuts, read_data=True)
    said = [cut.supervisions[0] for cut in cuts]
    assert {(one.language, one.speaker, one.custom["dialogue"]) for one in said} == {("en", "TAM", "TAM1")}
    stream = join("x", lines)
    assert stream.text == "Hello Joe. Fine. Go"
    assert [len(stream.samples) > 16000 * s for s in stream.starts_s] == [True] * 3
    heard = stream.heard({lines[1].name: [0.5]})
    assert (heard[0].word, heard[0].end) == ("fine", stream.starts_s[1] + 0.5)


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "queen.1c").write_bytes(b"x" * 99)
    with pytest.raises(InputError, match="SHA-256"):
        prepare(tmp_path, ("test",))
    with pytest.raises(InputError, match="not the English talkie"):
        Game(tmp_path / "queen.1c")


def test_where_there_is_no_package_system_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="apt-get is not installed"):
        prepare(tmp_path, ("test",))


def test_word_ends_fit_the_recordings(fotaq: Path) -> None:
    ends, lines = read_word_ends(), read_split(fotaq, "test")
    assert len(lines) == 538
    aligned = [line for line in lines if line.name in ends]
    assert len(aligned) > 400
    for line in aligned:
        assert len(ends[line.name]) == len(lag_words(line.text))
        assert ends[line.name] == sorted(ends[line.name])
        assert not ends[line.name] or ends[line.name][-1] <= line.duration_s + 0.02


def test_every_clip_has_an_id_of_its_own(tmp_path: Path) -> None:
    make_game(tmp_path / "queen.1c", [(1, "Hello Joe.*02How are you?")])
    game = Game(tmp_path / "queen.1c")
    game.files["*570001P1.SB"] = game.files["570001P1.SB"]  # another file that was recorded for the same words
    assert [game.utterance(clip).id for clip in game.clips()] == ["TAM1-570001P1"]


APT = """#!/bin/sh
for word in "$@"; do case "$word" in Dir::State=/*|Dir::Cache=/*) ls -d "${word#*=}" >/dev/null || exit 1;;
Dir::State=*|Dir::Cache=*) echo "List directory /$word is missing" >&2; exit 100;; esac; done
case "$*" in *download*) touch flight-of-the-amazon-queen_1_all.deb;; esac
"""
DPKG = """#!/bin/sh
test -f "$2" || exit 1
mkdir -p usr/share/doc/flight-of-the-amazon-queen usr/share/scummvm/flight-of-the-amazon-queen
echo free > usr/share/doc/flight-of-the-amazon-queen/copyright
cp "$GAME" usr/share/scummvm/flight-of-the-amazon-queen/queen.1c
"""


def test_a_relative_folder_and_its_manifests_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, program in (("apt-get", APT), ("dpkg-deb", DPKG)):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    make_game(tmp_path / "game", [(1, "Hello Joe.*02How are you?")])
    monkeypatch.setattr(corpus, "SHA256", hashlib.sha256((tmp_path / "game").read_bytes()).hexdigest())
    monkeypatch.setenv("GAME", str(tmp_path / "game"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    old = Path("data/fotaq/package/flight-of-the-amazon-queen_0_all.deb")  # of a run that was killed
    old.parent.mkdir(parents=True)
    old.touch()
    prepare(Path("data/fotaq"), ("test",))
    assert (tmp_path / "data/fotaq/LICENCE").read_text() == "free\n"
    assert not Path("data/fotaq/package").exists()
    monkeypatch.chdir("/")
    (line,) = read_split(tmp_path / "data/fotaq", "test")
    assert soundfile.info(line.path).samplerate == 16000
    path = tmp_path / "data/fotaq/fotaq_cuts_test.jsonl.gz"
    said = gzip.decompress(path.read_bytes()).replace(f"{tmp_path}/data/fotaq/".encode(), b"")
    path.write_bytes(gzip.compress(said))  # paths relative to the manifest
    (tmp_path / "data").rename(tmp_path / "moved")
    (line,) = read_split(tmp_path / "moved/fotaq", "test")
    assert soundfile.info(line.path).samplerate == 16000
    monkeypatch.setattr(corpus, "fetch", lambda folder: pytest.fail("prepared already"))
    prepare(tmp_path / "moved/fotaq", ("test",))
