"""Frames that are encoded again with the next chunk: the stream, and a search that has a glimpse of them."""

from __future__ import annotations

import itertools
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from speechattn.attention import Span, set_span
from speechattn.audio.resample import Samples
from speechattn.encoder.revising import Revising
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.live import Event, Pool, Session
from speechattn.live.endings import Glimpse, Limits, StreamSettings
from speechattn.live.streaming import Streaming
from speechattn.model import Recognizer, from_config, load_model
from speechattn.model.chunks import set_chunk
from speechattn.policy import Source
from speechattn.pretrained.whisper.streaming import Flow, StreamingEncoder
from speechattn.score.wer import word_errors
from speechattn.search import Beam, Draft, Hypothesis
from speechattn.search.aligned import AlignedGreedy
from speechattn.stream import Delay, Serial, Stream
from speechattn.testing import check_export, check_stream, oracle, random_frames

RATE = 16000
FOLDER = Path(__file__).parent / "digits"
LINES = json.loads((FOLDER / "transcripts.json").read_text(encoding="utf-8"))


def layers(span: Span, depth: int = 2) -> Serial:
    encoder = StreamingEncoder(5, 8, depth, 2, span=span)
    for name, parameter in encoder.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.4)
    return Serial(layers=encoder.layers, norm=encoder.norm)


@oracle.register
def revised(stream: Revising, x: Frames) -> Frames:
    """Window by window: what each layer read before is kept as it read it, all others are read anew."""
    body: Any = stream.inner
    blocks, revise = body.layers.members, stream.revise
    span = blocks[0].attention.first.span
    new, total = span.chunk - revise, x.mask.shape[1]
    kept = [x[:0] for _ in blocks]
    said: list[Frames] = []
    stable, end = -revise, 0
    front = Frames(x.values.new_zeros(len(x.mask), revise, x.values.shape[2]), x.mask.new_zeros(len(x.mask), revise))
    x = Frames.cat([front, x.pad(2 * span.chunk)])  # frame 0 of it is frame -revise
    while stable < total:
        window = x[stable + revise : end + new + revise]
        for i, block in enumerate(blocks):
            read = window[:new]
            before = kept[i] if span.left is None else kept[i][max(0, kept[i].mask.shape[1] - span.left + revise) :]
            both, attention = Frames.cat([before, window]), block.attention.first
            attention.span = Span.full()
            y = oracle(attention, both)[before.mask.shape[1] :]
            attention.span = span
            window = oracle(block.feed_forward, Frames.of(window.values + y.values, window.mask))
            kept[i] = Frames.cat([kept[i], read])
        said.append(oracle(body.norm, window)[:new])
        stable, end = stable + new, end + new
    return Frames.cat(said)[revise : revise + total]


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize(
    ("left", "chunk", "revise"), [(6, 4, 1), (6, 5, 2), (5, 4, 2), (None, 6, 4), (8, 7, 5), (4, 4, 3)]
)
def test_laws(left: int | None, chunk: int, revise: int) -> None:
    stream = Revising(layers(Span.chunked(left, chunk)), revise).eval()
    check_stream(stream, random_frames([26, 0, 19], 8), seed=1)
    check_export(stream, random_frames([3 * (chunk - revise), 2 * (chunk - revise)], 8))


@pytest.mark.usefixtures("precise")
def test_each_frame_has_heard_what_follows_it_and_no_more() -> None:
    stream, x = Revising(layers(Span.chunked(8, 6)), 2).eval(), random_frames([40], 8)
    assert stream.plan()[:3] == (4, 1, 2)
    y = stream(x).values
    for t in (9, 10, 20, 23):
        later = x.values.clone()
        later[:, t:] = torch.randn_like(later[:, t:])
        same = [torch.equal(a, b) for a, b in zip(y[0], stream(Frames(later, x.mask)).values[0], strict=True)]
        final = t // 4 * 4 - 2
        assert all(same[:final]), t
        assert not any(same[final : t + 1]), t


@pytest.mark.usefixtures("precise")
def test_what_is_ahead_is_what_a_stream_that_ends_here_says() -> None:
    stream, x = Revising(layers(Span.chunked(None, 6)), 2).eval(), random_frames([24, 20], 8)
    state = stream.init_state(x)
    assert not stream.ahead(state).mask.any()
    for at in range(0, 24, 4):
        _, state = stream.step(x[at : at + 4], state)
        ahead = stream.ahead(state)
        assert torch.equal(ahead.mask, x.mask[:, at + 2 : at + 4])
        ended, _ = stream.step(Frames(x.values[:, :4] * 0, x.mask[:, :4] & False), state)
        assert torch.allclose(ended.values[:, :2], ahead.values)


def test_what_cannot_be_read_again() -> None:
    x = random_frames([8], 8)
    with pytest.raises(ValueError, match="at least 1"):
        Revising(Delay(0), 0)
    with pytest.raises(ValueError, match="nothing is new"):
        Revising(layers(Span.chunked(8, 2)), 2).plan()
    with pytest.raises(ValueError, match="looks ahead"):
        Revising(layers(Span.chunked(8, 4, right=1)), 2).plan()
    with pytest.raises(ValueError, match="cannot read frames again"):
        Revising(layers(Span(8, 4, sinks=2)), 2).init_state(x)


def test_with_everything_in_sight_nothing_is_read_twice() -> None:
    body = layers(Span.full()).eval()
    stream, x = Revising(body, 3), random_frames([9, 5], 8)
    assert stream.plan().block is None
    assert stream.ahead(stream.init_state(x)) is None
    assert torch.equal(stream(x).values, body(x).values)


@pytest.mark.usefixtures("precise")
def test_an_encoder_is_trained_without_and_listens_with_it() -> None:
    encoder = StreamingEncoder(8, 8, 2, 2, span=Span.chunked(8, 6), revise=2, period=7).eval()
    x = random_frames([64], 8)
    heard, listening = encoder(x), encoder.listening(Delay(0))
    assert listening.plan().block == 2 * 4
    assert not torch.allclose(listening(x).values, heard.values)
    set_span(encoder, Span.full())
    assert torch.allclose(encoder.listening(Delay(0))(x).values, encoder(x).values)


def test_a_glimpse_sees_where_the_utterance_will_end() -> None:
    limits = Limits.of(StreamSettings(pause_s=0.06, silence_s=0.12, longest_s=2.0), 0.02)  # 3, 6, 100 frames
    quiet, there = [True] * 4, [True] * 4

    def glimpse(nothing: list[bool], counts: list[int], valid: list[bool] = there) -> tuple[Any, ...]:
        found = limits.glimpse(100, nothing, valid, counts)
        return found.frames, found.quiet, found.spoke, found.end

    assert glimpse(quiet, [1, 9, 5]) == (104, 5, 5, None)
    assert glimpse(quiet, [2, 9, 5]) == (104, 6, 5, 104)
    assert glimpse(quiet, [4, 9, 5]) == (104, 8, 5, 102)
    assert glimpse([True, True, False, False], [4, 9, 5]) == (104, 0, 7, 102)
    assert glimpse([False] * 4, [5, 9, 0]) == (104, 0, 4, None)
    assert glimpse(quiet, [1, 9, 0]) == (104, 5, 0, None)
    assert glimpse(quiet, [4, 9, 5], [True, False, False, False]) == (101, 5, 5, None)
    assert glimpse([True, False, False, False], [2, 120, 5]) == (104, 0, 8, 101), "it is long: a pause is enough"
    assert glimpse([False, True, True, False], [0, 220, 5]) == (104, 0, 7, 102), "it is longer still"
    counts = [4, 9, 5]
    limits.glimpse(100, quiet, there, counts)
    assert counts == [4, 9, 5]


@pytest.fixture(scope="module")
def exact() -> Recognizer:
    made = load_model(dtype="float64")
    assert isinstance(made, Recognizer)
    return made


def digits(first: int, n: int, gap_s: float) -> Samples:
    gap = np.zeros(round(gap_s * RATE), np.float32)
    sounds = [soundfile.read(FOLDER / line["file"], dtype="float32")[0] for line in LINES[first : first + n]]
    return np.concatenate([part for sound in sounds for part in (sound, gap)])


def run(model: Recognizer, sound: Samples, cuts: list[int]) -> list[Event]:
    session = Session(model)
    return [event for part in np.split(sound, cuts) for event in session.feed(part, RATE)] + session.finish()


def rounded(events: list[Event]) -> list[list[tuple[str, float, float, float]]]:
    return [[(w.text, w.start, w.end, round(w.confidence, 6)) for w in event.words] for event in events if event.words]


def test_a_session_does_not_know_how_the_sound_was_cut_nor_its_neighbours(exact: Recognizer) -> None:
    set_chunk(exact, 320)
    assert exact.encoder.revise == 16
    sounds = [digits(0, 3, 0.7), digits(3, 2, 0.1)]
    whole = [run(exact, sound, []) for sound in sounds]
    pool = Pool(exact, 2)
    slots, heard, left = [pool.open() for _ in sounds], {0: list[Event](), 1: list[Event]()}, [*sounds]
    for step in range(200):
        for i, slot in enumerate(slots):
            if len(left[i]) and (step + i) % 3:
                pool.feed(slot, left[i][:3001], RATE)
                left[i] = left[i][3001:]
                if not len(left[i]):
                    pool.close(slot)
        for slot, events in pool.step().items():
            heard[slots.index(slot)] += events
    for i, sound in enumerate(sounds):
        cut = run(exact, sound, [700, 9000, 9001, 30000])
        for other in (cut, heard[i]):
            assert rounded(other) == rounded(whole[i])


@pytest.mark.parametrize("gap_s", [0.3, 0.7, 1.3])
def test_nothing_is_said_twice_where_utterances_end(exact: Recognizer, gap_s: float) -> None:
    set_chunk(exact, 640)
    events = run(exact, digits(2, 4, gap_s), [])
    said = "".join(event.committed for event in events)
    errors = word_errors([" ".join(line["text"] for line in LINES[2:6])], [said])
    assert errors.insertions == 0, said
    assert errors.rate < 0.3, said
    ends = [word.end for event in events for word in event.words]
    assert ends == sorted(ends)


def test_a_search_has_a_glimpse_of_what_the_encoder_says_ahead(
    exact: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """None where the utterance ends; once for each step and search; and words that end with it stay before its end."""
    set_chunk(exact, 320)
    said, looks, ends = list[Frames](), list[Frames](), list[int]()
    ahead, peek, finish = Flow.ahead, AlignedGreedy.peek, AlignedGreedy.finish

    def spoken(flow: Flow, state: Any) -> Frames | None:
        found = ahead(flow, state)
        assert found is not None
        said.append(found)
        return found

    def peeked(search: AlignedGreedy, x: Frames, glimpse: Frames, beam: Beam) -> Beam:
        looks.append(glimpse)
        return peek(search, x, glimpse, beam)

    def finished(search: AlignedGreedy, beam: Beam) -> Beam:
        ends.append(int(beam.frames[0]))
        looks.append(Frames(torch.empty(0), torch.empty(0)))
        return finish(search, beam)

    monkeypatch.setattr(Flow, "ahead", spoken)
    monkeypatch.setattr(AlignedGreedy, "peek", peeked)
    monkeypatch.setattr(AlignedGreedy, "finish", finished)
    events = run(exact, digits(2, 3, 0.9), [])
    assert sum(bool(look.mask.any()) for look in looks if look.mask.numel()) == sum(bool(x.mask.any()) for x in said)
    for look, after in itertools.pairwise(looks):
        assert not look.mask.numel() or bool(after.mask.numel()) or not look.mask.any(), "an end that had a glimpse"
    bounds = iter([*ends[:-1], 10**9])
    bound = next(bounds)
    for event in events:
        assert all(word.start < bound * 0.02 for word in event.words)
        bound = next(bounds, bound) if event.final else bound
    assert len(ends) >= 3


def test_who_does_not_peek_is_not_judged_by_what_is_ahead(exact: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk(exact, 640)
    sound, made = digits(2, 2, 0.9), exact.search("aligned")
    made.peeks = False
    told = Session(exact, search=made)
    events = told.feed(sound, RATE) + told.finish()
    monkeypatch.setattr(Flow, "ahead", lambda flow, state: None)
    untold = Session(exact, search=exact.search("aligned"))
    assert rounded(events) == rounded(untold.feed(sound, RATE) + untold.finish())


def test_a_chunk_is_what_is_new(exact: Recognizer) -> None:
    for ms in (160, 320, 640):
        set_chunk(exact, ms)
        assert exact.listening.plan().block == 16 * ms
        assert exact.encoder.layers.members[0].attention.first.span == Span(400, ms // 20 + 16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"revise": -1}, "revise -1: wanted a number of frames"),
        ({"revise": "16"}, "revise 16: wanted a number of frames"),
        ({"revise": 1.5}, "revise 1.5: wanted a number of frames"),
        ({"revise": 48}, "nothing is new"),
        ({"left": 8}, "8 frames before a chunk are fewer than the 16"),
        ({"right": 16}, "looks ahead"),
    ],
)
def test_a_folder_that_cannot_revise_is_refused(exact: Recognizer, change: dict[str, Any], said: str) -> None:
    config = deepcopy(exact.config)
    assert config is not None
    arguments = config["encoder"]["init_args"]
    (arguments if "revise" in change else arguments["span"]["init_args"]).update(change)
    with pytest.raises(ModelError, match=said):
        from_config(config, exact.tokenizer)


def test_nothing_is_said_where_hardly_anything_was_heard(exact: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of letters hears something in two frames of every second of silence, or in three."""
    set_chunk(exact, 640)

    def said(heard: int) -> str:
        at = iter(range(10**9))

        def blank(model: Recognizer, frames: Frames) -> torch.Tensor:
            if frames.mask.shape[1] == 16:  # ahead
                return torch.ones_like(frames.mask)
            return torch.tensor([[next(at) % 50 >= heard for _ in range(frames.mask.shape[1])]])

        monkeypatch.setattr(Recognizer, "blank", blank)
        return "".join(event.committed for event in run(exact, digits(2, 1, 3.0), []))

    assert said(2) == ""
    assert said(3) != ""


class Everything:
    """A policy that takes every draft."""

    heads = ()

    def initial(self) -> None:
        return None

    def accept(self, draft: Draft, source: Source, state: None) -> tuple[int, None]:
        return len(draft.tokens), None

    def why(self, draft: Draft, source: Source, state: None, n: int) -> str:
        return ""


def test_what_comes_behind_the_end_that_is_in_sight_waits(exact: Recognizer) -> None:
    session = Session(exact, search=exact.search("aligned"), policy=Everything())
    assert isinstance(session.listener, Streaming)
    tokens = tuple(exact.tokenizer.encode("the red dog"))
    assert len(tokens) == 3
    best = Hypothesis(tokens, 0.0, (0.0,) * 3, ((0, 10), (10, 20), (60, 70)))
    draft = Draft(torch.tensor(tokens), torch.zeros(3), torch.zeros(0, 4, 80), (), 0, False)

    def safe(end: int | None) -> int:
        assert isinstance(session.listener, Streaming)
        return session.listener.safe(best, 3, Glimpse(80, 40, 9, end), draft)[0]

    assert [safe(end) for end in (None, 61, 60, 15, 5)] == [3, 3, 1, 1, 0]


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize(("left", "chunk", "revise"), [(6, 4, 1), (5, 4, 2), (None, 6, 4), (8, 7, 5), (4, 6, 3)])
def test_all_windows_at_once(left: int | None, chunk: int, revise: int) -> None:
    stream, x = Revising(layers(Span.chunked(left, chunk)), revise).eval(), random_frames([26, 0, 19], 8)
    assert torch.allclose(stream.at_once(x).values, oracle(stream, x).values, atol=1e-9)
    assert torch.equal(stream.at_once(x).mask, x.mask)
    parameters, weight = list(stream.parameters()), torch.randn(8).double()
    both = [torch.autograd.grad((said.values @ weight).square().sum(), parameters)
            for said in (stream.at_once(x), Stream.at_once(stream, x))]  # fmt: skip
    for mine, theirs in zip(*both, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)
    assert stream.plan().block == chunk - revise  # the span is the usual one again


@pytest.mark.usefixtures("precise")
def test_layers_that_differ_are_read_step_by_step() -> None:
    body, x = layers(Span.chunked(8, 6)), random_frames([26, 19], 8)
    body.layers.members[1].attention.first.span = Span.chunked(5, 6)
    stream = Revising(body, 2).eval()
    with torch.no_grad():
        stepped = stream(x)
    assert torch.allclose(stream.at_once(x).values, stepped.values, atol=1e-9)


@pytest.mark.usefixtures("precise")
def test_a_training_hears_what_a_listener_hears() -> None:
    encoder = StreamingEncoder(8, 8, 2, 2, span=Span.chunked(8, 6), revise=2, period=7).eval()
    x = random_frames([64], 8)
    body = encoder.body()
    assert torch.allclose(encoder.heard(x).values, body(encoder.subsample(x)).values)
    assert not torch.allclose(encoder.heard(x).values, encoder(x).values)
