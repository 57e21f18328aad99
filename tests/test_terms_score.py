"""Terms as they are counted: retrieved, recognised, falsely inserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechattn.cli import main
from speechattn.errors import InputError
from speechattn.score.terms import Rate, counted, phrases, places, recognised, retrieved
from speechattn.score.wer import word_errors

TERMS = ["zeppelin", "Frank Ironstein", "Frank", "ox"]
SAID = ["the zeppelin of Frank Ironstein", "an ox and an ox", "nothing here"]
HEARD = ["the zeppelin of Frank Einstein", "an ox and an axe", "nothing zeppelin here"]


def table(rates: list[Rate]) -> dict[str, tuple[float, int]]:
    return {rate.name: (rate.value, rate.count) for rate in rates}


def test_what_became_of_terms() -> None:
    found = table(recognised(SAID, HEARD, TERMS))
    assert found == {
        "term accuracy": (2 / 4, 4),  # zeppelin and one ox; "Frank" alone is another term than the one said
        "term precision": (2 / 4, 4),  # zeppelin, Frank, ox, zeppelin
        "false insertions": (2 / 12, 12),
        "WER of term words": (3 / 5, 5),  # Einstein, axe, and the zeppelin that came from nowhere
        "WER of other words": (0.0, 7),
    }


def test_the_longest_term_counts_and_none_inside_another() -> None:
    bank = phrases(TERMS, "none")
    assert places(["Frank", "Ironstein", "Frank", "ox", "Frank"], bank) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert places([], bank) == []
    assert places(["Frank"], phrases(["Frank Ironstein"], "none")) == []


WORDS = st.lists(st.sampled_from(["a", "b", "c", "ox", "frank", "ironstein"]), max_size=8).map(" ".join)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_errors_inside_and_outside_of_terms_are_all_errors(pairs: list[tuple[str, str]]) -> None:
    bank = phrases(TERMS, "whisper-english")
    rows = [counted(a.split(), b.split(), bank) for a, b in pairs]
    for (a, b), row in zip(pairs, rows, strict=True):
        said, right, heard, false, words, wrong, inside, other = row
        assert right <= min(said, heard)
        assert false == heard - right
        assert inside <= words
        if a:
            errors = word_errors([a], [b], normalise="none")
            assert wrong + other == errors.substitutions + errors.insertions + errors.deletions
        else:
            assert wrong + other == len(b.split())


def test_retrieval_counts_utterances_with_terms_alone() -> None:
    ranked = [["Zeppelin", "ox", "Frank Ironstein"], ["frank", "ox"], ["ox"]]
    found = table(retrieved(SAID, ranked, TERMS, [1, 2, 3]))
    assert found["recall@1"] == ((0.5 + 0.0) / 2, 3)
    assert found["recall@2"] == ((0.5 + 1.0) / 2, 3)
    assert found["recall@3"] == (1.0, 3)
    assert found["precision@2"] == (0.5, 3)
    assert found["precision@3"] == ((2 / 3 + 0.5) / 2, 3)


def test_nothing_to_score_is_said() -> None:
    with pytest.raises(InputError, match="no reference says"):
        recognised(SAID, HEARD, ["unsaid"])
    with pytest.raises(InputError, match="no reference says"):
        retrieved(SAID, [[]] * 3, ["unsaid"], [1])
    with pytest.raises(InputError, match="nothing is left"):
        recognised(SAID, HEARD, ["(so)"])


def files(folder: Path) -> dict[str, str]:
    lists = [["zeppelin"], ["ox"], []]
    texts = {
        "ref": "\n".join(SAID), "hyp": "\n".join(HEARD), "terms": "zeppelin => zepelim\nFrank Ironstein\nFrank\nox",
        "lists": "\n".join(map(json.dumps, lists)), "short": "one line", "broken": "[1]\n{}\n[]",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return {name: str(folder / name) for name in texts}


def test_the_command_prints_rates_with_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = files(tmp_path)
    given = ["score", "terms", at["ref"], at["hyp"], "--terms", at["terms"], "--retrieved", at["lists"], "--k", "1"]
    assert main([*given, "--json"]) == 0
    rates = json.loads(capsys.readouterr().out)
    assert [rate["name"] for rate in rates] == [
        "recall@1", "precision@1", "term accuracy", "term precision", "false insertions", "WER of term words",
        "WER of other words",
    ]  # fmt: skip
    assert all(rate["low"] <= rate["value"] <= rate["high"] for rate in rates)
    assert main(given) == 0
    assert "term accuracy 50.00 % [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["ref", "short"], "must pair up"), (["ref", "hyp", "--retrieved", "short"], "must pair up"),
        (["ref"], "needs HYP"), (["ref", "hyp", "--k", "0"], "wanted 1 or more"),
        (["ref", "nothing"], "No such file"), (["ref", "--retrieved", "broken"], "a list of terms"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(
    change: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = files(tmp_path) | {"nothing": str(tmp_path / "nothing")}
    assert main(["score", "terms", *(at.get(word, word) for word in change), "--terms", at["terms"]]) != 0
    assert said in capsys.readouterr().err
