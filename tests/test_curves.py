"""`speechattn curves`: known words under known policies, golden lags, areas by hand, joined clips."""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fake import FakeModel

from speechattn.cli import curves, curves_hear
from speechattn.cli.main import parser
from speechattn.cli.sweeps import USUAL, at, parse_sweeps, settings_of
from speechattn.errors import InputError
from speechattn.live.events import Event
from speechattn.score.curves import Point, Setting, Streams, Timed, average
from speechattn.score.curves_area import area, gap
from speechattn.score.curves_plot import drawn
from speechattn.score.latency.logs import read_events
from speechattn.score.latency.said import Said
from speechattn.score.latency.segments import by_talk, read_sentences
from speechattn.score.latency.table import talk_figures
from speechattn.score.listening import Ears
from speechattn.score.metrics import ErrorRate
from speechattn.score.utterances import FileSound, Utterance, read_utterances

RATE = 16000
DELAYS = (1000, 1000, 2000, 3000, 4000, 4000)  # ms; the golden vector of the metrics
ELAPSED = (1200, 1250, 2300, 3350, 4500, 4550)


def utterance(name: str, text: str, seconds: float = 4.0, translation: str | None = None) -> Utterance:
    return Utterance(name, text, seconds, FileSound(Path("none.wav")), translation=translation)


def said(words: Sequence[str], delays: Sequence[float], elapsed: Sequence[float], end: float) -> list[Event]:
    """One event for each word, and the end of the stream."""
    times = zip(words, delays, elapsed, strict=True)
    log = [Event("text", f" {word}", "", (), late / 1000, emitted_s=done / 1000) for word, late, done in times]
    return [*log, Event("text", "", "", (), end / 1000, final=True, emitted_s=max(end, *elapsed) / 1000)]


def test_lags_of_utterances_are_the_golden_ones() -> None:
    streams = Streams([utterance("a", "a b c d e")], metric="wer", normalise="none")
    log = said([*"abcdef"], DELAYS, ELAPSED, 4000)
    point = streams.point(Setting("alignatt"), [log], [2.0])
    found = {
        name: [mean.value for aware in (False, True) if (mean := average(lag.of(aware=aware)))]
        for name, lag in point.lags.items()
    }
    assert found["LAAL"] == pytest.approx([0.8666667, 1.1866667])
    assert found["DAL"] == pytest.approx([1.1111111, 1.4361111])
    assert found["YAAL"] == pytest.approx([0.75, 1.025])
    assert found["AP"][0] == pytest.approx(0.75)
    assert found["first word"] == pytest.approx([1.0, 1.2])
    assert point.quality["WER"].tolist() == [[1, 5]]  # one word too many
    assert point.computing.tolist() == [[2.0, 4.0]]


def test_erasure_counts_what_was_shown_and_taken_back() -> None:
    streams = Streams([utterance("a", "a b")], metric="wer", normalise="none")
    log = [
        Event("text", "", " x y", (), 1.0, emitted_s=1.0),
        Event("text", " a", " y", (), 2.0, emitted_s=2.0),
        Event("text", " b", "", (), 3.0, final=True, emitted_s=3.0),
    ]
    assert streams.point(Setting("alignatt"), [log], [0.0]).erasure.tolist() == [[3, 2]]


def cut_row(name: str, parts: Sequence[tuple[float, float, str]], seconds: float, source: str) -> dict[str, Any]:
    """A cut of lhotse with a supervision for each part."""
    rows = [
        {"id": f"{name}-{k}", "recording_id": name, "start": start, "duration": long, "channel": 0, "text": text,
         "language": "en", "speaker": "x", "custom": {"translation": text.upper()}}
        for k, (start, long, text) in enumerate(parts)
    ]  # fmt: skip
    recording = {
        "id": name, "sources": [{"type": "file", "channels": [0], "source": source}], "sampling_rate": RATE,
        "num_samples": round(seconds * RATE), "duration": seconds, "channel_ids": [0],
    }  # fmt: skip
    return {"id": name, "start": 0.0, "duration": seconds, "channel": 0, "supervisions": rows[::-1],
            "recording": recording, "type": "MonoCut"}  # fmt: skip


def write_cuts(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


PARTS = [(0.0, 2.0, "w0 w1 w2"), (2.5, 2.0, "w3 w4"), (5.0, 3.0, "w5 w6 w7 w8")]
ENDS = [0.5, 1.0, 1.6, 3.0, 3.9, 5.5, 6.2, 6.9, 7.5]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two streams that say the same, of three sentences."""
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * np.random.default_rng(0).standard_normal(8 * RATE), RATE)
    return write_cuts(tmp_path / "cuts.jsonl.gz", [cut_row(name, PARTS, 8.0, f"{name}.wav") for name in "ab"])


def test_streams_score_sentence_by_sentence_as_score_latency_does(manifest: Path, tmp_path: Path) -> None:
    """The mean over streams' sums is that of `talk_figures` over all sentences."""
    utterances = read_utterances(manifest)
    texts = [["w0", "w1", "w2", "w3", "w4", "w5", "w6", "w8", "w9"], ["w0", "w1", "x", "w4", "w5", "w6", "w7"]]
    logs = [
        said(words, [1000 * (k + 1) for k in range(len(words))], [1000 * (k + 1) + 300 for k in range(len(words))], 9e3)
        for words in texts
    ]
    point = Streams(utterances, metric="wer", normalise="none").point(Setting("alignatt"), logs, [1.0, 1.0])
    rows = [{"wav": f"{name}.wav", "offset": at, "duration": long} for name in "ab" for at, long, _ in PARTS]
    (tmp_path / "talks.json").write_text(json.dumps(rows), encoding="utf-8")
    sentences = read_sentences(tmp_path / "talks.json", [text for _ in "ab" for _, _, text in PARTS])
    talks = [
        Said(tuple(words), tuple(1000.0 * (k + 1) for k in range(len(words))), 9000.0,
             tuple(1000.0 * (k + 1) + 300 for k in range(len(words))), name=name)
        for name, words in zip("ab", texts, strict=True)
    ]  # fmt: skip
    theirs = {figure.name: figure for figure in talk_figures(by_talk(talks, sentences))}
    for name in ("StreamLAAL", "LongYAAL", "LongAP", "LongDAL"):
        scale = 1.0 if name == "LongAP" else 1000.0
        for aware in (False, True):
            mean, other = average(point.lags[name].of(aware=aware)), theirs[name]
            assert mean is not None
            assert scale * mean.value == pytest.approx((other.aware if aware else other.unaware).value)  # type: ignore[union-attr]
            assert mean.n == 2
    assert point.quality["WER"].tolist() == [[2, 9], [3, 9]]


def test_translations_are_judged_by_sentence_and_drawn_by_stream(manifest: Path) -> None:
    from sacrebleu.metrics import CHRF

    streams = Streams(read_utterances(manifest), metric="bleu")
    texts = [["W0 W1 W2", "W3 W5", "W5 W6 W7 W8"], ["W0", "", "W5 W6 W7 W8"]]
    quality = streams.quality(texts)
    assert quality["chrF"].shape[0] == quality["BLEU"].shape[0] == 2
    references = [text.upper() for _ in texts for _, _, text in PARTS]
    theirs = CHRF().corpus_score([text for row in texts for text in row], [references]).score
    assert float(streams.metrics[1].score(quality["chrF"].sum(0)[None])[0]) == pytest.approx(theirs)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every model says w0 to w8 at known times; -> how long the sounds were that were heard as a whole."""
    whole = list[float]()

    def offline(sounds: Sequence[np.ndarray]) -> list[str]:
        whole.extend(len(sound) / RATE for sound in sounds)
        return [text for _, _, text in PARTS][: len(sounds)]

    for module in (curves, curves_hear):
        monkeypatch.setattr(module, "build_model", lambda options: FakeModel(ENDS))
    monkeypatch.setattr(curves_hear, "ears", lambda options: Ears(offline, None, RATE))  # type: ignore[arg-type]
    return whole


SMALL = ["--no-vad", "--policies", "alignatt,hold-n", "--sweep", "alignatt=5,25,75", "--sweep", "hold-n=1,3"]


def options(manifest: Path, place: Path, *more: str) -> argparse.Namespace:
    return parser().parse_args(["curves", "tiny.en", str(manifest), "-o", str(place), *SMALL, *more])


def test_a_sweep_writes_logs_table_and_picture(manifest: Path, tmp_path: Path, fake: list[float]) -> None:
    place = tmp_path / "out"
    given = options(manifest, place)
    assert given.run(given) == 0
    assert fake == [2.0, 2.0, 3.0] * 2  # offline hears the sentences
    with (place / "curves.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(row["policy"], row["value"]) for row in rows] == [
        ("alignatt", "5"), ("alignatt", "25"), ("alignatt", "75"), ("hold-n", "1"), ("hold-n", "3"),
    ]  # fmt: skip
    lags = [float(row["StreamLAAL unaware"]) for row in rows]
    assert lags[0] < lags[1] < lags[2]
    assert lags[3] < lags[4]
    assert all(float(row["StreamLAAL aware"]) >= lag for row, lag in zip(rows, lags, strict=True))
    assert all(row["n"] == "2" for row in rows)
    assert [float(row["WER"]) > 0 for row in rows] == [True, False, False, False, False]  # 5 frames: said too early
    assert all(path.stat().st_size > 5000 for path in (place / "wer.svg", place / "wer.png"))
    figures = json.loads((place / "curves.json").read_text(encoding="utf-8"))
    assert figures["offline"]["WER"]["value"] == 0
    assert "--sweep hold-n=1,3" in figures["command"]
    log = place / "alignatt-frame-threshold-25" / "logs" / "a.jsonl"
    events = read_events(log.read_text(encoding="utf-8").splitlines(), "a")
    assert "".join(event.committed for event in events).split() == [f"w{k}" for k in range(9)]


def test_what_is_finished_is_not_heard_again(
    manifest: Path, tmp_path: Path, fake: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, heard = tmp_path / "out", list[tuple[str, str]]()
    listen = curves_hear.listen

    def counted(booth: Any, job: Any) -> Any:
        heard.append((job[0].name if job[0] else "offline", job[2].id))
        return listen(booth, job)

    monkeypatch.setattr(curves_hear, "listen", counted)
    first = curves.curves(options(manifest, place, "--limit", "1"))
    assert len(heard) == len(set(heard)) == 6
    heard.clear()
    (place / "hold-n-3" / "logs" / "a.jsonl").unlink()
    again = curves.curves(options(manifest, place, "--limit", "1"))
    assert heard == [("hold-n-3", "a")]
    assert [point.quality["WER"].tolist() for point in first.points] == [
        point.quality["WER"].tolist() for point in again.points
    ]
    heard.clear()
    assert len(curves.curves(options(manifest, place)).streams.utterances) == 2
    assert {name for _, name in heard} == {"b"}
    with pytest.raises(InputError, match="min_chunk_size not given, now it is 2"):
        curves.curves(options(manifest, place, "--min-chunk-size", "2"))


def test_an_utterance_that_cannot_be_heard_does_not_count_anywhere(
    manifest: Path, tmp_path: Path, fake: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.wav").unlink()
    found = curves.curves(options(manifest, tmp_path / "out"))
    assert [one.id for one in found.streams.utterances] == ["a"]
    assert "skipped b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--sweep", "alignatt"], "wanted POLICY"),
        (["--sweep", "alignatt=x"], "invalid literal"),
        (["--sweep", "alignatt:search=1"], "no option of a session with a number"),
        (["--sweep", "alignatt:chunk-ms=320"], "this model has no such option"),
        (["--sweep", "local-agreement=2"], "has no usual option"),
        (["--sweep", "edatt=0.1"], "--policies has no edatt"),
        (["--sweep", "alignatt=5"], "a point is there twice"),
        (["--policies", "alignat"], "--policies alignat: wanted some of"),
        (["--policy", "alignatt"], "curves are of --policies"),
        (["--attn-layer", "1"], "none of alignatt,hold-n has such a setting"),
        (["--range", "3", "1"], "wanted a smaller and a larger lag"),
        (["--chunk", "0"], "--chunk 0.0: at least"),
        (["--metric", "bleu"], "no translation"),
    ],
)
def test_what_cannot_be_is_said(
    manifest: Path, tmp_path: Path, fake: list[float], arguments: list[str], what: str
) -> None:
    rows = [cut_row("a", PARTS, 8.0, "a.wav")]
    for supervision in rows[0]["supervisions"]:
        supervision["custom"] = {}
    write_cuts(manifest, rows)
    with pytest.raises(InputError, match=what):
        curves.curves(options(manifest, tmp_path / "out", *arguments))


def test_usual_sweeps_and_settings_that_only_some_policies_have() -> None:
    found = settings_of(["alignatt", "local-agreement"], [], windows=False)
    assert {one.option for one in found} == {"frame_threshold", "chunk_ms"}
    assert {one.option for one in settings_of(["local-agreement"], [], windows=True)} == {"min_chunk_size"}
    given = parser().parse_args(["curves", "m", "x", "-o", "o", "--attn-layer", "2"])
    edatt, hold = (at(given, one) for one in (Setting("edatt", "attn_threshold", 0.2), Setting("hold-n", "hold_n", 4)))
    assert (edatt.policy, edatt.attn_layer, edatt.attn_threshold, edatt.hold_n) == ("edatt", 2, 0.2, None)
    assert (hold.attn_layer, hold.hold_n, hold.attn_threshold) == (None, 4, None)
    assert at(given, None).policy is None
    assert parse_sweeps(["edatt=0.5,1", "hold-n:min-chunk-size=2"]) == [
        ("edatt", "attn_threshold", (0.5, 1.0)), ("hold-n", "min_chunk_size", (2.0,)),
    ]  # fmt: skip
    assert [Setting("wait-k", "wait_k", 3).name, Setting("local-agreement", "chunk_ms", 320).curve] == [
        "wait-k-3", "local-agreement chunk-ms",
    ]  # fmt: skip


def rows_of(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array(pairs, float)


def test_areas_by_hand() -> None:
    """Lines from (1, 10) to (2, 20) and from (1, 10) to (3, 10): 5 points on average from 1 to 2 s."""
    rising, level = rows_of((2, 20), (1, 10)), rows_of((1, 10), (3, 10))
    assert gap(rising, level, least=1, most=3) == pytest.approx((5, 1, 2))
    assert gap(level, rising, least=1, most=3) == pytest.approx((-5, 1, 2))
    assert gap(rising, level, least=1.5, most=3) == pytest.approx((7.5, 1.5, 2))
    assert gap(rising, rows_of((1, 10), (1.5, 18), (2, 10)), least=0, most=9) == pytest.approx((1.0, 1, 2))
    assert gap(rising, rows_of((2.5, 1), (3, 2)), least=1, most=3) is None
    assert gap(rising, rows_of((1.5, 1)), least=1, most=3) is None
    assert gap(rising, rows_of((1, 1), (2, np.nan)), least=1, most=3) is None


def point_of(value: float, lag_s: float, errors: Sequence[float], aware_s: float = 0.0) -> Point:
    """N streams of 10 words and one sentence."""
    n = len(errors)
    ones = np.ones((n, 1))
    quality = np.stack([np.array(errors, float), np.full(n, 10.0)], 1)
    lags = {"LAAL": Timed(*(np.concatenate([x * ones, ones], 1) for x in (lag_s, lag_s + aware_s)))}
    return Point(Setting("p", "o", value), {"WER": quality}, lags, 0 * quality, quality)


def test_areas_of_curves_with_their_bootstrap() -> None:
    how = ErrorRate()
    good = [point_of(1, 1.0, [1, 1, 1, 1]), point_of(2, 2.0, [0, 0, 0, 0])]
    bad = [point_of(1, 1.0, [3, 3, 3, 3], 5.0), point_of(2, 3.0, [1, 1, 1, 1], 5.0)]
    found = area(good, bad, how, "LAAL")
    assert found is not None
    assert [found.mean, found.value, found.first_s, found.last_s, found.n] == pytest.approx([20, 20, 1, 2, 4])
    assert [found.low, found.high, found.drawn] == pytest.approx([20, 20, 1])  # every stream says the same
    assert area(good, bad, how, "LAAL", aware=True) is None
    uneven = [point_of(1, 1.0, [0, 0, 0, 8]), point_of(2, 3.0, [0, 0, 0, 8])]
    swings = area(good, uneven, how, "LAAL")
    assert swings is not None
    assert swings.mean == pytest.approx(15)
    assert swings.low < 0 < swings.high
    # drawn in pairs: the same stream makes the same errors, whoever is drawn
    same = area(uneven, [point_of(1, 1.0, [1, 1, 1, 9]), point_of(2, 3.0, [1, 1, 1, 9])], how, "LAAL")
    assert same is not None
    assert [same.low, same.mean, same.high] == pytest.approx([10, 10, 10])


def test_the_picture_has_both_clocks_and_offline() -> None:
    from speechattn.score.metrics import Scored

    points = [point_of(k, float(k), [k, k], 0.5) for k in (3, 1, 2)]
    offline = Scored("WER", 7.0, 6.0, 8.0, 2, "")
    plot = drawn(points, ErrorRate(), "LAAL", offline, "title").axes[0]
    solid, dashed, level = plot.lines[:3]
    assert list(solid.get_xdata()) == [1, 2, 3]
    assert list(solid.get_ydata()) == [10, 20, 30]
    assert list(dashed.get_xdata()) == [1.5, 2.5, 3.5]
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert list(level.get_ydata()) == [7, 7]
    assert plot.get_xlabel() == "LAAL, seconds"
    assert plot.get_ylabel() == "WER %, less is better"


def test_the_page_says_what_is_so() -> None:
    page = (Path(__file__).parents[1] / "docs" / "curves.md").read_text(encoding="utf-8")
    commands = [line for block in page.split("```sh\n")[1:] for line in block.split("```")[0].splitlines()]
    ours = [line.split()[1:] for line in commands if line.startswith("speechattn ")]
    assert len(ours) == 3
    for words in ours:
        given = parser().parse_args(words)
        settings_of(given.policies.split(","), parse_sweeps(given.sweep), windows=True)
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/curves.md", "exec"), names)
    assert [names["mean"], names["least"], names["most"]] == pytest.approx([5, 1, 2])
    for policy, (_, values) in USUAL.items():
        (row,) = [line for line in page.splitlines() if line.startswith("|") and f"`{policy}`" in line.split("|")[1]]
        assert policy == "retranslation" or ", ".join(f"{value:g}" for value in values) in row
