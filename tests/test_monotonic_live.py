"""A live session of monotonic heads alone: nobody hears silence, and what was said is over when they stop no more."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from spelling import BLOCK, FRAME, LETTERS, RATE, Speller, sound
from torch import nn

from speechattn.cross.monotonic import HardMonotonic, InfiniteLookback
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.errors import InputError
from speechattn.frames import Frames, Memory
from speechattn.live import Event, Session, StreamSettings
from speechattn.model import Recognizer
from speechattn.model.window import WindowRecognizer
from speechattn.policy import Policy
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.policy.monotonic import Stopped
from speechattn.search import Search
from speechattn.search.ctc import CTCGreedy
from speechattn.search.greedy import Greedy
from speechattn.search.monotonic import MonotonicBeam
from speechattn.stream import Serial
from speechattn.text.pieces import Pieces

DIM, EOS = LETTERS.size, LETTERS.size
STEP_S = BLOCK * FRAME / RATE


@torch.no_grad()
def copying() -> AttentionDecoder:
    """Its head stops at the first frame of a letter that is not the last one, and it says that letter.

    What it sees of frames are log-probabilities, about 0 for the letter and -8 for others. With nothing to see it says
    the end: what `out` adds in the place of the blank is then the greatest.
    """
    made = AttentionDecoder(EOS + 1, 200, DIM, 1, 1, cross=partial(HardMonotonic, offset=0.0), inner=4,
                            output=nn.Linear(DIM, EOS + 1)).eval()  # fmt: skip
    layer, eye = made.layers[0], torch.eye(DIM)
    for module in (layer.self_attention, layer.ff, layer.cross, made.output):
        for parameter in module.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    made.positions.zero_()
    made.embed.weight.copy_(torch.cat([0.1 * eye, torch.zeros(1, DIM)]))
    cross = layer.cross
    assert isinstance(cross, HardMonotonic)
    cross.energy.key.weight.copy_(eye - 1 / DIM)
    cross.energy.query.weight.copy_(-2.6 * eye)
    cross.energy.query.bias.copy_(torch.tensor([-25.0] + [1.0] * (DIM - 1)))
    cross.value.weight.copy_(eye)
    cross.out.weight.copy_(eye)
    cross.out.bias[0] = 4.0
    assert isinstance(made.output, nn.Linear)
    made.output.weight[1:EOS] = eye[1:]
    made.output.weight[EOS] = eye[0]
    return made.requires_grad_(False)


@dataclass
class Walker(Speller):
    """The same sound, spelled by the heads; doubled letters are one."""

    size: int = 1

    def search(self) -> Search:
        return MonotonicBeam(copying(), self.size, sos=EOS, eos=EOS, never=[0], hears=True)

    def blank(self, frames: Frames) -> torch.Tensor:
        raise AssertionError("nobody hears silence")


def run(samples: np.ndarray, cuts: list[int], **changes: object) -> list[Event]:
    made, events = Session(Walker(), **changes), list[Event]()  # type: ignore[arg-type]
    for part in np.split(samples, cuts):
        events += made.feed(part, RATE)
    return events + made.finish()


def said(events: list[Event]) -> str:
    return "".join(event.committed for event in events).strip()


@pytest.mark.parametrize("policy", [None, Stopped(), LocalAgreement(1)])
def test_words_come_while_they_are_heard(policy: Policy | None) -> None:
    events = run(sound("3 ab cd efg hi3 e"), [], policy=policy)
    assert said(events) == "ab cd efg hi e"
    early = [event for event in events if event.words and not event.final]
    assert len(early) >= 3
    for event in early:  # a word is whole when the next has begun; the encoder is a block late
        assert event.audio_s - event.words[-1].end <= 0.2 + 2 * STEP_S
    assert sum(event.final for event in events) == 1
    words = [word for event in events for word in event.words]
    assert words[0].start == pytest.approx(0.3, abs=0.03)
    assert words[0].end == pytest.approx(0.3 + 0.04 + 0.08 + 0.02, abs=0.03)


def test_an_utterance_ends_when_heads_stop_no_more() -> None:
    """After `silence_s`, at the next block; its last word comes then, and times go on."""
    samples = sound(" ab cd9 ef9 gh")
    events = run(samples, [], settings=StreamSettings(silence_s=0.5))
    assert said(events) == "ab cd ef gh"
    finals = [event for event in events if event.final]
    assert [said([event]) for event in finals] == ["cd", "ef", "gh"]
    ends = [event.words[-1].end for event in finals]
    assert ends == sorted(ends)
    for event, end in zip(finals[:2], ends, strict=False):
        assert 0.5 <= event.audio_s - end <= 0.5 + 4 * STEP_S
    assert ends[1] == pytest.approx(len(sound(" ab cd9 ef")) / RATE - 0.06, abs=0.03)  # its first frame
    patient = run(samples, [], settings=StreamSettings(silence_s=5.0))
    assert said(patient) == "ab cd ef gh"
    assert sum(event.final for event in patient) == 1


def test_events_do_not_depend_on_the_cuts() -> None:
    samples = sound("2 bc de9 f ga9 ij9")
    whole = run(samples, [])
    assert run(samples, list(range(0, len(samples), 777))) == whole
    assert said(whole) == "bc de f ga ij"
    assert sum(event.final for event in whole) >= 3


def test_silence_says_nothing() -> None:
    events = run(np.zeros(8 * RATE, np.float32), [])
    assert said(events) == ""
    assert [event.final for event in events] == [True] * len(events)
    assert len(events) <= 1


def test_waited_counts_from_the_last_stop() -> None:
    search = Walker().search()
    probs = torch.full((2, 12, DIM), 0.01 / (DIM - 1))
    letters = torch.tensor([[0, 3, 3, 0, 4, 0, 0, 0, 0, 0, 0, 0], [0] * 12])
    x = Frames.from_lengths(probs.scatter(2, letters[..., None], 0.99).log(), torch.tensor([12, 12]))
    beam = search.start_at(x, torch.tensor([100, 7]))
    for (a, b), wanted in zip(itertools.pairwise([0, 1, 2, 4, 5, 12]), (0, 0, 2, 0, 7), strict=True):
        beam = search.step(x[a:b], beam)
        assert search.waited(beam).tolist() == [wanted, 0], b
    assert [len(draft.tokens) for draft in search.looks(beam)] == [2, 0]
    assert not any(draft.waiting.any() for draft in search.looks(beam))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="does not hear"):
        CTCGreedy().waited(beam)


def test_an_end_that_is_said_while_a_head_waits_is_none() -> None:
    probs = torch.full((1, 6, DIM), 0.01 / (DIM - 1))
    values = probs.scatter(2, torch.tensor([[0, 3, 0, 4, 0, 0]])[..., None], 0.99).log()
    x, search = Frames(values, torch.ones(1, 6, dtype=torch.bool)), Greedy(copying(), EOS, suppress=[0])
    for finished in (False, True):
        draft = search.draft(Memory.of(x, finished=finished), [EOS], [])
        assert draft.tokens.tolist() == [3, 4]
        assert draft.waiting is not None
        assert not draft.waiting.any()
        assert draft.ended == finished


def test_only_where_no_head_hears() -> None:
    pieces = Pieces(["<blank>", "▁", *"abcdef", "<sos/eos>"])
    monotonic = AttentionDecoder.usual(9, 8, 2, 1, 12, context=40, cross=InfiniteLookback)
    front = Serial(nn_stream())
    for heads, hears in (({"monotonic": monotonic}, True), ({"monotonic": monotonic, "ctc": CTC(8, 9)}, False)):
        model = Recognizer(front, nn_stream(), heads, pieces)
        assert model.search("monotonic").hears == hears
        assert (model.counter is None) == hears
        window = model.windowed()
        assert isinstance(window, WindowRecognizer)
        assert window.policy() == Stopped()
        assert (window.counter is None) == hears
    with pytest.raises(InputError, match="no head hears"):
        Recognizer(front, nn_stream(), {"monotonic": monotonic}, pieces).blank(Frames.from_lengths(
            torch.zeros(1, 3, 8), torch.tensor([3])))  # fmt: skip


def nn_stream() -> Serial:
    """Samples as they are."""
    from speechattn.audio.spectrum import LogMel

    return Serial(LogMel(8))
