"""How a kernel is launched, recorded, and asked whether it can run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Launch", "divided", "launch", "power", "precision", "recorded", "registered", "unable"]

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments, by name: what would have been launched."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    warps: int
    stages: int


_records: list[list[Launch]] = []


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, nothing is launched: the list holds what would have been. The tensors may be on the device `meta`."""
    _records.append([])
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


def registered(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], *, mutates: Sequence[str] = ()
) -> torch.library.CustomOpDef:
    """`run` as an op of torch, which compilers follow by `fake`; while launches are recorded it runs on any device."""
    op = torch.library.custom_op(f"speechattn::{name}", run, mutates_args=tuple(mutates))
    op.register_fake(lambda *args: run(*args) if _records else fake(*args))
    return op


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
