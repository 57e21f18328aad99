"""What all layers are made of: the product with a matrix of weights, and dropout."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook as hooked

from speechattn.frames import known

__all__ = ["activated", "bare", "dropped", "eager", "linear", "plain", "product", "run"]

WORTH = 1 << 20  # multiplications of a product that pays for the longer way to oneDNN
FUSED = {nn.ReLU: "relu", nn.SiLU: "swish"}


def run(f: nn.Module, x: Tensor) -> Tensor:
    """`f(x)` of `x` [..., D]; oneDNN computes the linear layers and their gradients, also inside a sequence.

    On CPUs whose wide registers MKL does not use it takes half the time in float32, also for the few rows of a step; in
    bfloat16 the bias is not first copied to every row. Nothing is made from the weights beforehand, and a module that
    is not exactly torch's (wrapped, quantised, with a hook) is called.
    """
    if not torch.compiler.is_compiling() and bare(f):
        if type(f) is nn.Linear and direct(x, f.weight, f.bias):
            return multiplied(x, f.weight, f.bias)
        if type(f) is nn.Dropout and not f.inplace:
            return dropped(x, f.p) if f.training else x
        if type(f) is nn.Sequential:
            for member in f:
                x = run(member, x)
            return x
    return f(x)  # type: ignore[no-any-return]


def activated(layer: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """`activation(layer(x))` of `x` [..., D], as `run`; in one pass where oneDNN knows it and no gradient is asked."""
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        name = FUSED.get(type(activation)) if bare(activation) else None
        if name and type(layer) is nn.Linear and bare(layer) and direct(x, layer.weight, layer.bias):
            return product(x, layer.weight, layer.bias, name)
    return activation(run(layer, x))  # type: ignore[no-any-return]


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of what is `direct`."""
    if not torch.is_grad_enabled():
        return product(x, weight, bias, "none")
    y: Tensor = Product.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


class Product(torch.autograd.Function):
    """oneDNN's linear layer, whose gradients are two more products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [N, D], weight [E, D] -> [N, E]."""
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias, "none")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By torch's own products where these gradients shall have gradients."""
        x, weight = ctx.saved_tensors
        wanted, grad = ctx.needs_input_grad, grads[0].contiguous()
        times = F.linear if torch.is_grad_enabled() else straight
        to_x = times(grad, weight.t()) if wanted[0] else None
        to_weight = None
        if wanted[1]:  # the longer side comes last, which is faster
            wide = weight.shape[0] > weight.shape[1]
            to_weight = times(x.t(), grad.t()).t() if wide else times(grad.t(), x.t())
        return to_x, to_weight, grad.sum(0) if wanted[2] else None


def straight(x: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product of any two matrices."""
    return product(x, weight, None, "none")


def dropped(x: Tensor, p: float) -> Tensor:
    """Dropout of `x`, as in training: each element is 0 with probability `p`, the others grow to keep the mean.

    On a CPU by 16 random bits an element, in a seventh of the time; `p` is then a multiple of 2 ** -16, and exact in
    the scale. A flag for each element is all that the gradient keeps.
    """
    if not p:
        return x
    if x.is_cpu and x.is_floating_point() and p < 1 and eager(x):
        y: Tensor = Dropped.apply(x, round(p * 65536))
        return y
    return F.dropout(x, p)


class Dropped(torch.autograd.Function):
    """Elements whose random number of 16 bits is one of the `share` lowest become 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: int) -> Tensor:
        """x [...] -> the same shape."""
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= share - 32768
        ctx.save_for_backward(kept)
        ctx.scale = 65536 / (65536 - share)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The same elements."""
        (kept,) = ctx.saved_tensors
        return (grads[0] * kept).mul_(ctx.scale), None


def eager(x: Tensor) -> bool:
    """Autograd may take a way of our own through `x`: nothing traces, transforms functions or carries tangents."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def bare(module: nn.Module) -> bool:
    """To call it is to call the `forward` of its class: there is no hook, and nothing in its place."""
    own = vars(module)
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or hooked())  # type: ignore[no-untyped-call]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """oneDNN's linear layer."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, as `run`."""
    return multiplied(x, weight, bias) if fits(x, weight, bias) else F.linear(x, weight, bias)


def direct(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """oneDNN knows this case, and the weights are no more than they seem."""
    return type(weight) is nn.Parameter and fits(x, weight, bias)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """oneDNN knows this product, and it is worth it."""
    return (
        x.shape[-1] == weight.shape[1]
        and x.numel() * weight.shape[0] >= WORTH
        and (bias is None or (bias.is_contiguous() and bias.dtype == x.dtype))
        and plain(x, weight)
    )


def plain(x: Tensor, weight: Tensor) -> bool:
    """Nothing is lost by oneDNN: it has neither tangents nor function transforms nor autocast."""
    return (
        known(x)
        and x.dtype == weight.dtype
        and type(weight) in (Tensor, nn.Parameter)
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and eager(x)
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
