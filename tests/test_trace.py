"""Why a word was withheld: reasons of the policies, and traces of sessions that change nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fake import RATE, FakeModel, FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from spelling import RATE as SPELLED_RATE
from spelling import Speller
from spelling import sound as spelled

from speechattn.audio.vad import AlwaysSpeech
from speechattn.cli import main
from speechattn.live import Event, Pool, Session, Settings, StreamSettings, Trace, Word
from speechattn.policy import Policy, Source
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.ed_att import EDAtt
from speechattn.policy.hold import Hold, Told, WaitK
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.policy.monotonic import Stopped
from speechattn.policy.retranslation import Retranslation
from speechattn.search import Draft

DIGITS = Path(__file__).parent / "digits"
HEADS = ((3, 0),)
ROWS = torch.tensor([
    (0.40, 0.30, 0.10, 0.05, 0.05, 0.10), (0.05, 0.50, 0.20, 0.10, 0.05, 0.10), (0.05, 0.05, 0.50, 0.20, 0.10, 0.10),
    (0.05, 0.05, 0.10, 0.20, 0.40, 0.20), (0.02, 0.03, 0.05, 0.10, 0.20, 0.60),
])  # fmt: skip
READ = Source(6, 0.04, finished=False)


def draft(rows: torch.Tensor, tokens: list[int] | None = None, first: int = 0) -> Draft:
    tokens = list(range(len(rows))) if tokens is None else tokens
    weights = torch.cat([rows, torch.full((1, rows.shape[1]), 1 / rows.shape[1])])[None]
    return Draft(torch.tensor(tokens), torch.zeros(len(tokens)), weights, HEADS, first, True)


def ones(tokens: list[int]) -> list[int]:
    return [1] * len(tokens)


BACK = torch.eye(60)[[50, 5, 7]]
REASONS = [
    (AlignAtt.fbk(3, 1, 2), draft(ROWS), None, 3, "looks at frame 4, within 2 of the newest 5"),
    (AlignAtt.fbk(3, 1, 3), draft(ROWS), None, 2, "looks at frame 2, within 3 of the newest 5"),
    (replace(AlignAtt.fbk(3, 1, 2), rewind_threshold=20), draft(BACK), None, 1,
     "looks at frame 5, 45 behind the token before it (more than 20)"),
    (EDAtt(HEADS, 0.6), draft(ROWS), None, 3, "attention 1.29 on the last 2 frames, 0.6 or more"),
    (EDAtt(HEADS, 0.2, power=1), draft(ROWS), None, 2, "attention 0.33 on the last 2 frames, 0.2 or more"),
    (Hold(2), draft(ROWS), None, 3, "one of the last 2 tokens (hold-n)"),
    (WaitK(3, ones, 2), draft(ROWS), Told(), 0, "3 words were heard: 0 may be said (wait-3)"),
    (WaitK(1, ones, 2), draft(ROWS), Told(), 2, "3 words were heard: 2 may be said (wait-1)"),
    (LocalAgreement(), draft(ROWS), (), 0, "draft 1 of the 2 that must agree"),
    (LocalAgreement(), draft(ROWS), ((0, (0, 1, 9, 3, 4)),), 2, "the last 2 drafts disagree"),
    (LocalAgreement(), draft(ROWS), ((0, (0, 1, 2)),), 3, "not all of the last 2 drafts are so long"),
    (LocalAgreement(), draft(ROWS[:2], [3, 7], first=2), ((0, (1, 2, 3, 4)),), 1, "the last 2 drafts disagree"),
    (Stopped(), replace(draft(ROWS), waiting=torch.tensor([0, 0, 1, 0, 1]) > 0), None, 2,
     "a monotonic head waits for the frame at which it stops"),
    (Retranslation(2), draft(ROWS), None, 0, "the utterance has not ended (retranslation)"),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "proposal", "state", "n", "reason"), REASONS)
def test_the_reason_is_that_of_the_decision(
    policy: Policy, proposal: Draft, state: object, n: int, reason: str
) -> None:
    assert policy.accept(proposal, READ, state)[0] == n
    assert policy.why(proposal, READ, state, n) == reason


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.floats(0, 1), min_size=9, max_size=9), min_size=1, max_size=6), st.integers(0, 6),
       st.integers(0, 40))  # fmt: skip
def test_who_waits_has_a_reason_and_nobody_else(rows: list[list[float]], n: int, frames: int) -> None:
    tokens = tuple(range(len(rows)))
    proposal = replace(draft(torch.tensor(rows)), waiting=torch.arange(len(rows)) == n)
    source = Source(frames, 0.02, finished=False)
    given: list[tuple[Policy, object]] = [
        (AlignAtt(HEADS, n, n, normalise=False, median=1, rewind_threshold=2), None), (AlignAtt.fbk(3, 1, n), None),
        (EDAtt(HEADS, 0.1 + n / 6), None), (Hold(n), None), (Stopped(), None), (WaitK(n, ones, 4), Told()),
        (LocalAgreement(), ((0, (*tokens[:n], 99)),)), (LocalAgreement(), ()),
    ]  # fmt: skip
    for policy, state in given:
        done = policy.accept(proposal, source, state)[0]
        if done < len(rows):
            assert policy.why(proposal, source, state, done), policy
        if not isinstance(policy, LocalAgreement) or state:
            assert not any(policy.why(proposal, source, state, i) for i in range(done)), policy


ENDS = [0.5 + 0.4 * i for i in range(20)]


def run(policy: Policy, *, trace: bool, model: FakeModel | None = None, **changes: float) -> list[Event]:
    made = Session(
        model or FakeModel(ENDS), policy=policy, settings=Settings(**changes), vad=AlwaysSpeech(), trace=trace
    )  # fmt: skip
    x = np.full(9 * RATE, 0.1, np.float32)
    return [event for at in range(0, len(x), 4000) for event in made.feed(x[at : at + 4000], RATE)] + made.finish()


def bare(events: list[Event]) -> list[Event]:
    """What they say without traces, where they say something new."""
    said, before = list[Event](), ""
    for event in (replace(event, trace=None) for event in events):
        if event.committed or event.unstable != before or event.final or event.withheld:
            said.append(event)
        before = event.unstable
    return said


@pytest.mark.parametrize("policy", [AlignAtt(((0, 0),), 10, normalise=False, median=1), LocalAgreement(), Hold(3)])
def test_a_trace_changes_nothing_else(policy: Policy) -> None:
    plain, traced = run(policy, trace=False), run(policy, trace=True)
    assert [replace(event, trace=None) for event in traced] == plain
    assert all(event.trace is None for event in plain)
    for event in traced:
        if event.trace is None:  # nothing was left to be said
            assert event == Event("text", "", "", (), 9.0, final=True)
            continue
        assert event.trace.committed == len(event.words)
        assert event.trace.draft == event.committed + event.unstable
        assert (event.trace.committed < event.trace.tokens) == bool(event.trace.why)
        assert event.unstable.startswith(event.trace.at)
    assert sum(event.trace.committed for event in traced if event.trace) == 20


def test_a_session_says_what_its_policy_says() -> None:
    first = run(AlignAtt(((0, 0),), 40, normalise=False, median=1), trace=True)[0].trace
    assert first == Trace(" w0 w1 cut2", 3, 0, " w0", "looks at frame 17, within 40 of the newest 52")
    assert str(first) == "0 of 3 tokens: 'w0' waits, looks at frame 17, within 40 of the newest 52"
    events = run(Hold(1), trace=True)
    assert str(events[0].trace) == "2 of 3 tokens: 'cut2' waits, one of the last 1 tokens (hold-n)"
    assert str(events[-1].trace).endswith("tokens")


def test_reasons_of_the_session_itself() -> None:
    class Cut(FakeModel):
        def draft(self, *arguments, **options):  # type: ignore[no-untyped-def]
            return replace(super().draft(*arguments, **options), ended=False)

    reasons = {event.trace.why for event in run(Hold(0), trace=True, model=Cut(ENDS)) if event.trace}
    assert "incomplete word: the draft was cut inside it" in reasons
    looped = run(Hold(0), trace=True, model=FakeModel(ENDS[:5], loop_from_s=2.0))
    assert [event.trace.why for event in looped if event.kind == "text" and event.trace][-1] == "a loop begins here"
    assert "a loop begins here" in str(looped[-2].trace)

    class Pairs(FakeTokenizer):
        def words(self, tokens, *, spaceless=False):  # type: ignore[no-untyped-def]
            return [2] * (len(tokens) // 2) + [1] * (len(tokens) % 2)

    odd = run(Hold(1), trace=True, model=FakeModel(ENDS[:6], tokenizer=Pairs()))
    for event in odd[:-1]:  # a word of two tokens, of which the second one waits
        assert event.trace is not None
        assert event.trace.why in ("", "one of the last 1 tokens (hold-n)")
        assert event.trace.committed % 2 == 0


def test_streams_tell_of_the_beam_and_the_words() -> None:
    x = spelled(" aB cd ef gh9 ij")
    how = StreamSettings(patience_s=60.0)
    plain, traced = (
        made.feed(x, SPELLED_RATE) + made.finish() for made in (
            Session(Speller(), settings=how), Session(Speller(), settings=how, trace=True)
        )
    )  # fmt: skip
    assert bare(traced) == plain
    assert len(traced) > len(plain)  # a step that says nothing new has its reason, too
    whys = {event.trace.why for event in traced if event.trace}
    assert "incomplete word: hypotheses disagree on it" in whys
    assert whys <= {"", "hypotheses disagree on it", "incomplete word", "incomplete word: hypotheses disagree on it"}
    assert traced[0].trace is not None
    assert (traced[0].trace.at, traced[0].trace.committed) == (" ab", 0)
    sure = Session(Speller(), trace=True)
    whys = {event.trace.why for event in sure.feed(spelled(" abc de fg"), SPELLED_RATE) if event.trace}
    assert "incomplete word" in whys
    held = Session(Speller(), policy=Hold(4), settings=how, trace=True)
    whys = {event.trace.why for event in held.feed(spelled(" abc de fg hi jk"), SPELLED_RATE) if event.trace}
    assert any("one of the last 4 tokens (hold-n)" in why for why in whys)


def test_a_pool_tells_it_too() -> None:
    pool = Pool(Speller(), 2, trace=True)
    slot = pool.open()
    pool.feed(slot, spelled(" abc de fg9"), SPELLED_RATE)
    pool.close(slot)
    told = []
    while pool.busy:
        told += [event for events in pool.step().values() for event in events]
    alone = Session(Speller(), trace=True)
    assert told == alone.feed(spelled(" abc de fg9"), SPELLED_RATE) + alone.finish()
    assert any(event.trace and event.trace.why for event in told)


def test_json_has_a_trace_only_where_there_is_one() -> None:
    word = Word(" a", 0.1, 0.2, 0.9)
    plain = Event("text", " a", " b", (word,), 1.0)
    traced = replace(plain, trace=Trace(" a b", 2, 1, " b", "looks at frame 4, within 2 of the newest 5"))
    assert "trace" not in plain.to_json()
    assert json.loads(traced.to_json())["trace"]["why"] == "looks at frame 4, within 2 of the newest 5"
    for event in (plain, traced):
        assert Event.from_json(event.to_json()) == event


def test_the_commands_print_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And `score` reads a log with traces as one without."""
    x, rate = soundfile.read(DIGITS / "00.flac")
    path = tmp_path / "talk.wav"
    soundfile.write(path, x, rate)
    given = [str(path), "--model", str(DIGITS), "--search", "aligned"]
    found = {}
    for more in ([], ["--trace"]):
        assert main(["stream", *given, "--fast", "--format", "jsonl", *more]) == 0
        log = tmp_path / f"log{len(more)}.jsonl"
        log.write_text(capsys.readouterr().out)
        events = [Event.from_json(line) for line in log.read_text().splitlines()]
        assert any(event.trace for event in events) == bool(more)
        assert main(["score", "latency", str(log), "--json"]) == 0
        found[len(more)] = {k: v for k, v in json.loads(capsys.readouterr().out).items() if "aware" not in k}
        found[len(more)] = [event.words for event in events if event.words]  # type: ignore[assignment]
    assert found[0] == found[1]
    for command in (["stream", *given, "--fast", "--format", "text"], ["transcribe", *given]):
        assert main([*command, "--trace"]) == 0
        said = capsys.readouterr()
        assert " waits, looks at frame " in said.err
        assert "waits" not in said.out
