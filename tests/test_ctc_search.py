"""Searches over CTC log-probabilities, against every path there is."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechattn import tree
from speechattn.frames import Frames
from speechattn.search.beam import Beam, Hypothesis, Prefixes, Search
from speechattn.search.ctc import CTCGreedy, CTCPrefixBeam
from speechattn.search.phrases import Phrases

pytestmark = pytest.mark.usefixtures("precise")
BOTH = pytest.mark.parametrize("compiled", [False, True])
GOLDEN = [[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.3, 0.3, 0.4]]


def whole(x: Tensor) -> Frames:
    """Frames that are all there."""
    return Frames(x, torch.ones(x.shape[:2], dtype=torch.bool))


def posteriors(*shape: int, seed: int = 0, sharp: float = 2.0) -> Tensor:
    """Random log-probabilities."""
    return (sharp * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def enumerated(x: Tensor, blank: int = 0) -> dict[tuple[int, ...], tuple[float, tuple[int, ...]]]:
    """Each text, with the log-probability of all its paths in [T, V], and the best one of them."""
    sums: dict[tuple[int, ...], float] = {}
    best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
    for path in itertools.product(range(x.shape[1]), repeat=x.shape[0]):
        worth = sum(float(x[t, c]) for t, c in enumerate(path))
        text = tuple(k for k, _ in itertools.groupby(path) if k != blank)
        sums[text] = np.logaddexp(sums.get(text, -math.inf), worth)
        best[text] = max(best.get(text, (-math.inf, ())), (worth, path))
    return {text: (sums[text], best[text][1]) for text in sums}


def runs(path: tuple[int, ...], x: Tensor, blank: int = 0) -> tuple[list[tuple[int, int]], list[float]]:
    """Spans and peaks of the tokens of a path."""
    spans, peaks, at = [], [], 0
    for token, run in itertools.groupby(path):
        n = len(list(run))
        if token != blank:
            spans.append((at, at + n))
            peaks.append(max(float(x[t, token]) for t in range(at, at + n)))
        at += n
    return spans, peaks


def simple(x: Tensor, size: int) -> dict[tuple[int, ...], float]:
    """The textbook's prefix beam search over [T, V], with prefixes in a dictionary."""
    beam = {(): (0.0, -math.inf)}
    add = np.logaddexp
    for frame in x.tolist():
        new: dict[tuple[int, ...], list[float]] = {}
        for prefix, (blank, label) in beam.items():
            for token, worth in enumerate(frame):
                if token == 0:
                    slot = new.setdefault(prefix, [-math.inf, -math.inf])
                    slot[0] = add(slot[0], add(blank, label) + worth)
                    continue
                grown = new.setdefault((*prefix, token), [-math.inf, -math.inf])
                if prefix[-1:] == (token,):
                    slot = new.setdefault(prefix, [-math.inf, -math.inf])
                    slot[1] = add(slot[1], label + worth)
                    grown[1] = add(grown[1], blank + worth)
                else:
                    grown[1] = add(grown[1], add(blank, label) + worth)
        ranked = sorted(new.items(), key=lambda item: -add(*item[1]))[:size]
        beam = {prefix: (blank, label) for prefix, (blank, label) in ranked}
    return {prefix: float(add(*worth)) for prefix, worth in beam.items()}


def same(a: list[Hypothesis], b: list[Hypothesis], tolerance: float = 1e-9) -> None:
    """Equal answers, in this order."""
    assert [x.tokens for x in a] == [x.tokens for x in b]
    assert [x.spans for x in a] == [x.spans for x in b]
    for x, y in zip(a, b, strict=True):
        assert x.score == pytest.approx(y.score, abs=tolerance)
        assert x.log_probs == pytest.approx(y.log_probs, abs=tolerance)


def pieces(search: Search, x: Frames, cuts: list[int]) -> Beam:
    """The beam behind steps that end at the cuts."""
    beam = search.start(x)
    for a, b in itertools.pairwise([0, *sorted(cuts), x.mask.shape[1]]):
        beam = search.step(x[a:b], beam)
    return beam


@BOTH
def test_golden_probabilities(compiled: bool) -> None:
    x = torch.tensor(GOLDEN).log()[None]
    found = CTCPrefixBeam(16, compiled=compiled).decode(whole(x))[0]
    worth = {h.tokens: round(math.exp(h.score), 9) for h in found}
    assert worth == {(): 0.06, (1,): 0.264, (2,): 0.2265, (1, 1): 0.036, (1, 2): 0.2125, (2, 1): 0.1185,
                     (2, 2): 0.032, (1, 2, 1): 0.0225, (2, 1, 2): 0.028}  # fmt: skip
    assert sum(worth.values()) == pytest.approx(1)
    assert found[0].tokens == (1,)


@BOTH
@pytest.mark.parametrize("blank", [0, 1])
def test_a_large_beam_is_the_sum_over_all_paths(compiled: bool, blank: int) -> None:
    for frames, vocab in itertools.product(range(5), (blank + 1, 3)):
        x = posteriors(frames, vocab, seed=frames)
        expected = enumerated(x, blank)
        found = CTCPrefixBeam(64, blank=blank, candidates=None, compiled=compiled).decode(whole(x[None]))[0]
        assert {h.tokens for h in found} == set(expected)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        for h in found:
            assert h.score == pytest.approx(expected[h.tokens][0], abs=1e-9)
            spans, peaks = runs(expected[h.tokens][1], x, blank)
            assert list(h.spans) == spans
            assert list(h.log_probs) == pytest.approx(peaks, abs=1e-12)


@BOTH
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([0.3, 1.0, 3.0]))
def test_a_small_beam_is_the_textbook_s(compiled: bool, seed: int, size: int, sharp: float) -> None:
    """Few symbols and few hypotheses: prefixes leave the beam and come back all the time."""
    x = posteriors(25, 3, seed=seed, sharp=sharp)
    expected = simple(x, size)
    found = CTCPrefixBeam(size, candidates=None, compiled=compiled).decode(whole(x[None]))[0]
    assert [h.tokens for h in found] == list(expected)
    assert [h.score for h in found] == pytest.approx(list(expected.values()), abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 7), st.sampled_from([1, 3, 40, None]), st.booleans(), st.booleans())
def test_compiled_is_the_same(seed: int, size: int, candidates: int | None, biased: bool, holes: bool) -> None:
    draw = random.Random(seed)
    x = posteriors(2, draw.randint(0, 40), draw.choice([1, 2, 12]), seed=seed, sharp=draw.choice([1.0, 4.0]))
    frames = whole(x)
    if holes:
        mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.8
        frames = Frames(torch.where(mask[..., None], x, torch.nan), mask)
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = -torch.inf
    phrases = None
    if biased:
        texts = [[draw.randrange(x.shape[2]) for _ in range(draw.randint(1, 4))] for _ in range(6)]
        begins = draw.choice([None, draw.sample(range(x.shape[2]), x.shape[2] // 2)])
        phrases = Phrases(texts, bonus=draw.choice([1.25, -0.5]), vocab=x.shape[2], begins=begins)
    found = [
        CTCPrefixBeam(size, candidates=candidates, phrases=phrases, reward=0.25, compiled=compiled)
        for compiled in (False, True)
    ]
    for a, b in zip(*(search.decode(frames) for search in found), strict=True):
        same(a, b)


def test_what_is_not_a_candidate_is_not_said_but_lasts() -> None:
    x = torch.tensor([[0.1, 0.8, 0.1], [0.05, 0.45, 0.5], [0.8, 0.1, 0.1]]).log()[None]
    for compiled in (False, True):
        found = CTCPrefixBeam(8, candidates=1, compiled=compiled).decode(whole(x))[0]
        assert {h.tokens for h in found} == {(), (1,), (2,), (1, 2), (1, 1), (2, 1), (1, 2, 1)}
        lasting = next(h for h in found if h.tokens == (1,))
        # all its paths count, also those that say it later, when it is no candidate any more
        assert lasting.score == pytest.approx(enumerated(x[0])[(1,)][0])


@BOTH
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 1000), st.lists(st.integers(0, 30), max_size=6))
def test_any_split_gives_the_same_beam(compiled: bool, seed: int, cuts: list[int]) -> None:
    x = whole(posteriors(2, 30, 6, seed=seed))
    x.mask[1, 21:] = False
    x.mask[0, 5:9] = False
    phrases = Phrases([[1, 2], [3, 3, 1]], vocab=6, begins=[1, 3])
    for search in (CTCPrefixBeam(4, phrases=phrases, compiled=compiled), CTCGreedy()):
        one, other = search.step(x, search.start(x)), pieces(search, x, cuts)
        assert torch.equal(one.frames, other.frames)
        for a, b in zip(search.hypotheses(one), search.hypotheses(other), strict=True):
            same(a, b)


@BOTH
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 1000))
def test_what_all_agree_on_can_be_committed_at_any_time(compiled: bool, seed: int) -> None:
    x, draw = whole(posteriors(2, 40, 5, seed=seed, sharp=3.0)), random.Random(seed)
    for search in (CTCPrefixBeam(3, compiled=compiled), CTCGreedy()):
        beam, done = search.start(x), [list[Hypothesis](), list[Hypothesis]()]
        for at in range(0, 40, 5):
            beam = search.step(x[at : at + 5], beam)
            n = torch.tensor([draw.randint(0, int(k)) for k in beam.agreed()])
            for row, kept in enumerate(n.tolist()):
                done[row].append(cut(search.hypotheses(beam)[row][0], 0, kept))
            beam = search.commit(beam, n)
        for row, answers in enumerate(search.hypotheses(beam)):
            first = [token for part in done[row] for token in part.tokens]
            alone = search.decode(Frames(x.values[row : row + 1], x.mask[row : row + 1]))[0]
            assert all(list(h.tokens[: len(first)]) == first for h in alone)
            same([cut(h, len(first), None) for h in alone], answers)


def cut(h: Hypothesis, first: int, last: int | None) -> Hypothesis:
    """A stretch of an answer."""
    span = slice(first, last)
    return replace(h, tokens=h.tokens[span], log_probs=h.log_probs[span], spans=h.spans[span])


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    """What a path says."""
    return tuple(k for k, _ in itertools.groupby(path) if k)


@BOTH
def test_who_says_otherwise_does_not_come_back(compiled: bool) -> None:
    """Behind a commit, the paths that count are those that had said so by then."""
    x = posteriors(1, 4, 3, seed=3, sharp=1.0)
    search = CTCPrefixBeam(100, compiled=compiled)
    beam = search.step(whole(x[:, :2]), search.start(whole(x)))
    said = search.hypotheses(beam)[0][0].tokens
    assert said
    beam = search.commit(beam, torch.tensor([len(said)]))
    found = search.hypotheses(search.step(whole(x[:, 2:]), beam))[0]
    expected: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=4):
        if collapsed(path[:2])[: len(said)] == said:
            worth = sum(float(x[0, t, c]) for t, c in enumerate(path))
            text = collapsed(path)[len(said) :]
            expected[text] = np.logaddexp(expected.get(text, -math.inf), worth)
    assert {h.tokens: h.score for h in found} == pytest.approx(expected)
    assert len(found) == len(expected)
    with pytest.raises(ValueError, match="commit"):
        search.commit(beam, torch.tensor([9]))


def test_a_row_does_not_know_its_batch() -> None:
    x = posteriors(3, 30, 6, seed=5)
    mask = torch.arange(30) < torch.tensor([30, 0, 17])[:, None]
    batch = Frames(torch.where(mask[..., None], x, torch.nan), mask)
    for search in (CTCPrefixBeam(4), CTCPrefixBeam(4, compiled=False), CTCGreedy()):
        beam = pieces(search, batch, [4, 20])
        assert beam.frames.tolist() == [30, 0, 17]
        for row, n in enumerate([30, 0, 17]):
            same(search.hypotheses(beam)[row], search.decode(whole(x[row : row + 1, :n]))[0])


def test_states_are_selected_joined_and_split() -> None:
    x = posteriors(3, 40, 6, seed=6)
    for search in (CTCPrefixBeam(4, lm=Bigrams(6), weight=0.5), CTCPrefixBeam(4), CTCGreedy()):
        old = search.step(whole(x[:2, :30]), search.start(whole(x[:2])))
        young = search.start(whole(x[2:]))
        beam = tree.select(tree.concat([old, young]), [2, 1, 0])
        beam = tree.concat([search.step(whole(x[i : i + 1, 30:]), row) for i, row in zip([2, 1, 0], tree.split(beam),
                                                                                         strict=True)])  # fmt: skip
        found = search.hypotheses(beam)
        for row, frames in ((2, x[:1]), (1, x[1:2]), (0, x[2:, 30:])):
            same(found[row], search.decode(whole(frames))[0])
        order = torch.tensor([list(reversed(range(search.size)))] * 3)
        assert search.hypotheses(search.select(beam, order)) == [row[::-1] for row in found]


@BOTH
def test_impossible_frames_are_survived(compiled: bool) -> None:
    x = torch.full((1, 6, 4), -torch.inf)
    for t, token in enumerate([1, 1, 0, 1, 3, 0]):
        x[0, t, token] = 0
    search = CTCPrefixBeam(3, compiled=compiled)
    found = search.decode(whole(x))
    assert [(h.tokens, h.score, h.spans) for h in found[0]] == [((1, 1, 3), 0, ((0, 2), (3, 4), (4, 5)))]
    y = torch.cat([x[:, :1], torch.full((1, 1, 4), -torch.inf), torch.full((1, 1, 4), torch.nan), x[:, 1:]], 1)
    for one in (search, CTCGreedy()):
        found = one.decode(whole(y))
        assert [(h.tokens, h.score, h.spans) for h in found[0]] == [((1, 1, 3), 0, ((0, 4), (5, 6), (6, 7)))]


def test_nothing_and_nobody() -> None:
    for search in (CTCPrefixBeam(4), CTCPrefixBeam(4, compiled=False), CTCGreedy()):
        none = whole(torch.zeros(2, 0, 5))
        assert [[(h.tokens, h.score) for h in row] for row in search.decode(none)] == [[((), 0.0)]] * 2
        assert search.decode(whole(torch.zeros(0, 7, 5))) == []
        only = whole(torch.zeros(1, 3, 1))
        assert [(h.tokens, h.score) for h in search.decode(only)[0]] == [((), 0.0)]
    for wrong in ({"size": 0}, {"candidates": 0}):
        with pytest.raises(ValueError, match="a beam of"):
            CTCPrefixBeam(**wrong)  # type: ignore[arg-type]


def test_greedy_is_the_best_path() -> None:
    x = posteriors(3, 50, 5, seed=8)
    for row, (found,) in enumerate(CTCGreedy().decode(whole(x))):
        path = tuple(x[row].argmax(-1).tolist())
        spans, peaks = runs(path, x[row])
        assert found.tokens == tuple(k for k, _ in itertools.groupby(path) if k)
        assert list(found.spans) == spans
        assert list(found.log_probs) == pytest.approx(peaks)
        assert found.score == pytest.approx(float(x[row].amax(-1).sum()))


def test_half_precision_is_read_as_what_it_is() -> None:
    x = posteriors(1, 30, 6, seed=1).bfloat16()
    a, b = (CTCPrefixBeam(4, compiled=compiled).decode(whole(x))[0] for compiled in (True, False))
    same(a, b)
    assert a[0].score == pytest.approx(CTCPrefixBeam(4).decode(whole(x.double()))[0][0].score)


@BOTH
@pytest.mark.parametrize("begins", [None, (1,), (2,)])
def test_phrases_rank_and_leave_probabilities_alone(compiled: bool, begins: tuple[int, ...] | None) -> None:
    x = posteriors(4, 3, seed=2)
    expected = enumerated(x)
    phrases = Phrases([[1, 2], [2, 2, 1]], bonus=1.5, vocab=3, begins=begins)
    search = CTCPrefixBeam(64, candidates=None, phrases=phrases, compiled=compiled)
    beam = search.finish(search.step(whole(x[None]), search.start(whole(x[None]))))
    found = search.hypotheses(beam)[0]
    assert {h.tokens for h in found} == set(expected)
    for h, worth in zip(found, search.log_probs(beam)[0].tolist(), strict=False):
        assert worth == pytest.approx(expected[h.tokens][0], abs=1e-9)
        inside = {i + d for i in range(len(h.tokens)) for p in ((1, 2), (2, 2, 1)) if h.tokens[i : i + len(p)] == p
                  and (begins is None or h.tokens[i + len(p) : i + len(p) + 1] in ((), *((t,) for t in begins)))
                  for d in range(len(p))}  # fmt: skip
        assert h.score == pytest.approx(worth + 1.5 * len(inside), abs=1e-9)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@BOTH
def test_a_phrase_is_not_kept_for_a_longer_word(compiled: bool) -> None:
    """Space, m, a, c and k are 1 to 5: "mak" was heard, and less clearly "mac", "mack"."""
    for last, said, without in ((5, (1, 2, 3, 5), (1, 2, 3, 4, 5)), (0, (1, 2, 3, 4), (1, 2, 3, 4))):
        x = torch.full((1, 6, 6), 0.01)
        for t, token in enumerate([1, 2, 3, 5, last, 0]):
            x[0, t, token] = 0.5 if t == 3 else 0.9
        x[0, 3, 4] = 0.4
        x = x.log().log_softmax(-1)
        for begins, tokens in ((None, without), ([1], said)):
            book = Phrases([[1, 2, 3, 4]], vocab=6, begins=begins)
            assert CTCPrefixBeam(6, phrases=book, compiled=compiled).decode(whole(x))[0][0].tokens == tokens


@BOTH
def test_a_phrase_brings_back_what_was_heard_less_clearly(compiled: bool) -> None:
    x = torch.full((1, 6, 5), 0.02)
    for t, (token, worth) in enumerate([(0, 0.9), (1, 0.9), (0, 0.9), (2, 0.5), (0, 0.9), (0, 0.9)]):
        x[0, t, token] = worth
    x[0, 3, 3] = 0.4
    x = x.log().log_softmax(-1)
    plain = CTCPrefixBeam(5, compiled=compiled)
    assert plain.decode(whole(x))[0][0].tokens == (1, 2)
    phrases = Phrases([[1, 3]], bonus=1.0, vocab=5)
    search = CTCPrefixBeam(5, phrases=phrases, compiled=compiled)
    assert search.decode(whole(x))[0][0].tokens == (1, 3)
    # phrases that come and go in a session
    beam = search.step(whole(x[:, :2]), search.start(whole(x)))
    beam = search.bias(beam, phrases.add([[1, 4], [2]]))
    assert search.hypotheses(beam)[0][0].score == pytest.approx(float(search.log_probs(beam)[0, 0]) + 1.0)
    beam = search.finish(search.step(whole(x[:, 2:]), beam))
    assert search.hypotheses(beam)[0][0].tokens == (1, 2)
    with pytest.raises(ValueError, match="takes no phrases"):
        plain.bias(plain.start(whole(x)), 0)


class Bigrams:
    """A language model that keeps all it has read, and counts what it computes."""

    partial = False

    def __init__(self, vocab: int) -> None:
        self.table = posteriors(vocab + 1, vocab + 1, seed=7)
        self.rows = 0

    def start(self, x: Frames) -> Prefixes:
        return Prefixes.empty(self.table.new_zeros(len(x.mask)), 1)

    def read(self, x: Frames, state: Prefixes) -> Prefixes:
        return state

    def score(self, state: Prefixes, candidates: Tensor | None) -> tuple[Tensor, Prefixes]:
        rows, size = state.length.shape
        self.rows += rows * size
        texts = [state.tokens[b, k, : state.length[b, k]].tolist() for b in range(rows) for k in range(size)]
        table = [self.at(text) for text in texts]
        return self.table[torch.tensor(table, dtype=torch.long).view(rows, size)], state

    def extend(self, state: Prefixes, parents: Tensor, tokens: Tensor) -> Prefixes:
        zero = torch.zeros_like(tokens)
        return state.select(parents).append(tokens, zero, zero, zero.double(), zero == 0)

    def select(self, state: Prefixes, parents: Tensor) -> Prefixes:
        return state.select(parents)

    def of(self, text: tuple[int, ...], end: int) -> float:
        """What it gives to a whole text."""
        return sum(float(self.table[self.at(text[:i]), token]) for i, token in enumerate((*text, end)))

    def at(self, text: Sequence[int]) -> int:
        """Which line of the table comes behind a text."""
        return reduce(lambda a, b: (a * 3 + b) % len(self.table), text, 0)


def test_a_language_model_ranks_and_reads_only_what_is_new() -> None:
    x = posteriors(2, 4, 3, seed=4)
    lm = Bigrams(3)
    search = CTCPrefixBeam(64, candidates=None, lm=lm, weight=0.5, reward=0.7, end=3)
    for row, answers in enumerate(search.decode(whole(x))):
        expected = enumerated(x[row])
        assert {h.tokens for h in answers} == set(expected)
        for h in answers:
            worth = expected[h.tokens][0] + 0.5 * lm.of(h.tokens, 3) + 0.7 * len(h.tokens)
            assert h.score == pytest.approx(worth, abs=1e-9)
    lm.rows = 0
    quiet = torch.tensor([0.9, 0.05, 0.05]).log().expand(1, 50, 3)
    CTCPrefixBeam(2, lm=lm).decode(whole(quiet))
    assert lm.rows < 30
    lm.partial = True  # type: ignore[misc]
    with pytest.raises(ValueError, match="scores only candidates"):
        CTCPrefixBeam(2, lm=lm)


def test_an_hour_is_counted_in_float64_and_kept_small() -> None:
    x = posteriors(1, 200, 5, seed=9).float()
    search = CTCPrefixBeam(4)
    beam, sizes = search.start(whole(x)), []
    with torch.inference_mode():
        for _ in range(60):
            beam = search.step(whole(x), beam)
            beam = search.commit(beam, beam.agreed())
            sizes.append(beam.said.tokens.shape[2])
    assert beam.frames.tolist() == [12000]
    assert max(sizes) <= 400
    assert beam.score.dtype == torch.float64
    alone = search.decode(whole(x))[0][0]
    assert float(beam.score[0, 0]) == pytest.approx(60 * alone.score, rel=0.02)
