"""What is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from speechattn_kernels.common import Launch
from speechattn_kernels.entmax import backward, forward

__all__ = ["flops", "shipped"]

WIDTHS = {torch.bfloat16: (32, 64, 80, 128, 256), torch.float32: (32, 64, 128, 256), torch.float16: (64, 128)}


def shipped() -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """A name, whether it is a default one, and a call that launches it on tensors of the device meta.

    Defaults are 60 tokens, and heads of 64 features with fewer; but for the gradient of float32 heads of 256, which
    spills. So do, by a few bytes, some forwards of fewer tokens.
    """
    for dtype, widths in WIDTHS.items():
        for width in widths:
            yield from calls(dtype, width, 60, True)
    for width, tokens in ((64, 1), (64, 20), (32, 20), (80, 1)):
        yield from calls(torch.bfloat16, width, tokens, False)


def calls(
    dtype: torch.dtype, width: int, tokens: int, learnt: bool
) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """Forward and backward, with an alpha that is `learnt` or not."""
    usual = width == 64 or tokens == 60
    q = torch.empty(4, 8, tokens, width, dtype=dtype, device="meta")
    k = torch.empty(4, 4, 500, width, dtype=dtype, device="meta")
    valid, alpha, levels = k[:, 0, :, 0].bool(), torch.empty(8, device="meta"), torch.empty(4, 8, tokens, device="meta")
    name, light = f"D={width} U={tokens} {str(dtype).removeprefix('torch.')}", width < 256 or dtype != torch.float32
    yield f"forward {name}", usual, partial(forward, q, k, k, valid, alpha)
    yield f"backward {name}", usual and light, partial(backward, q, k, k, valid, alpha, levels, q, learnt)


def flops(launch: Launch) -> float:
    """Operations of one launch in products of matrices; forward with four steps of Newton's method."""
    args = launch.args
    place = 2.0 * args["q"].shape[0] * args["H"] * args["U"] * args["T"] * args["D"]
    return place * (7 if "out" in args else 5 if "to_q" in args else 4)
