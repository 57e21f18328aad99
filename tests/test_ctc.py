"""The CTC head, its losses inside an encoder, and alignment."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from streams import D, lively
from torch import Tensor
from torch.nn import functional as F

from speechattn.attention import Span
from speechattn.decoder.alignment import align
from speechattn.decoder.ctc import CTC, IntermediateCTC, SelfConditioned
from speechattn.encoder import Conformer, Encoder
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.stream import Serial
from speechattn.testing import check_stream, oracle, random_frames

pytestmark = pytest.mark.usefixtures("precise")


def probability(log_probs: Tensor, text: list[int], blank: int = 0) -> float:
    """The sum over all paths [T, V] that say `text`."""
    total = 0.0
    for path in itertools.product(range(log_probs.shape[1]), repeat=log_probs.shape[0]):
        if [k for k, _ in itertools.groupby(path) if k != blank] == text:
            total += math.exp(sum(float(log_probs[t, c]) for t, c in enumerate(path)))
    return total


@pytest.mark.parametrize("blank", [0, 2])
def test_the_loss_is_the_sum_over_all_paths(blank: int) -> None:
    ctc = CTC(D, 3, blank=blank)
    x = random_frames([4, 3, 2, 0, 1, 4], D)
    label, other = (token for token in range(3) if token != blank)
    texts = [[label, other], [label, label], [label, label], [], [], [other, other, label]]
    targets = torch.full((6, 3), label)
    for row, text in enumerate(texts):
        targets[row, : len(text)] = torch.tensor(text, dtype=torch.long)
    lengths = torch.tensor([len(text) for text in texts])
    losses = ctc.losses(x, targets, lengths)
    log_probs = ctc(x).values.detach()
    for row, text in enumerate(texts):
        exact = probability(log_probs[row, : int(x.lengths[row])], text, blank)
        assert losses[row].item() == pytest.approx(-math.log(exact) if exact else 0.0, abs=1e-9)
    assert losses[2] == 0  # two equal tokens need three frames
    torch.testing.assert_close(ctc.loss(x, targets, lengths), losses.mean())


def test_what_does_not_fit_leaves_no_trace() -> None:
    ctc = CTC(D, 4)
    x = random_frames([5, 2, 0], D)
    x = Frames(torch.where(x.mask[..., None], x.values, torch.nan).requires_grad_(), x.mask)
    losses = ctc.losses(x, torch.tensor([[1, 2, 3], [1, 2, 3], [3, 3, 3]]), torch.tensor([3, 3, 1]))
    losses.sum().backward()
    assert losses.tolist()[1:] == [0, 0]
    assert losses[0] > 0
    weight = ctc.head.weight.grad
    assert weight is not None
    assert weight.isfinite().all()
    alone = CTC(D, 4)
    alone.load_state_dict(ctc.state_dict())
    one = Frames(x.values[:1].detach(), x.mask[:1])
    alone.losses(one, torch.tensor([[1, 2, 3]]), torch.tensor([3])).sum().backward()
    torch.testing.assert_close(weight, alone.head.weight.grad)
    none = Frames(torch.zeros(2, 0, D), torch.zeros(2, 0, dtype=torch.bool))
    assert ctc.losses(none, torch.ones(2, 1, dtype=torch.long), torch.tensor([0, 1])).tolist() == [0, 0]
    nobody = Frames(torch.zeros(0, 4, D), torch.zeros(0, 4, dtype=torch.bool))
    assert ctc.loss(nobody, torch.ones(0, 1, dtype=torch.long), torch.ones(0, dtype=torch.long)) == 0
    half = ctc.bfloat16()
    assert half.losses(Frames(one.values.bfloat16(), one.mask), torch.tensor([[1]]), torch.tensor([1])).isfinite().all()
    with pytest.raises(ValueError, match="blank 4 of a vocabulary of 4"):
        CTC(D, 4, blank=4)


def test_the_head_and_what_conditions_on_it_are_streams() -> None:
    ctc = CTC(D, 7)
    check_stream(lively(ctc), random_frames([20, 9], D))
    inner = IntermediateCTC(ctc)
    check_stream(lively(SelfConditioned(inner)), random_frames([20, 9], D))
    y = ctc(random_frames([6], D)).values
    torch.testing.assert_close(y.exp().sum(-1), torch.ones(1, 6))


@oracle.register
def scored(ctc: CTC, x: Frames) -> Frames:
    """By the definition."""
    y = F.linear(x.values, ctc.head.weight, ctc.head.bias)
    return Frames.of(y - y.exp().sum(-1, keepdim=True).log(), x.mask)


@oracle.register
def conditioned(module: SelfConditioned, x: Frames) -> Frames:
    """By the definition."""
    norm, head, back = module.inner.norm, module.inner.ctc.head, module.project
    z = F.layer_norm(x.values, (D,), norm.weight, norm.bias)
    posterior = F.linear(z, head.weight, head.bias).softmax(-1)
    return Frames.of(x.values + F.linear(posterior, back.weight, back.bias), x.mask)


def built() -> tuple[Encoder, Encoder, SelfConditioned]:
    """An encoder of three layers, and the same with conditioning behind the first two."""
    plain = lively(Conformer(D, D, 3, 2, 12, span=Span(5, 2, 1), kernel=5, conv_right=1))
    assert isinstance(plain, Encoder)
    a, b, c = plain.layers.members
    between = lively(SelfConditioned(IntermediateCTC(CTC(D, 7))))
    assert isinstance(between, SelfConditioned)
    return plain, Encoder(plain.subsample, [a, between, b, between, c], plain.norm, dim=D).eval(), between


def test_a_projection_of_zeros_is_the_plain_intermediate_loss() -> None:
    plain, told, between = built()
    x = random_frames([50, 31], D)
    check_stream(Serial(told.layers, between.inner.ctc), random_frames([20, 9], D))
    targets, lengths = torch.tensor([[1, 2, 3], [4, 4, 5]]), torch.tensor([3, 2])
    last, layers = told.intermediate(x, [0, 2])
    loss = between.inner.loss(layers, targets, lengths)
    _, seen = plain.intermediate(x, [0, 1])
    torch.testing.assert_close(layers[0].values, seen[0].values)
    assert (layers[1].values - seen[1].values).abs().max() > 1e-3
    assert (loss - between.inner.loss(seen, targets, lengths)).abs() > 1e-6
    torch.nn.init.zeros_(between.project.weight)
    torch.nn.init.zeros_(between.project.bias)
    last, layers = told.intermediate(x, [0, 2])
    torch.testing.assert_close(last.values, plain(x).values, rtol=0, atol=1e-12)
    expected = torch.stack([
        F.ctc_loss(between.inner(z).values.transpose(0, 1), targets, z.lengths, lengths, reduction="none").mean()
        for z in seen
    ]).mean()  # fmt: skip
    torch.testing.assert_close(between.inner.loss(layers, targets, lengths), expected)


def test_the_first_layers_are_told_the_language_only() -> None:
    inner = IntermediateCTC(CTC(D, 9), first=1)
    layers = [random_frames([6, 4], D, seed=i) for i in range(3)]
    targets, lengths = torch.tensor([[7, 1, 2], [8, 3, 3]]), torch.tensor([3, 3])
    found = inner.loss(layers, targets, lengths, torch.tensor([7, 8]))
    first = [inner.ctc.loss(inner.normal(layers[0]), torch.tensor([[7], [8]]), torch.ones(2, dtype=torch.long))]
    others = [inner.ctc.loss(inner.normal(z), targets, lengths) for z in layers[1:]]
    torch.testing.assert_close(found, (first[0] + others[0] + others[1]) / 3)
    with pytest.raises(ValueError, match="of which 1 say the language"):
        inner.loss(layers, targets, lengths)
    with pytest.raises(ValueError, match="0 layers"):
        IntermediateCTC(CTC(D, 9)).loss([], targets, lengths)


@pytest.mark.parametrize("blank", [0, 3])
def test_alignment_is_the_best_path_that_says_the_text(blank: int) -> None:
    for seed, text in enumerate([[1, 2], [2, 2], [1], []]):
        x = (2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)
        path = max(
            (
                p
                for p in itertools.product(range(4), repeat=5)
                if [k for k, _ in itertools.groupby(p) if k != blank] == text
            ),
            key=lambda p: sum(float(x[t, c]) for t, c in enumerate(p)),
        )
        expected, at = [], 0
        for token, run in itertools.groupby(path):
            n = len(list(run))
            if token != blank:
                expected.append((token, at, at + n, float(x[at : at + n, token].mean())))
            at += n
        found = align(x, text, blank=blank)
        assert [span[:3] for span in found] == [span[:3] for span in expected]
        assert [span.log_prob for span in found] == pytest.approx([span[3] for span in expected])


def test_alignment_survives_the_impossible_and_refuses_the_unsayable() -> None:
    x = torch.full((4, 3), -torch.inf)
    for t, token in enumerate([1, 0, 1, 2]):
        x[t, token] = 0
    assert [span[:3] for span in align(x, [1, 1, 2])] == [(1, 0, 1), (1, 2, 3), (2, 3, 4)]
    assert [span.token for span in align(x.bfloat16(), [2, 1])] == [2, 1]  # nowhere, but somewhere
    with pytest.raises(InputError, match="4 frames, 3 tokens need 5"):
        align(x, [1, 1, 1])
    with pytest.raises(InputError, match=r"tokens \[0, 3\] cannot be aligned"):
        align(x, [0, 1, 3])
    assert align(x[:0], []) == []
