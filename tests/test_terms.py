"""Attention2Probability: the released formulation, its invariances, and what is computed in its place."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.score.terms import recall_at
from speechattn.terms import (
    Hearing,
    RawRetriever,
    RestingRetriever,
    Retriever,
    Spelling,
    Subwords,
    VectorIndex,
    best,
    calibration,
    contrastive,
    in_batch,
    presence_loss,
)
from speechattn.testing import check_stream, random_frames

TERMS = ["Almaxaquottl", "zeppelin", "Frank Ironstein", "lederhosen", "ox", "habeas corpus", "pygmy"]
KINDS = [Retriever, RawRetriever, RestingRetriever]


def made(kind: type[Retriever] = Retriever, *, seed: int = 0) -> Retriever:
    """A small one in float64, with weights large enough that attention is sharp."""
    torch.manual_seed(seed)
    frames, spelling = Hearing(6, 8, stack=2, kernel=3, layers=1), Spelling(8, layers=2, stride=2)
    model = kind(frames, spelling, 8, 2).double().eval().requires_grad_(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or "rest" in name:
                weight.copy_(torch.randn(weight.shape) * (1.5 if "rest" in name else weight.shape[-1] ** -0.5))
            elif "bias" in name:
                weight.copy_(0.3 * torch.randn(weight.shape))
    return model


def sound(*lengths: int, seed: int = 0) -> Frames:
    """Random frames, and NaN behind each row's end."""
    torch.manual_seed(seed)
    values = torch.randn(len(lengths), max(lengths), 6, dtype=torch.float64)
    there = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Frames.of(values.masked_fill(~there[..., None], torch.nan), there)


def alone(x: Frames, row: int, length: int) -> Frames:
    """One row, without padding."""
    return Frames(x.values[row : row + 1, :length], x.mask[row : row + 1, :length])


def presence(model: Retriever, x: Frames, terms: list[str]) -> Tensor:
    """Probabilities [B, N]."""
    return model.odds(x, model.embed(terms)).sigmoid()


def linear(layer: Any, x: list[float]) -> list[float]:
    """One vector through a layer, number by number."""
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def released(model: Retriever, frames: list[list[float]], word: list[list[float]]) -> float:
    """P of one term from its token vectors and the frames of one utterance, in loops (methods: 8.1 to 8.6)."""
    dim, heads = model.dim, model.heads
    size, cross = dim // heads, model.cross
    tokens = [linear(model.word, w) for w in word]
    keys, values = ([linear(part, f) for f in frames] for part in (cross.key, cross.value))
    contexts = []
    for token in tokens:
        query, context = linear(cross.query, token), []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = [sum(a * b for a, b in zip(query[part], key[part], strict=True)) / sqrt(size) for key in keys]
            pairs = [(score, value[part]) for score, value in zip(scores, values, strict=True)]
            if isinstance(model, RestingRetriever):
                pairs.append((float(model.cross.rest[head]), [0.0] * size))
            total = sum(exp(score) for score, _ in pairs)
            context += [sum(exp(score) * value[i] for score, value in pairs) / total for i in range(size)]
        contexts.append(linear(cross.out, context))
    pooled = [sum(c[i] for c in contexts) / len(contexts) for i in range(dim)]
    logits = [linear(model.out, [a + b for a, b in zip(token, pooled, strict=True)]) for token in tokens]
    absent, present = (sum(logit[i] for logit in logits) / len(logits) for i in range(2))
    return exp(present) / (exp(absent) + exp(present))


@pytest.mark.parametrize("kind", [Retriever, RestingRetriever])
def test_presence_is_that_of_the_released_formulation_written_in_loops(kind: type[Retriever]) -> None:
    model, x = made(kind), sound(9, 4)
    found = presence(model, x, TERMS)
    ids, mask = model.ids(TERMS)
    words, there = model.spelling(ids, mask)
    for row, length in enumerate((9, 4)):
        frames = model.frames(alone(x, row, length)).values[0].tolist()
        for n in range(len(TERMS)):
            assert found[row, n] == pytest.approx(released(model, frames, words[n][there[n]].tolist()), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_form_is_the_reference(kind: type[Retriever]) -> None:
    model, x = made(kind), sound(9, 4, 1)
    logits = model.reference(x, *model.ids(TERMS))
    assert logits.shape == (3, len(TERMS), 2)
    torch.testing.assert_close(presence(model, x, TERMS), logits.softmax(-1)[..., 1], rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(presence(model, x, TERMS), logits.softmax(-1)[..., 1], rtol=0, atol=1e-12)


def test_the_raw_variant_is_the_largest_score_of_each_token() -> None:
    model, x = made(RawRetriever), sound(7)
    heard, (words, _) = model.frames(x).values[0], model.spelling(*model.ids(["zeppelin"]))
    scores = []
    for token in model.word(words[0]):
        query, keys = model.cross.query(token), model.cross.key(heard)
        scores.append([max(float(query[p] @ key[p]) / 2 for key in keys) for p in (slice(0, 4), slice(4, 8))])
    odds = sum(float(model.out.weight[0] @ torch.tensor(row, dtype=torch.float64)) for row in scores) / len(scores)
    assert float(model.odds(x, model.embed(["zeppelin"]))) == pytest.approx(odds + float(model.out.bias), abs=1e-12)


@pytest.mark.parametrize("kind", [Retriever, RestingRetriever])
def test_what_aligns_is_the_largest_score_or_the_odds_of_looking_at_the_sound(kind: type[Retriever]) -> None:
    model, x = made(kind), sound(9, 4)
    found = model.alike(model.frames(x), model.embed(TERMS))
    heard = model.frames(alone(x, 1, 4)).values[0]
    for n, term in enumerate(TERMS):
        words, there = model.spelling(*model.ids([term]))
        queries, keys = model.cross.query(model.word(words[there])), model.cross.key(heard)
        each = []
        for token in queries:
            for head, part in enumerate((slice(0, 4), slice(4, 8))):
                scores = [float(token[part] @ key[part]) / 2 for key in keys]
                if kind is Retriever:
                    each.append(max(scores))
                else:
                    each.append(log(sum(map(exp, scores))) - float(model.cross.rest[head]))
        assert float(found[1, n]) == pytest.approx(sum(each) / len(each), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_retriever_is_calibrated_by_a_line(kind: type[Retriever]) -> None:
    model, x = made(kind), sound(9, 4)
    before = model.odds(x, model.embed(TERMS))
    model.calibrate(1.7, -0.4)
    torch.testing.assert_close(model.odds(x, model.embed(TERMS)), 1.7 * before - 0.4, rtol=0, atol=1e-12)


def test_calibration_is_where_probabilities_fit_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    odds = 3 * torch.randn(4000, generator=generator) - 5
    label = torch.rand(4000, generator=generator) < (0.6 * odds + 1).sigmoid()
    scale, bias = calibration(odds, label)
    assert (scale, bias) == (pytest.approx(0.6, abs=0.1), pytest.approx(1.0, abs=0.25))
    wrong = (scale * odds.double() + bias).sigmoid() - label.double()
    assert abs(float(wrong.mean())) < 1e-3
    assert abs(float((wrong * odds).mean())) < 1e-2
    far, never = calibration(torch.tensor([-1.0, 1.0]), torch.tensor([False, True]))
    assert (far, never) == (pytest.approx(log(2), abs=1e-3), pytest.approx(0.0, abs=1e-3))
    for constant in (True, False):
        with pytest.raises(ValueError, match="that were not"):
            calibration(torch.zeros(3), torch.full((3,), constant))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(len(TERMS))), some=st.integers(1, len(TERMS)), room=st.integers(0, 5))
def test_a_term_knows_neither_padding_nor_order_nor_the_rest_of_the_bank(
    kind: type[Retriever], order: list[int], some: int, room: int
) -> None:
    model, x = made(kind), sound(9, 4)
    whole = presence(model, x, TERMS)
    mine = order[:some]
    torch.testing.assert_close(presence(model, x, [TERMS[i] for i in mine]), whole[:, mine], rtol=0, atol=1e-12)
    torch.testing.assert_close(presence(model, x.pad(room), TERMS), whole, rtol=0, atol=1e-12)
    apart = torch.cat([presence(model, alone(x, i, n), TERMS) for i, n in ((0, 9), (1, 4))])
    torch.testing.assert_close(apart, whole, rtol=0, atol=1e-12)
    ids, mask = model.ids(TERMS)
    more = torch.nn.functional.pad(ids, [0, room], value=3), torch.nn.functional.pad(mask, [0, room])
    torch.testing.assert_close(model.odds(x, model.queries(*more)).sigmoid(), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_bank_and_an_empty_utterance(kind: type[Retriever]) -> None:
    model = made(kind)
    assert model.odds(sound(5, 3), model.embed([])).shape == (2, 0)
    bank = model.embed(TERMS)
    nothing = model.odds(sound(5)[:0], bank)
    padding = Frames(torch.zeros(1, 4, 6, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.bool))
    torch.testing.assert_close(nothing, model.odds(padding, bank))
    torch.testing.assert_close(nothing, bank.prior[None])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences_and_of_the_reference(kind: type[Retriever]) -> None:
    model, x = made(kind), sound(6, 3)
    ids, mask = model.ids(TERMS[:3])
    weights = [model.cross.query.weight, model.cross.key.weight, model.out.weight, model.word.weight]
    for weight in weights:
        weight.requires_grad_(True)

    def odds(values: Tensor, *_: Tensor) -> Tensor:
        return model.odds(Frames(values, x.mask), model.queries(ids, mask))

    values = x.values.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(odds, (values, *weights), atol=1e-6, fast_mode=True)
    logits = model.reference(Frames(values, x.mask), ids, mask)
    slow = torch.autograd.grad((logits[..., 1] - logits[..., 0]).square().sum(), (values, *weights))
    fast = torch.autograd.grad(odds(values).square().sum(), (values, *weights))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("precise")
def test_the_projector_is_a_stream() -> None:
    check_stream(Hearing(6, 8, stack=2, kernel=3, layers=1), random_frames([13, 0, 8], 6), seed=1)


def test_the_loss_is_two_class_cross_entropy_with_label_smoothing() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(3, 5, 2), torch.rand(3, 5) > 0.7
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), label.long().flatten(), label_smoothing=0.1)
    torch.testing.assert_close(presence_loss(logits[..., 1] - logits[..., 0], label), wanted)


def test_contrastive_is_each_positive_against_the_negatives_of_both_sides() -> None:
    scores = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.3]])
    label = torch.tensor([[True, True, False], [False, False, True]])
    rows = [(2.0, [-1.0]), (0.5, [-1.0]), (0.3, [0.0, 1.0])]
    columns = [(2.0, [0.0]), (0.5, [1.0]), (0.3, [-1.0])]

    def lost(pairs: list[tuple[float, list[float]]]) -> float:
        each = [-torch.tensor([p, *others]).log_softmax(0)[0] for p, others in pairs]
        return float(torch.stack(each).mean())

    assert float(contrastive(scores, label)) == pytest.approx((lost(rows) + lost(columns)) / 2, abs=1e-6)
    assert float(contrastive(scores, torch.zeros_like(label))) == 0.0


def test_the_bank_of_a_batch_is_the_union_of_its_terms_shuffled_and_cut() -> None:
    said = [[f"t{i}" for i in range(row, row + 4)] for row in range(0, 40, 2)]
    bank, label = in_batch(said, 100, torch.Generator().manual_seed(3))
    assert sorted(bank) == sorted({t for row in said for t in row})
    assert bank != sorted(bank)
    assert all(label[i, j] == (t in row) for i, row in enumerate(said) for j, t in enumerate(bank))
    less, _ = in_batch(said, 10, torch.Generator().manual_seed(3))
    assert less == bank[:10]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_recall_grows_with_k_and_is_one_for_the_whole_bank(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    odds = torch.randn(4, n, generator=generator)
    gold = [[i for i in range(n) if torch.rand((), generator=generator) < 0.4] for _ in range(4)]
    found = [recall_at(odds, gold, k) for k in range(1, n + 1)]
    rows = [i for i, terms in enumerate(gold) if terms]
    assert all(len(each) == len(rows) for each in found)
    assert all(a <= b for low, high in pairwise(found) for a, b in zip(low, high, strict=True))
    assert found[-1] == [1.0] * len(rows)
    slow = [len({*odds[i].topk(1).indices.tolist()} & {*gold[i]}) / len(gold[i]) for i in rows]
    assert found[0] == pytest.approx(slow)


def test_the_best_terms_are_in_order_above_the_threshold() -> None:
    odds = torch.tensor([0.0, 2.0, -3.0, 2.0, 1.0])
    assert [i for i, _ in best(odds, 3)] == [1, 3, 4]
    assert [(i, round(p, 3)) for i, p in best(odds, 5, 0.6)] == [(1, 0.881), (3, 0.881), (4, 0.731)]
    for k, threshold in ((0, 0.0), (3, 1.5), (3, float("nan"))):
        with pytest.raises(InputError, match="wanted"):
            best(odds, k, threshold)


def test_spelling_is_of_letters_without_case_and_accents() -> None:
    spelling = Spelling(8)
    assert spelling.tokens("Café-Crème!") == spelling.tokens("cafe creme")
    with pytest.raises(InputError, match="spell it as it is said"):
        spelling.tokens("42")


def test_subwords_are_rows_of_a_table_that_is_not_trained() -> None:
    class Words:
        unknown = 9

        def encode(self, text: str) -> list[int]:
            return [9 if word == "what" else len(word) for word in text.split()]

    table = torch.randn(8, 6)
    words = Subwords(table, Words())
    ids, mask = torch.tensor([[2, 5], [3, 0]]), torch.tensor([[True, True], [True, False]])
    w, there = words(ids, mask)
    torch.testing.assert_close(w[0], table[[2, 5]])
    assert there is mask
    assert float(w[1, 1].abs().sum()) == 0
    assert not [*words.parameters()]
    assert not words.state_dict()
    assert words.tokens("ab cde") == [2, 3]
    with pytest.raises(InputError, match="vocabulary"):
        words.tokens("what")


def test_the_index_is_the_largest_cosine_over_windows() -> None:
    torch.manual_seed(0)
    model = VectorIndex(Hearing(6, 8, stack=2), Spelling(8), 8, window=3, hop=2).double().eval().requires_grad_(False)
    lengths = 14, 8, 4, 1
    x = sound(*lengths)
    bank = model.embed(TERMS)
    found = model.odds(x, bank) * model.temperature.exp()
    for row, length in enumerate(lengths):
        frames = model.frames(alone(x, row, length)).values[0]
        pieces = [frames[i : i + 3] for i in range(0, max(1, len(frames) - 2), 2)]
        vectors = torch.stack([torch.nn.functional.normalize(model.sound(piece.mean(0)), dim=0) for piece in pieces])
        torch.testing.assert_close(found[row], (vectors @ bank.vectors.T).amax(0), rtol=0, atol=1e-12)
