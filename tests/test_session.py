"""The live session on a recogniser whose every word is known."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from fake import RATE, FakeModel, FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.audio.hearing import hear
from speechattn.audio.vad import AlwaysSpeech
from speechattn.errors import InputError
from speechattn.frames import Memory
from speechattn.live.events import Event
from speechattn.live.session import Session
from speechattn.live.windowed import Settings
from speechattn.policy import Policy
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.pretrained.whisper.features import FrontEnd

ENDS = [0.5 + 0.4 * i for i in range(30)]
LENGTH_S = 13.0


class LoudSpeech:
    """Speech is what is not zero."""

    def __call__(self, frame: np.ndarray) -> float:
        return float(np.abs(frame).max() > 0)


def sound(seconds: float, gaps: Sequence[tuple[float, float]] = ()) -> np.ndarray:
    x = np.full(round(seconds * RATE), 0.1, np.float32)
    for begin, end in gaps:
        x[round(begin * RATE) : round(end * RATE)] = 0
    return x


def align_att(threshold: int = 10) -> AlignAtt:
    return AlignAtt(((0, 0),), threshold, normalise=False, median=1)


def session(model: FakeModel, policy: Policy | None = None, **changes: float) -> Session:
    return Session(model, policy=policy or align_att(), settings=Settings(**changes), vad=LoudSpeech())


def text(events: Sequence[Event]) -> str:
    return "".join(event.committed for event in events)


def whole(n: int) -> str:
    return "".join(f" w{i}" for i in range(n))


def run(made: Session, x: np.ndarray, cuts: Sequence[int] = ()) -> list[Event]:
    edges = [0, *sorted({c % (len(x) + 1) for c in cuts}), len(x)]
    events = [event for a, b in pairwise(edges) for event in made.feed(x[a:b], RATE)]
    return events + made.finish()


@pytest.mark.parametrize("policy", [align_att(), LocalAgreement()])
@pytest.mark.parametrize("chunk", [0.3, 1.0, 2.0])
def test_everything_is_said_once_and_right(policy: Policy, chunk: float) -> None:
    events = run(session(FakeModel(ENDS), policy, min_chunk_s=chunk), sound(LENGTH_S), range(0, 200000, 1600))
    assert text(events) == whole(30)
    assert sum(event.final for event in events) == 1


class Listening(FakeModel):
    """Remembers the features that it was given: the first sample of the window, its samples, what they became."""

    def __init__(self, ends: Sequence[float]) -> None:
        super().__init__(ends, front_end=FrontEnd())
        self.given: list[tuple[int, int, torch.Tensor]] = []

    def encode(self, features: torch.Tensor, *, samples: int, start: int = 0, finished: bool = False) -> Memory:
        self.given.append((start, samples, features[0]))
        return super().encode(features, samples=samples, start=start, finished=finished)


@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.integers(0, 10**6), max_size=40))
def test_features_of_a_session_are_those_of_the_whole_sound(cuts: list[int]) -> None:
    """However it came, and when the window has lost its front: what remains still hears what stood before it."""
    model, x = Listening(ENDS), np.random.default_rng(0).normal(0, 0.1, 208123).astype(np.float32)
    made = Session(model, policy=align_att(), settings=Settings(max_window_s=5.0), vad=AlwaysSpeech())
    assert text(run(made, x, cuts)) == whole(30)
    windows = [start for start, *_ in model.given]
    assert windows[0] == 0
    assert len(set(windows)) > 2
    for start, samples, features in model.given:
        assert start % 320 == 0
        heard = hear(FrontEnd(), x[: start + samples])[0, start // 160 :]
        torch.testing.assert_close(features, heard, rtol=0, atol=1e-5)
    assert start + samples == len(x)
    assert max(samples for _, samples, _ in model.given) < 8 * RATE


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 10**6), max_size=40))
def test_events_do_not_depend_on_how_the_sound_was_cut(cuts: list[int]) -> None:
    x = sound(LENGTH_S, [(4.1, 4.9)])
    expected = run(session(FakeModel(ENDS)), x)
    assert run(session(FakeModel(ENDS)), x, cuts) == expected
    assert len(expected) > 10


def test_sample_by_sample_equals_all_at_once() -> None:
    x = sound(2.5)
    assert run(session(FakeModel(ENDS)), x, range(len(x))) == run(session(FakeModel(ENDS)), x)


def test_committed_text_is_what_will_stay_and_comes_before_the_end() -> None:
    made, ready = session(FakeModel(ENDS)), list[float]()
    events = run(made, sound(LENGTH_S), range(0, 200000, 1600))
    texts = list(accumulate(event.committed for event in events))
    assert all(whole(30).startswith(said) for said in texts)
    for event in events:
        assert "cut" not in event.committed
        ready += [event.audio_s - word.end for word in event.words]
    assert 0 < np.mean(ready) < 1.5
    assert any("cut" in event.unstable for event in events)


def test_finishing_commits_the_last_word_and_only_once() -> None:
    made = session(FakeModel([0.5, 0.9]))
    before = made.feed(sound(0.95), RATE)
    last = made.finish()
    assert text(before + last) == " w0 w1"
    assert last[-1].final
    assert last[-1].unstable == ""
    assert made.finish() == []
    with pytest.raises(InputError, match="finished"):
        made.feed(sound(0.1), RATE)


def test_the_last_samples_are_heard_though_they_fill_no_frame() -> None:
    model, x = FakeModel([0.5, 0.9, 1.51]), sound(1.51)
    assert text(run(session(model), x)) == whole(3)
    assert model.end_s == len(x) / RATE


def test_a_draft_that_was_cut_is_not_committed_to_its_last_word() -> None:
    class Cut(FakeModel):
        def draft(self, *arguments, **options):  # type: ignore[no-untyped-def]
            return replace(super().draft(*arguments, **options), ended=False)

    class Everything(LocalAgreement):
        def accept(self, draft, source, state):  # type: ignore[no-untyped-def]
            return len(draft.tokens), state

    made = session(Cut([0.3, 0.6, 0.9]), Everything())
    assert text(made.feed(sound(1.2), RATE)) == whole(2)
    assert text(made.finish()) == " w2"


def test_an_utterance_ends_after_silence_and_the_next_begins_in_its_own_time() -> None:
    ends = [0.6, 1.0, 3.6, 4.0]
    x = sound(4.3, [(0.0, 0.25), (1.1, 3.2)])
    events = run(session(FakeModel(ends)), x)
    assert text(events) == whole(4)
    finals = [event for event in events if event.final]
    assert len(finals) == 2
    assert 1.5 < finals[0].audio_s < 1.8  # 1.1 s and half a second of silence
    for event in events:
        for word in event.words:
            true = ends[int(word.text.strip("w ")) % 1000]
            assert true - 0.35 <= word.start <= word.end <= true + 0.35


def test_a_pause_commits_before_the_utterance_ends() -> None:
    ends = [0.6, 1.0, 2.2]
    x = sound(2.4, [(1.1, 1.5)])
    quick = run(session(FakeModel(ends), align_att(20), min_chunk_s=5.0), x)
    assert quick[0].committed == " w0 w1"
    assert 1.3 < quick[0].audio_s < 1.4
    assert text(quick) == whole(3)


def test_a_pause_begins_the_next_interval() -> None:
    model = FakeModel([0.6, 1.0, 3.2])
    run(session(model, min_chunk_s=1.0), sound(3.4, [(1.1, 1.5)]))
    looks = [n / RATE for n in model.encoded]
    assert looks[:3] == pytest.approx([1.0, 1.36, 2.36], abs=0.05)


def test_utterances_that_bring_no_space_still_stand_apart() -> None:
    class Tight(FakeTokenizer):
        def decode(self, tokens: Sequence[int]) -> str:
            return super().decode(tokens).replace(" ", "")

    x = sound(4.3, [(0.0, 0.25), (1.1, 3.2)])
    ends = [0.6, 1.0, 3.6, 4.0]
    assert text(run(session(FakeModel(ends, tokenizer=Tight())), x)) == " w0w1 w2w3"
    assert text(run(session(FakeModel(ends, tokenizer=Tight(), spaceless=True)), x)) == "w0w1w2w3"


def test_silence_is_not_even_listened_to() -> None:
    model = FakeModel(ENDS)
    assert run(session(model), np.zeros(10 * RATE, np.float32)) == []
    assert model.encoded == []


@pytest.mark.parametrize("policy", [align_att(), LocalAgreement()])
def test_hours_cost_what_minutes_cost(policy: Policy) -> None:
    """The window, the prompt and the state stay bounded, and no word is lost or said twice where it is cut."""
    ends = [0.5 + 0.4 * i for i in range(900)]
    model = FakeModel(ends)
    made = session(model, policy, max_window_s=8.0, context_tokens=20)
    events = run(made, sound(362), range(0, 362 * RATE, 8000))
    assert text(events) == whole(900)
    assert max(model.encoded) <= 9.1 * RATE
    assert max(model.prompts) <= 20 + 8 / 0.4 + 4
    assert len(made.listener.context) <= 20
    first, last = model.encoded[:60], model.encoded[-60:]
    assert np.mean(last) < 1.5 * np.mean(first)


def test_a_window_that_cannot_be_cut_starts_again_between_two_words() -> None:
    class Never(LocalAgreement):
        def accept(self, draft, source, state):  # type: ignore[no-untyped-def]
            return (len(draft.tokens) if source.finished else 0), state

    ends = [0.5 + 0.4 * i for i in range(170)]
    model = FakeModel(ends)
    events = run(session(model, Never()), sound(70))
    assert text(events) == whole(170)
    assert sum(event.final for event in events) == 1
    assert max(model.encoded) <= 30 * RATE


def test_a_loop_is_withheld_and_what_was_before_it_is_kept() -> None:
    ends = [0.5 + 0.4 * i for i in range(5)]
    made = session(FakeModel(ends, loop_from_s=2.0))
    events = run(made, sound(6.0))
    said = text(events)
    assert said.startswith(whole(5))
    assert said.count("w7") <= 1
    assert [event.kind for event in events].count("withheld") == 1
    assert "w7 w7" in events[-1].withheld
    assert all(event.unstable.count("w7") <= 1 for event in events)


def test_wall_time_does_not_make_events_differ_and_queueing_is_counted() -> None:
    ticks = iter(np.arange(0, 10**6, 0.25))
    slow = Session(FakeModel(ENDS), policy=align_att(), vad=LoudSpeech(), clock=lambda: float(next(ticks)))
    events = slow.feed(sound(3.0), RATE) + slow.finish()
    assert events == run(session(FakeModel(ENDS)), sound(3.0))
    for event, later in pairwise(events):
        assert later.emitted_s >= event.emitted_s
    # 94 frames of 0.25 s of computing each: three seconds of sound take more than twenty
    assert events[-1].emitted_s > 20


def test_other_rates_and_channels_and_integers_give_the_same_words() -> None:
    x = sound(3.0)
    stereo = np.stack([x, x], 1)
    expected = text(run(session(FakeModel(ENDS[:7])), x))
    assert text(session_all(stereo, RATE)) == expected
    assert text(session_all((x * 32767).astype(np.int16), RATE)) == expected
    for rate in (8000, 11025, 44100, 48000):
        y = np.full(3 * rate, 0.1, np.float32)
        assert text(session_all(y, rate)) == expected


def session_all(x: np.ndarray, rate: int) -> list[Event]:
    made = Session(FakeModel(ENDS[:7]), policy=align_att(), vad=AlwaysSpeech())
    return made.feed(x, rate) + made.finish()


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (np.array([0.0, np.nan]), RATE, "sample 1 is not a finite number"),
        (np.array([np.inf]), RATE, "sample 0 is not a finite number"),
        (np.zeros((2, 2, 2)), RATE, "shape"),
        (np.array(["a"]), RATE, "type"),
        (np.zeros(10), 100, "sample rate 100 Hz"),
    ],
)
def test_what_is_not_sound_is_refused(samples: np.ndarray, rate: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        session(FakeModel(ENDS)).feed(samples, rate)


def test_settings_and_rates_that_cannot_be_honoured_are_refused() -> None:
    made = session(FakeModel(ENDS))
    made.feed(sound(0.1), RATE)
    with pytest.raises(InputError, match="8000 Hz after 16000 Hz"):
        made.feed(sound(0.1), 8000)
    with pytest.raises(InputError, match="max_window_s is 29"):
        session(FakeModel(ENDS), max_window_s=29.0)
    with pytest.raises(InputError, match="min_chunk_s is 0"):
        Settings(min_chunk_s=0)
    with pytest.raises(InputError, match="silence_s is nan"):
        Settings(silence_s=float("nan"))


def test_context_manager_finishes_and_callback_hears_everything() -> None:
    heard: list[Event] = []
    with Session(FakeModel(ENDS[:3]), policy=align_att(), vad=LoudSpeech(), on_event=heard.append) as made:
        made.feed(sound(1.4), RATE)
    assert text(heard) == whole(3)
    assert made.closed


def test_async_iterator_yields_until_finished() -> None:
    async def listen() -> list[Event]:
        made = session(FakeModel(ENDS[:7]))

        async def feed() -> None:
            for _ in range(30):
                made.feed(sound(0.1), RATE)
                await asyncio.sleep(0)
            made.finish()

        task = asyncio.create_task(feed())
        events = [event async for event in made]
        await task
        return events

    assert text(asyncio.run(listen())) == whole(7)


def test_events_survive_json() -> None:
    events = run(session(FakeModel(ENDS)), sound(3.0))
    again = [Event.from_json(event.to_json()) for event in events]
    assert [event.committed for event in again] == [event.committed for event in events]
    assert again[0].words[0].end == pytest.approx(events[0].words[0].end, abs=1e-3)
