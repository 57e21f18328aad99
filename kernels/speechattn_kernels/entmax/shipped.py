"""What is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from speechattn_kernels.common import Launch
from speechattn_kernels.entmax import backward, forward

__all__ = ["flops", "shipped"]

WIDTHS = {torch.bfloat16: (32, 64, 80, 128, 256), torch.float32: (64, 128, 256), torch.float16: (64,)}


def shipped() -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """A name, whether it is a default one, and a call that launches on tensors of the device meta."""
    for dtype, widths in WIDTHS.items():
        for width in widths:
            yield from calls(dtype, width, 60, True)
    yield from calls(torch.bfloat16, 64, 1, False)


def calls(
    dtype: torch.dtype, width: int, tokens: int, learnt: bool
) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """Forward and backward, with an alpha that is `learnt` or not."""
    q = torch.empty(4, 8, tokens, width, dtype=dtype, device="meta")
    k = torch.empty(4, 4, 500, width, dtype=dtype, device="meta")
    valid, alpha, levels = k[:, 0, :, 0].bool(), torch.empty(8, device="meta"), torch.empty(4, 8, tokens, device="meta")
    name = f"D={width} U={tokens} {str(dtype).removeprefix('torch.')}"
    yield f"forward {name}", True, partial(forward, q, k, k, valid, alpha)
    yield f"backward {name}", True, partial(backward, q, k, k, valid, alpha, levels, q, learnt)


def flops(launch: Launch) -> float:
    """Operations of one launch in products of matrices; forward with four steps of Newton's method."""
    args = launch.args
    place = 2.0 * args["q"].shape[0] * args["H"] * args["U"] * args["T"] * args["D"]
    return place * (7 if "out" in args else 5 if "to_q" in args else 4)
