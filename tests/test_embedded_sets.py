"""The test sets of the shipped model: what is read out of packages, and what the benchmark makes of texts."""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.data.fotaq import Line
from speechattn.data.prepare.debian import sha256
from speechattn.data.prepare.manifests import Utterance, write_manifests
from speechattn.errors import InputError

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "recipes" / "embedded"), str(ROOT / "benchmarks")]
import model  # noqa: E402
import model_runs  # noqa: E402
import quiet  # noqa: E402
import sources  # noqa: E402
import testsets  # noqa: E402

RATE = 16000


def tone(seconds: float) -> np.ndarray:
    return (0.1 * np.sin(np.arange(round(seconds * RATE)) / 5)).astype(np.float32)


def test_prompts_are_sentences() -> None:
    text = """; Core Sounds

agent-pass: Please enter your password followed by the pound key.
beep: [this is a simple beep tone]
time: The time will be exactly...
thanks: Thank you.
odd: Press * or (if you must) the other key now.
"""
    assert testsets.prompts(text) == {"agent-pass": "Please enter your password followed by the pound key."}


def test_lines_of_sphinx() -> None:
    text = "<s> he was not  </s> (a_1-0880)\n<s> ten of clubs </s> (001)\nnothing\n"
    assert testsets.sphinx_lines(text) == {"a_1-0880": "he was not", "001": "ten of clubs"}


def test_verses_go_together() -> None:
    rows = [("0.0", "1.0", "1"), ("1.0", "2.5", "From"), ("2.5", "3.0", "fairest"), ("3.0", "4.0", "creatures")]
    said = json.dumps({"fragments": [{"begin": b, "end": e, "lines": [text]} for b, e, text in rows]})
    assert testsets.verses(said, 2) == [(1.0, 3.0, "From fairest"), (3.0, 4.0, "creatures")]


@settings(deadline=None, max_examples=30)
@given(st.permutations([f"name-{i}" for i in range(12)]), st.integers(1, 12))
def test_choice_does_not_depend_on_the_order(names: list[str], n: int) -> None:
    assert testsets.spread(names, n) == testsets.spread(sorted(names), n)
    assert len(set(testsets.spread(names, n))) == n
    assert set(testsets.spread(names, n - 1)) < set(testsets.spread(names, n))


def test_sentences_were_kept_out() -> None:
    lines = testsets.SENTENCES.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) >= 100
    assert all(line == " ".join(line.split()) and not any(c.isdigit() for c in line) for line in lines)
    assert len(testsets.VOICES) == len(set(testsets.VOICES)) >= 8


def test_sets_are_read_back(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "poem.wav", tone(3.0), RATE)
    written = [
        testsets.utterance("1", tmp_path / "poem.wav", "from fairest", "sonnet", start_s=0.5, duration_s=1.25),
        Utterance("mary-1", lambda: tone(0.75), "mary rolled", "mary", "en"),
    ]
    write_manifests(tmp_path, "read", "test", written)
    first, second = testsets.read_lines(tmp_path, "read")
    assert (first.name, first.text, first.speaker, first.dialogue) == ("sonnet-1", "from fairest", "sonnet", "read")
    assert np.array_equal(testsets.read(first.path), testsets.read(tmp_path / "poem.wav")[8000:28000])
    assert (second.duration_s, len(testsets.read(second.path))) == (0.75, 12000)


def test_set_that_was_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"read_cuts_test.*testsets\.py"):
        testsets.read_lines(tmp_path, "read")


def line(folder: Path, name: str, seconds: float) -> Line:
    path = folder / f"{name}.wav"
    soundfile.write(path, tone(seconds), RATE)
    return Line(name, path, "read", "x", name, seconds)


def test_hour_repeats_in_one_order(tmp_path: Path) -> None:
    lines = [line(tmp_path, f"clip{i}", 1.0 + i / 4) for i in range(4)]
    stream = testsets.hour(lines, 0.5)
    assert 28 < stream.duration_s < 36
    said = [one.name for one in stream.lines]
    assert said[:4] == said[4:8]
    assert sorted(said[:4]) == [one.name for one in lines]
    assert testsets.hour(lines, 0.5).text == stream.text


def test_noises_are_what_they_are_called() -> None:
    found = testsets.noises(0.2)
    silence, noise = found["silence"], found["noise"]
    assert len(silence) == len(noise) == round(0.2 * 60 * RATE)
    assert not silence[: len(silence) // 2].any()
    assert 0 < np.abs(silence).max() < 1e-3
    parts = noise.reshape(4, -1)
    assert np.allclose(np.sqrt(np.mean(parts**2, 1)), 10 ** (-30 / 20), rtol=1e-3)
    low = [float((np.abs(np.fft.rfft(part)) ** 2)[: len(part) // 160].sum()) for part in parts]  # below 100 Hz
    share = [one / float((np.abs(np.fft.rfft(part)) ** 2).sum()) for one, part in zip(low, parts, strict=True)]
    assert share[0] < 0.03 < share[1] < share[2]
    assert share[3] > 0.6
    assert np.array_equal(noise, testsets.noises(0.2)["noise"])


def archive(folder: Path) -> Path:
    (folder / "inside.txt").write_text("words")
    with tarfile.open(folder / "p-1.tar.gz", "w:gz") as file:
        file.add(folder / "inside.txt", "p-1/inside.txt")
    return folder / "p-1.tar.gz"


def test_package_is_checked_and_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = archive(tmp_path), list[str]()

    def get(source: sources.Source, _: Path) -> Path:
        calls.append(source.name)
        return made

    monkeypatch.setattr(sources, "sdist", get)
    wrong = sources.Source("p", "pypi", "1", "0" * 64, "MIT")
    with pytest.raises(InputError, match=r"p-1.tar.gz: its SHA-256 is .*, expected 0000"):
        sources.fetch(wrong, tmp_path / "out")
    right = sources.Source("p", "pypi", "1", sha256(made), "MIT")
    for _ in range(2):
        assert (sources.fetch(right, tmp_path / "out") / "files/p-1/inside.txt").read_text() == "words"
    assert calls == ["p", "p"]


def test_every_source_is_complete() -> None:
    for name, source in sources.SOURCES.items():
        assert name == source.name
        assert source.kind in ("debian", "pypi")
        assert source.version
        assert source.licence
        assert len(source.sha256) == 64
        assert int(source.sha256, 16)


def test_quiet_clips_are_as_loud_as_they_say(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "piece.ogg", np.tile(tone(2), 8), RATE)
    for n in range(9):
        clip = quiet.Clip(n, (tmp_path / "piece.ogg",))
        x = clip()
        level = 10 * np.log10(np.mean(x.astype(float) ** 2))
        low, high = quiet.LEVELS[clip.kind]
        assert clip.kind == ("hiss", "noise", "music")[n % 3]
        assert low - 1 <= level <= high + 1
        assert quiet.SHORTEST_S * RATE <= len(x) <= quiet.LONGEST_S * RATE
        assert np.array_equal(x, clip())


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(5, 20, 60).astype(float)
    first = np.stack([rng.integers(0, 4, 60).astype(float), words], 1)
    second = np.stack([2 * first[:, 0], words], 1)
    value, note = model.relative(first, second)
    assert value == pytest.approx(100)
    assert note == "[+100.0, +100.0]"
    gap, note = model.points(first, second)
    assert gap == pytest.approx(100 * first[:, 0].sum() / words.sum())
    low, high = (float(x) for x in note.strip("[]").split(", "))
    assert low < gap < high


def test_bounds_of_a_count() -> None:
    low, high = model.poisson_bounds(0)
    assert low == 0
    assert high == pytest.approx(3.689, rel=0.02)
    low, high = model.poisson_bounds(10)
    assert (low, high) == (pytest.approx(4.795, rel=0.02), pytest.approx(18.39, rel=0.02))


def plan(folder: Path, *stages: str) -> model.Plan:
    clips = {name: [line(folder, f"{name}{i}", 0.5) for i in range(6)] for name in ("fotaq", "read", "voices")}
    return model.Plan("m", stages, clips, 0.2, 0.01, 1.0, 1, None)


def test_jobs_of_stages(tmp_path: Path) -> None:
    assert set(plan(tmp_path, "read").jobs()) == {"read offline", "read 640"}
    assert set(plan(tmp_path, "hour").jobs()) == {"hour", "fotaq 640", "read 640", "voices 640"}
    assert set(plan(tmp_path, "hour", "voices").jobs()) == {
        "hour", "fotaq 640", "read 640", "voices 640", "voices offline",
    }  # fmt: skip
    modes = {f"fotaq {mode}" for mode in (160, 320, 640, 1280, "full", "offline", "again")}
    assert set(plan(tmp_path, "fotaq").jobs()) == modes
    assert set(plan(tmp_path, "nobody").jobs()["nobody"][2]) == {"silence", "noise"}


def test_rows_of_a_set(tmp_path: Path) -> None:
    made = plan(tmp_path, "read")
    texts = [one.text for one in made.clips["read"]]
    found = model.Found(made, {"read offline": texts, "read 640": ["wrong", *texts[1:]]})
    report = model.Report()
    model.report_clips(report, found, "read")
    rows = {row["name"]: row for row in report.rows}
    assert rows["read_wer_offline"]["value"] == 0
    assert rows["read_wer_640"]["value"] == pytest.approx(100 / 6)
    assert rows["read_gap"]["value"] == pytest.approx(100 / 6)
    assert rows["read_gap"]["ok"] is False


def test_talkers_have_one_length(tmp_path: Path) -> None:
    made = model.talkers(plan(tmp_path), 3, 2.0)
    assert [len(one) for one in made] == [32000] * 3
    assert np.abs(made[0]).max() > 0


def test_unknown_stage() -> None:
    with pytest.raises(SystemExit, match="--only walk: stages are fotaq"):
        model.planned(argparse.Namespace(only="read,walk"))


def test_pieces_are_all_of_the_sound() -> None:
    x = tone(0.77)
    assert np.array_equal(np.concatenate(list(model_runs.pieces(x))), x)
    assert model_runs.megabytes() > 10
