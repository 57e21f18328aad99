"""What training does in another way than torch: the same numbers and gradients, and nothing waits for a device."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from speechattn.attention import Relative, SelfAttention, Span
from speechattn.attention.position import Skewed, along, sinusoids
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.decoder.predictor import TransformerPredictor
from speechattn.decoder.transducer import Joint, Transducer
from speechattn.encoder import Conformer
from speechattn.encoder.layers import Conv2d, convolved
from speechattn.frames import Frames, Memory
from speechattn.linear import dropped, linear, plain, run
from speechattn.testing import oracle, random_frames, stepped


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum in which every element has another weight."""
    maker = torch.Generator().manual_seed(1)
    return list(torch.autograd.grad((y * torch.randn(y.shape, generator=maker, dtype=y.dtype)).sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 256), (256, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_the_product_are_torchs(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    x = torch.randn(3, 30, inputs).to(dtype).transpose(0, 1).requires_grad_()
    leaves = [x, *layer.parameters()]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float64: 1e-12}[dtype]
    y, expected = run(layer, x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=20 * tolerance)


def test_the_way_of_our_own_is_taken_where_it_can_be() -> None:
    layer, x = nn.Linear(64, 256), torch.randn(90, 64)
    found = [type(node).__name__ for node in ancestors(run(nn.Sequential(layer, nn.ReLU(inplace=True)), x))]
    assert ("ProductBackward" in found) == plain(x, layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert "ProductBackward" not in [type(node).__name__ for node in ancestors(run(layer, x))]


def ancestors(y: Tensor) -> list[object]:
    """The graph of a result."""
    seen: list[object] = []
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.append(node)
            todo += [inner for inner, _ in node.next_functions]
    return seen


def test_gradients_of_gradients() -> None:
    weight, x = torch.randn(256, 64, requires_grad=True), torch.randn(90, 64, requires_grad=True)
    found = []
    for f in (linear, F.linear):
        (first,) = torch.autograd.grad(f(x, weight, None).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, weight]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2 * float(b.abs().mean()))


@pytest.mark.parametrize("shape", [(7, 9), (4, 5, 33), (1,)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_the_gradient_follows(shape: tuple[int, ...], p: float) -> None:
    x = torch.ones(200, *shape, requires_grad=True)
    y = dropped(x, p)
    share = float((y == 0).float().mean())
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / y.numel()) ** 0.5)
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-3)
    (grad,) = torch.autograd.grad((3 * y).sum(), x)
    assert torch.equal(grad, 3 * y)


def test_dropout_comes_from_the_seed_and_elements_do_not_hang_together() -> None:
    x, found = torch.ones(4096, 16), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(dropped(x, 0.5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    centred = found[0] - 1
    together = (centred.T @ centred / len(x)).fill_diagonal_(0)
    assert float(together.abs().max()) < 0.1  # six deviations
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 0.03
    assert torch.equal(dropped(x, 0.0), x)
    assert not dropped(x, 1.0).any()
    layer = nn.Dropout(0.5)
    assert run(nn.Sequential(layer), x).unique().tolist() == [0, 2]
    assert torch.equal(run(layer.eval(), x), x)


def test_dropout_of_a_mapped_function_is_torchs() -> None:
    x = torch.ones(2, 500)
    y = torch.func.vmap(lambda row: dropped(row, 0.5), randomness="different")(x)
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize(("queries", "keys"), [(2, 1), (3, 4), (5, 5), (4, 9)])
def test_gradient_of_skewed_rows(queries: int, keys: int) -> None:
    rows = torch.randn(2, 3, queries, queries + keys - 1, dtype=torch.float64, requires_grad=True)
    y, expected = Skewed.apply(rows, keys), along(rows, queries, keys)
    assert torch.equal(y, expected)
    assert torch.equal(gradients(y, [rows])[0], gradients(expected, [rows])[0])
    assert torch.autograd.gradgradcheck(lambda x: Skewed.apply(x, keys).square(), rows)


@pytest.mark.parametrize(("kernel", "stride", "frames", "bins"), [(3, 2, 21, 14), (5, 3, 23, 17), (3, 1, 9, 8)])
def test_gradients_of_the_convolution(kernel: int, stride: int, frames: int, bins: int) -> None:
    conv = Conv2d(16, 24, kernel, stride, right=0).conv
    x = torch.randn(2, frames, bins, 16).permute(0, 3, 1, 2).requires_grad_()
    leaves = [x, *conv.parameters()]
    y, expected = convolved(x, conv), conv(x)
    torch.testing.assert_close(y, expected)
    for a, b in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    found = []
    for f in (convolved(x, conv), conv(x)):
        (first,) = torch.autograd.grad(f.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), conv.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-1)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("right", [2, None])
def test_whole_in_training_is_whole_without_gradient_and_in_steps(right: int | None) -> None:
    encoder = Conformer(8, 8, 2, 2, 16, span=Span(4, 2), kernel=5, conv_right=right).eval()
    x = random_frames([37, 20], 8)
    y = encoder(x)
    with torch.no_grad():
        for other in (encoder(x), stepped(encoder, x)):
            assert torch.equal(y.mask, other.mask)
            torch.testing.assert_close(y.values, other.values, rtol=0, atol=1e-10)
    torch.testing.assert_close(y.values, oracle(encoder, x).values, rtol=0, atol=1e-9)


class Recording(TorchDispatchMode):
    """Writes down every operation, and what waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(f.overloadpacket.__name__)
        return f(*args, **(kwargs or {}))


def hybrid(span: Span) -> tuple[Conformer, CTC, AttentionDecoder]:
    """A small encoder and its heads."""
    encoder = Conformer(80, 16, 2, 2, 32, span=span, kernel=5, conv_right=None, dropout=0.1)
    return encoder, CTC(16, 9), AttentionDecoder.usual(9, 16, 2, 2, 32)


WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"}


@pytest.mark.parametrize("span", [Span.full(), Span(8, 4), Span(None, 4)])
def test_nothing_in_encoder_and_decoder_waits_for_a_device(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a CPU may look at out of sight, as on a GPU: no number goes back to Python."""
    for name, module in list(sys.modules.items()):
        if name.startswith("speechattn") and name != "speechattn.decoder.transducer" and hasattr(module, "known"):
            monkeypatch.setattr(module, "known", lambda x: False)
    encoder, _, attention = hybrid(span)
    x, targets, lengths = random_frames([64, 40], 80), torch.randint(1, 8, (2, 5)), torch.tensor([5, 3])
    with Recording() as recording:
        y = encoder(x)
        attention.losses(Memory.of(y, finished=True), targets, lengths, sos=8, eos=8).sum().backward()
    assert "addmm" in recording.seen
    assert not WAITING & set(recording.seen)


def test_tables_of_positions_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = 700  # 1399 distances of 256 features
    layers = [SelfAttention(256, 4, Span.full(), position=Relative(256, 4)) for _ in range(2)]
    x = Frames.of(torch.randn(1, frames, 256), torch.ones(1, frames, dtype=torch.bool))
    for layer in layers:
        with Recording() as recording:
            layer(x)
    assert "sin" not in recording.seen
    table = sinusoids(range(4, -5, -1), 6, torch.float64, torch.device("cpu"))
    assert float(table[4, 1]) == 1
    torch.testing.assert_close(table[:, 0], torch.arange(4.0, -5, -1).double().sin(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("span", [Span.full(), Span(8, 4)])
def test_all_losses_train_in_half_precision(span: Span) -> None:
    encoder, ctc, attention = hybrid(span)
    transducer = Transducer(TransformerPredictor(9, 16, 1, 2, 16), Joint(16, 16, 16, 9))
    x, targets, lengths = random_frames([64, 40], 80), torch.randint(1, 8, (2, 5)), torch.tensor([5, 3])
    members = nn.ModuleList([encoder, ctc, attention, transducer])
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        members.zero_grad()
        members.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = encoder(x)
            losses = [
                ctc.losses(y, targets, lengths),
                attention.losses(Memory.of(y, finished=True), targets, lengths, sos=8, eos=8),
                transducer.loss(y, targets, lengths),
            ]
        sum(loss.sum() for loss in losses).backward()  # type: ignore[union-attr]
        assert all(loss.dtype == torch.float32 for loss in (losses[0], losses[2]))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in members.parameters() if p.requires_grad)
        found.append(torch.stack([loss.float() for loss in losses]).detach())
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("span", [Span.full(), Span(8, 4)])
def test_the_encoder_compiles_for_training_as_one_graph(span: Span) -> None:
    """Through the whole of autograd; the code generator of the default backend wants a compiler."""
    encoder = hybrid(span)[0].eval()
    x = random_frames([64, 40], 80)
    compiled = torch.compile(copy.deepcopy(encoder), backend="aot_eager", fullgraph=True)
    for module in (encoder, compiled):
        module(x).values.square().sum().backward()
    for a, b in zip(encoder.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
