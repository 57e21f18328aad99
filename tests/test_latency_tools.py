"""Latency against SimulEval, OmniSTEval and simulstream: what they said of the same logs (see latency/run_tools.py)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from speechattn.cli import main
from speechattn.errors import InputError
from speechattn.score.latency.clocks import Apart, Cumulative, InOrder, retimed
from speechattn.score.latency.degeneracy import degeneracy
from speechattn.score.latency.instances import read_instances
from speechattn.score.latency.moses import moses
from speechattn.score.latency.said import SIMULEVAL, SIMULSTREAM, Said
from speechattn.score.latency.segmenter import WordErrors
from speechattn.score.latency.segments import Sentence, by_talk, read_sentences, resegmented
from speechattn.score.latency.simulstream import read_simulstream
from speechattn.score.latency.soft import Soft
from speechattn.score.latency.table import LONG, METRICS, mean, talk_figures

HERE = Path(__file__).parent / "latency"
LOGS = {"words.instances.log": "word", "letters.instances.log": "char"}
NAMES = {"StartOffset": "first word", "EndOffset": "finalisation"}
EXACT = {"rel": 1e-9, "abs": 1e-6}


def numbers(tool: str) -> dict[str, Any]:
    """What a tool said."""
    (path,) = HERE.glob(f"{tool}-*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def lines(name: str) -> list[str]:
    return (HERE / name).read_text(encoding="utf-8").splitlines()


def instances(name: str) -> list[Said]:
    return read_instances(lines(name), unit=LOGS.get(name, "word"))  # type: ignore[arg-type]


def sentences(name: str) -> list[Sentence]:
    return read_sentences(HERE / f"{name}.yaml", lines(f"{name}.txt"))


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("metric", ["AL", "LAAL", "AP", "DAL", "ATD", "StartOffset", "EndOffset"])
def test_every_utterance_scores_as_in_simuleval(name: str, metric: str) -> None:
    utterances, ours = instances(name), METRICS[NAMES.get(metric, metric)]
    for aware in (False, True):
        said = numbers("simuleval")[f"{name}/{metric}{'_CA' if aware else ''}"]
        each = [ours(one, aware=aware) for one in utterances]
        assert [number is None for number in each] == [number is None for number in said["each"]]
        assert [n for n in each if n is not None] == pytest.approx([n for n in said["each"] if n is not None], **EXACT)
        found = mean(utterances, ours, aware=aware)
        assert found is not None
        assert found.value == pytest.approx(said["mean"], **EXACT)


@pytest.mark.parametrize("name", LOGS)
def test_utterances_score_as_in_omnisteval(name: str) -> None:
    said, utterances = numbers("omnisteval")[name], instances(name)
    for metric in ("AL", "LAAL", "AP", "DAL", "YAAL"):
        for aware in (False, True):
            found = mean(utterances, METRICS[metric], aware=aware)
            assert found is not None
            assert found.value == pytest.approx(said[f"{'ca_' * aware}{metric.lower()}"], **EXACT)
    trouble = degeneracy(utterances)
    assert [trouble.simultaneous, trouble.expected, trouble.gap, trouble.likely] == pytest.approx(
        [said["swf"], said["efsw"], said["dsptv"], said["degenerate_policy"]], **EXACT
    )


@pytest.mark.parametrize("fixed", [False, True])
def test_talks_score_as_in_omnisteval(fixed: bool) -> None:
    said, found = numbers("omnisteval")[f"talks{'/fixed' * fixed}"], list[Said]()
    for talk, parts in by_talk(instances("talks.instances.log"), sentences("talks")):
        told = retimed(talk, Cumulative(), InOrder()) if fixed else talk
        found += resegmented(told, parts, Soft(), counting=SIMULEVAL)
    assert [sentence.text for sentence in found] == said["cut"]
    for name, metric in LONG.items():
        for aware in (False, True):
            ours = mean(found, metric, aware=aware)
            key = f"{'ca_' * aware}long_{name.removeprefix('Long').lower()}"
            assert ours is not None
            assert ours.value == pytest.approx(said["scores"][key], **EXACT)


def test_talks_score_as_in_omnisteval_with_a_language() -> None:
    plain, said = (numbers("omnisteval")[f"marks/{language}"] for language in (None, "en"))
    assert plain["cut"] != said["cut"]
    parts = read_sentences(HERE / "talks.yaml", lines("marks.txt"))
    both = by_talk(instances("marks.instances.log"), parts)
    cut = Soft(pieces=said["pieces"].__getitem__)
    found = [part for talk, parts in both for part in resegmented(talk, parts, cut, counting=SIMULEVAL)]
    assert [sentence.text for sentence in found] == said["cut"]
    pieces = said["pieces"].__getitem__
    figures = {figure.name: figure for figure in talk_figures(both, counting=SIMULEVAL, pieces=pieces)}
    for name in LONG:
        key, figure = f"long_{name.removeprefix('Long').lower()}", figures[name]
        assert figure.unaware is not None
        assert figure.aware is not None
        assert [figure.unaware.value, figure.aware.value] == pytest.approx(
            [said["scores"][key], said["scores"][f"ca_{key}"]], **EXACT
        )


@pytest.mark.parametrize(
    ("name", "tokens", "unit"), [("words", "word", "word"), ("pieces", "spm", "word"), ("zh", "char", "char")]
)
def test_logs_of_simulstream_score_as_there(name: str, tokens: Any, unit: Any) -> None:
    said = numbers("simulstream")[name]
    recordings = read_simulstream(lines(f"{name}.simulstream.jsonl"))
    talks = [recording.said(tokens=tokens, unit=unit, clock=Apart()) for recording in recordings]
    for talk in talks:
        text, ideal, aware = said["talks"][talk.name]
        assert talk.text.split() == text.split()
        assert np.array(talk.delays) / 1000 == pytest.approx(ideal, **EXACT)
        assert np.array(talk.elapsed) / 1000 == pytest.approx(aware, **EXACT)
    both = by_talk(talks, sentences("zh" if name == "zh" else "talks"))
    first = talk_figures(both, counting=SIMULSTREAM)[0]
    assert first.name == "StreamLAAL"
    assert first.unaware is not None
    assert first.aware is not None
    assert [first.unaware.value / 1000, first.aware.value / 1000] == pytest.approx(said["stream_laal"], **EXACT)
    gone = [recording.erasure(tokens=tokens, unit=unit) for recording in recordings]
    erased, last = sum(one.erased for one in gone), sum(one.last for one in gone)
    assert erased / last == pytest.approx(said["normalized_erasure"], **EXACT)
    computed = sum(chunk.compute for recording in recordings for chunk in recording.chunks)
    assert computed / sum(recording.chunks[-1].arrival for recording in recordings) == pytest.approx(
        said["real_time_factor"], **EXACT
    )


CASES = json.loads((HERE / "cuts.json").read_text(encoding="utf-8"))


def test_talks_are_cut_as_by_mweralign() -> None:
    """Ties and empty sentences too."""
    cut = WordErrors()
    assert [cut(case["said"], case["references"]) for case in CASES] == numbers("mweralign")["cuts"]


def test_talks_are_cut_as_by_the_soft_segmenter() -> None:
    """But for a mark before the first word, or a word before a first mark: it drops them, we do not."""
    cut, dropped = Soft(), 0
    for case, theirs in zip(CASES, numbers("omnisteval")["cuts"], strict=True):
        ours = cut(case["said"], case["references"])
        gone = [j for j, owner in enumerate(theirs) if owner is None]
        assert gone == list(range(len(gone)))
        assert ours[len(gone) :] == theirs[len(gone) :]
        first = next(s for s, words in enumerate(case["references"]) if words)
        assert all((case["said"][j] in ".,") != (case["references"][first][0] in ".,") for j in gone)
        assert ours[: len(gone)] == [first] * len(gone)
        dropped += bool(gone)
    assert 0 < dropped < len(CASES) / 4


def test_both_ways_to_cut_keep_every_word_and_differ() -> None:
    cuts = [[cut(case["said"], case["references"]) for case in CASES] for cut in (WordErrors(), Soft())]
    assert cuts[0] != cuts[1]
    for owners, case in zip([*cuts[0], *cuts[1]], [*CASES, *CASES], strict=True):
        assert len(owners) == len(case["said"])
        assert owners == sorted(owners)


def test_the_tools_still_say_so(tmp_path: Path) -> None:
    """Where they are installed; else the files they wrote must do. They run in a process of their own."""
    if not any(importlib.util.find_spec(tool) for tool in ("simuleval", "omnisteval", "simulstream", "mweralign")):
        pytest.skip("none of the tools is installed")
    run = [sys.executable, str(HERE / "run_tools.py"), str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for path in tmp_path.iterdir():
        now = json.loads(path.read_text(encoding="utf-8"))
        assert flat(now) == pytest.approx(flat(numbers(path.name.split("-")[0])), rel=1e-9)


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Numbers and texts of a tree of JSON, by their way to it."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {way: leaf for k, part in inner for way, leaf in flat(part, f"{key}/{k}").items()}
    return {key: value} if isinstance(value, int | float) else {f"{key}={value}": 0}


def test_pieces_of_words_come_from_the_tokeniser_of_moses(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[dict[str, Any]]()

    class Program:
        def __init__(self, **given: Any) -> None:
            made.append(given)

        def __call__(self, word: str) -> list[str]:
            return [word[:-1], word[-1]]

    monkeypatch.setitem(sys.modules, "mosestokenizer", SimpleNamespace(MosesTokenizer=Program))
    assert moses("zh") is moses("ja") is None
    cut = moses("de")
    assert cut is not None
    assert cut("ja,") == cut("ja,") == ["ja", ","]
    assert made == [{"lang": "de", "no_escape": True}]
    monkeypatch.setitem(sys.modules, "mosestokenizer", None)
    with pytest.raises(InputError, match=r"--lang de needs Perl .* pip install 'speechattn\[evaluators\]'"):
        moses("de")


def test_a_language_belongs_to_talks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "latency", str(HERE / "talks.instances.log"), "--lang", "de"]) == 2
    assert "it needs --segments" in capsys.readouterr().err
    given = ["--segments", str(HERE / "talks.yaml"), "--reference", str(HERE / "marks.txt"), "--lang", "zh", "--json"]
    assert main(["score", "latency", str(HERE / "marks.instances.log"), *given]) == 0
    found = json.loads(capsys.readouterr().out)["latency"]["metrics"]["LongYAAL"]["unaware"]["value"]
    assert found == pytest.approx(numbers("omnisteval")["marks/None"]["scores"]["long_yaal"], **EXACT)
