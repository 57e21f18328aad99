"""Word errors, lag, calibration; subtitles."""

from __future__ import annotations

import json

import numpy as np
import pytest

from speechattn.errors import InputError
from speechattn.live.events import Event, Word
from speechattn.live.formats import FORMATS, segments
from speechattn.live.timing import token_spans
from speechattn.score.calibration import calibration, word_marks
from speechattn.score.lag import Heard, lag_words, measure_lag
from speechattn.score.wer import bootstrap, word_errors


def test_word_errors_by_hand() -> None:
    errors = word_errors(["the cat sat", "on the mat", "!"], ["the bat sat down", "on mat", "noise"])
    assert (errors.substitutions, errors.insertions, errors.deletions) == (1, 1, 1)
    assert (errors.n, errors.utterances) == (6, 2)
    assert errors.rate == pytest.approx(0.5)
    assert errors.low <= errors.rate <= errors.high
    assert "whisper-normalizer" in errors.normaliser


def test_normaliser_is_named_and_does_what_it_says() -> None:
    assert word_errors(["It's twenty dollars"], ["it is $20"]).rate == 0
    assert word_errors(["Hello"], ["hello"], normalise="none").rate == 1
    with pytest.raises(InputError, match="wanted one of"):
        word_errors(["a"], ["a"], normalise="mine")


def test_texts_that_do_not_pair_are_refused() -> None:
    with pytest.raises(InputError, match="2 references and 1 hypotheses"):
        word_errors(["a", "b"], ["a"])
    with pytest.raises(InputError, match="no reference"):
        word_errors(["!"], ["a"])


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(200):
        low, high = bootstrap(rng.binomial(10, 0.2, 60), np.full(60, 10), seed=trial, rounds=300)
        inside += low <= 0.2 <= high
    assert 178 <= inside <= 199


def event(words: list[Word], at: float, *, final: bool = False) -> Event:
    return Event("text", "".join(word.text for word in words), "", tuple(words), at, final=final, emitted_s=at)


def test_lag_counts_correct_words_from_their_true_end() -> None:
    words = [
        Word(" The", 0.0, 0.4, 1),
        Word(" cat,", 0.4, 0.9, 1),
        Word(" bat", 1.0, 1.4, 1),
        Word(" ran.", 1.4, 9.0, 1),
    ]
    heard = [Heard("the", 0.5), Heard("cat", 1.0), Heard("sat", 1.5), Heard("ran", 2.0)]
    lag = measure_lag([event(words[:2], 1.5), event(words[2:], 3.0)], heard)
    assert lag.seconds == pytest.approx((1.0, 0.5))  # "ran" is another one: it lies seven seconds away
    assert lag.said == 4
    assert lag.mean == pytest.approx(0.75)
    assert np.isnan(measure_lag([], heard).mean)


def test_words_for_lag() -> None:
    assert lag_words("Don't... \u2018you\u2019 re-read it\u2019s 'ok'!") == ["don't", "you", "re", "read", "it's", "ok"]


def test_calibration_by_hand() -> None:
    perfect = calibration([1.0, 1.0, 0.0, 0.0], [True, True, False, False])
    assert perfect.ece == pytest.approx(0, abs=1e-5)
    assert perfect.nce == pytest.approx(1, abs=1e-4)
    flat = calibration([0.5] * 4, [True, True, False, False])
    assert (flat.ece, flat.nce) == (pytest.approx(0), pytest.approx(0))
    over = calibration([0.95] * 4, [True, False, True, False])
    assert over.ece == pytest.approx(0.45)
    assert over.nce < 0
    with pytest.raises(ValueError, match="no words"):
        calibration([], [])
    confidences, right = word_marks([Word(" a", 0, 1, 0.9), Word(" x", 1, 2, 0.2)], "a b")
    assert (confidences, right) == ([0.9, 0.2], [True, False])


def test_token_spans_follow_the_attention_in_order() -> None:
    weights = np.full((3, 10), 0.01, np.float32)
    weights[0, :3] = weights[1, 3:7] = weights[2, 7:] = 1
    assert token_spans(weights) == [(0, 3), (3, 7), (7, 10)]
    assert token_spans(weights[:, :2]) == [(0, 1), (1, 2), (1, 2)]
    rng = np.random.default_rng(0)
    for _ in range(20):
        w = rng.random((4, 9)).astype(np.float32)
        spans = token_spans(w)
        score = sum(w[i, a:b].sum() for i, (a, b) in enumerate(spans))
        cuts = [(0, a, b, c, 9) for a in range(1, 7) for b in range(a + 1, 8) for c in range(b + 1, 9)]
        best = max(sum(w[i, c[i] : c[i + 1]].sum() for i in range(4)) for c in cuts)
        assert score == pytest.approx(best, abs=1e-5)
        assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]


EVENTS = [
    event([Word(" Hi.", 0.0, 0.5, 0.9), Word(" How", 0.6, 0.8, 0.9)], 1.0),
    event([Word(" are\tyou", 0.8, 3661.25, 0.9)], 2.0, final=True),
]


def test_formats() -> None:
    parts = segments(EVENTS)
    assert [part.text for part in parts] == ["Hi.", "How", "are\tyou"]
    assert FORMATS["txt"](parts) == "Hi.\nHow\nare\tyou\n"
    assert FORMATS["srt"](parts).startswith("1\n00:00:00,000 --> 00:00:00,500\nHi.\n\n2\n")
    assert "01:01:01.250" in FORMATS["vtt"](parts)
    assert FORMATS["vtt"](parts).startswith("WEBVTT\n\n")
    assert FORMATS["tsv"](parts).splitlines()[3] == "800\t3661250\tare you"
    said = json.loads(FORMATS["json"](parts))
    assert said["segments"][0]["words"][0] == {"text": " Hi.", "start": 0.0, "end": 0.5, "confidence": 0.9}


def test_long_sentences_are_cut_for_subtitles() -> None:
    words = [Word(f" word{i}", i * 0.5, i * 0.5 + 0.4, 1.0) for i in range(60)]
    parts = segments([event(words, 30.0)])
    assert max(part.end - part.start for part in parts) <= 7
    assert " ".join(part.text for part in parts) == " ".join(f"word{i}" for i in range(60))
