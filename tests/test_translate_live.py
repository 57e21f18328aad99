"""Sessions of translators: text in another order than the sound keeps the laws of sessions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fake import RATE as FAKE_RATE
from fake import FakeModel, Reordering
from test_aligned import END, INSIDE, NEVER, aligned, decoder, utterances

from speechattn.audio.vad import AlwaysSpeech
from speechattn.frames import Frames, Memory
from speechattn.live import Event, Session, Settings, StreamSettings
from speechattn.live.formats import segments
from speechattn.model import Recognizer, load_model
from speechattn.policy import Policy, Source
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.hold import Hold
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.search import Draft
from speechattn.search.greedy import Greedy
from speechattn.search.loops import loop_start

DIGITS = Path(__file__).parent / "digits"


@pytest.fixture(scope="module")
def translator() -> Recognizer:
    """The recogniser of the digits, which from now on is said to translate."""
    model = load_model(DIGITS, dtype="float64")
    assert isinstance(model, Recognizer)
    model.target_language = "de"
    return model


@pytest.fixture(scope="module")
def speech() -> tuple[np.ndarray, int]:
    """Two utterances with a pause."""
    (x, rate), (y, _) = (soundfile.read(DIGITS / f"{name}.flac") for name in ("00", "12"))
    return np.concatenate([x, np.zeros(rate), y]), rate


def text(events: Sequence[Event]) -> str:
    return "".join(event.committed for event in events)


def run(model: Recognizer, sound: np.ndarray, cuts: list[int], rate: int, **options: Any) -> list[Event]:
    session = Session(model, search=model.search("aligned"), **options)
    events = [event for part in np.split(sound, sorted(cuts)) for event in session.feed(part, rate)]
    return events + session.finish()


def test_events_of_a_translator_do_not_depend_on_the_cuts(
    translator: Recognizer, speech: tuple[np.ndarray, int]
) -> None:
    sound, rate = speech
    chance = random.Random(5)
    whole = run(translator, sound, [], rate)
    assert run(translator, sound, [chance.randrange(len(sound)) for _ in range(9)], rate) == whole
    assert sum(event.final for event in whole) == 2
    assert whole[-1].unstable == ""
    assert any(event.committed and not event.final for event in whole)
    for policy in (Hold(2), LocalAgreement()):
        cuts = [chance.randrange(len(sound)) for _ in range(5)]
        again = run(translator, sound, cuts, rate, policy=policy)
        assert again == run(translator, sound, [], rate, policy=policy)
        assert sum(event.final for event in again) == 2


def test_a_translator_waits_in_a_pause_and_has_no_patience(
    translator: Recognizer, speech: tuple[np.ndarray, int]
) -> None:
    """Only the end of the utterance overrules a policy that never commits."""
    sound, rate = speech
    soon = StreamSettings(patience_s=0.2)
    events = run(translator, sound, [], rate, policy=Hold(99), settings=soon)
    assert text(events)
    assert all(event.final for event in events if event.committed)
    recogniser = load_model(DIGITS, dtype="float64")
    assert isinstance(recogniser, Recognizer)
    said = run(recogniser, sound, [], rate, policy=Hold(99), settings=soon)
    assert any(not event.final for event in said if event.committed)
    quick = [run(model, sound, [], rate, policy=Hold(0), trace=True) for model in (translator, recogniser)]
    whole = [
        [e for e in said if e.trace and e.trace.committed == e.trace.tokens and not e.final] for said in quick
    ]  # fmt: skip
    assert not whole[0]  # the last word before a pause waits
    assert whole[1]
    listener = Session(translator, search=translator.search("aligned")).listener
    heads = translator.heads["attention"].alignment_heads  # type: ignore[union-attr]
    assert listener.policy == AlignAtt(  # type: ignore[attr-defined]
        heads, 24, 24, drop_last=1, normalise=False, median=1, rewind_threshold=None
    )  # fmt: skip


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_drafts_of_a_translation_go_to_the_end_of_the_text(seed: int) -> None:
    """They are those of a greedy search that reads all anew, whatever the attention looks at."""
    torch.manual_seed(seed)
    made = decoder(seed)
    made.output.bias.data[END] -= 3.0  # type: ignore[union-attr]
    search = aligned(made, most=2.0).translating()
    assert (search.reorders, search.edge, search.most) == (True, 0, 2.0)
    assert not aligned(made).reorders
    frames = utterances(1, 24, holes=False)
    beam = search.start(frames)
    plain = Greedy(made, END, suppress=NEVER, suppress_next=INSIDE)
    lengths, backs = [], 0
    for at in range(0, 24, 6):
        beam = search.step(frames[at : at + 6], beam)
        memory = Memory.of(Frames(frames.values[:, : at + 6], frames.mask[:, : at + 6]))
        best = search.hypotheses(beam)[0][0]
        expected = plain.draft(memory, [END], [], max_tokens=30).tokens.tolist()
        assert list(best.tokens) == expected[: len(best.tokens)]
        assert len(best.tokens) in (len(expected), 2 * (at + 6) + 2, loop_start(expected))  # the end, the most, a loop
        lengths.append(len(best.tokens))
        assert all(0 <= begin < end <= at + 6 for begin, end in best.spans)
        backs += sum(b[0] < a[0] for a, b in pairwise(best.spans))
    assert max(lengths) > 2
    assert backs > 0  # times that are those of where it looked, in any order


ENDS = [0.5 + 0.4 * i for i in range(30)]


@pytest.mark.parametrize("policy", [AlignAtt(((0, 0),), 10, normalise=False, median=1, rewind_threshold=None),
                                    LocalAgreement(), Hold(2)])  # fmt: skip
def test_a_window_that_reorders_says_whole_words_once(policy: Policy) -> None:
    """Committed text only grows, is right at once, and is all there at the end; words have the times of their sound."""
    model = Reordering(ENDS)
    session = Session(model, policy=policy, settings=Settings(min_chunk_s=0.5), vad=AlwaysSpeech())
    x = np.full(round(13.0 * FAKE_RATE), 0.1, np.float32)
    events = [event for at in range(0, len(x), 1600) for event in session.feed(x[at : at + 1600], FAKE_RATE)]
    events += session.finish()
    whole = "".join(f" w{p ^ 1}" for p in range(30))
    assert text(events) == whole
    assert len([event for event in events if event.committed]) > 8
    words = [word for event in events for word in event.words]
    for word in words:
        end = ENDS[int(word.text.strip(" w"))]
        assert end - 0.4 <= word.start < end - 0.15 < word.end <= end + 0.1
    assert [word.start for word in words] != sorted(word.start for word in words)
    parts = segments(events)
    assert [part.start for part in parts] == sorted(part.start for part in parts)
    assert all(part.start <= part.end for part in parts)
    assert parts[0].start == words[1].start < words[0].start


def test_speech_without_a_pause_is_bounded(translator: Recognizer) -> None:
    """Nothing is certain and nobody pauses: the search ends all the same, with what it has, and begins anew."""
    x, rate = soundfile.read(DIGITS / "00.flac")
    loud = x[np.abs(x) > 0.005]
    session = Session(
        translator, search=translator.search("aligned"), policy=Hold(999), settings=StreamSettings(longest_s=1.0)
    )  # fmt: skip
    ends, read = 0, list[int]()
    for _ in range(8):
        for at in range(0, len(loud), rate // 4):
            ends += sum(event.final for event in session.feed(loud[at : at + rate // 4], rate))
            place = session.listener.place  # type: ignore[attr-defined]
            read += [] if place is None else place.row.beam.state.heard.tolist()
    assert ends >= int(8 * len(loud) / rate / 4.3)
    assert max(read) * translator.frame_s <= 4.0 + 0.7


def test_a_pause_is_no_end_of_a_word_in_a_translation() -> None:
    """A look at a pause is taken, but the policy of a translator is not told of it."""
    for translates in (False, True):
        told = list[bool]()

        class Told(Hold):
            def accept(self, draft: Draft, source: Source, state: None, told: list[bool] = told) -> tuple[int, None]:
                told.append(source.paused)
                return super().accept(draft, source, state)

        session = Session(FakeModel(ENDS, translates=translates), policy=Told(1), vad=Loud())
        x = np.full(6 * FAKE_RATE, 0.1, np.float32)
        x[3 * FAKE_RATE : round(3.4 * FAKE_RATE)] = 0
        session.feed(x, FAKE_RATE)
        assert any(told) == (not translates)
        assert len(told) >= 5


class Loud:
    """Speech is what is not zero."""

    def __call__(self, frame: np.ndarray) -> float:
        return float(np.abs(frame).max() > 0)
