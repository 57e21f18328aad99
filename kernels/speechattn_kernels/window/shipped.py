"""What is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from speechattn_kernels.common import Launch
from speechattn_kernels.window.op import window

__all__ = ["flops", "shipped"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KINDS = ("plain", "rows", "table", "turns")
PRODUCTS = {"window_forward": 2, "window_queries": 3, "window_keys": 4, "window_distance": 3}
HEADS, FRAMES = 8, 2000


def call(
    dtype: torch.dtype, kind: str, dim: int, *, left: int | None = 64, chunk: int | None = 16, dilation: int = 1,
    sinks: int = 0, dropout: float = 0.0,
) -> None:  # fmt: skip
    """Forward and backward of 8 rows and 8 heads over 4."""
    q = torch.empty(8, HEADS, FRAMES, dim, dtype=dtype, device="meta", requires_grad=True)
    k, v = (q.new_empty(8, HEADS // 2, FRAMES, dim, requires_grad=True) for _ in range(2))
    valid = torch.empty(8, FRAMES, dtype=torch.bool, device="meta")
    columns = (left or FRAMES) + 2 * (chunk or FRAMES) - 1
    rows = q.new_empty(HEADS, dim, columns, requires_grad=True) if kind == "rows" else None
    table = q.new_empty(HEADS, columns, requires_grad=True) if kind in ("rows", "table") else None
    turns = torch.empty(2, FRAMES, dim // 2, device="meta") if kind == "turns" else None
    extra = q.new_empty(8, HEADS, FRAMES, sinks, requires_grad=True) if sinks else None
    held = v.new_empty(8, HEADS // 2, sinks, dim, requires_grad=True) if sinks else None
    window(
        q, k, v, valid, left=left, chunk=chunk, dilation=dilation, extra=extra, extra_values=held, rows=rows,
        table=table, turns=turns, origin=1 - (chunk or FRAMES), dropout=dropout, seed=0,
    )[0].sum().backward()  # fmt: skip


def shipped() -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """A name, whether it is a default one, and a call on tensors of the device meta.

    Defaults are heads of 64 features in bfloat16 with each position, in float32 with none.
    """
    for name, dtype in DTYPES.items():
        for kind in KINDS:
            for dim in (32, 64, 80, 128, 256):
                default = dim == 64 and (name == "bfloat16" or (name == "float32" and kind == "plain"))
                yield f"{kind} D={dim} {name}", default, partial(call, dtype, kind, dim)
    half = torch.bfloat16
    yield "full D=64 bfloat16", False, partial(call, half, "plain", 64, left=None, chunk=None)
    yield "causal D=64 bfloat16", True, partial(call, half, "plain", 64, left=None, chunk=1)
    yield "dilation 2, dropout D=64 bfloat16", False, partial(call, half, "plain", 64, chunk=1, dilation=2, dropout=0.1)
    yield "4 sinks D=64 bfloat16", False, partial(call, half, "plain", 64, sinks=4)


def flops(launch: Launch) -> float:
    """Operations of the products of one launch, over the keys that are visible (half of all, where it is causal)."""
    args, products = launch.args, PRODUCTS[launch.kernel.fn.__name__.removesuffix("_kernel")]
    batch, heads, frames, dim = args["q"].shape
    keys = args["left"] + args["chunk"] + args["right"] if args["BOUNDED"] else frames / (2 if args["CHUNKED"] else 1)
    return 2.0 * (products + (args["rows"] is not None)) * batch * heads * frames * min(keys, frames) * dim
