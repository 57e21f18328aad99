"""Searches of a transducer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchaudio.models import RNNTBeamSearch

from speechattn import tree
from speechattn.decoder.predictor import LSTMPredictor, Predictor, StatelessPredictor, TransformerPredictor
from speechattn.decoder.transducer import FactoredJoint, Joint, Transducer
from speechattn.frames import Frames
from speechattn.search.beam import Beam, Hypothesis, Search
from speechattn.search.phrases import Phrases
from speechattn.search.transducer import TransducerBeam, TransducerGreedy
from speechattn.testing import random_frames

pytestmark = pytest.mark.usefixtures("precise")
D = 6


def predictor(kind: str, vocab: int, blank: int = 0) -> Predictor:
    if kind == "lstm":
        return LSTMPredictor(vocab, D, blank=blank)
    if kind == "stateless":
        return StatelessPredictor(vocab, D, blank=blank)
    return TransformerPredictor(vocab, D, 1, 2, 8, left=2 if kind == "transformer" else None, blank=blank)


KINDS = ["lstm", "stateless", "transformer", "unlimited transformer"]


def transducer(
    kind: str = "lstm", vocab: int = 4, joint: type[Joint] = Joint, *, std: float = 0.7, seed: int = 0, blank: int = 0
) -> Transducer:
    torch.manual_seed(seed)
    model = Transducer(predictor(kind, vocab, blank), joint(D, D, 8, vocab, blank=blank)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.requires_grad_(False)


def same(found: list[list[Hypothesis]], expected: list[list[Hypothesis]], tolerance: float = 1e-9) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert [h.tokens for h in mine] == [h.tokens for h in theirs]
        assert [h.spans for h in mine] == [h.spans for h in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert a.score == pytest.approx(b.score, abs=tolerance)
            assert a.log_probs == pytest.approx(b.log_probs, abs=tolerance)


def piecewise(search: Search, x: Frames, cuts: list[int]) -> list[list[Hypothesis]]:
    beam = search.start(x)
    edges = [0, *sorted(c % (x.mask.shape[1] + 1) for c in cuts), x.mask.shape[1]]
    for a, b in pairwise(edges):
        beam = search.step(x[a:b], beam)
    return search.hypotheses(search.finish(beam))


def grid(model: Transducer, x: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Log-probabilities [T, U + 1, V] of one row [T, D]."""
    labels = torch.tensor([tokens], dtype=torch.long)
    g = model.joint.labels(model.predictor(labels))
    return model.joint.log_probs(model.joint.frames(x)[:, None], g[0])


def exact(model: Transducer, x: Tensor, tokens: tuple[int, ...], cap: int) -> float:
    """log of the sum over all alignments with no more than `cap` labels in a frame, by going over how many each has."""
    log_probs, blank = grid(model, x, tokens), model.blank
    found = []
    for counts in product(range(cap + 1), repeat=len(x)):
        if sum(counts) != len(tokens):
            continue
        total, u = 0.0, 0
        for t, n in enumerate(counts):
            for _ in range(n):
                total += float(log_probs[t, u, tokens[u]])
                u += 1
            total += float(log_probs[t, u, blank])
        found.append(total)
    return float(torch.tensor(found).logsumexp(0)) if found else -math.inf


@settings(deadline=None, max_examples=12)
@given(kind=st.sampled_from(KINDS), cap=st.integers(1, 4), frames=st.integers(0, 15), seed=st.integers(0, 99))
def test_greedy_is_a_beam_of_one(kind: str, cap: int, frames: int, seed: int) -> None:
    model = transducer(kind, joint=[Joint, FactoredJoint][seed % 2], seed=seed)
    x = random_frames([frames, 15, 3], D, seed=seed)
    one, beam = TransducerGreedy(model, max_symbols=cap), TransducerBeam(model, 1, max_symbols=cap)
    same(one.decode(x), beam.decode(x))


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_greedy_says_the_best_of_every_place(kind: str) -> None:
    model, cap = transducer(kind, seed=1, std=1.0), 3
    x = random_frames([25], D)
    found = TransducerGreedy(model, max_symbols=cap).decode(x)[0][0]
    assert len(found.tokens) > 4
    log_probs, u, score = grid(model, x.values[0], found.tokens), 0, 0.0
    for t in range(25):
        for symbols in range(cap + 1):
            best, token = (float(v) for v in log_probs[t, u].max(-1))
            if token == 0 or symbols == cap:
                score += float(log_probs[t, u, 0])
                break
            assert (found.tokens[u], found.spans[u]) == (token, (t, t + 1))
            assert found.log_probs[u] == pytest.approx(best)
            score, u = score + best, u + 1
    assert u == len(found.tokens)
    assert found.score == pytest.approx(score)


@settings(deadline=None, max_examples=12)
@given(
    shape=st.sampled_from([(1, 3, 3), (2, 3, 2), (3, 3, 2), (4, 2, 3), (4, 3, 1), (4, 2, 1), (2, 1, 2)]),
    kind=st.sampled_from(KINDS), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_large_beam_is_exact(shape: tuple[int, int, int], kind: str, seed: int) -> None:
    frames, vocab, cap = shape
    model = transducer(kind, vocab, joint=[Joint, FactoredJoint][seed % 2], seed=seed)
    if vocab == 1 and seed % 2:
        return  # nothing to share the rest
    x = random_frames([frames], D, seed=seed)
    every = [s for n in range(frames * cap + 1) for s in product(range(1, vocab), repeat=n)]
    found = TransducerBeam(model, 2 * len(every), max_symbols=cap).decode(x)[0]
    assert {h.tokens for h in found} == set(every)
    assert len(found) == len(every)
    for h in found:
        assert h.score == pytest.approx(exact(model, x.values[0], h.tokens, cap), abs=1e-9)
        log_probs = grid(model, x.values[0], h.tokens)
        for u, (token, said, (start, end)) in enumerate(zip(h.tokens, h.log_probs, h.spans, strict=True)):
            assert said == pytest.approx(float(log_probs[start, u, token]), abs=1e-9)
            assert end == start + 1
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@settings(deadline=None, max_examples=12)
@given(
    kind=st.sampled_from(KINDS), size=st.integers(1, 6), cuts=st.lists(st.integers(0, 30), max_size=6),
    seed=st.integers(0, 99), greedy=st.booleans(),
)  # fmt: skip
def test_any_split_gives_the_same_beam(kind: str, size: int, cuts: list[int], seed: int, greedy: bool) -> None:
    model = transducer(kind, 5, seed=seed)
    x = random_frames([11, 0, 7], D, seed=seed)
    search = TransducerGreedy(model) if greedy else TransducerBeam(model, size, max_symbols=3)
    same(piecewise(search, x, cuts), search.decode(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 4])
def test_a_row_does_not_know_its_batch(kind: str, size: int) -> None:
    model = transducer(kind, 5)
    search = TransducerBeam(model, size, max_symbols=3) if size else TransducerGreedy(model, max_symbols=3)
    x = random_frames([10, 5, 0, 8], D)
    dirty = Frames(x.values.masked_fill(~x.mask[..., None], torch.nan), x.mask)
    together = search.decode(dirty)
    for row in range(4):
        alone = tree.select(x, [row])[: int(x.lengths[row])]
        same(search.decode(alone), together[row : row + 1])
    # Frames that are not valid are not there, wherever they stand.
    values, mask = torch.full((1, 20, D), torch.nan), torch.arange(20)[None] % 2 == 1
    values[mask] = x.values[0]
    same(search.decode(Frames(values, mask)), together[:1])
    same(piecewise(search, Frames(values, mask), [4, 7, 18]), together[:1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 3])
def test_sessions_of_different_age_share_a_batch(kind: str, size: int) -> None:
    model = transducer(kind, 5)
    search = TransducerBeam(model, size, max_symbols=3) if size else TransducerGreedy(model, max_symbols=3)
    x, y = random_frames([20], D), random_frames([12], D, seed=1)
    older, younger = search.step(x[:12], search.start(x)), search.step(y[:4], search.start(y))
    both = tree.select(tree.concat([older, younger]), [1, 0])
    both = search.step(Frames(torch.cat([y.values[:, 4:], x.values[:, 12:]]), torch.ones(2, 8, dtype=torch.bool)), both)
    one, two = tree.split(both)
    same(search.hypotheses(search.finish(two)), search.decode(x))
    same(search.hypotheses(search.finish(one)), search.decode(y))


@pytest.mark.parametrize("size", [0, 1, 5])
def test_what_is_committed_is_forgotten_and_nothing_else(size: int) -> None:
    model = transducer("transformer", 5)
    search = TransducerBeam(model, size, max_symbols=3) if size else TransducerGreedy(model, max_symbols=3)
    x = random_frames([24, 24], D)
    beam = search.step(x[:12], search.start(x))
    n = torch.tensor([3, 0])
    first, old = beam.said.tokens[0, 0, :3].tolist(), search.hypotheses(beam)
    agree = [h for h in old[0] if list(h.tokens[:3]) == first]
    beam = search.commit(beam, n)
    now = search.hypotheses(beam)
    assert [h.tokens for h in now[0]] == [h.tokens[3:] for h in agree]
    assert [h.score for h in now[0]] == [h.score for h in agree]
    assert now[1] == old[1]
    found = search.hypotheses(search.step(x[12:], beam))
    same(found[1:], search.decode(x)[1:])
    whole = tuple(first) + found[0][0].tokens
    if size < 2:
        assert whole == search.decode(x)[0][0].tokens
    assert found[0][0].score <= exact_any(model, x.values[0], whole, 3) + 1e-9
    with pytest.raises(ValueError, match="commit"):
        search.commit(beam, torch.tensor([99, 0]))


def exact_any(model: Transducer, x: Tensor, tokens: tuple[int, ...], cap: int) -> float:
    """As `exact`, by dynamic programming over labels and labels in the frame."""
    log_probs, blank = grid(model, x, tokens), model.blank
    row = torch.full((len(tokens) + 1,), -torch.inf)
    row[0] = 0
    for t in range(len(x)):
        now, ended = row, row + log_probs[t, :, blank]
        for _ in range(cap):
            moved = now[:-1] + log_probs[t, :-1].gather(1, torch.tensor([tokens]).T)[:, 0]
            now = torch.cat([torch.tensor([-torch.inf]), moved])
            ended = torch.logaddexp(ended, now + log_probs[t, :, blank])
        row = ended
    return float(row[-1])


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_bounds_that_grow_with_the_beam(seed: int) -> None:
    model = transducer("stateless", 5, seed=seed)
    x = random_frames([10], D, seed=seed)
    best = []
    for size in (1, 4, 64):
        found = TransducerBeam(model, size, max_symbols=2).decode(x)[0]
        assert len(found) == min(size, len(found))
        for h in found:
            assert h.score <= exact_any(model, x.values[0], h.tokens, 2) + 1e-9
        best.append(found[0])
    assert best[0].score < best[-1].score


class Theirs(nn.Module):
    """Our networks as torchaudio's search calls them: its blank is the last symbol, ours the first.

    It wants at least as many labels as hypotheses: there are `more` that are never said.
    """

    def __init__(self, model: Transducer, more: int) -> None:
        super().__init__()
        self.model, self.more = model, more
        self.labels = model.joint.out.out_features - 1

    def transcribe(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.joint.frames(x), lengths

    def predict(self, tokens: Tensor, lengths: Tensor, state: list[list[Tensor]] | None):  # type: ignore[no-untyped-def]
        before = self.model.predictor.init_state(len(tokens)) if state is None else tuple(state[0])
        mine = torch.where(tokens < self.labels, tokens + 1, 0)[:, 0]
        g, after = self.model.predictor.step(mine, before)
        return self.model.joint.labels(g)[:, None], lengths, [list(after)]

    def join(self, a: Tensor, na: Tensor, b: Tensor, nb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.model.joint.scores(a[:, :, None], b[:, None])
        never = scores.new_full((*scores.shape[:-1], self.more), -1e5)
        return torch.cat([scores[..., 1:], never, scores[..., :1]], -1), na, nb


def theirs(model: Transducer, x: Frames, size: int, cap: int) -> list[tuple[tuple[int, ...], float]]:
    """What torchaudio's search finds, ranked by log-probability (it would divide by the number of labels)."""
    last = model.joint.out.out_features - 1 + size
    peer = RNNTBeamSearch(Theirs(model, size), last, hypo_sort_key=lambda h: h[3], step_max_tokens=cap)
    found = peer(x.values, torch.tensor([x.mask.shape[1]]), size)
    return [(tuple(token + 1 for token in h[0][1:]), h[3]) for h in found if h[3] > -9e4]


@pytest.mark.parametrize(("vocab", "frames", "cap"), [(3, 3, 2), (6, 2, 1), (4, 3, 1)])
@pytest.mark.parametrize("joint", [Joint, FactoredJoint])
def test_parity_with_torchaudio_where_nothing_is_pruned(vocab: int, frames: int, cap: int, joint: type[Joint]) -> None:
    """Both sum over all alignments then: the same N-best, with the same scores."""
    model = transducer("lstm", vocab, joint, seed=cap)
    x = random_frames([frames], D)
    size = sum((vocab - 1) ** n for n in range(frames * cap + 1))
    mine, expected = TransducerBeam(model, 2 * size, max_symbols=cap).decode(x)[0], theirs(model, x, size, cap)
    assert len(mine) == size
    assert [h.tokens for h in mine] == [tokens for tokens, _ in expected]
    assert [h.score for h in mine] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_parity_with_torchaudio_where_something_is_pruned() -> None:
    """Both then miss some alignments, not the same ones: mostly the same answer, and on average an equally good one."""
    equal, gain = 0, 0.0
    for seed in range(10):
        model = transducer("lstm", 6, std=1.5, seed=seed)
        model.joint.out.bias[0] += 8
        x = random_frames([12], D, seed=seed)
        expected, mine = theirs(model, x, 8, 3)[0], TransducerBeam(model, 8, max_symbols=3).decode(x)[0][0]
        equal += mine.tokens == expected[0]
        gain += exact_any(model, x.values[0], mine.tokens, 3) - exact_any(model, x.values[0], expected[0], 3)
    assert equal >= 6
    assert gain / 10 > -0.3


@pytest.mark.parametrize("begins", [None, (1,), (2,)])
def test_phrases_rank_and_do_not_count_as_probability(begins: tuple[int, ...] | None) -> None:
    model, cap = transducer("lstm", 3), 2
    x = random_frames([3], D)
    plain = TransducerBeam(model, 300, max_symbols=cap).decode(x)[0]
    assert (1, 2, 1) in [h.tokens for h in plain]
    phrases = Phrases([(1, 2, 1), (2, 2, 1)], bonus=1.5, vocab=3, begins=begins)
    search = TransducerBeam(model, 300, max_symbols=cap, phrases=phrases)
    beam = search.step(x, search.start(x))
    for end in (False, True):
        beam = search.finish(beam) if end else beam
        found, log_probs = search.hypotheses(beam)[0], search.log_probs(beam)[0].tolist()
        assert len(found) == len(plain)
        for h, alone in zip(found, log_probs, strict=False):
            assert alone == pytest.approx(exact(model, x.values[0], h.tokens, cap), abs=1e-9)
            node, bonus = phrases.start(1, 1)[0, 0], 0.0
            for token in h.tokens:
                node, more = phrases.step(node, torch.tensor(token))
                bonus += float(more)
            bonus += float(phrases.finish(node)) if end else 0
            assert h.score == pytest.approx(alone + bonus, abs=1e-9)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert [h.tokens for h in found] != [h.tokens for h in plain]
    # Another set in mid-stream, before any phrase can be complete.
    root = phrases.add([(2, 1, 2)])
    beam = search.bias(search.step(x[:1], search.start(x)), root)
    found = search.hypotheses(search.finish(search.step(x[1:], beam)))[0]
    expected = Phrases([(2, 1, 2)], bonus=1.5, vocab=3, begins=begins)
    same([found], [TransducerBeam(model, 300, max_symbols=cap, phrases=expected).decode(x)[0]])
    with pytest.raises(ValueError, match="without phrases"):
        TransducerBeam(model, 3).bias(beam, 0)


class Bigram:
    """A language model that remembers one token."""

    partial = False

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def start(self, x: Frames) -> Tensor:
        return torch.zeros(len(x.mask), 1, dtype=torch.long)

    def read(self, x: Frames, state: Tensor) -> Tensor:
        return state

    def score(self, state: Tensor, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.table[state], state

    def extend(self, state: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        return tokens

    def select(self, state: Tensor, parents: Tensor) -> Tensor:
        return state.gather(1, parents)


def test_language_models_and_the_internal_one() -> None:
    model, cap = transducer("transformer", 3, FactoredJoint), 2
    x = random_frames([3, 2], D)
    table = torch.randn(3, 3).log_softmax(-1)
    search = TransducerBeam(model, 300, max_symbols=cap, lm=Bigram(table), weight=0.4, internal=0.2, reward=0.7)
    beam = search.step(x, search.start(x))
    for row, found in enumerate(search.hypotheses(beam)):
        frames = x.values[row, : x.lengths[row]]
        for h, alone in zip(found, search.log_probs(beam)[row].tolist(), strict=False):
            lm = sum(float(table[a, b]) for a, b in zip((0, *h.tokens), h.tokens, strict=False))
            g = model.joint.labels(model.predictor(torch.tensor([h.tokens], dtype=torch.long)))[0]
            inner = model.joint.internal(g)  # type: ignore[operator]
            own = sum(float(inner[u, token]) for u, token in enumerate(h.tokens))
            assert alone == pytest.approx(exact(model, frames, h.tokens, cap), abs=1e-9)
            assert h.score == pytest.approx(alone + 0.4 * lm - 0.2 * own + 0.7 * len(h.tokens), abs=1e-9)
    same(piecewise(search, x, [1]), search.hypotheses(search.finish(beam)))
    small = TransducerBeam(model, 4, max_symbols=cap, lm=Bigram(table), weight=0.4)
    same(small.decode(tree.select(x, [1])[:2]), small.decode(x)[1:])


def counted(model: Transducer, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows that the label encoder reads."""
    rows: list[int] = []
    step = model.predictor.step

    def noted(tokens: Tensor, state: object) -> object:
        rows.append(len(tokens))
        return step(tokens, state)

    monkeypatch.setattr(model.predictor, "step", noted)
    yield rows


def test_equal_states_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transducer("transformer", 4, std=0.4, seed=3)
    x = random_frames([16, 16], D)
    (shared,) = counted(model, monkeypatch)
    found = TransducerBeam(model, 12, max_symbols=2).decode(x)
    monkeypatch.undo()
    monkeypatch.setattr(model.predictor, "context", None)
    (apart,) = counted(model, monkeypatch)
    same(TransducerBeam(model, 12, max_symbols=2).decode(x), found)
    assert sum(shared) < 0.7 * sum(apart)


def test_what_another_hypothesis_has_said_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transducer("lstm", 4, std=0.4)
    x = random_frames([30], D)
    (rows,) = counted(model, monkeypatch)
    search = TransducerBeam(model, 12, max_symbols=2)
    said: list[int] = []
    known = search._listened
    monkeypatch.setattr(search, "_listened", lambda tokens, heard: (said.append(len(tokens)), known(tokens, heard))[1])
    search.decode(x)
    assert sum(rows) == sum(said) + 1  # and the start symbol
    assert sum(rows) < 12 * 30


@pytest.mark.parametrize("blank", [0, 2])
def test_blank_may_be_any_symbol(blank: int) -> None:
    model = transducer("lstm", 4, blank=blank, seed=3)
    x = random_frames([12], D)
    same(TransducerGreedy(model).decode(x), TransducerBeam(model, 1).decode(x))
    for h in TransducerBeam(model, 4).decode(x)[0]:
        assert blank not in h.tokens
        assert h.score <= exact_any(model, x.values[0], h.tokens, 5) + 1e-9


def test_a_margin_saves_work_and_spares_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transducer("lstm", 6, std=1.5)
    x = random_frames([20, 20], D)
    found = {}
    for margin in (0.0, 2.0, math.inf):
        (rows,) = counted(model, monkeypatch)
        found[margin] = TransducerBeam(model, 8, max_symbols=3, margin=margin).decode(x), sum(rows)
        monkeypatch.undo()
    assert found[0.0][1] < found[2.0][1] < found[math.inf][1]
    for wide, narrow in zip(found[math.inf][0], found[2.0][0], strict=True):
        assert narrow[0].score <= wide[0].score + 1e-9
    one = [TransducerBeam(model, 1, max_symbols=3, margin=margin).decode(x) for margin in (0.0, math.inf)]
    same(*one)


def test_nothing_to_read_and_nothing_to_say() -> None:
    model = transducer("transformer", 4)
    for search in (TransducerGreedy(model), TransducerBeam(model, 3)):
        nothing = random_frames([0, 0], D)
        assert [[h.tokens for h in row] for row in search.decode(nothing)] == [[()], [()]]
        nobody = Frames(torch.zeros(0, 5, D), torch.zeros(0, 5, dtype=torch.bool))
        assert search.decode(nobody) == []
    only_blank = transducer("lstm", 1)
    for search in (TransducerGreedy(only_blank), TransducerBeam(only_blank, 3)):
        found = search.decode(random_frames([4], D))
        assert [(h.tokens, round(h.score, 12)) for h in found[0]] == [((), 0)]


def test_what_cannot_be_is_refused() -> None:
    model = transducer()
    for arguments, message in (
        ({"max_symbols": 0}, "at most 0 labels"),
        ({"size": 0}, "a beam of 0"),
        ({"margin": -1.0}, "within -1.0"),
        ({"internal": 0.1}, "Joint has no language model of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            TransducerBeam(model, **arguments)  # type: ignore[arg-type]


def test_scores_of_an_hour_are_exact_to_the_digit() -> None:
    """In single precision the sum over many frames would not be: it is kept in double."""
    model = transducer("lstm", 4).float()
    x = random_frames([5], D)
    beam: Beam = TransducerBeam(model, 2).start(Frames(x.values.float(), x.mask))
    assert beam.score.dtype == torch.float64
