"""What is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from speechattn_kernels.common import Launch
from speechattn_kernels.monotonic import kernel

__all__ = ["flops", "shipped"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COUNTS = (20, 50, 100, 250, 500, 1000, 2000, 100_000)  # one for each size of a tile, and many tiles


def shipped() -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """A name, whether it is a default one, and a call on tensors of the device meta."""
    for name, dtype in DTYPES.items():
        for count in COUNTS:
            p = torch.empty(8, 60, count, dtype=dtype, device="meta")
            start, alpha = torch.empty_like(p[:, 0]), torch.empty_like(p, dtype=torch.float32)
            edges = alpha.new_empty(kernel.shape(p))
            yield f"forward T={count} {name}", True, partial(kernel.forward, p, start, alpha, edges)
            back = partial(kernel.backward, p, start, alpha, edges, alpha, to_p=p, to_start=start)
            yield f"backward T={count} {name}", True, back


def flops(launch: Launch) -> float:
    """Operations of one launch: 6 for a place forward, 20 backward; those that a scan repeats are not counted."""
    rows, tokens, count = launch.args["p"].shape
    return rows * tokens * count * (20.0 if "grad" in launch.args else 6.0)
