"""Greedy attention over a memory that grows: against loops that read everything anew; sessions and pools with it."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn import tree
from speechattn.cross.location import DynamicConvolution
from speechattn.cross.soft import Resting
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.letters import Letters
from speechattn.errors import InputError
from speechattn.frames import Frames, Memory
from speechattn.live import Event, Pool, Session, StreamSettings
from speechattn.live.suited import TRANSLATING, suited
from speechattn.live.timing import token_spans
from speechattn.model import Recognizer, load_model
from speechattn.model.searches import possible
from speechattn.policy import Source
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.score.wer import word_errors
from speechattn.search import Beam, Prefixes
from speechattn.search.aligned import AlignedGreedy
from speechattn.search.greedy import Greedy
from speechattn.search.looks import monotone
from speechattn.search.loops import loop_end, loop_start

DIM, VOCAB, END, EDGE, BACK, REACH = 8, 12, 11, 2, 3, 4
NEVER, INSIDE = (0,), (1, 2, 3)  # never said; not at the beginning of a word
HEADS = ((0, 1), (1, 0))
FOLDER = Path(__file__).parent / "digits"
RATE = 16000
LINES: list[dict[str, Any]] = [
    line for line in json.loads((FOLDER / "transcripts.json").read_text(encoding="utf-8")) if not line["rare"]
]
Text = tuple[int, ...]


def decoder(seed: int, context: int = 60, **options: Any) -> AttentionDecoder:
    torch.manual_seed(seed)
    made = AttentionDecoder.usual(VOCAB, DIM, 2, 2, 12, context=context, **options).eval()
    made.alignment_heads = HEADS
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.6)
    assert made.output is not None
    made.output.bias.data[END] += 1.0  # texts end
    return made.requires_grad_(False)


def aligned(made: AttentionDecoder, **options: Any) -> AlignedGreedy:
    given = {
        "never": NEVER,
        "never_next": INSIDE,
        "edge": EDGE,
        "back": BACK,
        "reach": REACH,
        "most": 0.5,
        "spare": 2,
        **options,
    }
    return AlignedGreedy(made, sos=END, eos=END, **given)


def utterances(rows: int, frames: int, *, holes: bool = True) -> Frames:
    mask = torch.rand(rows, frames) < 0.7 if holes else torch.ones(rows, frames, dtype=torch.bool)
    return Frames.of(torch.randn(rows, frames, DIM), mask)


@dataclass
class Loops:
    """One row in plain Python, which keeps nothing but texts and frames.

    `read` are the tokens whose keys and values stay, each with the frames that were seen when they were made: they are
    made anew from the beginning, one by one, whenever something is said. Frames `ahead` are seen, and not kept. Every
    token is said of a window of the frames; keys and values too far from it are as if they had not been read.
    """

    decoder: AttentionDecoder
    frames: list[Tensor] = field(default_factory=list)
    ahead: list[Tensor] = field(default_factory=list)
    read: list[tuple[int, list[Tensor], int, int]] = field(default_factory=list)
    last: int = END
    committed: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    looks: list[Tensor] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    views: list[tuple[int, int]] = field(default_factory=list)
    far: int = 0
    most: float = 0.5
    spare: int = 2

    @property
    def shown(self) -> list[Tensor]:
        return [*self.frames, *self.ahead]

    def seen(self, frames: list[Tensor], first: int = 0, end: int | None = None) -> Any:
        mask = torch.zeros(1, len(frames), dtype=torch.bool)
        mask[:, max(0, first) : end] = True
        return self.decoder.start(Memory.of(Frames(torch.stack(frames)[None], mask)))

    def speak(self, *, whole: bool = False) -> None:
        n, shown = len(self.shown), self.shown
        state = self.seen(shown)
        for token, frames, first, end in self.read:
            state = replace(state, cross=self.seen(frames, first, end).cross)
            _, _, state = self.decoder.step(torch.tensor([[token]]), state)
        self.tokens, self.log_probs, self.looks, self.peaks, self.views = [], [], [], [], []
        far = self.far
        token, most = self.last, int(self.most * n) + self.spare - len(self.committed)
        while True:
            wider = 0
            while True:
                first = 0
                while first + REACH // 2 <= far - BACK:
                    first += REACH // 2
                end = 0
                while end < far + REACH:
                    end += REACH // 2
                end += wider
                state = replace(state, cross=self.seen(shown, first, end).cross)
                hidden, look, after = self.decoder.step(torch.tensor([[token]]), state, heads=HEADS)
                scores = self.decoder.logits(hidden[0, 0])
                banned = [*NEVER, *(INSIDE if self.committed and not self.tokens else ())]
                scores = scores.index_fill(0, torch.tensor(banned), -torch.inf).log_softmax(0)
                best = int(scores.argmax())
                peak = int(look[0, :, 0].mean(0).argmax())
                late = min(n, end) - 1 - peak < EDGE
                over = best == END or peak < far - BACK
                if end >= n or not (late or over):
                    break
                wider += REACH // 2
            token, state = best, after
            self.looks.append(look[0, :, 0])
            self.views.append((first, end))
            if over or (late and not whole) or len(self.tokens) >= most:
                return
            far = far if late else max(far, peak)
            self.peaks.append(peak)
            self.tokens.append(token)
            self.log_probs.append(float(scores[token]))
            loop = loop_start([*self.committed, *self.tokens])
            if loop is not None:
                sane = max(0, loop - len(self.committed))
                del self.tokens[sane:], self.log_probs[sane:], self.looks[sane + 1 :]
                return

    def commit(self, n: int) -> None:
        if n:
            said = zip([self.last, *self.tokens[: n - 1]], self.views, strict=False)
            self.read += [(token, self.shown, *view) for token, view in said]
            self.last = self.tokens[n - 1]
            self.committed += self.tokens[:n]
            self.far = max(self.far, *self.peaks[:n])
            del self.tokens[:n], self.log_probs[:n], self.looks[:n], self.peaks[:n], self.views[:n]


def compare(search: AlignedGreedy, beam: Beam, rows: list[Loops]) -> None:
    for [found], draft, row in zip(search.hypotheses(beam), search.looks(beam), rows, strict=True):
        assert found.tokens == tuple(row.tokens) == tuple(draft.tokens.tolist())
        assert found.log_probs == pytest.approx(row.log_probs, abs=1e-9)
        assert found.score == pytest.approx(sum(row.log_probs), abs=1e-9)
        if row.looks:
            mine = draft.weights[:, -len(row.looks) :]
            assert mine.shape[2] == len(row.shown)
            torch.testing.assert_close(mine, torch.stack(row.looks, 1).float())


@pytest.mark.usefixtures("precise")
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6), guess=st.booleans(), begun=st.booleans(), ahead=st.integers(0, 5), data=st.data()
)  # fmt: skip
def test_drafts_are_those_of_loops_that_read_all_anew(
    seed: int, guess: bool, begun: bool, ahead: int, data: st.DataObject
) -> None:  # fmt: skip
    """Whatever the chunks, the neighbours, frames that are not there, the commits, the guess, the opening, the
    glimpses."""
    made = decoder(seed, **({"cross": partial(Resting, rest=3, weight=2.0)} if begun else {}))
    made.opening = nn.Parameter(torch.randn(2, DIM), requires_grad=False) if begun else None
    search, x = aligned(made), utterances(3, 24)
    rows = [Loops(made) for _ in range(3)]
    beam, at = search.start(x), 0
    while at < 24:
        size = data.draw(st.integers(1, 9))
        piece, seen = x[at : at + size], utterances(3, ahead)
        at += size
        there = (piece.mask.any(1) | seen.mask.any(1)).tolist()
        if not guess:
            beam = replace(beam, said=Prefixes.empty(x.values, 1))
            for row, speaks in zip(rows, there, strict=True):  # who hears nothing says no more
                if not speaks:
                    row.tokens, row.log_probs = [], []
        beam = search.peek(piece, seen, beam) if ahead else search.step(piece, beam)
        for b, row in enumerate(rows):
            row.frames += [*piece.values[b, piece.mask[b]]]
            if there[b]:
                row.ahead = [*seen.values[b, seen.mask[b]]]
                row.speak()
        if guess:
            compare(search, beam, rows)
        else:
            assert [h[0].tokens for h in search.hypotheses(beam)] == [tuple(row.tokens) for row in rows]
        n = [data.draw(st.integers(0, min(3, len(row.tokens)))) for row in rows]
        for row, count in zip(rows, n, strict=True):
            row.commit(count)
        beam = search.commit(beam, torch.tensor(n))
        if guess:
            compare(search, beam, rows)
    beam = search.finish(beam)
    for row in rows:
        row.ahead = []
        if row.frames:
            row.speak(whole=True)
        else:
            row.tokens, row.log_probs, row.looks = [], [], []
    compare(search, beam, rows)
    assert beam.frames.tolist() == x.lengths.tolist()


@pytest.mark.usefixtures("precise")
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 20), max_size=5))
@example(seed=1958, cuts=[])  # a shorter loop is complete before one that begins earlier
def test_a_text_that_is_not_committed_is_that_of_the_whole_memory(seed: int, cuts: list[int]) -> None:
    made = decoder(seed)
    search, x = aligned(made, most=9.0, spare=30, back=99, reach=99), utterances(2, 20, holes=False)
    beam = search.start(x)
    for a, b in itertools.pairwise([0, *sorted(cuts), 20]):
        beam = search.step(x[a:b], beam)
    greedy = Greedy(made, END, suppress=NEVER)
    found, drafts = search.hypotheses(search.finish(beam)), search.looks(search.finish(beam))
    assert found == search.decode(x) or [h[0].tokens for h in found] == [h[0].tokens for h in search.decode(x)]
    for b, ([mine], draft) in enumerate(zip(found, drafts, strict=True)):
        theirs = greedy.draft(Memory.of(tree.select(x, [b])), [END], [], heads=HEADS, max_tokens=58)
        said = theirs.tokens.tolist()
        n = next((at for k in range(len(said)) if (at := loop_start(said[: k + 1])) is not None), None)
        assert mine.tokens == tuple(theirs.tokens.tolist()[:n])
        assert mine.log_probs == pytest.approx(theirs.log_probs.tolist()[:n], abs=1e-6)
        if n is None:
            torch.testing.assert_close(draft.weights, theirs.weights)
            policy, source = AlignAtt.whisper(HEADS, 5), Source(20, 0.02, finished=False)
            assert policy.accept(draft, source, None) == policy.accept(theirs, source, None)


@pytest.mark.usefixtures("precise")
def test_spans_lie_in_order_inside_the_frames_of_the_stream() -> None:
    search, x = aligned(decoder(3), edge=0), utterances(4, 40)
    beam = search.start_at(x, torch.tensor([0, 100, 7, 0]))
    ends = [0, 100, 7, 0]
    for at in range(0, 40, 8):
        beam = search.step(x[at : at + 8], beam)
        for [found], end, frames in zip(search.hypotheses(beam), ends, beam.frames.tolist(), strict=True):
            times = [end, *(time for span in found.spans for time in span)]
            assert times == sorted(times)
            assert all(a < b for a, b in found.spans)
            assert times[-1] <= max(frames, end)
        n = [min(1, len(h[0].tokens)) for h in search.hypotheses(beam)]
        ends = [h[0].spans[0][1] if k else end for h, k, end in zip(search.hypotheses(beam), n, ends, strict=True)]
        beam = search.commit(beam, torch.tensor(n))
    assert any(ends[i] > first for i, first in enumerate([0, 100, 7, 0]))


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 10**6))
def test_the_path_is_that_of_the_frames(rows: int, frames: int, seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((rows, frames)).astype(np.float32)
    assert monotone(weights) == token_spans(weights)


@given(st.lists(st.integers(0, 2), max_size=40))
def test_a_loop_is_found_when_its_last_token_is_said(tokens: list[int]) -> None:
    found = next((loop_end(tokens[:n]) for n in range(len(tokens) + 1) if loop_end(tokens[:n]) is not None), None)
    first = next((loop_start(tokens[:n]) for n in range(len(tokens) + 1) if loop_start(tokens[:n]) is not None), None)
    assert found == first


@pytest.mark.usefixtures("precise")
def test_a_loop_is_said_once() -> None:
    made = decoder(0)
    assert made.output is not None
    made.output.weight.zero_()
    made.output.bias.copy_(torch.arange(VOCAB) == 5)  # 5, for ever
    search, x = aligned(made, edge=0, most=9.0, spare=30, back=99, reach=99), utterances(2, 10)
    beam = search.step(x, search.start(x))
    assert [h[0].tokens for h in search.hypotheses(beam)] == [(5,), (5,)]
    beam = search.commit(beam, torch.tensor([1, 0]))
    beam = search.finish(search.step(utterances(2, 10), beam))
    assert [h[0].tokens for h in search.hypotheses(beam)] == [(), (5,)]


@pytest.mark.usefixtures("precise")
def test_only_what_was_said_can_be_committed() -> None:
    search, x = aligned(decoder(3), edge=0), utterances(2, 16, holes=False)
    beam = search.step(x, search.start(x))
    length = beam.said.length[:, 0]
    with pytest.raises(ValueError, match="commit"):
        search.commit(beam, length + 1)
    assert search.commit(beam, length * 0) is beam
    after = search.commit(beam, length)
    assert [h[0].tokens for h in search.hypotheses(after)] == [(), ()]


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize(("memory", "context"), [(30, 500), (10**6, 40)])
def test_a_search_without_room_says_nothing_more(memory: int, context: int) -> None:
    made = decoder(5, context)
    assert made.output is not None
    made.output.bias.data[END] -= 9.0  # never the end
    search, sizes, rooms = aligned(made, edge=0, memory=memory, spare=8, back=99, reach=99), [], []
    x = utterances(2, 8)
    beam = search.start(x)
    for _ in range(30):
        beam = search.commit(beam, beam.said.length[:, 0])
        beam = search.step(utterances(2, 8), beam)
        sizes.append(sum(leaf.numel() for leaf in tree.leaves(beam)))
        rooms.append(search.room(beam).tolist())
    assert all(a >= b for row in zip(*rooms, strict=True) for a, b in itertools.pairwise(row))
    assert rooms[0][0] > 0.5
    assert rooms[-1] == [0.0, 0.0] if memory > 30 else max(rooms[-1]) < 0.2
    assert len({*sizes[-8:]}) <= 2 or max(sizes[-8:]) <= 1.2 * sizes[-9] if memory == 30 else True
    beam = search.commit(beam, beam.said.length[:, 0])
    before = search.hypotheses(search.finish(beam))
    assert all(not h[0].tokens for h in before) or memory == 30
    fresh = search.start_at(x, beam.frames)
    assert search.room(fresh).tolist() == [1.0, 1.0]


def test_decoders_that_remember_where_they_are_are_refused() -> None:
    with pytest.raises(ValueError, match="not soft"):
        aligned(decoder(0, cross=DynamicConvolution))


@pytest.fixture(scope="module")
def exact() -> Recognizer:
    made = load_model(FOLDER, dtype="float64")
    assert isinstance(made, Recognizer)
    return made


def joined(lines: list[dict[str, Any]], gap_s: float) -> np.ndarray:
    gap = np.zeros(round(gap_s * RATE), np.float32)
    sounds = [soundfile.read(FOLDER / line["file"], dtype="float32")[0] for line in lines]
    return np.concatenate([part for sound in sounds for part in (sound, gap)])


def text(events: list[Event]) -> str:
    return "".join(event.committed for event in events).strip()


def run(model: Recognizer, sound: np.ndarray, cuts: list[int], **options: Any) -> list[Event]:
    session = Session(model, search=model.search("aligned"), **options)
    events = [event for part in np.split(sound, sorted(cuts)) for event in session.feed(part, RATE)]
    return events + session.finish()


@pytest.mark.parametrize("policy", [None, LocalAgreement()])
def test_words_come_live_with_times(exact: Recognizer, policy: Any) -> None:
    said, off = [], []
    for line in LINES[:5]:
        found = exact.transcribe(FOLDER / line["file"], search=exact.search("aligned"), policy=policy)
        said.append(found.text)
        if found.text == line["text"]:
            pairs = list(zip(found.words, line["words"], strict=True))
            off += [abs(word.start - true["start"]) for word, true in pairs]
            assert [word.start for word in found.words] == sorted(word.start for word in found.words)
    errors = word_errors([line["text"] for line in LINES[:5]], said, normalise="none")
    assert errors.rate <= 0.3, said
    assert np.median(off) <= 0.2


def test_events_do_not_depend_on_the_cuts_and_text_only_grows(exact: Recognizer) -> None:
    sound, chance = joined(LINES[2:5], 0.8), random.Random(3)
    runs = [run(exact, sound, [chance.randrange(len(sound)) for _ in range(9)]) for _ in range(2)]
    assert runs[0] == runs[1]
    assert sum(event.final for event in runs[0]) == 3
    assert any(event.committed and not event.final for event in runs[0])


def test_a_pool_says_what_each_session_says_alone(exact: Recognizer) -> None:
    sounds = [joined(LINES[i : i + 1 + i % 2], 0.7) for i in range(3)]
    alone = [text(run(exact, sound, [])) for sound in sounds]
    pool = Pool(exact, 3, search=exact.search("aligned"))
    heard: dict[int, list[Event]] = {}
    for i, sound in enumerate(sounds):  # one begins when the others are under way
        slot = pool.open()
        heard[slot] = []
        pool.feed(slot, sound, RATE)
        pool.close(slot)
        for _ in range(3 + i):
            for other, events in pool.step().items():
                heard[other] += events
    while pool.busy:
        for other, events in pool.step().items():
            heard[other] += events
    assert [text(events) for events in heard.values()] == alone


def test_where_nothing_was_heard_nothing_is_said(exact: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = joined(LINES[:1], 1.0)
    assert text(run(exact, sound, []))
    monkeypatch.setattr(type(exact), "blank", lambda self, x: torch.ones_like(x.mask))
    for kind in ("aligned", "attention"):
        session = Session(exact, search=exact.search(kind, beam_size=1))
        assert session.feed(sound, RATE) + session.finish() == []


def test_a_policy_needs_heads_that_the_search_gives(exact: Recognizer) -> None:
    heads = exact.heads["attention"].alignment_heads  # type: ignore[union-attr]
    usual = Session(exact, search=exact.search("aligned")).listener
    assert usual.policy == AlignAtt.whisper(heads, usual.policy.frame_threshold)  # type: ignore[attr-defined]
    Session(exact, search=exact.search("aligned"), policy=AlignAtt(heads[:1], 3))
    with pytest.raises(InputError, match=r"heads \[\(0, 9\)\]"):
        Session(exact, search=exact.search("aligned"), policy=AlignAtt(((0, 9),)))
    with pytest.raises(InputError, match="does not give"):
        Session(exact, search=exact.search("ctc"), policy=AlignAtt(heads))


def test_a_translator_looks_further_and_waits_longer(exact: Recognizer) -> None:
    """It sees all, and by default leaves the words of its last 0.48 s, as far as nobody says otherwise."""
    search = exact.search("aligned")
    assert isinstance(search, AlignedGreedy)
    made = search.translating()
    assert (made.reorders, made.edge, made.back >= made.memory, made.reach >= made.memory) == (True, 0, True, True)
    assert (search.reorders, search.edge, search.back, search.reach) == (False, 4, 40, 64)
    usual = suited(None, made)
    assert isinstance(usual, AlignAtt)
    assert (usual.frame_threshold, usual.heads, usual.rewind_threshold) == (TRANSLATING, search.heads, None)


def test_a_greater_threshold_says_words_later(exact: Recognizer) -> None:
    heads, sound = exact.heads["attention"].alignment_heads, joined(LINES[:2], 0.8)  # type: ignore[union-attr]
    late = []
    for threshold in (2, 25):
        events = run(exact, sound, [], policy=AlignAtt.whisper(heads, threshold))
        late.append(np.mean([event.audio_s - word.end for event in events for word in event.words]))
    assert late[0] < late[1]


def test_it_is_the_choice_where_letters_hear_the_pauses() -> None:
    heads: dict[str, nn.Module] = {"attention": nn.Identity(), "letters": Letters(8)}
    assert possible(nn.ModuleDict(heads))[0] == "aligned"
    assert possible(nn.ModuleDict(heads), streams=False)[0] == "attention"
    assert possible(nn.ModuleDict({"attention": nn.Identity()}))[0] == "attention"
    assert possible(nn.ModuleDict({**heads, "ctc": nn.Identity()}))[0] == "joint"
    assert possible(nn.ModuleDict({**heads, "transducer": nn.Identity()}))[0] == "transducer"


def test_long_utterances_end_before_there_is_no_room(exact: Recognizer) -> None:
    search = exact.search("aligned")
    assert isinstance(search, AlignedGreedy)
    search.memory = 150
    session = Session(exact, search=search, settings=StreamSettings(silence_s=30.0))
    sound = joined(LINES[:4], 0.1)
    events = session.feed(sound, RATE) + session.finish()
    assert sum(event.final for event in events) > 1
    wanted = " ".join(line["text"] for line in LINES[:4])
    assert word_errors([wanted], [text(events)], normalise="none").rate <= 0.7
