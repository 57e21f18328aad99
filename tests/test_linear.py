"""The product of all layers: the same numbers by any way, the public way wherever the other would lose something."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from speechattn import linear as module
from speechattn.linear import activated, direct, run, served
from speechattn.testing import random_frames

TYPES = [torch.float32, torch.bfloat16]


def layer_and_input(dtype: torch.dtype, *, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    """Big enough to be worth the direct way."""
    torch.manual_seed(0)
    return nn.Linear(64, 256, bias=bias, dtype=dtype), torch.randn(4, 20, 64).to(dtype)


def close(y: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of the type."""
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "view",
    [lambda x: x, lambda x: x[0], lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:1].expand(4, -1, -1)],
)
def test_it_is_the_linear_layer_of_torch(dtype: torch.dtype, bias: bool, view: Callable[[Tensor], Tensor]) -> None:
    layer, x = layer_and_input(dtype, bias=bias)
    with torch.no_grad():
        close(run(layer, view(x)), F.linear(view(x), layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.Tanh()])
def test_an_activation_in_the_same_pass_is_the_same(dtype: torch.dtype, activation: nn.Module) -> None:
    layer, x = layer_and_input(dtype)
    with torch.no_grad():
        close(activated(layer, activation, x), activation(F.linear(x, layer.weight, layer.bias)))
    assert activated(layer, activation, x).requires_grad


def test_hooks_and_what_stands_in_for_a_layer_are_not_passed_by() -> None:
    layer, x = layer_and_input(torch.float32)
    whole = nn.Sequential(nn.LayerNorm(64), layer, nn.GLU())
    with torch.no_grad():
        expected, activation, seen = whole(x), nn.SiLU(), []
        close(run(whole, x), expected)
        for watched in (whole, layer):
            with watched.register_forward_hook(lambda *_: seen.append(1)):
                close(run(whole, x), expected)
        with register_module_forward_hook(lambda module, *_: seen.append(1) if module is layer else None):
            close(run(whole, x), expected)
        assert len(seen) == 3
        for watched in (layer, activation):
            with watched.register_forward_pre_hook(lambda *_: seen.append(1)):
                close(activated(layer, activation, x), F.silu(layer(x)))
        assert len(seen) == 6  # the expected value runs the layer too
        layer.forward = torch.ones_like  # type: ignore[method-assign]
        assert run(layer, x).eq(1).all()
        close(activated(layer, activation, x), F.silu(torch.ones_like(x)))


def test_weights_are_never_stale() -> None:
    layer, x = layer_and_input(torch.float32)
    with torch.no_grad():
        run(layer, x)
        layer.weight.data.mul_(2)
        layer.bias[3] += 1
        close(run(layer, x), F.linear(x, layer.weight, layer.bias))
        other = copy.deepcopy(layer).to(torch.bfloat16)
        close(run(other, x.bfloat16()), F.linear(x.bfloat16(), other.weight, other.bias))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_the_public_way_is_taken_where_the_other_would_lose_something() -> None:
    layer, x = layer_and_input(torch.float32)
    assert run(layer, x).requires_grad
    with torch.no_grad():
        assert direct(x, layer.weight, layer.bias) == served(torch.float32)
        assert not direct(x[:1, :1], layer.weight, layer.bias)  # too small
        assert not direct(x, layer.weight, torch.zeros(2 * 256)[::2])  # which the other way reads as if contiguous
        assert not direct(x, layer.weight.t().contiguous().t().detach(), None)  # not a parameter: may be anything
        with torch.autocast("cpu", torch.bfloat16):
            assert run(layer, x).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            assert not direct(x, layer.weight, layer.bias)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            run(layer, x[..., :63])
        with pytest.raises(RuntimeError, match="dtype"):
            run(layer, x.double())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_tangents_and_function_transforms_go_through() -> None:
    layer, x = layer_and_input(torch.float32)
    along = torch.randn_like(x)
    with torch.no_grad():
        expected = F.linear(along, layer.weight)
        close(torch.func.jvp(partial(run, layer), (x,), (along,))[1], expected)
        close(torch.func.vmap(partial(run, layer))(x), layer(x))
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(run(layer, forward_ad.make_dual(x, along))).tangent
        assert tangent is not None
        close(tangent, expected)


def test_a_build_without_it_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(module, "product", missing)
    served.cache_clear()
    layer, x = layer_and_input(torch.float32)
    with torch.no_grad():
        close(run(layer, x), F.linear(x, layer.weight, layer.bias))
    served.cache_clear()


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_do_not_meet(dtype: torch.dtype) -> None:
    layer, x = layer_and_input(dtype)
    x[1], x[2, 3] = float("nan"), float("inf")
    with torch.no_grad():
        y = run(layer, x)
    assert y[[0, 3]].isfinite().all()
    close(y[0], F.linear(x[0], layer.weight, layer.bias).detach())


def test_frames_that_are_all_there_are_not_masked() -> None:
    x = random_frames([5, 5], 3)
    assert type(x).finite(x.values, x.mask).values is x.values
    y = random_frames([5, 4], 3)
    assert type(y).finite(torch.ones_like(y.values), y.mask).values[1, 4].tolist() == [0, 0, 0]
    each = torch.func.vmap(lambda mask: type(x).finite(torch.ones(2, 5, 3), mask).values)(torch.stack([x.mask, y.mask]))
    assert each.sum((1, 2, 3)).tolist() == [30, 27]
