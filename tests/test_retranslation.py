"""Retranslation: nothing is committed before the end, all is shown, and its log tells what was taken back."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from fake import RATE, FakeModel, draft, said
from spelling import Speller, sound

from speechattn.audio.vad import AlwaysSpeech
from speechattn.live import Event, Session, Settings, StreamSettings
from speechattn.policy import Policy, Source
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.policy.retranslation import Retranslation
from speechattn.score.latency.erasure import erasure
from speechattn.score.latency.logs import read_log

ENDS = [0.6 + 0.45 * i for i in range(12)]
GO, END = Source(50, 0.02, finished=False), Source(50, 0.02, finished=True)


def listened(policy: Policy, seconds: float = 6.0, **changes: Any) -> list[Event]:
    made = Session(FakeModel(ENDS), policy=policy, settings=Settings(min_chunk_s=0.5, **changes), vad=AlwaysSpeech())
    return made.feed(np.full(round(seconds * RATE), 0.1, np.float32), RATE) + made.finish()


def test_retranslation_commits_at_the_end_alone() -> None:
    policy = Retranslation(2)
    assert policy.accept(draft(5), GO, None) == (0, None)
    assert policy.accept(draft(5), END, None) == (5, None)
    assert "not ended" in policy.why(draft(5), GO, None, 0)
    assert [policy.shown(sizes) for sizes in ([], [1], [3], [1, 1, 1], [2, 3], [2, 2], [1, 4, 1])] == [
        0,
        0,
        0,
        1,
        2,
        2,
        1,
    ]
    assert Retranslation().shown([1, 4, 1]) == 6
    with pytest.raises(ValueError, match="-1"):
        Retranslation(-1)


def test_a_log_of_retranslation_tells_its_erasure() -> None:
    """Words are guessed wrongly until they end: each look takes its last word back, which mask-1 never shows."""
    events = listened(Retranslation())
    assert [event.final for event in events if event.committed] == [True]
    whole = said(events).split()
    assert whole == [f"w{i}" for i in range(12)]
    log = read_log([event.to_json() for event in events], where="log")
    assert log.erasure is not None
    shown = [event.unstable.split() for event in events[:-1]] + [whole]
    taken = [len([w for i, w in enumerate(a) if i >= len(b) or a[: i + 1] != b[: i + 1]])
             for a, b in itertools.pairwise(shown)]  # fmt: skip
    assert (log.erasure.erased, log.erasure.last) == (sum(taken), 12)
    assert log.erasure.erased >= 4
    assert log.erasure.normalised == pytest.approx(sum(taken) / 12)
    assert {*log.said[0].delays} == {1000 * events[-1].audio_s}
    masked = listened(Retranslation(1))
    assert said(masked) == said(events)
    assert read_log([event.to_json() for event in masked], where="log").erasure.erased == 0  # type: ignore[union-attr]
    full = {event.audio_s: event.unstable.split() for event in events}
    assert [event.unstable.split() for event in masked[:-1]] == [full[event.audio_s][:-1] for event in masked[:-1]]
    assert len(masked) > 6


def test_what_local_agreement_commits_never_flickers() -> None:
    events = listened(LocalAgreement())
    assert any(event.committed and not event.final for event in events)
    assert erasure(said(events[: i + 1]).split() for i in range(len(events))).normalised == 0
    assert said(events) == said(listened(Retranslation()))


def test_nothing_comes_before_the_end_in_a_stream() -> None:
    samples, how = sound(" ab cd ef gh ij"), StreamSettings(patience_s=0.2)
    for mask, shown in ((0, " ab cd ef gh ij"), (1, " ab cd ef gh"), (3, " ab cd ef gh"), (4, " ab cd ef")):
        made = Session(Speller(), policy=Retranslation(mask), settings=how)
        events = made.feed(np.concatenate([samples, np.zeros(4000, np.float32)]), RATE)
        assert said(events) == ""
        assert events[-1].unstable == shown
        assert said(made.finish()) == " ab cd ef gh ij"
