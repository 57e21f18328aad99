"""Hard-concrete gates: their law, their draws, and heads behind them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from streams import D, lively
from torch import Tensor, nn

from speechattn.attention import Relative, SelfAttention, Span
from speechattn.attention.gates import GatedLinear, GatedSelfAttention, HardConcrete, StraightThrough
from speechattn.frames import Frames
from speechattn.stream import Stream
from speechattn.testing import check_export, check_stream, oracle, random_frames
from speechattn.testing.attention import dense

pytestmark = pytest.mark.usefixtures("precise")


def gates(kind: type[HardConcrete], *logits: float) -> HardConcrete:
    made = kind(len(logits))
    made.logits.data = torch.tensor(logits)
    return made


def draws(made: HardConcrete, times: int = 200_000) -> Tensor:
    """[times, N]"""
    many = deepcopy(made)
    many.logits = nn.Parameter(made.logits.expand(times, -1))
    return many.train()().detach()


def silent(layer: SelfAttention, loud: Tensor) -> SelfAttention:
    """A plain layer whose heads are as loud as `loud` [H] says."""
    plain = SelfAttention(
        layer.dim, layer.heads, layer.span, position=layer.position, key_heads=layer.key_heads, norm=layer.norm
    )
    plain.qkv, plain.out = layer.qkv, nn.Linear(layer.dim, layer.dim)
    with torch.no_grad():
        plain.out.weight.copy_(layer.out.weight * loud.repeat_interleave(layer.dim // layer.heads))
        plain.out.bias.copy_(layer.out.bias)
    return plain.eval()


@oracle.register
def gated(stream: GatedSelfAttention, x: Frames) -> Frames:
    """A plain layer whose share of the output is as loud as the formula says."""
    return dense(silent(stream, (1.2 / (1 + (-stream.out.gates.logits).exp()) - 0.1).clamp(0, 1)), x)  # type: ignore[attr-defined]


def test_a_gate_is_open_as_often_as_it_says() -> None:
    logits = (-3.0, -1.0, 0.0, 1.5)
    made = gates(HardConcrete, *logits)
    z = draws(made)
    assert bool(((z >= 0) & (z <= 1)).all())
    torch.testing.assert_close((z > 0).double().mean(0), made.opening.detach(), rtol=0, atol=0.005)
    shut = (torch.tensor(logits) - 2 / 3 * torch.log(torch.tensor(11.0))).sigmoid()  # P(z = 1)
    torch.testing.assert_close((z == 1).double().mean(0), shut, rtol=0, atol=0.005)
    expected = made.opening.sum().item()
    assert abs((z > 0).double().sum(1).mean().item() - expected) < 0.01
    assert made.opening[2].item() == pytest.approx(0.831822, abs=1e-6)


def test_rounded_gates_are_open_as_often_as_they_say() -> None:
    made = gates(StraightThrough, -2.0, -0.01, 0.7)
    z = draws(made)
    assert set(z.round(decimals=9).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(z.mean(0), made.opening.detach(), rtol=0, atol=0.005)
    torch.testing.assert_close(made.opening, made.logits.sigmoid())
    assert made.eval()().tolist() == [0.0, 0.0, 1.0]


def test_the_gradient_of_rounded_gates_is_that_of_the_others() -> None:
    found = []
    for kind in (HardConcrete, StraightThrough):
        torch.manual_seed(1)
        made = gates(kind, *[0.3] * 50)
        (grad,) = torch.autograd.grad((made.train()() * torch.arange(50.0)).sum(), made.logits)
        found.append(grad)
    assert torch.equal(*found)
    assert 0 < int((found[0] != 0).sum()) < 50  # none for those that are exactly 0 or 1


def test_gates_settle_in_eval() -> None:
    made = gates(HardConcrete, -3.0, -2.398, -2.39, 0.0, 2.3, 2.4).eval()
    z = made()
    assert torch.equal(z, made())
    expected = (torch.tensor([-3.0, -2.398, -2.39, 0.0, 2.3, 2.4]).sigmoid() * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(z, expected)
    assert [*(z == 0).tolist(), bool(z[-1] == 1), bool(z[-2] < 1)] == [True, True, *[False] * 4, True, True]


@pytest.mark.parametrize("kind", [HardConcrete, StraightThrough])
def test_gates_start_as_asked(kind: type[HardConcrete]) -> None:
    torch.testing.assert_close(kind(3, start=0.7).opening, torch.full((3,), 0.7))
    assert kind(2).eval()().tolist() == [1.0, 1.0]  # nothing is changed at first
    for start in (0.0, 1.0):
        with pytest.raises(ValueError, match="more than 0 and less than 1"):
            kind(2, start=start)


def test_gradients_of_draws_are_those_of_their_formula() -> None:
    made = gates(HardConcrete, -1.0, 0.0, 1.0)

    def z(logits: Tensor) -> Tensor:
        torch.manual_seed(4)
        made.logits.data.copy_(logits)
        return torch.func.functional_call(made.train(), {"logits": logits}, ())  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(z, torch.tensor([-1.0, 0.0, 1.0]).requires_grad_())
    made.logits.data.fill_(1e4)
    assert bool(made().isfinite().all())


def test_a_gated_layer_is_the_layer_of_gated_features() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    made = GatedLinear.of(layer, gates(HardConcrete, -0.5, 5.0, -9.0)).eval()
    z = made.gates()
    loud = torch.stack([x[..., 0] * z[0], x[..., 1] * z[0], x[..., 2], x[..., 3], *[0 * x[..., 0]] * 2], -1)
    torch.testing.assert_close(made(x), layer(loud))
    torch.testing.assert_close(nn.functional.linear(x, made.settled, layer.bias), layer(loud))
    assert made.weight is layer.weight
    with pytest.raises(ValueError, match="6 features, 4 gates"):
        GatedLinear.of(layer, HardConcrete(4))


MAKERS = [
    lambda: GatedSelfAttention(D, 2, Span(5, 4), position=Relative(D, 2), norm=nn.LayerNorm(D)),
    lambda: GatedSelfAttention(D, 4, Span(None, 3, 2), key_heads=2, gates=StraightThrough),
    lambda: GatedSelfAttention(D, 2, Span.full()),
]


@pytest.mark.parametrize("make", MAKERS)
def test_laws_of_gated_heads(make: type[Stream]) -> None:
    stream = lively(make())
    assert isinstance(stream, GatedSelfAttention)
    reference = None
    if isinstance(stream.out.gates, StraightThrough):  # type: ignore[attr-defined]
        stream.out.gates.logits.data = torch.tensor([1.0, -1.0, 1.0, -1.0])  # type: ignore[attr-defined]
        reference = lambda s, x: dense(silent(s, torch.tensor([1.0, 0.0, 1.0, 0.0])), x)  # noqa: E731
    else:
        stream.out.gates.logits.data = torch.tensor([0.3, -0.9])  # type: ignore[attr-defined]
    x = random_frames([11, 0, 7], D)
    check_stream(stream, x, reference=reference)
    check_export(stream, random_frames([3 * (stream.plan().block or 9)] * 2, D))


def test_gates_of_what_is_not_needed_close() -> None:
    """Eight features, two of which say what is wanted; each open gate has its price."""
    x = torch.randn(256, 8)
    y = x[:, :2] @ torch.randn(2, 3) * 2
    layer = GatedLinear.of(nn.Linear(8, 3), HardConcrete(8, start=0.9))
    optimizer = torch.optim.Adam([{"params": [layer.weight, layer.bias]}, {"params": layer.gates.parameters()}], 0.05)
    for _ in range(400):
        loss = (layer(x) - y).square().mean() + 0.05 * layer.gates.opening.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (layer.gates.settled > 0).tolist() == [True] * 2 + [False] * 6
    assert (layer.eval()(x) - y).square().mean() < 0.1 * y.square().mean()
