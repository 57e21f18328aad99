"""Weights in a file: as they are, in half the bytes, or in a quarter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from speechattn.errors import InputError, ModelError

__all__ = ["KINDS", "SCALE", "Unfilled", "compact", "read_weights"]

KINDS = ("float32", "bfloat16", "int8")
SCALE = ".scale"  # behind the name of a tensor in int8: what its rows are multiplied by
LARGEST = 127  # in int8
RANDOM = {nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_}


def compact(tensors: Mapping[str, Tensor], kind: str = "float32") -> dict[str, Tensor]:
    """Tensors as a file holds them. What has one dimension, or no fraction, stays as it is in all kinds.

    `int8`: row r of a tensor of two or more dimensions, along the first of them, is round(w[r] / s[r]) with the
    scale s[r] = max |w[r]| / 127, which stands beside it as `NAME.scale` in float32. Law: |w - s w'| <= s / 2.
    InputError for another kind.
    """
    if kind not in KINDS:
        raise InputError(f"weights {kind}: wanted {', '.join(KINDS)}")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        x = tensor.detach()
        x = x.float() if x.is_floating_point() else x
        if kind == "float32" or x.dim() < 2 or not x.is_floating_point():
            found[name] = x.contiguous()
        elif kind == "bfloat16":
            found[name] = x.to(torch.bfloat16).contiguous()
        else:
            found[name], found[f"{name}{SCALE}"] = rounded(x)
    return found


class Unfilled(TorchFunctionMode):
    """Weights made inside are zeros instead of random numbers, for a file's will replace them; that is faster."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM:
            tensor: Tensor = args[0] if args else kwargs["tensor"]
            with torch.no_grad():
                return tensor.zero_()
        return func(*args, **kwargs)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor [R, ...] in int8, and the scale of each row [R]."""
    flat = x.reshape(len(x), prod(x.shape[1:])).double()
    most = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
    scale = (most / LARGEST).clamp(min=torch.finfo(torch.float32).tiny).float()
    whole = (flat / scale.double()[:, None]).round().clamp(-LARGEST, LARGEST)
    return whole.to(torch.int8).reshape(x.shape), scale


def read_weights(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, those in fewer bytes as float32; `wanted` are those of the model that they are for.

    ModelError names the file where it is not safetensors, or where what it holds cannot be turned into weights.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as error:
        raise ModelError(f"{path}: not safetensors ({str(error)[:200]})") from error
    scales = {name for name in tensors if name.endswith(SCALE) and name not in wanted}
    if alone := sorted(name for name in scales if not whole(tensors.get(name.removesuffix(SCALE)))):
        raise ModelError(f"{path}: {alone[0]}: the scale of no tensor in int8")
    found: dict[str, Tensor] = {}
    for name in tensors.keys() - scales:
        like = wanted.get(name)
        if whole(tensors[name]) and (like is None or like.is_floating_point()):
            found[name] = stretched(path, name, tensors)
            continue
        x = tensors[name]
        found[name] = x.float() if x.dtype == torch.bfloat16 else x
        if x.is_floating_point() and x.isnan().any():
            raise ModelError(f"{path}: {name}: holds NaN, which is no weight")
    return found


def whole(x: Tensor | None) -> bool:
    """It is in int8."""
    return x is not None and x.dtype == torch.int8


def stretched(path: Path, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor in int8, times its scale; ModelError where that is missing or does not fit."""
    x, scale = tensors[name], tensors.get(f"{name}{SCALE}")
    if scale is None:
        raise ModelError(f"{path}: {name}: in int8 without {name}{SCALE}")
    if x.dim() < 2 or scale.shape != x.shape[:1] or scale.dtype != torch.float32:
        said = f"{tuple(scale.shape)} in {str(scale.dtype).removeprefix('torch.')}"
        raise ModelError(f"{path}: {name}{SCALE}: {said} for {tuple(x.shape)}: wanted a float32 for each row")
    if not (scale.isfinite() & (scale >= 0)).all():
        raise ModelError(f"{path}: {name}{SCALE}: not finite numbers of 0 or more")
    return x * scale.view(-1, *[1] * (x.dim() - 1))
