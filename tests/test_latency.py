"""Latency metrics against golden vectors and their laws; clocks, erasure, logs, and `score latency`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.cli import main
from speechattn.errors import InputError
from speechattn.live.events import Event, Word
from speechattn.score.latency.clocks import CLOCKS, Apart, Cumulative, InOrder, Queueing, retimed
from speechattn.score.latency.degeneracy import degeneracy
from speechattn.score.latency.erasure import Erasure, erasure
from speechattn.score.latency.events import recording_of, said_of, shown_erasure
from speechattn.score.latency.instances import read_instances, write_instances
from speechattn.score.latency.lagging import long_yaal, yaal
from speechattn.score.latency.logs import read_log
from speechattn.score.latency.said import PLAIN, SIMULEVAL, Said
from speechattn.score.latency.segmenter import WordErrors, latin_runs
from speechattn.score.latency.segments import Sentence, resegmented
from speechattn.score.latency.simulstream import chunk_lines, read_simulstream
from speechattn.score.latency.soft import Soft
from speechattn.score.latency.table import METRICS, mean
from speechattn.score.latency.tokens import average_token_delay

DATA = Path(__file__).parent / "latency"
DELAYS, ELAPSED = (1000.0, 1000.0, 2000.0, 3000.0, 4000.0, 4000.0), (1200.0, 1250.0, 2300.0, 3350.0, 4500.0, 4550.0)


def said(delays: tuple[float, ...], length: float, words: int | None = None, elapsed: tuple[float, ...] = ()) -> Said:
    return Said(tuple("abcdefghijklmnop"[: len(delays)]), delays, length, elapsed, reference_length=words)


GOLDEN = [
    (5, False, {"AL": 600, "LAAL": 866.6666667, "AP": 0.75, "DAL": 1111.1111111, "YAAL": 750, "ATD": 1550}),
    (8, False, {"AL": 1200, "LAAL": 1200, "AP": 0.46875, "DAL": 1111.1111111, "YAAL": 1000, "ATD": 1550}),
    (5, True, {"AL": 920, "LAAL": 1186.6666667, "DAL": 1436.1111111, "YAAL": 1025}),
]


@pytest.mark.parametrize(("words", "aware", "wanted"), GOLDEN)
def test_golden_vectors(words: int, aware: bool, wanted: dict[str, float]) -> None:
    one = said(DELAYS, 4000, words, ELAPSED)
    assert {name: METRICS[name](one, aware=aware) for name in wanted} == pytest.approx(wanted, abs=1e-6)


def test_golden_text_of_wait_3() -> None:
    one = said((3, 4, 5, 6, 6, 6), 6, 6)
    assert [METRICS[name](one) for name in ("AL", "LAAL", "DAL", "YAAL")] == pytest.approx([3, 3, 3, 3])
    assert METRICS["AP"](one) == pytest.approx(5 / 6)


def test_token_delays_one_by_one() -> None:
    """Each golden token alone: what the mean grows by."""
    sums = [k * (average_token_delay(said(DELAYS[:k], 4000)) or 0) for k in range(1, 7)]
    assert [late - early for early, late in zip([0, *sums], sums, strict=False)] == pytest.approx(
        [700, 400, 1100, 2000, 2700, 2400]
    )


def test_ends_and_beginnings() -> None:
    one = said(DELAYS, 3500, 5, ELAPSED)
    assert [METRICS[name](one) for name in ("first word", "finalisation")] == [1000, 500]
    assert [METRICS[name](one, aware=True) for name in ("first word", "finalisation")] == [1200, 1050]


def test_numbers_that_are_not_defined_are_none() -> None:
    silent, whole = said((), 4000, 5), said((4000.0, 4000.0), 4000, 5)
    assert all(metric(silent) is None for metric in METRICS.values())
    assert all(metric(whole, aware=True) is None for metric in METRICS.values())
    assert yaal(whole) is None
    assert METRICS["AL"](said((1.0,), 4000, 0)) is None
    assert METRICS["LAAL"](said((1.0,), 0, 3)) is None
    found = mean([silent, whole, said(DELAYS, 4000, 5)], yaal)
    assert found is not None
    assert (found.value, found.n, found.skipped) == (pytest.approx(750), 1, 2)
    assert mean([silent], yaal) is None


def test_long_yaal_counts_words_behind_the_sentence_but_not_behind_the_talk() -> None:
    one = replace(said((500.0, 1500.0, 2500.0, 9000.0), 2000, 4), to_end=8000.0)
    assert yaal(one) == pytest.approx((500 + 1500 - 500) / 2)
    assert long_yaal(one) == pytest.approx((500 + 1500 + 2500 - 500 - 1000) / 3)
    assert long_yaal(replace(one, to_end=math.inf)) == pytest.approx((500 + 1500 + 2500 + 9000 - 3000) / 4)


TIMES = st.lists(st.floats(0, 9000), min_size=1, max_size=12).map(lambda times: tuple(sorted(times)))


@settings(deadline=None, max_examples=60)
@given(TIMES, st.integers(1, 20), st.integers(1, 3000))
def test_who_says_the_same_later_lags_more(times: tuple[float, ...], words: int, late: int) -> None:
    """Words before and after the same end of the source stay there; every metric grows by what they are late."""
    early = said(times, 20_000.0, words)
    later = replace(early, delays=tuple(time + late for time in times))
    for name in ("AL", "LAAL", "DAL", "YAAL", "first word", "finalisation"):
        assert METRICS[name](later) == pytest.approx((METRICS[name](early) or 0) + late)
    assert METRICS["AP"](later) == pytest.approx((METRICS["AP"](early) or 0) + late * len(times) / 20_000 / words)


@settings(deadline=None, max_examples=60)
@given(TIMES, st.integers(1, 20), st.sampled_from(list(METRICS)))
def test_seconds_are_thousands_of_milliseconds(times: tuple[float, ...], words: int, name: str) -> None:
    """But for ATD, which has a length of its own."""
    one = said(times, 5000.0, words)
    scaled = replace(one, delays=tuple(time / 1000 for time in times), source_length=5.0)
    number, small = METRICS[name](one), METRICS[name](scaled)
    if name != "ATD" and number is not None:
        assert small == pytest.approx(number / (1 if name == "AP" else 1000), abs=1e-9)


STEPS = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 800)), min_size=1, max_size=10)


@settings(deadline=None, max_examples=80)
@given(STEPS)
def test_clocks_are_ordered_and_can_be_read_back(steps: list[tuple[int, int]]) -> None:
    computes = [float(compute) for _, compute in steps]
    arrivals = [float(sum(gap for gap, _ in steps[: k + 1])) for k in range(len(steps))]
    apart, in_order, queue, total = (
        clock.finish(arrivals, computes) for clock in (Apart(), InOrder(), Queueing(), Cumulative())
    )
    for row in zip(arrivals, apart, in_order, queue, total, strict=True):
        assert list(row) == sorted(row)
    assert in_order == sorted(in_order)
    assert queue == sorted(queue)
    for clock in CLOCKS.values():
        done = clock.finish(arrivals, computes)
        assert clock.finish(arrivals, clock.computes(arrivals, done)) == pytest.approx(done)
    for exact in (Queueing(), Cumulative(), Apart()):
        assert exact.computes(arrivals, exact.finish(arrivals, computes)) == pytest.approx(computes)


def test_queueing_by_hand() -> None:
    """The second step waits for the first, the fourth for its sound."""
    arrivals, computes = [100.0, 200.0, 300.0, 2000.0], [500.0, 100.0, 50.0, 10.0]
    assert Queueing().finish(arrivals, computes) == [600, 700, 750, 2010]
    assert Cumulative().finish(arrivals, computes) == [600, 800, 950, 2660]
    assert Apart().finish(arrivals, computes) == [600, 300, 350, 2010]
    assert InOrder().finish(arrivals, computes) == [600, 600, 600, 2010]


def test_words_of_one_step_compute_once() -> None:
    one = said((100.0, 100.0, 200.0, 2000.0), 2500, 4, (600.0, 600.0, 800.0, 2610.0))
    assert retimed(one, Cumulative(), Queueing()).elapsed == (600, 600, 700, 2010)
    assert retimed(one, Cumulative(), Apart()).elapsed == (600, 600, 300, 2010)
    assert retimed(one, Cumulative(), Cumulative()).elapsed == one.elapsed
    assert retimed(replace(one, elapsed=()), Cumulative(), Queueing()).elapsed == ()


def test_erasure_by_hand() -> None:
    shown = [["a"], ["a", "b"], ["a", "c", "d"], ["x", "c", "d", "e"], ["x", "c", "d", "e"]]
    assert erasure(shown) == Erasure(1 + 3, 4)
    assert erasure(shown).normalised == 1
    assert (erasure([]).normalised, erasure([["a"], ["a", "b"]]).normalised) == (None, 0)
    assert Erasure(1, 2) + Erasure(2, 4) == Erasure(3, 6)


def test_who_waits_for_the_end_with_most_words_is_degenerate() -> None:
    steady = said(tuple(500.0 * (k + 2) for k in range(8)), 5000, 8)
    waiting = said((500.0, *[5000.0] * 7), 5000, 8)
    assert not degeneracy([steady]).likely
    found = degeneracy([waiting])
    assert found.likely
    assert (found.simultaneous, found.expected) == (12.5, 90)
    last_moment = degeneracy([said((4900.0,) * 8, 5000, 8)])
    assert last_moment.gap < -20
    assert last_moment.likely
    assert math.isnan(degeneracy([said((), 5000, 8)]).gap)


def event(committed: str, audio: float, *, unstable: str = "", late: float = 0.2) -> Event:
    words = tuple(Word(f" {word}", 0, audio - 0.5, 1) for word in committed.split())
    return Event("text", committed, unstable, words, audio, emitted_s=audio + late)


EVENTS = [
    event(" Hel", 1.0, unstable="lo word"),
    event("lo world", 2.0, unstable=" and"),
    event("", 2.5, unstable=""),
    event(" end", 3.0, late=1.0),
]


def test_a_word_of_an_event_log_is_said_with_its_last_letter() -> None:
    one = said_of(EVENTS)
    assert (one.units, one.delays, one.elapsed) == (("Hello", "world", "end"), (2e3, 2e3, 3e3), (2200, 2200, 4e3))
    assert one.source_length == 3000
    letters = said_of(EVENTS, unit="char")
    assert (letters.text, letters.delays[2:4]) == ("Helloworldend", (1e3, 2e3))
    assert shown_erasure(EVENTS) == Erasure(2, 3)  # "word" becomes "world", "and" is taken back


def test_an_event_log_becomes_one_of_simulstream() -> None:
    """Texts and times are the same, whatever computed when."""
    (back,) = read_simulstream(chunk_lines(recording_of(EVENTS, "a")))
    one = back.said(tokens="spm")
    assert (one.units, one.delays) == (said_of(EVENTS).units, said_of(EVENTS).delays)
    assert one.elapsed == pytest.approx(said_of(EVENTS).elapsed)


def test_instances_are_read_as_they_were_written(tmp_path: Path) -> None:
    utterances = read_instances((DATA / "words.instances.log").read_text().splitlines())
    write_instances(tmp_path / "instances.log", utterances)
    again = read_instances((tmp_path / "instances.log").read_text().splitlines())
    assert again == utterances
    row = json.loads((tmp_path / "instances.log").read_text().splitlines()[0])
    assert list(row) == [
        "index", "prediction", "delays", "elapsed", "prediction_length", "reference", "source", "source_length",
    ]  # fmt: skip


def test_times_of_zero_are_no_times() -> None:
    row = {"prediction": "a b", "delays": [1, 2], "elapsed": [0, 0], "source_length": 3}
    (one,) = read_instances([json.dumps(row)])
    assert (one.elapsed, one.reference_length) == ((), None)


def test_references_are_counted_as_the_tools_do() -> None:
    assert (PLAIN.count("a  b ", "word"), SIMULEVAL.count("a  b", "word"), SIMULEVAL.count("", "word")) == (2, 3, 1)
    assert (PLAIN.count("a b", "char"), SIMULEVAL.count(" a b", "char")) == (2, 3)


def test_sentences_begin_with_themselves() -> None:
    talk = Said(("a", "b", "c", "d"), (1e3, 2e3, 3e3, 4e3), 5e3, (1.1e3, 2.1e3, 3.1e3, 4.1e3), name="t")
    sentences = [Sentence("t", 500, 1500, "a b"), Sentence("t", 2500, 2000, "c d")]
    first, second = resegmented(talk, sentences, WordErrors())
    assert (first.delays, second.delays) == ((500, 1500), (500, 1500))
    assert second.elapsed == pytest.approx((600, 1600))
    assert (first.to_end, second.to_end, second.source_length) == (4000, 2000, 2000)
    assert second.reference_length == 2


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=3), min_size=1, max_size=4), st.text("abcd", max_size=7))
def test_no_cut_has_fewer_word_errors(references: list[list[str]], text: str) -> None:
    """Against all cuts, one by one; each sentence of which nothing was said before the first word costs one more."""
    words = list(text)
    owners = WordErrors()(words, references)
    assert owners == sorted(owners)
    parts = [[word for word, owner in zip(words, owners, strict=True) if owner == s] for s in range(len(references))]
    errors = sum(distance(wanted, part) for wanted, part in zip(references, parts, strict=True))
    if words:
        assert errors + owners[0] == fewest(references, words, begun=False)


def distance(wanted: list[str], said: list[str]) -> int:
    row = list(range(len(said) + 1))
    for i, word in enumerate(wanted, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(said, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


def fewest(references: list[list[str]], words: list[str], *, begun: bool) -> int:
    first, *rest = references
    if not rest:
        return distance(first, words)
    return min(
        distance(first, words[:k]) + (not begun and not k) + fewest(rest, words[k:], begun=begun or k > 0)
        for k in range(len(words) + 1)
    )


def test_words_in_pieces_are_cut_by_their_first_one() -> None:
    """Marks that are apart are compared as marks; a word without pieces stays whole."""
    cut = Soft(pieces=lambda word: re.findall(r"\w+|[.]", word))
    references = [["the", "end."], ["we", "send", "it"]]
    assert cut(["the", "end", ".", "we", "~", "it"], references) == [0, 0, 0, 1, 1, 1]
    assert cut(["end."], references) == [0]


def test_cuts_of_nothing() -> None:
    for cut in (WordErrors(), Soft()):
        assert cut([], [["a"], ["b"]]) == []
        assert cut(["a", "b"], [["a"], ["b"]]) == [0, 1]
    assert Soft()(["a"], [[], []]) == [0]
    assert latin_runs(list("ab 我们c")) == ["ab ", "我", "们", "c"]


def run(capsys: pytest.CaptureFixture[str], *options: str | Path) -> str:
    assert main(["score", "latency", *map(str, options)]) == 0
    return capsys.readouterr().out


def test_score_latency_of_each_kind_of_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f"{one.to_json()}\n" for one in EVENTS))
    out = run(capsys, path)
    assert out.startswith("lag mean 0.90 s, p50 0.70 s, p95 1.38 s (against the log's own word ends, 4 words; queueing")
    assert "LAAL" not in out
    assert "normalised erasure 0.667" in out
    (tmp_path / "r.txt").write_text("Hello world\nthe end\n")
    found = json.loads(run(capsys, path, "--reference", tmp_path / "r.txt", "--json"))
    assert found["mean_s"] == pytest.approx(0.9)
    assert found["latency"]["metrics"]["LAAL"]["unaware"]["value"] == pytest.approx((2000 + 1250 + 1500) / 3)
    assert (found["latency"]["clock"], found["latency"]["log"]) == ("queueing", "speechattn")
    out = run(capsys, DATA / "words.instances.log")
    assert "20 utterances of a log of simuleval" in out
    assert "LAAL s" in out
    talk = [DATA / "words.simulstream.jsonl", "--reference", DATA / "talks.txt", "--segments", DATA / "talks.yaml"]
    out = run(capsys, *talk)
    assert "StreamLAAL s" in out
    assert "LongYAAL s" in out
    apart, queue = (
        json.loads(run(capsys, *talk, "--json", "--clock", clock))["latency"]["metrics"]["StreamLAAL"]
        for clock in ("simulstream", "queueing")
    )
    assert apart["unaware"] == queue["unaware"]
    assert apart["aware"]["value"] < queue["aware"]["value"]


def test_score_latency_warns_of_who_waits_for_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = replace(said((500.0, *[5000.0] * 7), 5000, 8), reference="a b c d e f g h")
    write_instances(tmp_path / "log", [waiting] * 3)
    assert "warning: 12 % of the words came before the source ended" in run(capsys, tmp_path / "log")


GOOD = {"prediction": "a b", "delays": [1, 2], "elapsed": [1, 2], "source_length": 3, "reference": "a"}
BAD = [
    ("", (), "no words to measure"),
    ("[1]", (), "line 1: not an event, nor a line of an instances.log"),
    ("hello", (), "line 1: not an event"),
    (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "delays": [1]}), (), "line 2: 2 words and 1 delays"),
    (json.dumps({**GOOD, "delays": [2, 1]}), (), "line 1: delays go back in time"),
    (json.dumps({**GOOD, "elapsed": [1]}), (), "line 1: 2 words and 1 elapsed times"),
    (json.dumps({"prediction": "a", "delays": [1]}), (), "line 1: not an instance (no 'source_length')"),
    (json.dumps({**GOOD, "source_length": math.nan}), (), "line 1: a time is not a finite number"),
    (json.dumps({**GOOD, "prediction": "", "delays": [], "elapsed": []}), (), "no words to measure"),
    (json.dumps(GOOD), ("--words", "w"), "--words goes with an event log"),
    (json.dumps(GOOD), ("--segments", "talks.yaml"), "--segments needs --reference"),
    (json.dumps(GOOD), ("--reference", "talks.txt"), "lines for 1 utterances"),
    (json.dumps(GOOD), ("--segments", "talks.txt", "--reference", "talks.txt"), "wanted a list of {wav"),
    (json.dumps(GOOD), ("--segments", "talks.yaml", "--reference", "zh.txt"), "segments for 6 lines of reference"),
    (json.dumps(GOOD), ("--segments", "talks.yaml", "--reference", "talks.txt"), "talk talk0: not in the log"),
    (json.dumps({"id": 1, "total_audio_processed": 1}), (), "line 1: not a line of simulstream (no 1)"),
    (
        '{"id": 1, "metadata": {"wav_name": "a.wav"}}\n{"id": 1, "total_audio_processed": 1, "computation_time": 1, '
        '"generated_tokens": [], "deleted_tokens": ["x"]}', (), "a, 1 s: deleted tokens are not the last ones",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "options", "words"), BAD, ids=lambda value: str(value)[-40:])
def test_what_cannot_be_scored_is_one_line_and_exit_code_2(
    text: str, options: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    given = [str(DATA / option) if "." in option else option for option in options]
    assert main(["score", "latency", str(path), *given]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert words in said


def test_a_log_names_its_clock_and_counts_by_it() -> None:
    lines = [json.dumps(GOOD)]
    assert read_log(lines, where="x").clock == "simuleval"
    assert read_log(lines, where="x", clock="queueing").said[0].elapsed == (1, 2)
    with pytest.raises(InputError, match="x, line 1"):
        read_log(["{}"], where="x")
