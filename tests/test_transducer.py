"""The transducer: label encoders, joint networks, losses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchaudio.functional import rnnt_loss

from speechattn import tree
from speechattn.decoder.predictor import LSTMPredictor, Predictor, StatelessPredictor, TransformerPredictor
from speechattn.decoder.transducer import FactoredJoint, FusedLoss, Joint, PrunedLoss, Transducer
from speechattn.decoder.transducer_loss import arcs, bands, lattice_loss, occupancy, simple_arcs, transducer_loss
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.testing import random_frames

V, D = 6, 8
PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "lstm": lambda: LSTMPredictor(V, D),
    "deep lstm": lambda: LSTMPredictor(V, D, inner=12, depth=2, blank=3),
    "transformer": lambda: TransformerPredictor(V, D, 2, 2, 12, left=3),
    "unlimited transformer": lambda: TransformerPredictor(V, D, 2, 2, 12, left=None, blank=2),
    "stateless": lambda: StatelessPredictor(V, D, context=3),
    "last label": lambda: StatelessPredictor(V, D, context=1, blank=1),
}
GOLDEN = torch.tensor(
    [
        [[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.7, 0.2, 0.1]],
        [[0.4, 0.5, 0.1], [0.3, 0.1, 0.6], [0.8, 0.1, 0.1]],
    ], dtype=torch.float64,
)[None]  # fmt: skip


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("name", PREDICTORS)
def test_labels_one_by_one_are_labels_at_once(name: str) -> None:
    predictor = PREDICTORS[name]().eval()
    labels = torch.randint(V, (3, 9))
    whole = predictor(labels)
    assert whole.shape == (3, 10, D)
    state, tokens = predictor.init_state(3), torch.cat([torch.full((3, 1), predictor.blank), labels], 1)
    for u in range(10):
        g, state = predictor.step(tokens[:, u], state)
        torch.testing.assert_close(g, whole[:, u], rtol=0, atol=1e-12)
        if u == 4:  # rows are picked, joined and taken apart
            parts = tree.split(state)
            state = tree.select(tree.concat([parts[2], parts[0], parts[1]]), [1, 2, 0])
    assert predictor(labels[:, :0]).shape == (3, 1, D)
    torch.testing.assert_close(predictor(labels[:, :4]), whole[:, :5], rtol=0, atol=1e-12)
    assert predictor.init_state(0) is not None


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("name", PREDICTORS)
def test_context_is_what_decides(name: str) -> None:
    predictor = PREDICTORS[name]().eval()
    labels = torch.randint(V, (2, 20))
    labels[1] = (labels[0] + 1) % V
    context = predictor.context
    if context is None:
        labels[1, 1:] = labels[0, 1:]
        assert (predictor(labels)[:, -1].diff(dim=0).abs() > 1e-9).any()
        return
    labels[1, -context:] = labels[0, -context:]
    first, second = predictor(labels)[:, -1]
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    labels[1, -context] += 1
    labels[1] %= V
    first, second = predictor(labels)[:, -1]
    assert (first - second).abs().max() > 1e-9


def paths(log_probs: Tensor, labels: list[int]) -> Tensor:
    """log P by enumeration: in which of the T + U - 1 free steps the labels are said; the last is a blank."""
    frames, said = len(log_probs), len(labels)
    found = []
    for places in combinations(range(frames + said - 1), said):
        t, u, total = 0, 0, log_probs.new_zeros(())
        for step in range(frames + said):
            token = labels[u] if step in places else 0
            total = total + log_probs[t, u, token]
            t, u = (t, u + 1) if step in places else (t + 1, u)
        found.append(total)
    return torch.stack(found).logsumexp(0)


def lengths(*n: int) -> Tensor:
    return torch.tensor(n)


def test_golden_lattice() -> None:
    labels = torch.tensor([[1, 2]])
    loss = lattice_loss(arcs(GOLDEN.log(), labels), lengths(2), lengths(2))
    torch.testing.assert_close(loss, torch.tensor([1.3227563]).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(transducer_loss(GOLDEN.log().float(), labels, lengths(2), lengths(2)), loss.float())
    found = occupancy(arcs(GOLDEN.log(), labels), lengths(2), lengths(2))
    alpha = torch.tensor([[1, 0.3, 0.09], [0.6, 0.45, 0.333]]).double()
    # What goes through (t, u) is alpha * beta; the last frame's column of labels has one way to the end.
    torch.testing.assert_close(found.blank[0, 1, 2], torch.tensor(1.0).double())
    torch.testing.assert_close(found.label[0, 1, 1], alpha[1, 1] * 0.6 * 0.8 / 0.2664)
    torch.testing.assert_close(found.blank[0, 0, 2], alpha[0, 2] * 0.7 * 0.8 / 0.2664)


@settings(deadline=None, max_examples=25)
@given(frames=st.integers(1, 4), said=st.integers(0, 4), seed=st.integers(0, 99))
def test_loss_is_the_sum_of_all_paths(frames: int, said: int, seed: int) -> None:
    torch.manual_seed(seed)
    log_probs = torch.randn(2, 4, 5, V).double().log_softmax(-1)
    labels = torch.randint(1, V, (2, 4))
    found = lattice_loss(arcs(log_probs, labels), lengths(frames, 4), lengths(said, 2))
    torch.testing.assert_close(-found[0], paths(log_probs[0, :frames], labels[0, :said].tolist()), rtol=0, atol=1e-10)
    torch.testing.assert_close(-found[1], paths(log_probs[1], labels[1, :2].tolist()), rtol=0, atol=1e-10)


def test_gradients_of_the_reference() -> None:
    log_probs = torch.randn(2, 3, 4, 3).double().log_softmax(-1).requires_grad_()
    labels = torch.tensor([[1, 2, 1], [2, 2, 0]])

    def loss(x: Tensor) -> Tensor:
        return lattice_loss(arcs(x, labels), lengths(3, 2), lengths(3, 2))

    assert torch.autograd.gradcheck(loss, (log_probs,))
    grad = torch.autograd.grad(loss(log_probs).sum(), log_probs)[0]
    assert not grad[1, 2:].any()
    assert not grad[1, :, 3:].any()


@pytest.mark.parametrize("joint", [Joint, FactoredJoint])
def test_parity_with_torchaudio(joint: type[Joint]) -> None:
    model = joint(D, D, 16, V)
    frames, said = lengths(7, 5, 1), lengths(2, 4, 0)
    labels = torch.randint(1, V, (3, 4))
    scores = model(torch.randn(3, 7, D), torch.randn(3, 5, D)).detach().requires_grad_()
    fast = transducer_loss(scores, labels, frames, said)
    grad = torch.autograd.grad(fast.sum(), scores)[0]
    slow = transducer_loss(scores.double(), labels, frames, said)
    torch.testing.assert_close(fast.double(), slow, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(slow.sum(), scores)[0], rtol=0, atol=1e-5)
    log_probs = scores.log_softmax(-1)
    theirs = rnnt_loss(
        log_probs, labels.int(), frames.int(), said.int(), blank=0, reduction="none", fused_log_softmax=False
    )
    torch.testing.assert_close(fast, theirs)


def test_blank_elsewhere_and_shorter_than_declared() -> None:
    scores = torch.randn(2, 9, 6, V)
    labels = torch.tensor([[0, 1, 4, -1, -1], [5, -1, -1, -1, -1]])
    frames, said = lengths(6, 4), lengths(3, 1)
    fast = transducer_loss(scores, labels, frames, said, blank=2)
    slow = lattice_loss(arcs(scores.log_softmax(-1), labels.clamp(min=0), blank=2), frames, said)
    torch.testing.assert_close(fast, slow)
    order = [2, 0, 1, 3, 4, 5]
    same = transducer_loss(scores[..., order], torch.tensor([1, 2, 0, 3, 4, 5])[labels.clamp(min=0)], frames, said)
    torch.testing.assert_close(fast, same)


@pytest.mark.parametrize(
    ("frames", "said"),
    [((9, 6, 1), (4, 2, 3)), ((2,), (0,)), ((1, 1), (0, 3)), ((0, 2, 0, 5, 1), (0, 1, 2, 0, 2)), ((4, 2), (1, 4))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_that_a_kernel_gets_wrong_are_kept_from_it(
    frames: tuple[int, ...], said: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it gives nonsense, for one frame or no label, neither loss nor gradient know it."""
    asked = []

    def nonsense(scores: Tensor, labels: Tensor, t: Tensor, u: Tensor, **options: Any) -> Tensor:
        asked.extend(zip(t.tolist(), u.tolist(), strict=True))
        wrong = (t < 2) | (u < 1)
        return rnnt_loss(scores, labels, t, u, **options) * torch.where(wrong, torch.nan, 1.0)

    scores = torch.randn(len(frames), max(frames) + 1, max(said) + 2, V).to(dtype).requires_grad_()
    labels = torch.randint(1, V, (len(frames), max(said) + 1))
    wanted = transducer_loss(scores.double(), labels, lengths(*frames), lengths(*said))
    sure = torch.autograd.grad(wanted[wanted.isfinite()].sum(), scores)[0]
    monkeypatch.setattr("torchaudio.functional.rnnt_loss", nonsense)
    near = 1e-5 if dtype == torch.float32 else 1e-3
    for astray in (False, True):
        monkeypatch.setattr("speechattn.decoder.transducer_loss.astray", lambda scores, found=astray: found)
        asked.clear()
        found = transducer_loss(scores, labels, lengths(*frames), lengths(*said))
        pairs = [(t, u) for t, u in zip(frames, said, strict=True) if t > int(astray) and u >= int(astray)]
        assert asked == pairs
        assert found.dtype == torch.float32
        right = [i for i, (t, u) in enumerate(zip(frames, said, strict=True)) if astray or t < 1 or (t > 1 and u)]
        torch.testing.assert_close(found[right].double(), wanted[right], rtol=0, atol=1e-5)
    grad = torch.autograd.grad(found[found.isfinite()].sum(), scores)[0]
    torch.testing.assert_close(grad, sure, rtol=0, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_frames_there_is_no_alignment(dtype: torch.dtype) -> None:
    scores = torch.randn(3, 2, 3, V, dtype=dtype).requires_grad_()
    labels = torch.ones(3, 2, dtype=torch.long)
    loss = transducer_loss(scores, labels, lengths(0, 0, 2), lengths(0, 2, 2))
    assert loss[:2].tolist() == [0, torch.inf]
    loss[2].backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    nothing = transducer_loss(scores[:, :0], labels, lengths(0, 0, 0), lengths(0, 2, 1))
    assert nothing.tolist() == [0, torch.inf, torch.inf]
    assert nothing.dtype == dtype
    assert transducer_loss(scores[:0], labels[:0], lengths(), lengths()).shape == (0,)


def transducer(joint: type[Joint] = Joint) -> Transducer:
    return Transducer(LSTMPredictor(V, D), joint(5, D, 12, V))


@pytest.mark.usefixtures("precise")
def test_a_row_does_not_know_its_batch() -> None:
    model = transducer(FactoredJoint)
    x, labels, said = random_frames([9, 4], 5), torch.randint(1, V, (2, 5)), lengths(2, 5)
    labels[0, 2:] = -1
    both = model.loss(x, labels, said)
    for row in range(2):
        n = int(said[row])
        alone = model.loss(random_rows(x, row), labels[row : row + 1, :n], said[row : row + 1])
        torch.testing.assert_close(alone[0], both[row], rtol=0, atol=1e-10)


def random_rows(x, row):  # type: ignore[no-untyped-def]
    return tree.select(x, [row])[: int(x.lengths[row])]


@pytest.mark.usefixtures("precise")
def test_factored_probabilities() -> None:
    joint = FactoredJoint(5, D, 12, V, blank=2)
    a, b = joint.frames(torch.randn(3, 5)), joint.labels(torch.randn(3, D))
    log_probs = joint.log_probs(a, b)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3))
    z = joint.out((a + b).tanh())
    torch.testing.assert_close(log_probs[:, 2].exp(), z[:, 2].sigmoid())
    labels = [0, 1, 3, 4, 5]
    torch.testing.assert_close(log_probs[:, labels].log_softmax(-1), z[:, labels].log_softmax(-1), rtol=0, atol=1e-10)
    silent = joint.log_probs(torch.zeros_like(a), b)
    internal = joint.internal(b)
    torch.testing.assert_close(internal[:, labels], silent[:, labels].log_softmax(-1), rtol=0, atol=1e-10)
    assert internal[:, 2].tolist() == [-torch.inf] * 3


def test_blanks_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="blank is 1 to the label encoder and 0 to the joint"):
        Transducer(LSTMPredictor(V, D, blank=1), Joint(5, D, 12, V))


@pytest.mark.usefixtures("precise")
def test_the_simple_lattice_is_normalised() -> None:
    am, lm, labels = 30 * torch.randn(2, 4, V), 30 * torch.randn(2, 4, V), torch.randint(1, V, (2, 3))
    expected = arcs((am[:, :, None] + lm[:, None]).log_softmax(-1), labels)
    found = simple_arcs(am, lm, labels)
    torch.testing.assert_close(found.blank, expected.blank, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.label, expected.label, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("width", [6, 9])
def test_a_band_over_all_labels_is_the_full_loss(width: int) -> None:
    model = transducer(FactoredJoint)
    pruned = PrunedLoss(5, D, V, width=width)
    x, labels, said = random_frames([9, 4], 5), torch.randint(1, V, (2, 5)), lengths(3, 5)
    full, found = model.loss(x, labels, said), pruned(model, x, labels, said)
    torch.testing.assert_close(found.loss, full, rtol=0, atol=1e-10)
    weights = list(model.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(found.loss.sum(), weights), torch.autograd.grad(full.sum(), weights), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    alone = pruned(model, random_rows(x, 1), labels[1:], said[1:])
    torch.testing.assert_close(alone.simple[0], found.simple[1], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("precise")
@settings(deadline=None, max_examples=40)
@given(frames=st.integers(1, 12), said=st.integers(0, 12), width=st.integers(2, 6), seed=st.integers(0, 99))
def test_bands_lead_from_the_first_label_to_the_last(frames: int, said: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    lattice = arcs((3 * torch.randn(2, 12, 13, V)).log_softmax(-1), torch.randint(1, V, (2, 12)))
    t, u = lengths(frames, 12), lengths(said, 12)
    begin = bands(occupancy(lattice, t, u), t, u, width)
    assert begin[:, 0].tolist() == [0, 0]
    assert begin.diff().min() >= 0
    assert begin.diff().max() < width
    last = begin.gather(1, t[:, None] - 1)[:, 0]
    assert torch.equal(last, torch.minimum((u - width + 1).clamp(min=0), (width - 1) * (t - 1)))


@pytest.mark.usefixtures("precise")
def test_a_narrow_band_is_a_bound_that_rises_with_certainty() -> None:
    model = transducer()
    x, labels, said = random_frames([12, 7], 5), torch.randint(1, V, (2, 8)), lengths(8, 6)
    full = model.loss(x, labels, said)
    losses = []
    for width in (2, 3, 5, 9):
        torch.manual_seed(1)
        losses.append(PrunedLoss(5, D, V, width=width)(model, x, labels, said).loss)
        assert (losses[-1] >= full - 1e-9).all()
        assert losses[-1].isfinite().all()
        gradient = torch.autograd.grad(losses[-1].sum(), list(model.parameters()))
        assert all(g.isfinite().all() for g in gradient)
    torch.testing.assert_close(losses[-1], full, rtol=0, atol=1e-9)
    assert (losses[0] > full + 1e-3).all()
    with pytest.raises(ValueError, match="a band of 1"):
        PrunedLoss(5, D, V, width=1)


def test_the_fused_loss_says_what_it_cannot_express(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it is the loss is tested where kernels run, in `kernels/tests/test_rnnt.py`."""
    x, labels, said = random_frames([4], 5), torch.tensor([[1]]), lengths(1)
    with pytest.raises(ModelError, match="the scores of FactoredJoint are not those of one softmax"):
        FusedLoss()(transducer(FactoredJoint), x, labels, said)
    model = transducer()
    model.joint.out = torch.nn.Sequential(model.joint.out)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="the last layer is Sequential, not linear alone"):
        FusedLoss()(model, x, labels, said)
    with pytest.raises(ModelError, match="the kernels compute in float32, bfloat16 and float16, not in float64"):
        FusedLoss()(transducer().double(), Frames.of(x.values.double(), x.mask), labels, said)
    with pytest.raises(ModelError, match=r"needs CUDA, the tensors are on cpu.*; TransducerObjective and Pruned"):
        FusedLoss()(transducer(), x, labels, said)
    monkeypatch.setattr("speechattn.decoder.transducer.installed", lambda: False)
    with pytest.raises(ModelError, match=r"triton is not installed \(pip install 'speechattn\[kernels\]'\); Trans"):
        FusedLoss()(transducer(), x, labels, said)


@pytest.mark.usefixtures("precise")
def test_bands_are_where_the_probability_is() -> None:
    """Where each label belongs to one frame for certain, the narrowest band loses nothing."""
    frames, said, width = 12, 6, 2
    labels = torch.randint(1, V, (1, said))
    log_probs = torch.full((1, frames, said + 1, V), -9.0)
    for t in range(frames):
        for u in range(said + 1):
            log_probs[0, t, u, int(labels[0, u]) if u < said and t >= 2 * u + 1 else 0] = 0
    lattice = arcs(log_probs.log_softmax(-1), labels)
    found = occupancy(lattice, lengths(frames), lengths(said))
    begin = bands(found, lengths(frames), lengths(said), width)
    kept = [found.blank[0, t, int(u) : int(u) + width].sum() for t, u in enumerate(begin[0])]
    assert min(kept) > 0.99
