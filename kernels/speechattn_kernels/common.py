"""How a kernel is launched, recorded, and asked whether it can run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

__all__ = ["Launch", "Op", "divided", "generation", "launch", "power", "precision", "recorded", "unable"]

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments, by name: what would have been launched."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    warps: int
    stages: int


class Launches(list[Launch]):
    """What would have been launched on a GPU of this generation."""

    def __init__(self, generation: int) -> None:
        super().__init__()
        self.generation = generation


_records: list[Launches] = []


@contextmanager
def recorded(generation: int = 9) -> Iterator[list[Launch]]:
    """Inside, nothing is launched: the list holds what would have been. The tensors may be on the device `meta`."""
    _records.append(Launches(generation))
    try:
        yield _records[-1]
    finally:
        _records.pop()


def launch(kernel: Any, grid: Sequence[int], args: dict[str, Any], *, warps: int = 4, stages: int = 2) -> None:
    """Run `kernel` over up to three dimensions of programs; nothing happens for a grid of none."""
    grid = tuple(grid)
    if _records:
        _records[-1].append(Launch(kernel, grid, args, warps, stages))
    elif min(grid) > 0:
        device = next(value.device for value in args.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](**args, num_warps=warps, num_stages=stages)


class Op:
    """`run` as an op of torch, `speechattn::NAME`, which compilers and exporters follow by `fake`.

    Where nobody compiles it is called directly, as what torch does around an op takes longer than a short step. While
    launches are recorded it runs on any device. A gradient that it has no formula for is an error, never nothing.
    """

    def __init__(
        self, name: str, run: Callable[..., Any], fake: Callable[..., Any], *, mutates: Sequence[str] = ()
    ) -> None:
        self.run, self.function = run, None
        self.op = torch.library.custom_op(f"speechattn::{name}", run, mutates_args=tuple(mutates))
        self.op.register_fake(lambda *args: run(*args) if _records else fake(*args))
        if not mutates:
            self.register_autograd(partial(refused, name), setup_context=lambda ctx, inputs, output: None)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Gradients: `setup_context(ctx, inputs, output)`, and `backward(ctx, *gradients)` of all inputs."""
        self.op.register_autograd(backward, setup_context=setup_context)
        parts = {"forward": self.run, "setup_context": setup_context, "backward": backward}
        self.function = type(self.op._name, (Function,), {name: staticmethod(part) for name, part in parts.items()})

    def __call__(self, *args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        plain = all(type(x) in (Tensor, Parameter) and x.device.type != "meta" for x in tensors)
        if not plain or torch.compiler.is_compiling():
            return self.op(*args)
        if self.function is not None and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self.function.apply(*args)  # type: ignore[attr-defined]
        return self.run(*args)


def refused(name: str, ctx: Any, *grads: Tensor) -> None:
    """There is no such gradient."""
    raise RuntimeError(f"speechattn::{name} has no gradient; what is differentiated once cannot be once more")


def generation(x: Tensor) -> int:
    """The major compute capability (8: Ampere, 9: Hopper) that kernels of `x` are made for."""
    if _records:
        return _records[-1].generation
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


def unable(x: Tensor) -> str | None:
    """Why no kernel can read `x` here; None if one can."""
    if x.dtype not in TYPES:
        return f"the kernels compute in float32, bfloat16 and float16, not in {str(x.dtype).removeprefix('torch.')}"
    if x.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(x.device)
        return None if major >= 8 else f"it needs compute capability 8.0, the GPU has {major}.{minor}"
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None if x.dtype != torch.bfloat16 else "Triton's interpreter multiplies bfloat16 as if it were integers"
    return f"it needs CUDA, the tensors are on {x.device.type} (TRITON_INTERPRET=1 runs it there, slowly)"


def precision(dtype: torch.dtype) -> str:
    """How matrices of `dtype` are multiplied: float32 exactly, unless torch is allowed to use TF32."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def power(n: int, least: int = 16) -> int:
    """The next power of two, at least `least`: tiles have such sizes."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def divided(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)
