"""What is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from speechattn_kernels.common import Launch
from speechattn_kernels.step import step

__all__ = ["flops", "shipped"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("none", "relative", "table", "rotary")
# Positions, features of a head, frames, type; the first are those that spill nothing.
USUAL = [
    *((kind, 64, 16, dtype) for dtype in ("float32", "bfloat16") for kind in KINDS),
    *((kind, dim, 16, "bfloat16") for dim in (32, 128) for kind in ("relative", "rotary")),
    *(("relative", 64, frames, "bfloat16") for frames in (1, 64)),
    ("rotary", 256, 16, "bfloat16"), ("relative", 64, 16, "float16"),
]  # fmt: skip
WIDE = [("relative", 256, 16, "bfloat16"), ("relative", 128, 64, "float32"), ("relative", 256, 64, "float32")]


def call(dtype: torch.dtype, kind: str, *, dim: int, left: int, chunk: int, frames: int, right: int = 0) -> object:
    """A step of 8 rows and 4 heads over 2."""
    late = -(-right // chunk) * chunk
    q = torch.empty(8, 4, frames, dim, dtype=dtype, device="meta")
    k, columns = q[:, :2], left + 2 * chunk - 1 + right
    mask = torch.empty(8, frames, dtype=torch.bool, device="meta")
    cache = q.new_empty(8, left + late + frames, 2, 2, dim)
    table = q.new_empty(4, columns) if kind in ("relative", "table") else None
    rows = q.new_empty(4, dim, columns) if kind == "relative" else None
    turns = q.new_empty(2, cache.shape[1], dim // 2, dtype=torch.float32) if kind == "rotary" else None
    return step(
        q, k, k, mask, cache, mask.new_empty(8, left + late), mask.new_empty(8, dtype=torch.long), left=left,
        chunk=chunk, right=right, dilation=1, late=late, rows=rows, table=table, turns=turns,
    )  # fmt: skip


def shipped() -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """A name, whether it is a default one, and a call on tensors of the device meta."""
    for case in [*USUAL, *WIDE]:
        kind, dim, frames, dtype = case
        made = partial(call, DTYPES[dtype], kind, dim=dim, left=64, chunk=min(frames, 16), frames=frames)
        yield f"{kind} D={dim} T={frames} {dtype}", case in USUAL, made


def flops(launch: Launch) -> float:
    """Operations of one launch on what is visible: two products, or three with `rows` (one column a distance)."""
    args = launch.args
    batch, heads, frames, dim = args["q"].shape
    keys = args["left"] + args["chunk"] + args["right"]
    return 2.0 * batch * heads * frames * keys * dim * (2 if args["rows"] is None else 3)
