"""The transducer's loss without its (B, T, U, V): kernels against the definition, torchaudio and the library's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechattn_kernels.common import recorded, unable
from speechattn_kernels.rnnt import backward, rnnt, tiles
from speechattn_kernels.rnnt.forward import Arcs
from speechattn_kernels.rnnt.lattice import backward_scores, forward_scores, lanes
from speechattn_kernels.rnnt.naive import rnnt_naive
from torch import Tensor
from torchaudio.functional import rnnt_loss

from speechattn import tree
from speechattn.decoder.predictor import StatelessPredictor
from speechattn.decoder.transducer import FusedLoss, Joint, Transducer
from speechattn.decoder.transducer_loss import arcs as arcs_of
from speechattn.decoder.transducer_loss import lattice_loss, occupancy
from speechattn.testing import random_frames

Case = tuple[Tensor, ...]


def case(
    frames: list[int], said: list[int], vocab: int, inner: int, *, more: int = 0, device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    """What the op takes; NaN, and labels that are none, wherever a row has nothing."""
    b, t, u = len(frames), max(frames, default=0) + more, max(said, default=0) + more
    frame_lengths, label_lengths = torch.tensor(frames, dtype=torch.long), torch.tensor(said, dtype=torch.long)
    f, g = torch.randn(b, t, inner), torch.randn(b, u + 1, inner)
    f[torch.arange(t) >= frame_lengths[:, None]] = torch.nan
    g[torch.arange(u + 1) > label_lengths[:, None]] = torch.nan
    targets = torch.randint(vocab, (b, u))
    targets[torch.arange(u) >= label_lengths[:, None]] = -100
    real = (f, g, torch.randn(vocab, inner) / 2, torch.randn(vocab))
    whole = (targets, frame_lengths, label_lengths)
    return (*(x.to(device, dtype) for x in real), *(x.to(device) for x in whole))


def pulled(op: Callable[..., Tensor], given: Case, *, blank: int = 0) -> list[Tensor]:
    """The loss of finite rows, and the gradients of all inputs, each row with another weight."""
    real = [x.clone().requires_grad_() for x in given[:4]]
    loss = op(*real, *given[4:], blank=blank)
    weights = torch.arange(1, len(loss) + 1, device=loss.device) / 2
    (loss.where(loss.isfinite(), 0) * weights).sum().backward()
    return [loss.detach(), *(x.grad for x in real if x.grad is not None)]


def agree(given: Case, *, blank: int = 0, loss: float = 1e-5, rest: float = 3e-5) -> list[Tensor]:
    """The kernels are what the definition is in float64."""
    found = pulled(rnnt, given, blank=blank)
    wanted = pulled(rnnt_naive, (*(x.double() for x in given[:4]), *given[4:]), blank=blank)
    assert len(found) == len(wanted) == 5
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=loss, atol=loss)
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        scale = max(float(theirs.abs().max()), 1e-3) if theirs.numel() else 1.0
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=rest * scale)
    return found


@pytest.mark.parametrize(("room", "number"), [(tiles.WORKSPACE, 1), (700, 2), (220, 6), (1, 9)])
def test_slab_after_slab(room: int, number: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WORKSPACE", room)
    plan = list(tiles.slabs(3, 3, 3, 20 + 16))
    assert len(plan) == number
    covered = [(s.row + i, s.frame + k) for s in plan for i in range(s.rows) for k in range(s.frames)]
    assert sorted(covered) == [(i, k) for i in range(3) for k in range(3)]
    found = agree(case([2, 1, 3], [1, 2, 0], 11, 20, device=device))
    assert not found[1][1, 1:].any()  # nothing for the frames that are not there
    assert not found[2][2, 1:].any()


def test_more_than_a_tile_of_everything(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the sum over pairs in as many parts as a GPU has room for."""
    half = tiles.tiles(torch.float16)
    assert [tiles.splits(n, 1000, 512, half) for n in (100, 3000, 10**6)] == [1, 2, 8]
    monkeypatch.setattr(backward, "splits", lambda *sizes: 3)
    blank = 149  # in the last tile
    given = case([9, 4], [8, 6], 150, 70, more=1, device=device)
    given[4][0, 2] = blank  # a label that is the blank, twice in one sum
    agree(given, blank=blank)


@pytest.mark.parametrize(("dtype", "rest"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype: torch.dtype, rest: float, device: torch.device) -> None:
    if reason := unable(torch.empty(0, dtype=dtype, device=device)):
        pytest.skip(reason)
    given = case([9, 4], [5, 3], 140, 40, device=device, dtype=dtype)
    found = agree(given, loss=2e-3, rest=rest)
    assert found[0].dtype == torch.float32
    assert {x.dtype for x in found[1:]} == {dtype}


@settings(deadline=None, max_examples=3)
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=3), vocab=st.integers(1, 70),
    inner=st.integers(1, 40), more=st.integers(0, 1), data=st.data(),
)  # fmt: skip
def test_every_shape(rows: list[tuple[int, int]], vocab: int, inner: int, more: int, data: st.DataObject) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blank = data.draw(st.integers(0, vocab - 1))
    agree(case([t for t, _ in rows], [u for _, u in rows], vocab, inner, more=more, device=device), blank=blank)


def test_torchaudio_and_the_reference(device: torch.device) -> None:
    given = case([9, 6, 2], [4, 2, 3], 12, 24, device=device)  # on CUDA torchaudio is wrong about rows of one frame
    f, g, weight, bias, targets, t, u = given
    targets.add_((targets == 2).int())  # torchaudio has another gradient where a label is the blank
    found = pulled(rnnt, given, blank=2)
    f, g, targets = f.nan_to_num(0), g.nan_to_num(0), targets.clamp(min=0)

    def theirs(f: Tensor, g: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor, blank: int) -> Tensor:
        z = (f[:, :, None] + g[:, None]).tanh() @ weight.T + bias
        return rnnt_loss(z, targets.int(), t.int(), u.int(), blank=blank, reduction="none")

    def ours(f: Tensor, g: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor, blank: int) -> Tensor:
        z = (f[:, :, None] + g[:, None]).tanh() @ weight.T + bias
        return lattice_loss(arcs_of(z.log_softmax(-1), targets, blank=blank), t, u)

    for op, dtype in ((theirs, torch.float32), (ours, torch.float64)):
        wanted = pulled(op, (*(x.to(dtype) for x in (f, g, weight, bias)), targets), blank=2)
        for mine, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine.to(dtype), other, rtol=1e-4, atol=2e-5)


def test_the_lattice_alone(device: torch.device) -> None:
    """Posteriors are minus the gradient of the arcs, and sum to one in each frame (blank) and for each label."""
    t, u = torch.tensor([6, 3, 0], device=device), torch.tensor([2, 20, 1], device=device)
    lattice = Arcs(*(3 * torch.randn(3, 6, 21, device=device).log_softmax(-1) for _ in range(3)))
    lattice.label[1, 1, 4] = -torch.inf
    alpha, loss = forward_scores(lattice, t, u)
    scale = torch.tensor([1.0, 2.0, 3.0], device=device)
    blanks, labels = backward_scores(lattice, alpha, loss, scale, t, u)
    wanted = occupancy(arcs_of_both(lattice), t, u)
    torch.testing.assert_close(-loss.double(), wanted.total, rtol=0, atol=1e-4)
    for row in range(2):
        a, n = int(t[row]), int(u[row])
        mine, said = blanks[row, :a, : n + 1], labels[row, :a, : n + 1]
        torch.testing.assert_close(mine.double(), scale[row] * wanted.blank[row, :a, : n + 1], rtol=0, atol=1e-4)
        torch.testing.assert_close(said[:, :n].double(), scale[row] * wanted.label[row, :a, :n], rtol=0, atol=1e-4)
        assert not said[:, n].any()
        torch.testing.assert_close(mine.sum(1), scale[row].expand(a), rtol=0, atol=1e-3)
        torch.testing.assert_close(said[:, :n].sum(0), scale[row].expand(n), rtol=0, atol=1e-3)


def arcs_of_both(lattice: Arcs) -> Any:
    from speechattn.decoder.transducer_loss import Arcs as Reference

    return Reference(lattice.blank.double(), lattice.label[..., :-1].double())


def test_rows_without_frames_and_labels_that_cannot_be(device: torch.device) -> None:
    given = case([0, 0, 3, 2], [0, 2, 1, 2], 7, 16, device=device)
    given[3][5] = -torch.inf  # forbidden
    given[4][2, 0], given[4][3] = 5, torch.tensor([1, 7], device=device)  # and one that is no entry
    found = pulled(rnnt, given)
    assert found[0].tolist() == [0, torch.inf, torch.inf, torch.inf]
    assert not any(x.any() for x in found[1:])
    given[4][2, 0], given[4][3, 1] = 4, 2
    found = agree(given)
    assert found[0][2:].isfinite().all()
    given[2][0] = torch.nan
    assert rnnt(*given).isnan().tolist() == [False, False, True, True]


def test_nothing_at_all(device: torch.device) -> None:
    for frames, said in (([], []), ([0, 0], [0, 2]), ([2], [0])):
        found = agree(case(frames, said, 5, 16, device=device))
        assert found[0].shape == (len(frames),)


def test_a_thousand_labels(device: torch.device) -> None:
    given = case([1], [1023], 3, 16, device=device)
    found = rnnt(*given)
    f, g, weight, bias, targets, t, u = given
    z = (f[:, :, None] + g[:, None]).tanh() @ weight.T + bias
    wanted = lattice_loss(arcs_of(z.double().log_softmax(-1), targets), t, u)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    assert [lanes(n) for n in (1, 256, 257, 1024, 4000)] == [1, 1, 2, 4, 8]


def test_what_is_not_contiguous(device: torch.device) -> None:
    given = case([4, 3], [2, 1], 9, 16, device=device)
    turned = tuple(x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x for x in given)
    assert not turned[0].is_contiguous()
    for mine, theirs in zip(pulled(rnnt, turned), pulled(rnnt, given), strict=True):
        assert torch.equal(mine, theirs)  # and twice the same


def test_no_length_reaches_beyond_what_is_there(device: torch.device) -> None:
    given = case([3, 2], [2, 1], 5, 16, device=device)
    beyond = torch.tensor([9, 0], device=device)
    longer = (*given[:5], given[5] + beyond, given[6] + beyond)
    for mine, theirs in zip(pulled(rnnt, longer), pulled(rnnt, given), strict=True):
        assert torch.equal(mine, theirs)


def test_the_definition_has_its_gradient() -> None:
    given = case([3, 2, 0], [1, 2, 1], 4, 3, more=1, dtype=torch.float64)
    real = [x.nan_to_num(0).requires_grad_() for x in given[:4]]
    finite = torch.tensor([1.0, 1.0, 0.0])

    def loss(*xs: Tensor) -> Tensor:
        found = rnnt_naive(*xs, *given[4:], blank=1)  # type: ignore[call-arg]
        return found.where(finite > 0, 0).sum()

    assert torch.autograd.gradcheck(loss, real)


def test_torch_sees_through_it(device: torch.device) -> None:
    given = case([3, 2], [2, 1], 5, 16, device=device)
    f, g, w, c = (x.nan_to_num(0) for x in given[:4])
    real = [x.requires_grad_() for x in (f, g, w, c)]
    # The values outside of a row's lengths are not written, and a numerical comparison would look at them.
    torch.library.opcheck(
        torch.ops.speechattn.rnnt.default, (*real, *given[4:], 0),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
    grad, back = torch.ones(2, device=device), torch.ops.speechattn.rnnt_backward.default
    outputs = torch.ops.speechattn.rnnt(*real, *given[4:], 0)
    torch.library.opcheck(
        back, (*(x.detach() for x in (grad, *real, *given[4:], *outputs)), 0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    compiled = torch.compile(rnnt, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(pulled(compiled, given), pulled(rnnt, given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    given = case([3, 2], [2, 1], 5, 16)
    with pytest.raises(ValueError, match=r"of one type, not of \['torch.float16', 'torch.float32'\]"):
        rnnt(given[0].half(), *given[1:])
    with pytest.raises(ValueError, match=r"frames \[2, 3, 16\] and targets \[2, 2\]: wanted labels \[2, 3, 16\]"):
        rnnt(given[0], given[1][:, 1:], *given[2:])
    with pytest.raises(ValueError, match="blank is 5, the vocabulary has 0 to 4"):
        rnnt(*given, blank=5)


@pytest.mark.parametrize("labels", [60, 1023])
def test_memory_is_bounded(labels: int) -> None:
    """What is launched for B = 16, T = 1500, V = 1000, J = 512 holds no (B, T, U, V) and no (B, T, U, J)."""
    b, t, vocab, inner = 16, 1500, 1000, 512
    real: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    f, g = torch.empty(b, t, inner, **real), torch.empty(b, labels + 1, inner, **real)
    weight, bias = torch.empty(vocab, inner, **real), torch.empty(vocab, **real)
    targets, lengths = (torch.empty(shape, dtype=torch.long, device="meta") for shape in ((b, labels), (b,)))
    with recorded() as launches:
        outputs = torch.ops.speechattn.rnnt(f, g, weight, bias, targets, lengths, lengths, 0)
        grad = torch.empty(b, device="meta")
        torch.ops.speechattn.rnnt_backward(grad, f, g, weight, bias, targets, lengths, lengths, *outputs, 0)
    assert len({launch.kernel for launch in launches}) == 9
    tensors = {id(x): x for launch in launches for x in launch.args.values() if isinstance(x, Tensor)}
    known = {id(x) for x in (f, g, weight, bias, targets, lengths, grad)}
    extra = sum(x.numel() * x.element_size() for key, x in tensors.items() if key not in known)
    pairs = b * t * (labels + 1)
    assert extra <= 6 * 4 * pairs + 3 * 2 * tiles.WORKSPACE + 48 * 2**20
    assert extra < (0.4 if labels == 60 else 0.1) * pairs * inner * 2  # the hidden layer alone


def transducer(device: torch.device) -> Transducer:
    return Transducer(StatelessPredictor(6, 8, context=2, blank=2), Joint(5, 8, 16, 6, blank=2)).to(device)


def test_the_fused_loss_is_the_loss(device: torch.device) -> None:
    model = transducer(device)
    x = tree.map(lambda v: v.to(device), random_frames([7, 4, 2], 5))
    labels, said = torch.randint(3, 6, (3, 5), device=device), torch.tensor([2, 5, 0], device=device)
    labels[0, 2:] = -1
    full, found = model.loss(x, labels, said), FusedLoss()(model, x, labels, said)
    torch.testing.assert_close(found, full, rtol=0, atol=1e-5)
    weights = list(model.parameters())
    pairs = zip(torch.autograd.grad(found.sum(), weights), torch.autograd.grad(full.sum(), weights), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with torch.autocast(device.type, torch.float16):
        half = FusedLoss()(model, x, labels, said)
    half.sum().backward()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0.02)
    assert {p.grad.dtype for p in weights if p.grad is not None} == {torch.float32}


def test_the_fused_loss_of_a_joint_without_bias(device: torch.device) -> None:
    model = transducer(device)
    model.joint.out.bias = None  # type: ignore[assignment]
    x = tree.map(lambda v: v.to(device), random_frames([4], 5))
    labels, said = torch.tensor([[1, 3]], device=device), torch.tensor([2], device=device)
    torch.testing.assert_close(FusedLoss()(model, x, labels, said), model.loss(x, labels, said), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_as_in_training(dtype: torch.dtype, device: torch.device) -> None:
    """Against torchaudio over the joint network's tensor in float32."""
    frames, said = [400, 311, 250, 17], [60, 45, 1, 30]  # on CUDA torchaudio is wrong about rows without labels
    given = case(frames, said, 1000, 512, device=device, dtype=dtype)
    given = (given[0], given[1], given[2] / 12, *given[3:])
    given[4].clamp_(min=1)  # torchaudio has another gradient where a label is the blank
    found = pulled(rnnt, given)
    again = pulled(rnnt, given)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, again, strict=True))
    targets, t, u = given[4:]

    def theirs(f: Tensor, g: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor, blank: int) -> Tensor:
        z = (f[:, :, None] + g[:, None]).tanh() @ weight.T + bias
        return rnnt_loss(z, targets.clamp(min=0).int(), t.int(), u.int(), blank=blank, reduction="none")

    wanted = pulled(theirs, tuple(x.nan_to_num(0).float() for x in given[:4]))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-3)
    bound = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}[dtype]
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        assert (mine.float() - other).square().mean().sqrt() <= bound * other.square().mean().sqrt()
