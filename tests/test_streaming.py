"""Sessions and pools of models that stream: committed text only grows, whoever else is there."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spelling import BLOCK, FRAME, LETTERS, RATE, Speller, sound

from speechattn.errors import InputError
from speechattn.live import Event, Pool, Session, Settings, StreamSettings
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.search.phrases import Phrases

STEP = BLOCK * FRAME


def session(**changes: object) -> Session:
    return Session(Speller(), **changes)  # type: ignore[arg-type]


def said(events: list[Event]) -> str:
    return "".join(event.committed for event in events).strip()


def run(made: Session, samples: np.ndarray, cuts: list[int]) -> list[Event]:
    events = []
    for part in np.split(samples, sorted(cuts)):
        events += made.feed(part, RATE)
    return events + made.finish()


@pytest.mark.parametrize("size", [1, 4])
def test_words_come_with_their_times(size: int) -> None:
    made = Session(Speller(size=size))
    events = run(made, sound("3 ab cd3 e2"), [])
    assert said(events) == "ab cd e"
    words = [word for event in events for word in event.words]
    assert [word.text for word in words] == [" ab", " cd", " e"]
    first = words[0]
    assert first.start == pytest.approx(0.3)  # the mark that begins the word
    assert first.end == pytest.approx(0.3 + 0.04 + 2 * 0.08 - 0.02)
    assert first.confidence == pytest.approx(0.99**3, rel=1e-4)
    assert events[-1].final


@given(st.lists(st.integers(0, 60000), max_size=12))
@settings(deadline=None, max_examples=25)
def test_events_do_not_depend_on_the_cuts(cuts: list[int]) -> None:
    samples = sound("2 hello world4 ab9 again and again1 c3")
    whole, parts = run(session(), samples, []), run(session(), samples, [min(c, len(samples)) for c in cuts])
    assert whole == parts
    assert said(whole) == "hello world ab again and again c"


def test_committed_text_only_grows_and_the_tail_is_shown() -> None:
    events = run(session(), sound(" one two three four five"), list(range(0, 60000, 500)))
    shown = [said(events[: i + 1]) + event.unstable for i, event in enumerate(events)]
    full = said(events)
    assert full == "one two three four five"
    assert all(full.startswith(said(events[: i + 1])) for i in range(len(events)))
    assert any(event.unstable for event in events)
    assert all(full.startswith(one.strip()) for one in shown)


def test_a_word_is_whole_when_a_pause_follows() -> None:
    made = session(settings=StreamSettings(pause_s=0.2, silence_s=5.0))
    events = made.feed(sound(" ab9"), RATE)
    assert said(events) == "ab"
    assert not any(event.final for event in events)
    eager = session(settings=StreamSettings(pause_s=4.0, silence_s=5.0))
    assert said(eager.feed(sound(" ab9"), RATE)) == ""
    assert said(eager.finish()) == "ab"


@pytest.mark.parametrize("block_phase", range(0, 8))
def test_the_search_begins_anew_in_long_gaps_only(block_phase: int) -> None:
    text = "".join(f"0 ab{gap}" for gap in (7, 4, 8, 5, 7)) + " c"
    lead = np.zeros(block_phase * FRAME, np.float32)
    made = session(settings=StreamSettings(silence_s=0.6))
    events = run(made, np.concatenate([lead, sound(text)]), [])
    assert sum(event.final for event in events) == 4  # the gaps of 0.7, 0.8 and 0.7 s, and the end
    assert said(events) == "ab ab ab ab ab c"


def test_times_are_those_of_the_stream_after_many_ends() -> None:
    text = "5" + " ab9" * 4
    words = [word for event in run(session(), sound(text), []) for word in event.words]
    assert [word.text for word in words] == [" ab"] * 4
    one_s = len(sound(" ab9")) / RATE
    for i, word in enumerate(words):
        assert word.start == pytest.approx(0.5 + i * one_s, abs=0.03)
        assert word.end == pytest.approx(0.5 + i * one_s + 0.18, abs=0.03)


def test_what_hypotheses_do_not_agree_on_waits() -> None:
    text = " aB cd ef gh ij kl"
    sure = session(settings=StreamSettings(patience_s=60.0)).feed(sound(text), RATE)
    assert said(sure) == ""  # ab with 60 %, ac with 39 %
    assert sure[-1].unstable.startswith(" ab cd")
    bold = session(settings=StreamSettings(patience_s=60.0, certainty=0.5)).feed(sound(text), RATE)
    assert said(bold).startswith("ab cd")
    late = session(settings=StreamSettings(patience_s=0.5)).feed(sound(text), RATE)
    assert said(late).startswith("ab cd")


def test_the_guard_keeps_a_search_for_a_while() -> None:
    made = session(settings=StreamSettings(silence_s=0.6, guard_s=3.0))
    events = made.feed(sound(" ab7 ab7 ab9 ab7 ab9"), RATE)
    ends = [event.audio_s for event in events if event.final]
    assert len(ends) == 1
    assert ends[0] >= 3.0


def test_an_utterance_without_pauses_ends_all_the_same() -> None:
    made = session(settings=StreamSettings(longest_s=1.0))
    events = run(made, sound(" abcdefgh" * 30), [])
    assert said(events).replace(" ", "") == "abcdefgh" * 30
    ends = [event.audio_s for event in events if event.final]
    assert len(ends) >= len(sound(" abcdefgh" * 30)) / RATE / 2 - 1


def test_memory_does_not_grow() -> None:
    made, sizes = session(), []
    for _ in range(40):
        made.feed(sound(" some words that go on and on2"), RATE)
        row = made.listener.place.row  # type: ignore[attr-defined]
        sizes.append(row.beam.said.tokens.shape[2])
    assert max(sizes[20:]) <= max(sizes[:20])


def test_nothing_said_is_no_event() -> None:
    assert run(session(), np.zeros(5 * RATE, np.float32), [7000]) == []
    assert session().finish() == []
    assert run(session(), np.zeros(10, np.float32), []) == []


def test_a_word_at_the_very_end_is_not_lost() -> None:
    for more in range(0, STEP, 160):
        samples = np.concatenate([np.zeros(more, np.float32), sound(" ab")])
        # a frame is 20 ms: letters that begin inside one are louder than what stands before them
        assert said(run(session(), samples, [])).replace(" ", "") in ("ab", "aab", "abb") or more % FRAME


def test_a_policy_decides_in_place_of_the_beam() -> None:
    made = session(policy=LocalAgreement(), settings=StreamSettings(pause_s=3.0, silence_s=5.0))
    events = run(made, sound(" one two three4"), [])
    assert said(events) == "one two three"
    with pytest.raises(InputError, match="attention"):
        session(policy=AlignAtt.whisper(((0, 0),)))


def test_options_of_another_kind_of_model_are_refused() -> None:
    with pytest.raises(InputError, match="StreamSettings"):
        session(settings=Settings())
    with pytest.raises(InputError, match="voice detection"):
        session(vad=object())
    with pytest.raises(InputError, match="silence_s"):
        StreamSettings(silence_s=0.0)


TEXTS = [" hello there7 you", "2 ab cd ef gh5 ij9 kl", " one", "", "9", "3 four five six seven eight nine ten"]


@pytest.mark.parametrize("seed", range(6))
def test_a_pool_says_what_each_session_says_alone(seed: int) -> None:
    chance = random.Random(seed)
    pool = Pool(Speller(), 3)
    waiting = [(text, sound(text)) for text in TEXTS]
    alone = {text: run(session(), samples, []) for text, samples in waiting}
    chance.shuffle(waiting)
    heard: dict[int, list[Event]] = {}
    texts: dict[int, str] = {}
    left: dict[int, np.ndarray] = {}
    while waiting or left or pool.busy:
        if waiting and len(pool.sessions) < 3 and chance.random() < 0.5:
            text, samples = waiting.pop()
            slot = pool.open()
            texts[slot], left[slot], heard[slot] = text, samples, []
        for slot in list(left):
            if chance.random() < 0.3:
                continue  # pauses
            n = chance.randrange(1, 3 * STEP)
            pool.feed(slot, left[slot][:n], RATE)
            left[slot] = left[slot][n:]
            if not len(left[slot]):
                del left[slot]
                pool.close(slot)
        if chance.random() < 0.7:
            for slot, events in pool.step().items():
                heard[slot] += events
    assert len(heard) == len(TEXTS)
    for slot, events in heard.items():
        assert events == alone[texts[slot]], texts[slot]
    assert pool.step() == {}


def test_a_pool_is_fair_and_bounded() -> None:
    pool = Pool(Speller(), 2)
    a, b = pool.open(), pool.open()
    with pytest.raises(InputError, match="2 slots"):
        pool.open()
    pool.feed(a, np.zeros(10 * STEP, np.float32), RATE)
    pool.feed(b, sound(" ab9"), RATE)
    n = len(sound(" ab9")) // STEP
    events = [pool.step() for _ in range(n)]
    assert said([event for step in events for event in step.get(b, [])]) == "ab"
    assert pool.sessions[a].listener.heard == n * STEP
    pool.feed(a, np.zeros(61 * RATE, np.float32), RATE)
    with pytest.raises(InputError, match="wait"):
        pool.feed(a, np.zeros(10, np.float32), RATE)
    pool.close(b)
    while b in pool.sessions:
        pool.step()
    assert pool.open() == 3
    with pytest.raises(InputError, match="not open"):
        pool.feed(b, np.zeros(10, np.float32), RATE)


def biased() -> Speller:
    return Speller(phrases=Phrases(bonus=1.5, vocab=LETTERS.size))


def test_phrases_are_preferred_until_others_are_asked_for() -> None:
    made = Session(biased())
    made.prefer(["ac"])
    events = made.feed(sound(" aB9 ab9"), RATE)
    assert said(events) == "ac ab"  # what is clear stays
    assert [(hit.text, len(hit.spans)) for hit in made.hits()] == [("ac", 1)]
    start, end = made.hits()[0].spans[0]
    assert 0 <= start < end <= 0.3
    made.prefer(["xy", "cd eh"])
    more = made.feed(sound(" aB9 cd eG9"), RATE)
    assert said(more) == "ab cd eh"
    assert [(hit.text, len(hit.spans)) for hit in made.hits()] == [("xy", 0), ("cd eh", 1)]
    made.prefer([])
    assert said(made.feed(sound(" aB9"), RATE) + made.finish()) == "ab"
    assert len([event for event in events + more if event.final]) == 4  # utterances end as without phrases


def test_phrases_of_one_session_are_not_those_of_another() -> None:
    pool = Pool(biased(), 3)
    slots = [pool.open(phrases=["ac"]), pool.open(), pool.open(phrases=["bb", "xy"])]
    heard: dict[int, list[Event]] = {slot: [] for slot in slots}
    for slot in slots:
        pool.feed(slot, sound(" aB9 ab Ab9"), RATE)
    for i in range(60):
        if i == 8:
            pool.prefer(slots[0], ["bb"])
        if i == 10:
            for slot in slots:
                pool.close(slot)
        for slot, events in pool.step().items():
            heard[slot] += events
    assert [said(heard[slot]) for slot in slots] == ["ac ab bb", "ab ab ab", "ab ab bb"]
    assert not pool.sessions
    assert len(pool.search.phrases._sets) == 1  # type: ignore[union-attr]


def test_phrases_need_a_search_that_takes_them() -> None:
    with pytest.raises(InputError, match="phrases"):
        session().prefer(["ab"])
    with pytest.raises(InputError, match="spell"):
        Session(biased()).prefer(["\u00e4"])
