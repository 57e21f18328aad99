"""Intervals, paired tests, alignments, and the metrics that they are made for."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU as SacreBLEU
from sacrebleu.metrics import CHRF as SacreCHRF
from sacrebleu.significance import PairedTest

from speechattn.cli import main
from speechattn.errors import InputError
from speechattn.score import significance
from speechattn.score.alignment import Edit, confusions, counts, edits
from speechattn.score.metrics import BLEU, ChrF, ErrorRate, Metric, compared, metric, scored
from speechattn.score.significance import Array, compare, interval, p_value
from speechattn.score.wer import error_counts, word_errors

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "big", "old", "and", "it", "was"]


def ratio(sums: Array) -> Array:
    return sums[:, 0] / sums[:, 1]


def texts(n: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(6, 14))) for _ in range(n)]


def spoiled(lines: list[str], share: float, seed: int) -> list[str]:
    """Some words are others."""
    chance = random.Random(seed)
    return [" ".join(chance.choice(WORDS) if chance.random() < share else w for w in line.split()) for line in lines]


REFERENCES = texts(60, 0)
GOOD, SAME, BAD = (spoiled(REFERENCES, share, seed) for share, seed in ((0.15, 1), (0.15, 2), (0.4, 3)))


@pytest.mark.parametrize("how", [ErrorRate(), ErrorRate("character"), BLEU(), ChrF()], ids=lambda how: how.name)
def test_equal_systems_are_equal_and_better_ones_are_better(how: Metric) -> None:
    good, bad = how.stats(REFERENCES, GOOD), how.stats(REFERENCES, BAD)
    same = compared(how, good, good)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    better = compared(how, bad, good)
    assert better.p < 0.01
    assert min(how.sign * better.low, how.sign * better.high) > 0
    assert better.low < better.value < better.high
    assert better.value == pytest.approx(float((how.score(good.sum(0)[None]) - how.score(bad.sum(0)[None]))[0]))


def test_the_other_way_round_is_the_same_difference() -> None:
    how = ErrorRate()
    good, bad, same = (how.stats(REFERENCES, said) for said in (GOOD, BAD, SAME))
    one, other = compared(how, good, bad), compared(how, bad, good)
    assert one.p == other.p
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert compared(how, good, same).p > 0.05


def test_systems_that_differ_in_few_utterances_cannot_be_significant() -> None:
    first = np.array([[1.0, 10.0]] * 100)
    second = first.copy()
    second[:3, 0] += 1
    found = compare(first, second, ratio)
    assert found.p == pytest.approx(2 / 2**3, abs=0.02)  # all three on one side, or all on the other
    assert found.value == pytest.approx(0.003)


def test_randomisation_agrees_with_all_exchanges() -> None:
    rng = np.random.default_rng(3)
    first, second = (np.stack([rng.integers(0, 6, 9), np.full(9, 10)], 1).astype(float) for _ in range(2))
    real = abs(float(ratio(second.sum(0)[None])[0] - ratio(first.sum(0)[None])[0]))
    as_large = 0
    for swap in itertools.product([False, True], repeat=9):
        pick = np.array(swap)[:, None]
        a, b = np.where(pick, second, first).sum(0), np.where(pick, first, second).sum(0)
        as_large += abs(float(ratio(b[None])[0] - ratio(a[None])[0])) >= real - 1e-12
    assert p_value(first, second, ratio, trials=20000) == pytest.approx(as_large / 2**9, abs=0.015)


def test_chance_is_called_significant_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    size = np.full(40, 10.0)
    found = []
    for seed in range(200):
        first, second = (np.stack([rng.binomial(10, 0.2, 40), size], 1) for _ in range(2))
        found.append(p_value(first, second, ratio, seed=seed, trials=300))
    assert 2 <= sum(p <= 0.05 for p in found) <= 22
    assert np.median(found) == pytest.approx(0.5, abs=0.12)


def test_interval_by_an_independent_computation() -> None:
    chance = random.Random(1)
    rows = [(chance.randint(0, 4), chance.randint(5, 15)) for _ in range(50)]
    rates = []
    for _ in range(4000):
        drawn = chance.choices(rows, k=len(rows))
        rates.append(sum(e for e, _ in drawn) / sum(n for _, n in drawn))
    rates.sort()
    assert interval(np.array(rows, float), ratio) == pytest.approx((rates[100], rates[3900]), abs=0.006)


def test_work_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    stats = np.stack([rng.integers(0, 5, 32), rng.integers(5, 9, 32)], 1).astype(float)
    whole = interval(stats, ratio)
    monkeypatch.setattr(significance, "ROOM", 700)
    assert interval(stats, ratio) == whole
    with pytest.raises(ValueError, match="same utterances"):
        compare(stats, stats[1:], ratio)


@pytest.mark.parametrize(("how", "theirs"), [(BLEU(), SacreBLEU()), (ChrF(), SacreCHRF())], ids=["BLEU", "chrF"])
def test_scores_and_tests_are_those_of_sacrebleu(how: Metric, theirs: SacreBLEU | SacreCHRF) -> None:
    good, bad = how.stats(REFERENCES, GOOD), how.stats(REFERENCES, SAME)
    found = scored(how, good)
    assert found.value == pytest.approx(theirs.corpus_score(GOOD, [REFERENCES]).score, abs=1e-9)
    systems = [("first", GOOD), ("second", SAME)]
    signatures, rows = PairedTest(systems, {"x": theirs}, [REFERENCES], test_type="bs")()
    name = next(key for key in rows if key != "System")
    assert (found.high - found.low) / 2 == pytest.approx(rows[name][0].ci, abs=0.1)  # theirs rounds indices
    assert str(signatures[name]) == found.label
    _, rows = PairedTest(systems, {"x": theirs}, [REFERENCES], test_type="ar", n_samples=10000)()
    assert 0 <= compared(how, good, bad).p - rows[name][1].p_value < 1e-3  # theirs leaves out equal gaps


lines = st.lists(st.sampled_from(["a", "b", "cd", "e f", ""]), max_size=7).map(" ".join)


@settings(deadline=None, max_examples=80)
@given(reference=lines, hypothesis=lines)
def test_alignments_say_both_texts_and_count_as_jiwer_does(reference: str, hypothesis: str) -> None:
    for unit, rate, separator in (("word", jiwer.wer, " "), ("character", jiwer.cer, "")):
        found = edits(reference, hypothesis, unit=unit)
        assert separator.join(e.reference for e in found if e.kind != "insert") == " ".join(reference.split())
        assert separator.join(e.hypothesis for e in found if e.kind != "delete") == " ".join(hypothesis.split())
        assert all((e.reference == e.hypothesis) == (e.kind == "equal") for e in found)
        *errors, n = counts(found)
        if n:
            wanted = rate(" ".join(reference.split()), " ".join(hypothesis.split()))
            assert sum(errors) / n == pytest.approx(wanted)
        else:
            assert [e.kind for e in found] == ["insert"] * len(found)


def test_rates_of_a_corpus_are_those_of_jiwer() -> None:
    words = word_errors(REFERENCES, BAD, normalise="none")
    characters = word_errors(REFERENCES, BAD, normalise="none", unit="character")
    assert words.rate == pytest.approx(jiwer.wer(REFERENCES, BAD))
    assert characters.rate == pytest.approx(jiwer.cer(REFERENCES, BAD))
    assert str(characters).startswith("CER ")
    assert "characters, 60 utterances" in str(characters)
    assert 100 * words.rate == pytest.approx(scored(ErrorRate(normalise="none"), stats := rate_stats(BAD)).value)
    assert (words.low * 100, words.high * 100) == pytest.approx(interval(stats, ErrorRate().score))


def rate_stats(said: list[str]) -> Array:
    return ErrorRate(normalise="none").stats(REFERENCES, said)


def test_an_empty_reference_does_not_count() -> None:
    how = ErrorRate(normalise="none")
    stats = how.stats(["a b", ""], ["a b", "noise and noise"])
    assert scored(how, stats).value == 0
    assert scored(how, stats).n == 1
    assert error_counts(["", "a"], ["x y", ""], normalise="none").tolist() == [[0, 2, 0, 0], [0, 0, 1, 1]]
    with pytest.raises(InputError, match="no reference"):
        scored(how, how.stats([""], ["x"]))


def test_confusions_are_in_a_fixed_order() -> None:
    rows = [edits("a b c", "a x c d"), edits("b c", "x"), edits("a", "a")]
    assert confusions(rows) == [
        (Edit("substitute", "b", "x"), 2), (Edit("delete", "c", ""), 1), (Edit("insert", "", "d"), 1),
    ]  # fmt: skip
    assert len(confusions(rows, most=1)) == 1


def test_names_that_are_none() -> None:
    with pytest.raises(InputError, match="wer, cer, bleu, chrf"):
        metric("ter")
    with pytest.raises(InputError, match="sacrebleu has"):
        BLEU(tokenize="13b")
    with pytest.raises(InputError, match="word or character"):
        edits("a", "a", unit="letter")
    assert [metric(name).name for name in ("wer", "cer", "bleu", "chrf")] == ["WER", "CER", "BLEU", "chrF"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, said in (("r", REFERENCES), ("good", GOOD), ("bad", BAD), ("short", GOOD[1:])):
        Path(f"{name}.txt").write_text("\n".join(said) + "\n")
    for name, said in (("log", "the cat"), ("log2", "the dog")):
        event = {"kind": "text", "committed": said, "unstable": "", "words": [], "audio_s": 1.0}
        Path(f"{name}.jsonl").write_text(json.dumps(event) + "\n")
    Path("one.txt").write_text("the\ncat\n")


@pytest.mark.usefixtures("files")
def test_the_command_compares_two_systems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "wer", "r.txt", "good.txt", "--against", "bad.txt", "--normaliser", "none"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["good.txt:", "bad.txt:", "WER"]
    assert "p = 0.0001" in said[2]
    assert "60 utterances" in said[2]
    assert main(["score", "wer", "r.txt", "good.txt", "--cer", "--against", "good.txt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["difference"]["p"] == 1
    assert found["first"] == found["second"]
    assert found["first"]["unit"] == "character"
    assert main(["score", "wer", "one.txt", "log.jsonl", "--against", "log2.jsonl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["first"]["rate"], found["second"]["rate"], found["difference"]["p"]) == (0, 0.5, 1)


@pytest.mark.usefixtures("files")
def test_the_command_prints_what_a_figure_must_state(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "bleu", "r.txt", "good.txt"]) == 0
    said = capsys.readouterr().out.splitlines()
    bleu, chrf = SacreBLEU().corpus_score(GOOD, [REFERENCES]), SacreCHRF().corpus_score(GOOD, [REFERENCES])
    assert said[0].startswith(f"BLEU {bleu.score:.2f} [")
    assert said[1].startswith(f"chrF {chrf.score:.2f} [")
    assert all("60 lines; nrefs:1|bs:1000|seed:12345|case:mixed" in line for line in said)
    assert main(["score", "chrf", "r.txt", "good.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chrF"]["value"] == pytest.approx(chrf.score)
    assert main(["score", "bleu", "r.txt", "bad.txt", "--against", "good.txt", "--json", "--lowercase"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["BLEU"]["difference"]["p"] < 0.01
    assert found["chrF"]["difference"]["low"] > 0
    assert "case:lc" in found["BLEU"]["first"]["label"]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wer", "r.txt", "short.txt"], "short.txt has 59: they must pair up"),
        (["bleu", "r.txt", "good.txt", "--against", "short.txt"], "short.txt has 59"),
        (["bleu", "r.txt", "good.txt", "--tokenize", "13b"], "sacrebleu has"),
        (["chrf", "r.txt", "nothing.txt"], "nothing.txt: No such file"),
        (["wer", "one.txt", "log.jsonl", "--against", "one.txt"], "an event log is one utterance"),
    ],
)
def test_what_cannot_be_scored(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("files")
def test_other_line_ends_do_not_shift_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("\ufeffthe\u2028cat\nsat\x0cdown\n", "utf-8")
    Path("b.txt").write_text("the cat\nsat down\n")
    assert main(["score", "wer", "a.txt", "b.txt", "--normaliser", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rate"], found["utterances"]) == (0, 2)
    assert main(["score", "bleu", "b.txt", "a.txt", "--json"]) == 0
