"""StreamAtt: what stays of text and sound, by golden numbers, an oracle, and in sessions of any length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fake import RATE, FakeModel, FakeTokenizer, Reordering
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.audio.vad import AlwaysSpeech
from speechattn.cli import main
from speechattn.cli.options import text_history
from speechattn.errors import InputError
from speechattn.live.events import Event
from speechattn.live.session import Session
from speechattn.live.windowed import Settings
from speechattn.policy import Policy
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.hold import Hold, WaitK
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.policy.stream_att import Characters, Punctuation, TextHistory, Words, earliest, kept
from speechattn.search import Draft

ROWS = torch.tensor([
    (0.40, 0.30, 0.10, 0.05, 0.05, 0.10), (0.05, 0.50, 0.20, 0.10, 0.05, 0.10), (0.05, 0.05, 0.50, 0.20, 0.10, 0.10),
    (0.05, 0.05, 0.10, 0.20, 0.40, 0.20), (0.02, 0.03, 0.05, 0.10, 0.20, 0.60),
])  # fmt: skip


def draft(rows: torch.Tensor, new: int, prompt: int = 1) -> Draft:
    """Of `rows` the last `new` say tokens of the draft, those before committed ones; one row behind them."""
    frames = rows.shape[1]
    weights = torch.cat([torch.rand(prompt - 1, frames), rows, torch.rand(1, frames)])
    return Draft(torch.arange(new), torch.zeros(new), weights[None], ((3, 0),), 0, True)


@pytest.mark.parametrize(
    ("history", "text", "stays"),
    [
        (Words(2), "a b c d", "c d"), (Words(9), "a b c d", "a b c d"), (Words(), "x " * 30, ("x " * 20).strip()),
        (Punctuation(), "I came. I saw", "I saw"), (Punctuation(), "I came. I saw.", "I saw."),
        (Punctuation(), "we came we saw", "we came we saw"), (Punctuation(), "what? yes! no: so; b", "b"),
        (Punctuation(), "one. two.", "two."), (Punctuation(), "3.5 is more, than 2", "3.5 is more, than 2"),
        (Characters(5), "ab cde f", "cde f"), (Characters(3), "ab cde f", "f"), (Characters(1), "ab cde", "cde"),
    ],
)  # fmt: skip
def test_the_text_that_stays(history: TextHistory, text: str, stays: str) -> None:
    words = [f" {word}" for word in text.split()]
    n = history.keep(words)
    assert "".join(words[len(words) - n :]).strip() == stays
    assert history.keep([]) == 0


def test_wide_marks_end_a_thought_too_and_the_papers_numbers_are_usual() -> None:
    assert Punctuation().keep(["好", "\u3002", "我", "来"]) == 2
    assert (Words().n, Punctuation().marks[:5]) == (20, ".!?:;")
    for history in (Words, Characters):
        with pytest.raises(ValueError, match="at least 1"):
            history(0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.text("ab.", min_size=1, max_size=6), st.integers(1, 60)), max_size=40), st.integers(1, 30))
def test_no_more_stays_than_a_decoder_can_read(words: list[tuple[str, int]], n: int) -> None:
    texts, sizes = [word for word, _ in words], [size for _, size in words]
    for history in (Words(n), Characters(n), Punctuation()):
        stays = kept(history, texts, sizes, most=100)
        assert 0 <= stays <= history.keep(texts)
        assert sum(sizes[len(sizes) - stays :]) <= 100 or stays == 1
        assert stays or not words
    assert all(Words(n).keep(texts) <= Words(n + 1).keep(texts) for n in range(1, 20))
    assert all(Characters(n).keep(texts) <= Characters(n + 1).keep(texts) for n in range(1, 20))


def test_the_sound_begins_where_the_text_that_stays_looks_first() -> None:
    """Peaks without the last frame are 0, 1, 2, 4, 4."""
    reader = AlignAtt.fbk(3, 1)
    for prompt in (1, 5):
        one = draft(ROWS, 2, prompt)  # three were committed before
        assert [earliest(one, reader, 3, range(first, 4)) for first in range(4)] == [0, 1, 2, 4]
        assert [earliest(one, reader, 2, range(first, 3)) for first in range(3)] == [1, 2, 4]
    back = draft(ROWS[[3, 1, 2, 4, 0]], 2)  # a translation looks back
    assert [earliest(back, reader, 3, range(first, 5)) for first in range(5)] == [0, 0, 0, 0, 0]
    assert earliest(back, reader, 3, range(4)) == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(2, 12), st.integers(0, 999), st.integers(0, 2))
def test_the_cut_is_that_of_a_loop(committed: int, new: int, frames: int, seed: int, drop: int) -> None:
    rows = np.random.default_rng(seed).random((committed + new, frames)).astype(np.float32)
    reader = AlignAtt(((3, 0),), drop_last=drop, normalise=False, median=1)
    seen = rows[:, : max(frames - drop, 1)]
    for first in range(committed + new):
        expected = min(int(max(range(seen.shape[1]), key=lambda t: seen[i, t])) for i in range(first, committed + new))
        found = earliest(draft(torch.tensor(rows), new, 3), reader, committed, range(first, committed + new))
        assert found == expected


def sound(seconds: float) -> np.ndarray:
    return np.full(round(seconds * RATE), 0.1, np.float32)


def text(events: Sequence[Event]) -> str:
    return "".join(event.committed for event in events)


def align_att() -> AlignAtt:
    return AlignAtt(((0, 0),), 10, normalise=False, median=1, rewind_threshold=None)


def run(model: FakeModel, seconds: float, policy: Policy | None = None, **settings: object) -> list[Event]:
    made = Session(model, policy=policy or align_att(), settings=Settings(**settings), vad=AlwaysSpeech())  # type: ignore[arg-type]
    events = [e for at in np.array_split(sound(seconds), round(2 * seconds)) for e in made.feed(at, RATE)]
    return events + made.finish()


WORDS, LENGTH_S = 240, 98.0
ENDS = [0.5 + 0.4 * i for i in range(WORDS)]


def order(n: int, *, swapped: bool) -> str:
    return "".join(f" w{i ^ 1 if swapped else i}" for i in range(n))


class Sentences(FakeTokenizer):
    """Every seventh word ends a sentence."""

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f" w{t}." if t % 7 == 6 else f" w{t}" if t < 1000 else f" cut{t - 1000}" for t in tokens)


@pytest.mark.parametrize("kind", [FakeModel, Reordering])
@pytest.mark.parametrize("policy", [align_att(), LocalAgreement(), Hold(3)])
def test_minutes_of_speech_in_a_window_of_seconds(kind: type[FakeModel], policy: Policy) -> None:
    """No pause, no word lost or said twice; sound, prompt and time of a look are bounded by the history."""
    model = kind(ENDS)
    events = run(model, LENGTH_S, policy, history=Words(6), max_window_s=20.0)
    assert text(events) == order(WORDS, swapped=kind is Reordering)
    assert max(model.encoded) / RATE < 6 * 0.4 + 5.0
    assert max(model.prompts) <= 6 + 8
    assert np.mean(model.encoded[-30:]) < 1.2 * np.mean(model.encoded[10:40])
    assert sum(event.final for event in events) == 1


def test_a_longer_history_keeps_more_sound() -> None:
    sizes = []
    for n in (3, 6, 12, 24):
        model = FakeModel(ENDS)
        assert text(run(model, LENGTH_S, history=Words(n), max_window_s=20.0)) == order(WORDS, swapped=False)
        sizes.append(np.mean(model.encoded[30:]) / RATE)
    assert np.diff(sizes) == pytest.approx([3 * 0.4, 6 * 0.4, 12 * 0.4], abs=0.3)


def test_the_window_begins_where_the_kept_words_are_heard() -> None:
    """The middle of the earliest of six words, as soon as a seventh is committed, and never later."""
    model = Reordering(ENDS)
    made = Session(model, policy=align_att(), settings=Settings(history=Words(6)), vad=AlwaysSpeech())
    said, starts = 0, set[int]()
    for at in np.array_split(sound(60.0), 120):
        said += sum(len(event.words) for event in made.feed(at, RATE))
        window = made.listener.utterance  # type: ignore[attr-defined]
        if window is None or said <= 6:
            continue
        earliest_s = min(ENDS[p ^ 1] for p in range(said - 6, said)) - 0.15
        assert window.start / RATE == pytest.approx(earliest_s, abs=0.021)
        assert len(window.words) == 6
        starts.add(window.start)
    assert len(starts) > 30


@pytest.mark.parametrize("how", [{"history": Words(6), "max_window_s": 20.0}, {"max_window_s": 8.0}])
def test_what_leaves_the_window_is_remembered_and_what_stays_is_where_it_was(how: dict[str, Any]) -> None:
    made = Session(
        FakeModel(ENDS), policy=align_att(), settings=Settings(context_tokens=999, **how), vad=AlwaysSpeech()
    )
    sizes = set[int]()
    for at in np.array_split(sound(60.0), 120):
        made.feed(at, RATE)
        window, gone = made.listener.utterance, made.listener.context  # type: ignore[attr-defined]
        if window is not None:
            assert [*gone, *window.tokens] == [*range(window.first)]
            assert window.context == gone  # the next draft reads it
            for word in window.words:
                end_s = ENDS[word.tokens[0]]
                assert end_s - 0.4 < window.start / RATE + 0.02 * word.frame < end_s
            sizes.add(len(gone))
    assert max(sizes) > 100
    assert len(sizes) > 5


@pytest.mark.parametrize("history", [Punctuation(), Characters(20)])
def test_other_histories_lose_nothing_either(history: TextHistory) -> None:
    model = FakeModel(ENDS, tokenizer=Sentences())
    events = run(model, LENGTH_S, history=history, max_window_s=20.0)
    assert text(events).replace(".", "") == order(WORDS, swapped=False)
    assert max(model.encoded) / RATE < 12.0


def test_speech_without_a_mark_is_cut_by_the_window() -> None:
    model = FakeModel(ENDS)
    events = run(model, LENGTH_S, history=Punctuation(), max_window_s=8.0)
    assert text(events) == order(WORDS, swapped=False)
    assert max(model.encoded) / RATE < 9.5


def test_wait_k_goes_on_when_the_window_has_lost_its_front() -> None:
    model = FakeModel(ENDS)
    words = FakeTokenizer().words
    events = run(model, LENGTH_S, WaitK(2, words, 20), history=Words(6), max_window_s=20.0)
    assert text(events) == order(WORDS, swapped=False)
    lags = [event.audio_s - word.end for event in events[:-1] for word in event.words]
    assert max(lags) < 4.0  # two words, and a look every second


@pytest.mark.parametrize("said", ["words=0", "words=x", "words=", "chars=-1", "sentences", "punctuation=3", ""])
def test_what_the_option_cannot_mean(said: str) -> None:
    with pytest.raises(InputError, match=f"--history {said}: "):
        text_history(said)


def test_who_takes_no_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "ok.wav", np.zeros(16000), 16000)
    given = ["transcribe", str(tmp_path / "ok.wav"), "--history", "words=5"]
    assert main([*given, "--model", "tiny.en", "--offline"]) == 2
    assert "--history does nothing with --offline" in capsys.readouterr().err
    assert main([*given, "--model", str(Path(__file__).parent / "digits")]) == 2
    assert "--history does nothing with" in capsys.readouterr().err


def test_settings_that_go_with_it_are_still_asked_for() -> None:
    with pytest.raises(InputError, match="max_window_s is 29"):
        Session(FakeModel(ENDS), settings=Settings(max_window_s=29.0, history=Words()), vad=AlwaysSpeech())
