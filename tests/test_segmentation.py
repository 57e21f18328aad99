"""Utterances of a text in a long recording."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechattn.decoder.segmentation import Trellis, entered, segment
from speechattn.errors import InputError


def recording(
    utterances: int, *, seed: int = 0, gap: int = 30, noise: float = 0.5, preamble: int = 40, vocab: int = 60
) -> tuple[Tensor, list[list[int]], list[tuple[int, int]]]:
    """Peaky log-probabilities [T, V], what is said in them, and where."""
    draw, at = random.Random(seed), preamble
    texts, bounds, spikes = [], [], []
    for _ in range(utterances):
        texts.append([draw.randrange(1, vocab) for _ in range(draw.randint(3, 30))])
        start = at
        for token in texts[-1]:
            spikes.append((at, token))
            at += draw.randint(2, 7)
        bounds.append((start, spikes[-1][0] + 1))
        at += draw.randint(1, gap)
    x = noise * torch.randn(at + preamble, vocab, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += 9
    for t, token in spikes:
        x[t, 0] -= 9
        x[t, token] += 9
    return x.log_softmax(-1), texts, bounds


def best(x: Tensor, texts: list[list[int]], free_gaps: bool) -> tuple[float, list[int]]:
    """All ways to give each token a frame to begin in, and one to the end: the best, and its frames."""
    flat = [token for text in texts for token in text]
    last = set(torch.tensor([len(text) for text in texts]).cumsum(0).sub(1).tolist())
    found = []
    for *first, end in itertools.combinations(range(len(x) + 1), len(flat) + 1):
        worth = 0.0
        for j, (a, b) in enumerate(itertools.pairwise([*first, end])):
            worth += float(x[a, flat[j]])
            if not (free_gaps and j in last):
                worth += sum(max(float(x[t, flat[j]]), float(x[t, 0])) for t in range(a + 1, b))
        found.append((worth, first))
    return max(found)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 100_000), st.booleans(), st.integers(1, 9))
def test_the_path_is_the_best_of_all(seed: int, free_gaps: bool, frames: int) -> None:
    draw = random.Random(seed)
    texts = [[draw.randrange(1, 4) for _ in range(draw.randint(1, 3))] for _ in range(draw.randint(1, 2))]
    texts = texts if sum(map(len, texts)) <= frames else [[1]]
    x = (3 * torch.randn(frames, 4, generator=torch.Generator().manual_seed(seed))).double().log_softmax(-1)
    _, first = best(x, texts, free_gaps)
    found = segment(x, texts, free_gaps=free_gaps)
    starts = [a for s in found for a, _ in s.tokens]
    assert starts == first
    assert [len(s.tokens) for s in found] == [len(text) for text in texts]


@pytest.mark.parametrize("free_gaps", [True, False])
@pytest.mark.parametrize("band", [4096, 64])
def test_known_boundaries_are_found_to_the_frame(free_gaps: bool, band: int) -> None:
    x, texts, bounds = recording(40)
    found = segment(x, texts, free_gaps=free_gaps, band=band)
    assert [(s.start, s.end) for s in found] == bounds
    assert [a for s in found for a, b in s.tokens] == sorted(a for s in found for a, b in s.tokens)
    assert all(b == a + 1 for s in found for a, b in s.tokens)
    assert all(s.tokens[0][0] == s.start and s.tokens[-1][1] == s.end for s in found)
    assert min(s.confidence for s in found) > -0.2


def test_a_sentence_that_was_cut_out_is_the_least_sure() -> None:
    x, texts, bounds = recording(30, noise=1.0)
    a, b = bounds[17]
    found = segment(torch.cat([x[:a], x[b:]]), texts)
    confidence = [s.confidence for s in found]
    assert confidence.index(min(confidence)) == 17
    assert sorted(confidence)[1] > min(confidence) + 3
    for i, s in enumerate(found):
        if abs(i - 17) > 1:
            shift = (b - a) * (i > 17)
            assert (s.start, s.end) == (bounds[i][0] - shift, bounds[i][1] - shift)


def test_other_speech_between_costs_nothing_where_gaps_are_free() -> None:
    x, texts, bounds = recording(12)
    other, _, _ = recording(6, seed=5, preamble=0)
    cut = (bounds[5][1] + bounds[6][0]) // 2
    y = torch.cat([x[:cut], other, x[cut:]])
    found = segment(y, texts)
    shifted = [(a + len(other) * (i > 5), b + len(other) * (i > 5)) for i, (a, b) in enumerate(bounds)]
    assert [(s.start, s.end) for s in found] == shifted


def test_a_band_that_is_too_narrow_is_widened() -> None:
    """A long preamble, and a pause: the path is far from the diagonal."""
    x, texts, bounds = recording(40, preamble=3000)
    found = segment(x, texts, band=16)
    assert [(s.start, s.end) for s in found] == bounds
    trellis = Trellis(x.numpy(), *flat(texts), 0, True)
    assert (entered(trellis, 16) == entered(trellis, 1 << 20)).all()


def flat(texts: list[list[int]]):  # type: ignore[no-untyped-def]
    tokens = torch.tensor([token for text in texts for token in text]).numpy()
    last = torch.tensor([i == len(text) - 1 for text in texts for i in range(len(text))]).numpy()
    return tokens, last


def test_margins_reach_to_the_middle_of_a_gap() -> None:
    x = torch.full((20, 3), -9.0)
    x[:, 0] = -0.1
    for t, token in ((4, 1), (5, 1), (9, 2), (12, 1)):
        x[t, token], x[t, 0] = -0.1, -9.0
    tight = segment(x, [[1], [2], [1]])
    assert [(s.start, s.end) for s in tight] == [(4, 6), (9, 10), (12, 13)]
    wide = segment(x, [[1], [2], [1]], margin=10)
    assert [(s.start, s.end) for s in wide] == [(0, 7), (8, 11), (11, 20)]
    near = segment(x, [[1], [2], [1]], margin=1)
    assert [(s.start, s.end) for s in near] == [(3, 7), (8, 11), (11, 14)]


def test_confidence_is_the_worst_stretch() -> None:
    x = torch.full((100, 3), -20.0)
    x[:, 0] = -0.01
    for t in range(0, 100, 10):
        x[t, 1], x[t, 0] = -0.01, -20.0
    x[51:55, 0] = -3.0
    found = segment(x, [[1] * 10])[0]
    assert found.confidence == pytest.approx(-(26 * 0.01 + 4 * 3.0) / 30, abs=1e-6)
    short = segment(x, [[1] * 10], window=1000)[0]
    assert short.confidence == pytest.approx(-(87 * 0.01 + 4 * 3.0) / 91, abs=1e-6)


def test_what_cannot_be_aligned_is_refused_by_name() -> None:
    x = torch.randn(5, 4).log_softmax(-1)
    with pytest.raises(InputError, match="5 frames, 6 tokens"):
        segment(x, [[1, 2, 3], [1, 2, 3]])
    with pytest.raises(InputError, match="without tokens"):
        segment(x, [[1], []])
    with pytest.raises(InputError, match=r"tokens \[0, 4\]"):
        segment(x, [[0, 4]])
    assert segment(x, []) == []
    assert segment(x[:0], []) == []
    assert len(segment(x, [[1, 2, 3], [1, 2]])[0].tokens) == 3  # every frame is a token


def test_impossible_tokens_are_put_somewhere() -> None:
    x = torch.full((30, 4), -torch.inf, dtype=torch.bfloat16)
    x[:, 0] = 0
    x[3, 1], x[3, 0] = 0, -torch.inf
    x[20, 2], x[20, 0] = 0, -torch.inf
    found = segment(x, [[1], [3], [2]])
    assert found[0].start == 3
    assert found[2].start == 20
    assert found[1].confidence == -1e4
