"""What the README says works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechattn.cli.main import parser
from speechattn.data.fotaq import read_split

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs(
    fotaq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = next(line for line in read_split(fotaq, "test") if line.name.startswith("TAM1"))
    x, rate = soundfile.read(clip.path)
    soundfile.write(tmp_path / "talk.wav", np.concatenate([x, x]), rate)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    for example in blocks("python"):
        exec(compile(example, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert len(said.split()) > 12
    assert said.endswith("call john please\n call jon please")  # as the comments say


def test_the_how_to_of_decoding_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    text = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "docs/decoding.md", "exec"), names)
    assert capsys.readouterr().out.startswith("one two three four five six\n")


def test_the_how_to_of_streams_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    text = (ROOT / "docs" / "streams.md").read_text(encoding="utf-8")
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "docs/streams.md", "exec"), names)
    assert capsys.readouterr().out == "a frame waits at most 0.63 s\n"
    assert names["offline"]


def test_every_command_parses() -> None:
    commands = [
        shlex.split(line.split("#")[0].split("|")[-1])[1:]
        for block in blocks("sh")
        for line in block.replace("\\\n", " ").splitlines()
        if "speechattn" in line.split("#")[0] and not line.startswith("pip")
    ]
    assert len(commands) >= 8
    for command in commands:
        if command[0] == "fit":  # test_recipes.py asks its own parser
            continue
        assert parser().parse_args(command).run


def test_make_targets_exist_and_nothing_is_left_to_fill_in() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "@" not in README
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link
