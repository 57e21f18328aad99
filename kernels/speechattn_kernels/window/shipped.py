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
# Of a pair of query and key that sees each other: scores, and what comes of them; then those that rows add, which are
# scores again, and gradients of q in the kernel of queries, of the rows in that of distances.
PRODUCTS = {"window_forward": (2, 1), "window_queries": (3, 2), "window_keys": (4, 1), "window_distance": (2, 2)}
HEADS, FRAMES = 8, 2000


def call(
    dtype: torch.dtype, kind: str, dim: int, *, left: int | None = 64, chunk: int | None = 16, dilation: int = 1,
    sinks: int = 0, dropout: float = 0.0, heads: int = HEADS, frames: int = FRAMES,
) -> None:  # fmt: skip
    """Forward and backward of 8 rows and, by default, 8 heads over 4."""
    groups = max(heads // 2, 1)
    q = torch.empty(8, heads, frames, dim, dtype=dtype, device="meta", requires_grad=True)
    k, v = (q.new_empty(8, groups, frames, dim, requires_grad=True) for _ in range(2))
    valid = torch.empty(8, frames, dtype=torch.bool, device="meta")
    columns = (frames if left is None else left) + 2 * (chunk or frames) - 1
    rows = q.new_empty(heads, dim, columns, requires_grad=True) if kind == "rows" else None
    table = None
    if kind in ("rows", "table"):
        table = q.new_empty(heads, columns, dtype=torch.float32, requires_grad=True)
    turns = torch.empty(2, frames, dim // 2, device="meta") if kind == "turns" else None
    extra = q.new_empty(8, heads, frames, sinks, requires_grad=True) if sinks else None
    held = v.new_empty(8, groups, sinks, dim, requires_grad=True) if sinks else None
    window(
        q, k, v, valid, left=left, chunk=chunk, dilation=dilation, extra=extra, extra_values=held, rows=rows,
        table=table, turns=turns, origin=1 - (chunk or frames), dropout=dropout, seed=0,
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
    for kind in KINDS:
        yield f"{kind} D=64 bfloat16, T=1999", True, partial(call, half, kind, 64, frames=1999)
    yield "turns D=64 bfloat16, T=N=H=P=1", True, partial(call, half, "turns", 64, heads=1, frames=1)


def flops(launch: Launch) -> float:
    """Operations of the products of one launch, over the keys that are visible (half of all, where it is causal)."""
    args, (products, more) = launch.args, PRODUCTS[launch.kernel.fn.__name__.removesuffix("_kernel")]
    batch, heads, frames, dim = args["q"].shape
    keys = args["left"] + args["chunk"] + args["right"] if args["BOUNDED"] else args["N"] / (1 + args["CHUNKED"])
    products += more if args["rows"] is not None else 0
    seen = products * min(keys, args["N"]) / args["dilation"] + args.get("S", 0)  # sinks come with their scores
    return float(2 * batch * heads * frames * seen * dim)
