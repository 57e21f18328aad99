"""What is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from speechattn_kernels.common import Launch
from speechattn_kernels.rnnt import rnnt_backward, rnnt_forward

__all__ = ["flops", "shipped"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
SIZES = ((60, 1000, 512), (300, 30, 320), (1200, 5000, 640))  # labels, vocabulary, inner features
PRODUCTS = ("rnnt_arcs_kernel", "rnnt_slopes_kernel", "rnnt_weight_kernel", "rnnt_inner_kernel")


def call(dtype: torch.dtype, labels: int, vocab: int, inner: int) -> None:
    """Forward and backward of 2 rows of as many frames as are one slab, up to 100."""
    frames = min(100, 40_000_000 // (2 * (labels + 1) * (inner + vocab)))
    f, g, weight = (
        torch.empty(*shape, inner, dtype=dtype, device="meta") for shape in ((2, frames), (2, labels + 1), (vocab,))
    )
    targets, lengths = (torch.empty(shape, dtype=torch.long, device="meta") for shape in ((2, labels), (2,)))
    given = f, g, weight, weight[:, 0], targets, lengths, lengths
    loss, *others = rnnt_forward(*given, 0)
    rnnt_backward(torch.empty_like(loss), *given, loss, *others, 0)


def shipped() -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """A name, whether it is a default one, and a call on tensors of the device meta."""
    for name, dtype in DTYPES.items():
        for size in SIZES:
            yield "U={} V={} J={} ".format(*size) + name, True, partial(call, dtype, *size)


def flops(launch: Launch) -> float:
    """Operations of the products of one launch: each has one, of all pairs, the vocabulary and the inner features."""
    args, name = launch.args, launch.kernel.fn.__name__
    rows = launch.grid[1] if name == "rnnt_arcs_kernel" else args.get("rows", launch.grid[-1])
    return 2.0 * rows * args["frames"] * args["N"] * args["V"] * args["J"] if name in PRODUCTS else 0.0
