"""Prefix probabilities of CTC: golden numbers, enumeration, streaming, ESPnet."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechattn import tree
from speechattn.frames import Frames
from speechattn.search.ctc_prefix import CTCPrefixes, CTCPrefixScorer

pytestmark = pytest.mark.usefixtures("precise")
GOLDEN = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.3, 0.3, 0.4]], dtype=torch.float64).log()
EOS = 9


def same(x: Frames) -> Frames:
    """Frames that are log-probabilities already."""
    return x


def scorer() -> CTCPrefixScorer:
    return CTCPrefixScorer(same, EOS)


def frames(log_probs: Tensor) -> Frames:
    values = log_probs if log_probs.dim() == 3 else log_probs[None]
    return Frames(values, torch.ones(values.shape[:2], dtype=torch.bool))


def say(state: CTCPrefixes, prefix: tuple[int, ...]) -> CTCPrefixes:
    """One hypothesis, label by label."""
    for token in prefix:
        _, state = scorer().score(state, None)
        state = scorer().extend(state, torch.zeros(len(state.tokens), 1, dtype=torch.long),
                                torch.full((len(state.tokens), 1), token))  # fmt: skip
    return state


def whole(log_probs: Tensor, prefix: tuple[int, ...]) -> tuple[float, float]:
    """psi(prefix) and p(prefix.eos)."""
    x = frames(log_probs)
    state = say(scorer().read(x, scorer().start(x)), prefix)
    end, _ = scorer().score(state, torch.tensor([[[EOS]]]))
    return state.worth.exp().item(), (state.worth + end[..., 0]).exp().item()


def enumerated(log_probs: Tensor, vocab: int) -> dict[tuple[int, ...], float]:
    """The probability of every text, as the sum over all paths."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(vocab), repeat=len(log_probs)):
        text = tuple(k for k, _ in itertools.groupby(path) if k)
        chance = float(sum((log_probs[t, k] for t, k in enumerate(path)), torch.zeros(())).exp())
        found[text] = found.get(text, 0.0) + chance
    return found


def test_golden_numbers() -> None:
    psi = {(1,): 0.535, (2,): 0.405, (1, 1): 0.036, (1, 2): 0.235, (2, 1): 0.1465, (1, 2, 1): 0.0225}
    ended = {(): 0.06, (1,): 0.264, (2,): 0.2265, (1, 1): 0.036, (1, 2): 0.2125, (2, 1): 0.1185, (1, 2, 1): 0.0225}
    assert {h: whole(GOLDEN, h)[0] for h in psi} == pytest.approx(psi, abs=1e-12)
    assert {h: whole(GOLDEN, h)[1] for h in ended} == pytest.approx(ended, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(0, 4), vocab=st.integers(1, 3))
def test_prefixes_are_sums_over_all_paths(seed: int, length: int, vocab: int) -> None:
    torch.manual_seed(seed)
    log_probs = (2 * torch.randn(length, vocab)).log_softmax(-1)
    texts = enumerated(log_probs, vocab)
    for n in range(3):
        for prefix in itertools.product(range(1, vocab), repeat=n):
            psi, ended = whole(log_probs, prefix)
            begin = sum(p for text, p in texts.items() if text[:n] == prefix)
            assert psi == pytest.approx(begin, abs=1e-12)
            assert ended == pytest.approx(texts.get(prefix, 0.0), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_prefix_ends_or_goes_on(seed: int) -> None:
    torch.manual_seed(seed)
    x = frames((3 * torch.randn(2, 30, 5)).log_softmax(-1))
    state = scorer().read(x, scorer().start(x))
    for token in torch.randint(1, 5, (8,)).tolist():
        state = say(state, (token,))
        scores, _ = scorer().score(state, None)
        assert scores.shape == (2, 1, EOS + 1)
        torch.testing.assert_close(scores.exp().sum(-1), torch.ones(2, 1), rtol=0, atol=1e-10)


def some(seed: int, rows: int = 2, length: int = 20, vocab: int = 5, beam: int = 3) -> tuple[Frames, list[Any]]:
    """Frames, and what K hypotheses say and descend from."""
    generator = torch.Generator().manual_seed(seed)
    x = frames((3 * torch.randn(rows, length, vocab, generator=generator)).log_softmax(-1))
    steps = [
        (torch.randint(beam if i else 1, (rows, beam), generator=generator),
         torch.randint(1, vocab, (rows, beam), generator=generator))
        for i in range(6)
    ]  # fmt: skip
    return x, steps


def scored(x: Frames, steps: list[Any], cuts: list[int]) -> list[Tensor]:
    """All scores, where frames are read at the given times (one cut may come before each label)."""
    state, edges, at, found = scorer().start(x), [0, *cuts], 0, []
    for i, (parents, tokens) in enumerate(steps):
        if i + 1 < len(edges):
            state, at = scorer().read(x[edges[i] : edges[i + 1]], state), edges[i + 1]
        found.append(scorer().score(state, None)[0])
        state = scorer().extend(scorer().score(state, None)[1], parents, tokens)
    state = scorer().read(x[at:], state)
    return [*found, (scorer().score(state, None)[0] + state.worth[..., None]), state.label, state.blank]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 20), max_size=6))
def test_frames_that_come_later_are_as_exact_as_all_at_once(seed: int, cuts: list[int]) -> None:
    x, steps = some(seed)
    late, early = scored(x, steps, sorted(cuts)), scored(x, steps, [20])
    for a, b in zip(late[-2:], early[-2:], strict=True):
        torch.testing.assert_close(a.exp(), b.exp(), rtol=1e-9, atol=1e-300)
    possible = late[-3] > -torch.inf  # what was impossible when it was said has no score to go on from
    torch.testing.assert_close(late[-3][possible], early[-3][possible], rtol=1e-9, atol=1e-9)


def test_candidates_are_what_all_tokens_are() -> None:
    x, steps = some(3)
    state = scorer().read(x, scorer().start(x))
    for parents, tokens in steps:
        state = scorer().extend(state, parents, tokens)
        every, _ = scorer().score(state, None)
        asked = torch.randint(5, (2, 3, 4))
        asked[..., 0] = EOS
        some_, _ = scorer().score(state, asked)
        torch.testing.assert_close(some_, every.gather(2, asked), rtol=1e-10, atol=1e-10)
        assert (every[..., 0] == -torch.inf).all()  # a blank is no token


def test_long_products_keep_their_ratios() -> None:
    """3,000 frames in float32: the closed form equals the recursion, label by label."""
    torch.manual_seed(1)
    log_probs = (6 * torch.randn(3000, 7)).log_softmax(-1)
    text = (3, 3, 1, 5, 2, 2, 6)
    x = frames(log_probs)
    state = say(scorer().read(x, scorer().start(x)), text)
    label, blank = torch.full((len(text) + 1,), -torch.inf), torch.full((len(text) + 1,), -torch.inf)
    blank[0] = 0.0
    for row in log_probs:
        either = torch.logaddexp(label, blank)
        entered = torch.cat([torch.full((1,), -torch.inf), either[:-1]])
        entered[2], entered[6] = blank[1], blank[5]
        spoken = torch.cat([torch.full((1,), -torch.inf), row[list(text)]])
        label, blank = torch.logaddexp(label, entered) + spoken, either + row[0]
    assert state.labels[0, 0, -1].item() == pytest.approx(label[-1].item(), rel=1e-9)
    assert state.blanks[0, 0, -1].item() == pytest.approx(blank[-1].item(), rel=1e-9)


def test_impossible_tokens_stay_impossible() -> None:
    log_probs = torch.full((4, 3), -torch.inf)
    log_probs[[0, 1, 2, 3], [1, 0, 2, 0]] = 0.0  # one path
    assert whole(log_probs, (1, 2)) == pytest.approx((1.0, 1.0))
    assert whole(log_probs, (2,))[0] == pytest.approx(0.0, abs=1e-12)
    assert whole(log_probs, (1, 1))[1] == pytest.approx(0.0, abs=1e-12)


def test_rows_of_different_age_share_a_batch_and_frames_that_are_not_there_are_not_there() -> None:
    x, steps = some(5)
    holes = torch.rand(2, 20) < 0.6
    y = Frames.of(x.values.masked_fill(~holes[..., None], float("nan")), holes)
    alone = []
    for row in (0, 1):
        there = frames(x.values[row : row + 1, holes[row]])
        state = scorer().read(there, scorer().start(there))
        for parents, tokens in steps[: 2 + row]:
            state = scorer().extend(state, parents[row : row + 1], tokens[row : row + 1])
        alone.append(state)
    together = tree.concat(alone)
    late = frames((2 * torch.randn(2, 7, 5)).log_softmax(-1))
    expected = []
    for row, state in enumerate(alone):
        state = scorer().extend(
            scorer().read(Frames(late.values[row : row + 1], late.mask[row : row + 1]), state), *both(steps[4], row)
        )
        expected.append(scorer().score(state, None)[0])
    together = scorer().extend(scorer().read(late, together), *steps[4])
    torch.testing.assert_close(scorer().score(together, None)[0], torch.cat(expected), rtol=1e-9, atol=1e-12)
    whole_rows = scorer().read(y, scorer().start(y))
    for parents, tokens in steps[:2]:
        whole_rows = scorer().extend(whole_rows, parents, tokens)
    torch.testing.assert_close(
        scorer().score(tree.split(whole_rows)[0], None)[0], scorer().score(alone[0], None)[0], rtol=1e-9, atol=1e-12
    )
    assert torch.equal(whole_rows.peak[0], alone[0].peak[0])


def both(step: tuple[Tensor, Tensor], row: int) -> tuple[Tensor, Tensor]:
    return step[0][row : row + 1], step[1][row : row + 1]


def test_room_that_nobody_uses_is_given_back() -> None:
    x, steps = some(5)
    old = scorer().read(x, scorer().start(x))
    for parents, tokens in steps:
        old = scorer().extend(old, parents, tokens)
    young = scorer().select(scorer().start(x), torch.zeros(2, 3, dtype=torch.long))
    rows = tree.where(torch.tensor([True, True]), young, old)
    assert rows.mask.shape[1] == 20
    fresh = scorer().read(x[:3], rows)
    assert fresh.mask.shape[1] == 3
    assert fresh.tokens.shape[2] == 1
    expected, _ = scorer().score(scorer().read(x[:3], young), None)
    torch.testing.assert_close(scorer().score(fresh, None)[0], expected, rtol=0, atol=1e-12)


def test_a_token_peaks_where_it_is_said() -> None:
    log_probs = torch.full((12, 4), 0.01)
    log_probs[:, 0] = 0.97
    for t, token in ((2, 1), (5, 3), (6, 3), (9, 3)):
        log_probs[t] = torch.tensor([0.01, 0.01, 0.01, 0.01])
        log_probs[t, token] = 0.97
    x = frames(log_probs.log())
    state = scorer().read(x, scorer().start(x))
    peaks = []
    for token in (1, 3, 3):
        state = say(state, (token,))
        peaks.append(scorer().when(state).item())
    assert peaks == [2, 5, 9]


@pytest.mark.parametrize("steps", [1, 4])
def test_parity_with_espnet(steps: int) -> None:
    espnet = pytest.importorskip("espnet.nets.ctc_prefix_score")
    torch.manual_seed(2)
    vocab, eos = 7, 6
    x = frames((3 * torch.randn(1, 25, vocab)).log_softmax(-1))
    mine, beam = CTCPrefixScorer(same, eos), 3
    theirs = espnet.CTCPrefixScoreTH(x.values.clone(), torch.tensor([25]), 0, eos)
    state = mine.select(mine.read(x, mine.start(x)), torch.zeros(1, beam, dtype=torch.long))
    said, their_state = [[eos] for _ in range(beam)], None
    for _ in range(steps):
        expected, their_next = theirs(said, their_state)
        found, state = mine.score(state, None)
        possible = expected > -1e9
        torch.testing.assert_close(found[0][possible], expected[possible], rtol=1e-9, atol=1e-9)
        assert (found[0][~possible] < -1e8).all()
        tokens = torch.randint(1, vocab - 1, (1, beam))
        state = mine.extend(state, torch.arange(beam)[None], tokens)
        flat = torch.arange(beam) * vocab + tokens[0]
        their_state = theirs.index_select_state(their_next, flat[None])
        said = [[*old, int(new)] for old, new in zip(said, tokens[0], strict=True)]
