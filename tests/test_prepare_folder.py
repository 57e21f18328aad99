"""A folder of one's own: tables, JSON lines and Kaldi folders, and how they are split."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.data.prepare.folder import parse_shares, prepare, split_of
from speechattn.data.prepare.manifests import manifest_path
from speechattn.data.prepare.transcripts import Entry, read_transcripts
from speechattn.errors import InputError
from speechattn.score.utterances import read_utterances


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """Recordings of 2 s: two at 16 kHz, one at 44.1 kHz in stereo."""
    folder = tmp_path / "audio"
    (folder / "b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, rate, channels in (("a.wav", 16000, 1), ("b/a.flac", 16000, 1), ("c.wav", 44100, 2)):
        soundfile.write(folder / name, rng.standard_normal((2 * rate, channels)) * 0.1, rate)
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def cuts(folder: Path, split: str = "train") -> list[dict]:  # type: ignore[type-arg]
    with gzip.open(manifest_path(folder, "own", "cuts", split), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_two_columns_are_path_and_text(audio: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "all.tsv", "a.wav\tone word\nb/a.flac\ttwo “words”\n\nc.wav\tthree\nd.wav\tfour\n")
    assert prepare(audio, tmp_path / "out", table, language="de") == ["train"]
    found = cuts(tmp_path / "out")
    assert [cut["id"] for cut in found] == ["a", "b/a", "c"]
    assert [cut["supervisions"][0]["text"] for cut in found] == ["one word", "two “words”", "three"]
    assert {(cut["supervisions"][0]["language"], cut["supervisions"][0]["speaker"]) for cut in found} == {("de", "own")}
    places = [Path(cut["recording"]["sources"][0]["source"]) for cut in found]
    assert places[:2] == [audio / "a.wav", audio / "b/a.flac"]
    assert places[2].parent == tmp_path / "out" / "own_train"
    assert [cut["duration"] for cut in found] == [2, 2, 2]
    reasons = manifest_path(tmp_path / "out", "own", "skipped", "train").read_text()
    assert reasons.splitlines()[1].startswith("d\t")
    assert "No such file" in reasons


def test_common_voices_header_and_nemos_keys() -> None:
    assert known_names("client_id\tpath\tsentence\tup_votes\tlocale\nx9\ta.mp3\tHallo\t2\tde\n", "cv.tsv") == [
        Entry("a", "a.mp3", "Hallo", "x9", "de")
    ]
    row = {"audio_filepath": "/data/a.wav", "text": "hi", "offset": 0.5, "duration": 1.25, "speaker": 7, "lang": "en"}
    assert known_names(json.dumps(row) + "\n\n", "nemo.jsonl") == [
        Entry("data/a-0.50", "/data/a.wav", "hi", "7", "en", start_s=0.5, duration_s=1.25)
    ]
    row = {"id": "u", "path": "a.wav", "text": "ja", "translation": "yes", "split": "dev", "start": 1, "end": 2.5}
    assert known_names(json.dumps(row), "x.json") == [
        Entry("u", "a.wav", "ja", translation="yes", split="dev", start_s=1.0, duration_s=1.5)
    ]


def known_names(text: str, name: str) -> list[Entry]:
    """What a transcript file of this text holds."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return read_transcripts(write(Path(folder) / name, text))


def test_kaldi_with_segments(audio: Path, tmp_path: Path) -> None:
    kaldi = tmp_path / "kaldi"
    write(kaldi / "wav.scp", "r1 a.wav\nr2 sox x.wav -t wav - |\n")
    write(kaldi / "text", "u1 hello there\nu2 general\nu3 lost\nu4 piped\nu5\n")
    write(kaldi / "segments", "u1 r1 0.00 1.00\nu2 r1 1.00 2.00\nu4 r2 0 1\nu5 r1 0 1\n")
    write(kaldi / "utt2spk", "u1 anna\nu2 ben\nu3 ben\nu4 ben\nu5 ben\n")
    for given_path in (kaldi, kaldi / "text", kaldi / "wav.scp"):
        assert len(read_transcripts(given_path)) == 5
    prepare(audio, tmp_path / "out", kaldi)
    found = cuts(tmp_path / "out")
    assert [(cut["id"], cut["start"], cut["duration"], cut["supervisions"][0]["speaker"]) for cut in found] == [
        ("u1", 0, 1, "anna"), ("u2", 1, 1, "ben"),
    ]  # fmt: skip
    lines = manifest_path(tmp_path / "out", "own", "skipped", "train").read_text().splitlines()[1:]
    assert [line.split("\t")[0] for line in lines] == ["u3", "u4", "u5"]
    assert "segments" in lines[0]
    assert "a command" in lines[1]
    assert "no text" in lines[2]


def test_kaldi_without_segments(audio: Path, tmp_path: Path) -> None:
    write(tmp_path / "k/wav.scp", "u1 c.wav\n")
    write(tmp_path / "k/text", "u1 hello\nu2 gone\n")
    prepare(audio, tmp_path / "out", tmp_path / "k")
    assert [(cut["id"], cut["duration"]) for cut in cuts(tmp_path / "out")] == [("u1", 2)]


def test_what_changed_is_prepared_again_and_nothing_else(audio: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "all.tsv", "path\ttext\tsplit\na.wav\tone\ttrain\nc.wav\ttwo\tdev\n")
    out = tmp_path / "out"
    assert prepare(audio, out, table) == ["train", "dev"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    prepare(audio, out, table)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    write(table, table.read_text().replace("two", "zwei"))
    prepare(audio, out, table)
    changed = {path.name for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert "own_cuts_dev.jsonl.gz" in changed
    assert "own_cuts_train.jsonl.gz" not in changed
    assert cuts(out, "dev")[0]["supervisions"][0]["text"] == "zwei"
    soundfile.write(audio / "c.wav", np.random.default_rng(1).standard_normal(3 * 16000) * 0.1, 16000)
    prepare(audio, out, table)
    assert cuts(out, "dev")[0]["duration"] == 3


def test_no_speaker_is_in_two_parts(audio: Path, tmp_path: Path) -> None:
    lines = [f"u{n}\ta.wav\tword\ts{n % 23}" for n in range(200)]
    table = write(tmp_path / "all.tsv", "\n".join(["id\tpath\ttext\tspeaker", *lines]))
    splits = prepare(audio, tmp_path / "out", table, shares={"dev": 0.2, "test": 0.3})
    assert sorted(splits) == ["dev", "test", "train"]
    speakers = {split: {cut["supervisions"][0]["speaker"] for cut in cuts(tmp_path / "out", split)} for split in splits}
    assert sum(map(len, speakers.values())) == 23
    assert len(set().union(*speakers.values())) == 23


@settings(deadline=None, max_examples=30)
@given(dev=st.floats(0.05, 0.45), test=st.floats(0.05, 0.45), salt=st.integers(0, 1000))
def test_shares_are_met_and_a_key_never_moves_when_others_come(dev: float, test: float, salt: int) -> None:
    shares = {"dev": dev, "test": test}
    parts = [split_of(f"{salt} {n}", shares) for n in range(2000)]
    for name, share in {**shares, "train": 1 - dev - test}.items():
        assert abs(parts.count(name) / 2000 - share) < 0.06
    smaller = [split_of(f"{salt} {n}", {"dev": dev / 2}) for n in range(2000)]
    assert all(large == "dev" for small, large in zip(smaller, parts, strict=True) if small == "dev")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("path\tsomething\na.wav\tx\n", "x.tsv", "line 1: the header has no column for sound or text"),
        ("a.wav\tone\na.wav\n", "x.tsv", "line 2: wanted columns"),
        ("", "x.tsv", "no utterances"),
        ("{}\n", "x.jsonl", "line 1: wanted an object with audio and text"),
        ("{", "x.jsonl", "line 1: not JSON"),
        ("[1]", "x.jsonl", "line 1: wanted"),
        ("u1 a.wav\n", "wav.scp", "text: No such file"),
        ("path\ttext\tsplit\na.wav\tx\tdev\nb.wav\ty\t\n", "x.tsv", "b has none"),
    ],
)
def test_a_transcript_file_that_is_none(audio: Path, tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(audio, tmp_path / "out", write(tmp_path / "in" / name, text))


def test_times_that_are_no_numbers_are_listed(audio: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "x.tsv", "path\ttext\tstart\tend\na.wav\tone\t0\t1\na.wav\ttwo\t1\tlate\n\tthree\t0\t1\n")
    prepare(audio, tmp_path / "out", table)
    lines = manifest_path(tmp_path / "out", "own", "skipped", "train").read_text().splitlines()
    assert len(lines) == 3
    assert "late" in lines[1]
    assert "no sound is named" in lines[2]


def test_what_does_not_go_together(audio: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "x.tsv", "path\ttext\tsplit\na.wav\tone\tdev\n")
    with pytest.raises(InputError, match="leave --split-share away"):
        prepare(audio, tmp_path / "out", table, shares={"dev": 0.1})
    with pytest.raises(InputError, match="no such folder"):
        prepare(tmp_path / "none", tmp_path / "out", table)
    with pytest.raises(InputError, match=r"none\.tsv: No such file"):
        prepare(audio, tmp_path / "out", tmp_path / "none.tsv")
    table.write_bytes(b"\xff\xfe\0")
    with pytest.raises(InputError, match="not UTF-8"):
        prepare(audio, tmp_path / "out", table)
    assert parse_shares(["dev=0.05", "test=0.1"]) == {"dev": 0.05, "test": 0.1}
    for words in (["dev"], ["dev=x"], ["=0.1"], ["dev=1"], ["train=0.5"], ["dev=0.6", "test=0.4"]):
        with pytest.raises(InputError, match="share"):
            parse_shares(words)


def test_line_ends_inside_of_texts_and_marks_of_other_programs(tmp_path: Path) -> None:
    line = json.dumps({"audio": "a.wav", "text": "one\u2028two"}, ensure_ascii=False)
    (one,) = read_transcripts(write(tmp_path / "x.jsonl", f"\ufeff{line}\n"))
    assert one.text == "one\u2028two"
    write(tmp_path / "k/wav.scp", "\ufeffu1 a.wav\n")
    (one,) = read_transcripts(write(tmp_path / "k/text", "\ufeffu1 one\x85two\n"))
    assert (one.id, one.audio, one.text) == ("u1", "a.wav", "one\x85two")


def test_columns_by_any_case_and_the_better_of_two() -> None:
    assert known_names("Path\tSentence\na.wav\tx\n", "x.tsv") == [Entry("a", "a.wav", "x")]
    (one,) = known_names('{"text": "said", "transcript": "other", "audio": "a.wav", "file": "b.wav"}\n', "x.jsonl")
    assert (one.audio, one.text) == ("a.wav", "said")


def test_kaldi_ends_at_minus_one_only(audio: Path, tmp_path: Path) -> None:
    write(tmp_path / "k/wav.scp", "r a.wav\n")
    write(tmp_path / "k/text", "u1 whole\nu2 nothing\nu3 backwards\n")
    write(tmp_path / "k/segments", "u1 r 0.5 -1\nu2 r 0 0\nu3 r 1 0.5\n")
    prepare(audio, tmp_path / "out", tmp_path / "k")
    assert [(cut["id"], cut["start"], cut["duration"]) for cut in cuts(tmp_path / "out")] == [("u1", 0.5, 1.5)]


def test_a_part_that_nobody_falls_into_is_said_before_anything_is_written(audio: Path, tmp_path: Path) -> None:
    lines = [f"u{n}\ta.wav\tword\tme" for n in range(40)]
    table = write(tmp_path / "all.tsv", "\n".join(["id\tpath\ttext\tspeaker", *lines]))
    shares = {"dev": 0.2, "test": 0.2}
    with pytest.raises(InputError, match="there are 1 speakers to share out by chance; take --split-by utterance"):
        prepare(audio, tmp_path / "out", table, shares=shares)
    assert not (tmp_path / "out").exists()
    assert sorted(prepare(audio, tmp_path / "out", table, shares=shares, split_by="utterance")) == [
        "dev", "test", "train",
    ]  # fmt: skip
    other = write(tmp_path / "two.tsv", "a.wav\tone\nb/a.flac\ttwo\n")
    with pytest.raises(InputError, match="no utterance falls into test: there are 2 utterances"):
        prepare(audio, tmp_path / "out", other, shares={"test": 0.001})
    with pytest.raises(InputError, match="--split-by speaker: a has no speaker"):
        prepare(audio, tmp_path / "out", other, split_by="speaker")


def test_relative_folders_and_another_working_folder(
    audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "all.tsv", "a.wav\tone\nc.wav\ttwo\n")
    monkeypatch.chdir(tmp_path)
    prepare(Path("audio"), Path("out"), Path("all.tsv"))
    monkeypatch.chdir("/")
    for one in read_utterances(manifest_path(tmp_path / "out", "own", "cuts", "train")):
        assert len(one.sound.read()[0]) == 32000
