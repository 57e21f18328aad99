"""The claims: one heading each, with a table and a picture; and they run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/claims.md").read_text(encoding="utf-8")
RECIPES = str(ROOT / "recipes")


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPES)


def noise(folder: Path) -> None:
    """Two train and two test recordings in which nothing is said: what the trainings need to run."""
    folder.mkdir()
    for split in ("train", "test"):
        entries = [{"samples": 8000, "text": "one two", "voice": "none", "words": [[0.1, 0.2], [0.3, 0.4]]}] * 40
        samples = np.random.default_rng(0).integers(-3000, 3000, 40 * 8000)
        np.save(folder / f"{split}.npy", samples.astype(np.int16))
        (folder / f"{split}.json").write_text(json.dumps(entries))


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *more: str) -> None:
    import claims

    page = folder / "claims.md"
    if not page.exists():
        page.write_text("# Claims\n\nWhat they are.\n\n## Before\n\nKept.\n\n## Behind\n\nKept, too.\n")
    arguments = [name, "--data", str(folder / "data"), "--runs", str(folder / "runs"), "--page", str(page), "--quick"]
    monkeypatch.setattr(sys, "argv", ["claims.py", *arguments, *more])
    claims.main()


def test_every_claim_has_its_section(recipes: None) -> None:
    from importlib import import_module

    from claims import CLAIMS

    sections = PAGE.split("\n## ")[1:]
    assert len(sections) == len(CLAIMS) == 8
    for name in CLAIMS:
        claim = import_module(f"claim.{name}")
        assert claim.POINTS
        assert claim.__doc__
        (mine,) = [section for section in sections if f"`python recipes/claims.py {name}`" in section]
        assert mine.count("\n| --- |") >= 1, f"{name} has no table"
        (picture,) = re.findall(r"!\[.*\]\((claims/.*\.svg)\)", mine)
        assert (ROOT / "docs" / picture).read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_one_point_is_measured_once_and_put_into_the_page(
    recipes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import claims
    from claim import sinks

    noise(tmp_path / "data")
    monkeypatch.setattr(claims, "start", lambda point, seed, arguments: measured(point, seed))

    def measured(point: str, seed: int) -> int:
        monkeypatch.setattr(sinks, "HOURS", 0.01)
        command(monkeypatch, tmp_path, "sinks", "--point", point, str(seed))
        return 0

    command(monkeypatch, tmp_path, "sinks", "--jobs", "1")
    (kept,) = (tmp_path / "runs/quick/sinks").iterdir()
    first = (tmp_path / "claims.md").read_text()
    assert json.loads(kept.read_text())["window"][0]["words"] == 40
    assert [part.split("\n")[0] for part in first.split("\n## ")[1:]][:2] == ["Before", "Behind"]
    assert "for hours" in first
    monkeypatch.setattr(claims, "start", lambda *_: pytest.fail("it was measured again"))
    command(monkeypatch, tmp_path, "sinks", "--jobs", "1")
    assert (tmp_path / "claims.md").read_text() == first
    assert (tmp_path / "claims/sinks.svg").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segmental", "latent", "monotonic", "sparse", "contexts", "restricted", "efficient"])
def test_a_claim_runs(recipes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    noise(tmp_path / "data")
    command(monkeypatch, tmp_path, name, "--jobs", "2")
    assert f"python recipes/claims.py {name}" in (tmp_path / "claims.md").read_text()
