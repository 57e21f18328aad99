"""The beam whose heads wait: streaming is offline, rows are apart, greedy is a plain loop; commits and restarts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speechattn import tree
from speechattn.cross.monotonic import HardMonotonic, InfiniteLookback, MoChA, Monotonic, Place
from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Frames, Memory
from speechattn.search import Beam, Hypothesis
from speechattn.search.monotonic import MonotonicBeam

pytestmark = pytest.mark.usefixtures("precise")
DIM, VOCAB, END = 8, 7, 6
CROSSES: dict[str, Callable[..., Monotonic]] = {
    "hard": HardMonotonic,
    "mocha": partial(MoChA, window=3, chunk_heads=2),
    "milk": partial(InfiniteLookback, preserve=True),
    "together": partial(MoChA, window=2, wait=3),
}


def decoder(kind: str, seed: int = 0) -> AttentionDecoder:
    torch.manual_seed(seed)
    found = AttentionDecoder.usual(VOCAB, DIM, 2, 2, 12, context=40, cross=partial(CROSSES[kind], offset=-1.0)).eval()
    for name, parameter in found.named_parameters():
        if "offset" not in name:
            nn.init.normal_(parameter, std=0.7)
    assert found.output is not None
    with torch.no_grad():
        found.output.bias[END] += 1.0  # texts end
    return found.requires_grad_(False)


def utterances(lengths: list[int], seed: int = 0, *, holes: bool = False) -> Frames:
    torch.manual_seed(seed)
    x = Frames.from_lengths(torch.randn(len(lengths), max(lengths), DIM), torch.tensor(lengths))
    return Frames.of(x.values, x.mask & (torch.rand(x.mask.shape) < 0.7)) if holes else x


def search_of(kind: str, size: int = 3, seed: int = 0) -> MonotonicBeam:
    return MonotonicBeam(decoder(kind, seed), size, sos=END, eos=END, bonus=0.3, never=[0])


def row(x: Frames, b: int) -> Frames:
    return Frames(x.values[b : b + 1], x.mask[b : b + 1])


def fed(search: MonotonicBeam, x: Frames, cuts: list[int]) -> Beam:
    beam = search.start(x)
    for a, b in itertools.pairwise([0, *sorted(cuts), x.mask.shape[1]]):
        beam = search.step(x[a:b], beam)
    return beam


def same(a: list[list[Hypothesis]], b: list[list[Hypothesis]]) -> None:
    for mine, theirs in zip(a, b, strict=True):
        assert [h.tokens for h in mine] == [h.tokens for h in theirs]
        assert [h.spans for h in mine] == [h.spans for h in theirs]
        for x, y in zip(mine, theirs, strict=True):
            assert x.score == pytest.approx(y.score, abs=1e-9)
            assert x.log_probs == pytest.approx(y.log_probs, abs=1e-9)


def offline(search: MonotonicBeam, x: Frames) -> Beam:
    return search.finish(search.step(x, search.start(x)))


@pytest.mark.parametrize("kind", list(CROSSES))
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 16), max_size=8), size=st.integers(1, 4))
def test_streaming_is_offline_and_rows_are_apart(kind: str, seed: int, cuts: list[int], size: int) -> None:
    search, x = search_of(kind, size, seed), utterances([16, 9, 1, 0], seed, holes=seed % 2 == 0)
    expected = search.hypotheses(offline(search, x))
    assert all(expected)
    same(search.hypotheses(search.finish(fed(search, x, cuts))), expected)
    for b in range(4):
        same(search.hypotheses(offline(search, row(x, b).front())), expected[b : b + 1])


def naive(model: AttentionDecoder, x: Frames) -> tuple[list[int], list[tuple[int, int]]]:
    """The best token after the other, behind everything that was said, from the start each time."""
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    frames = x.mask.shape[1]
    while True:
        read = torch.tensor([[END, *tokens]])
        state = model.start(Memory.of(x, finished=True))
        hidden, _, after = model.step(read, state)
        scores = model.logits(hidden[0, -1])
        scores[0] = -torch.inf
        best = int(scores.argmax())
        if best == END or len(tokens) == frames:
            return tokens, spans
        at = [min(j, frames - 1) for place in after.place for j in place.at[0].tolist()]
        tokens.append(best)
        spans.append((min(at), max(at) + 1))


@pytest.mark.parametrize("kind", list(CROSSES))
def test_greedy_is_a_plain_loop(kind: str) -> None:
    lengths, ends = set(), set()
    for seed in range(5):
        search, x = search_of(kind, 1, seed), utterances([13], seed)
        search.bonus = 0.0
        found = search.hypotheses(offline(search, x))[0][0]
        tokens, spans = naive(search.scorer.decoder, x)
        assert (list(found.tokens), list(found.spans)) == (tokens, spans)
        lengths.add(len(tokens))
        ends |= {end for _, end in spans}
        logs = search.scorer.decoder.forced(
            search.scorer.decoder.start(Memory.of(x, finished=True)),
            torch.tensor([tokens], dtype=torch.long).view(1, -1), torch.tensor([len(tokens)]), sos=END, eos=END,
        )  # fmt: skip
        each = logs.scores.log_softmax(-1).gather(2, logs.tokens[..., None])[0, :, 0]
        assert found.score == pytest.approx(float(each.sum()), abs=1e-9)
        assert found.log_probs == pytest.approx(each[:-1].tolist(), abs=1e-9)
    assert len(lengths) > 1
    assert len(ends) > 1


def test_a_wide_beam_finds_the_best_text() -> None:
    """All texts of at most three tokens of a tiny vocabulary."""
    search = search_of("mocha", 200)
    search.bonus, search.most = 0.0, 3 / 11
    x = utterances([11])
    model, best = search.scorer.decoder, list[tuple[float, tuple[int, ...]]]()
    memory = Memory.of(x, finished=True)
    for n in range(4):
        texts = list(itertools.product(range(1, END), repeat=n))
        tokens = torch.tensor(texts, dtype=torch.long).view(len(texts), n)
        scores = model.log_prob(memory, tokens, torch.full((len(texts),), n), sos=END, eos=END)
        best += zip(scores.tolist(), texts, strict=True)
    best.sort(reverse=True)
    found = search.hypotheses(offline(search, x))[0]
    assert [h.tokens for h in found[:20]] == [text for _, text in best[:20]]
    assert [h.score for h in found[:20]] == pytest.approx([score for score, _ in best[:20]], abs=1e-9)


def test_words_come_before_the_end_and_it_waits_for_frames() -> None:
    early, waited = 0, 0
    for seed in range(5):
        search, x = search_of("mocha", 1, seed), utterances([24], seed)
        beam, counts = search.start(x), []
        for t in range(24):
            beam = search.step(x[t : t + 1], beam)
            counts.append(int(beam.said.length[0, 0]))
            for hypothesis in search.hypotheses(beam)[0]:
                assert all(0 <= start < end <= t + 1 for start, end in hypothesis.spans)
        assert counts == sorted(counts)
        early += counts[12] > 0
        waited += len({*counts}) > 2
        assert int(beam.frames) == 24
    assert early
    assert waited


def test_frames_behind_the_heads_are_forgotten() -> None:
    for kind, reach in (("hard", 0), ("mocha", 2), ("milk", None)):
        fewest = 40
        for seed in (0, 1):
            search, x = search_of(kind, 2, seed), utterances([40], seed)
            before = fed(search, x[:36], [9, 20])
            beam = search.step(x[36:], before)
            living = ~before.state.ended & (before.score > -torch.inf)
            places = before.state.decoder.places
            for cross, place in zip(beam.state.decoder.cross, places, strict=True):
                assert isinstance(place, Place)
                least = int(place.at[living].amin()) - (reach or 0) if bool(living.any()) else 36
                assert cross.mask.shape[1] == (40 if reach is None else min(40, 40 - least))
                fewest = min(fewest, cross.mask.shape[1])
            same(search.hypotheses(search.finish(beam)), search.hypotheses(offline(search, x)))
        assert (fewest < 30) == (reach is not None)


def test_what_is_committed_goes_on() -> None:
    grown = 0
    for size, seed in ((1, 0), (1, 2), (3, 5), (3, 6)):
        search, x = search_of("mocha", size, seed), utterances([20, 14], seed)
        expected = search.hypotheses(offline(search, x))
        beam, said = search.start(x), [(), ()]  # type: list[tuple[int, ...]]
        for t in range(0, 20, 2):
            beam = search.step(x[t : t + 2], beam)
            n = beam.agreed()
            for b, hypotheses in enumerate(search.hypotheses(beam)):
                said[b] += hypotheses[0].tokens[: int(n[b])]
            grown += int(n.sum())
            beam = search.commit(beam, n)
        last = search.hypotheses(search.finish(beam))
        for b in range(2):
            assert [said[b] + h.tokens for h in last[b]] == [h.tokens for h in expected[b]]
    assert grown > 3


def test_commits_prune_and_rows_join_and_leave() -> None:
    for seed in range(20):
        search, x = search_of("mocha", 4, seed), utterances([18, 12], seed)
        beam = search.step(x[:10], search.start(x))
        first = search.hypotheses(beam)[0]
        n = torch.tensor([min(2, len(first[0].tokens)), 0])
        if int(n[0]) and len({h.tokens[: int(n[0])] for h in first}) > 1:
            break
    assert len({h.tokens[: int(n[0])] for h in first}) > 1
    after = search.commit(beam, n)
    kept = [h.tokens[int(n[0]) :] for h in first if h.tokens[: int(n[0])] == first[0].tokens[: int(n[0])]]
    assert [h.tokens for h in search.hypotheses(after)[0]] == kept
    parts = tree.split(after)
    late = search.start(row(x, 1))
    joined = tree.concat([parts[1], late, parts[0]])
    z = Frames(x.values[[1, 1, 0]], x.mask[[1, 1, 0]])
    more = Frames.cat([Frames(z.values[:, 10:], z.mask[:, 10:])])
    found = search.hypotheses(search.finish(search.step(more, joined)))
    for b, part in enumerate((parts[1], late, parts[0])):
        alone = search.finish(search.step(row(more, b), part))
        same(search.hypotheses(alone), found[b : b + 1])


def test_starting_late_counts_on() -> None:
    search, x = search_of("hard", 2, 1), utterances([12], 1)
    at = search.finish(search.step(x, search.start_at(x, torch.tensor([100]))))
    zero = search.hypotheses(offline(search, x))
    moved = search.hypotheses(at)
    assert int(at.frames) == 112
    for a, b in zip(zero[0], moved[0], strict=True):
        assert a.tokens == b.tokens
        assert [(s + 100, e + 100) for s, e in a.spans] == list(b.spans)
    assert any(h.spans for h in zero[0])


def test_texts_are_bounded() -> None:
    model = decoder("hard")
    assert model.output is not None
    model.output.bias[END] = -50.0  # never by itself
    for layer in model.layers:
        layer.cross.offset.fill_(50.0)  # type: ignore[union-attr]
    x = utterances([30])
    few = MonotonicBeam(model, 2, sos=END, eos=END, most=0.2)
    assert {len(h.tokens) for h in few.hypotheses(offline(few, x))[0]} == {6}
    same(few.hypotheses(few.finish(fed(few, x, [3, 11, 12]))), few.hypotheses(offline(few, x)))
    many = MonotonicBeam(model, 2, sos=END, eos=END, most=9.0)
    beam = many.step(x, many.start(x))
    assert float(many.room(beam)) == 0.0
    assert {len(h.tokens) for h in many.hypotheses(many.finish(beam))[0]} == {39}
    assert float(many.room(many.start(x))) == 1.0
    for some in (utterances([30, 2, 1]), utterances([2, 30])):  # a row that is full waits beside others that go on
        for b, hypotheses in enumerate(many.hypotheses(offline(many, some))):
            same([hypotheses], many.hypotheses(offline(many, row(some, b).front())))


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="layers \\[0\\] is not monotonic"):
        MonotonicBeam(AttentionDecoder.usual(VOCAB, DIM, 2, 1, 12), 2, sos=END, eos=END)
    with pytest.raises(ValueError, match="a beam of 0"):
        MonotonicBeam(decoder("hard"), 0, sos=END, eos=END)
