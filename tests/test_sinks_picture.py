"""The picture of a report on sinks, and the page that explains it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_sinks import PLACE, ROW, N, kinds_of, planted, report_of, usual

from speechattn.analysis.picture import save
from speechattn.multimodal.sinks_picture import draw


def test_the_picture_shows_the_report(tmp_path: Path) -> None:
    kinds = kinds_of(len(ROW), 24)
    report = report_of(planted(0, kinds), kinds)
    figure = draw(report, title="m_$1")
    plots = {plot.get_label(): plot for plot in figure.axes}
    image = plots["attention"].images[0]
    shown = image.get_array()
    assert shown.shape == (N, len(ROW))
    expected = report.example.received
    assert shown[2, PLACE] == pytest.approx(expected[2][PLACE])
    assert shown.mask[:, -8:].all()
    assert not shown.mask[:, :-8].any()
    assert plots["kinds"].images[0].get_array().shape[:2] == (1, len(ROW))
    alike = {line.get_label(): line.get_ydata() for line in plots["alike"].lines}
    assert [*alike] == ["mark", "sound", "lips", "prompt", "text", "intermediate sinks"]
    assert list(alike["sound"]) == [state.cosine2["sound"] for state in report.states]
    large = {line.get_label(): list(line.get_ydata()) for line in plots["large"].lines}
    assert large == {name: [state.ratio[name] for state in report.states] for name in ("BOS", "sinks", "others")}
    assert plots["large"].get_yscale() == "log"
    for plot in ("attention", "alike", "large"):
        assert plots[plot].get_ylabel()
    for ending in ("png", "svg"):
        for name in "ab":
            save(draw(report, title="m_$1"), tmp_path / f"{name}.{ending}")
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    assert "m_$1: 2 sequences" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_a_sequence_too_short_to_be_judged_is_drawn() -> None:
    kinds = kinds_of(3)
    assert draw(report_of(usual(0, kinds), kinds), title="short")


def test_states_whose_median_is_zero_are_drawn() -> None:
    kinds = kinds_of(12)
    inspected = usual(0, kinds)
    for state in inspected.states:
        state[..., 1:] = 0
    assert draw(report_of(inspected, kinds), title="zeros")


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    page = (Path(__file__).parents[1] / "docs" / "attention-sinks.md").read_text(encoding="utf-8")
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(example, "docs/attention-sinks.md", "exec"), names)
    assert "BOS" in capsys.readouterr().out
