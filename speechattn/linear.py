"""The product with a matrix of weights that all layers are made of."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook as hooked

from speechattn.frames import known

__all__ = ["activated", "product", "run"]

WORTH = 1 << 20  # multiplications of a product that pays for the longer way to oneDNN
FUSED = {nn.ReLU: "relu", nn.SiLU: "swish"}


def run(f: nn.Module, x: Tensor) -> Tensor:
    """`f(x)` of `x` [..., D]; where no gradient is asked, oneDNN computes the linear layers, also inside a sequence.

    On CPUs whose wide registers MKL does not use it takes half the time in float32, also for the few rows of a step; in
    bfloat16 the bias is not first copied to every row. Nothing is made from the weights beforehand, and a module that
    is not exactly torch's (wrapped, quantised, with a hook) is called.
    """
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        if type(f) is nn.Linear and bare(f) and direct(x, f.weight, f.bias):
            return product(x, f.weight, f.bias, "none")
        if type(f) is nn.Sequential and bare(f):
            for member in f:
                x = run(member, x)
            return x
    return f(x)  # type: ignore[no-any-return]


def activated(layer: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """`activation(layer(x))` of `x` [..., D], as `run`; in one pass where oneDNN knows the activation."""
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        name = FUSED.get(type(activation)) if bare(activation) else None
        if name and type(layer) is nn.Linear and bare(layer) and direct(x, layer.weight, layer.bias):
            return product(x, layer.weight, layer.bias, name)
    return activation(run(layer, x))  # type: ignore[no-any-return]


def bare(module: nn.Module) -> bool:
    """To call it is to call the `forward` of its class: there is no hook, and nothing in its place."""
    own = vars(module)
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or hooked())  # type: ignore[no-untyped-call]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """oneDNN's linear layer."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")  # type: ignore[no-any-return]


def direct(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """oneDNN knows this case, and nothing is lost: it has neither tangents nor function transforms nor autocast."""
    return (
        known(x)
        and x.dtype == weight.dtype
        and x.shape[-1] == weight.shape[1]
        and x.numel() * weight.shape[0] >= WORTH
        and type(weight) is nn.Parameter
        and (bias is None or (bias.is_contiguous() and bias.dtype == x.dtype))
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and served(x.dtype)
    )


@cache
def served(dtype: torch.dtype) -> bool:
    """This CPU and this build of torch multiply `dtype` by oneDNN, fast and right."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or dtype not in (torch.float32, torch.bfloat16):
        return False
    x, weight, bias = (torch.arange(1.0, n + 1, device="cpu").to(dtype) for n in (6, 12, 4))
    x, weight = x.view(2, 3), weight.view(4, 3)
    try:
        y = product(x, weight, bias, "none")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(y, F.linear(x, weight, bias))
