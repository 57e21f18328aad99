"""One chunk of many live streams against their ring caches: what is new is written in place, then looked at.

Key n of a row is frame n of its last `left + late` frames, the oldest first, then come the T new ones. The history
lies in the slots (at + n) % Cap, each row has its own `at`; new frame t goes to slot (at + left + late + t) % Cap.
Query t is `late` frames behind the newest key that it came with: it is key left + t itself. With j = n - left it sees

    floor(t / chunk) * chunk - left <= j < (floor(t / chunk) + 1) * chunk + right    and    (t - j) % dilation == 0

where key n is there. Its scores are q . k / sqrt(D), plus column t - j + chunk - 1 + right of q . rows and of the
table: their R = left + 2 chunk - 1 + right columns are the distances from -(chunk - 1 + right) on. Rotary `turns` turn
key n by place n and query t by place left + t.

Why nothing races: Cap >= left + late + T, so the T slots that are written are none of those that hold history. A
program reads history from the cache, what is new from k and v and never from the cache; each new frame is written by
one program. So the order of programs does not matter, and one launch does both. For the same reason a state is whole
until more than Cap - left - late frames were written behind it: its history was not touched.
"""

from __future__ import annotations

from torch import Tensor

from speechattn_kernels.common import Op
from speechattn_kernels.step import kernel

__all__ = ["step"]


def step(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cache: Tensor, filled: Tensor, at: Tensor, *, left: int, chunk: int,
    right: int, dilation: int, late: int, rows: Tensor | None = None, table: Tensor | None = None,
    turns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [B, H, T, D], k and v [B, G, T, D], mask [B, T] of new frames -> y [B, H, T, D], the next `filled` and `at`.

    `cache` [B, Cap, 2, G, D] is written to; `filled` [B, left + late] says which frames of the history are there, `at`
    [B] where it begins. Positions: `rows` [H, D, R], `table` [H, R], `turns` [2, P, D / 2] with P >= left + late + T.
    What is not there may be NaN; who sees nothing gets zeros. No gradient flows.
    """
    check(q, k, mask, cache, filled, left=left, chunk=chunk, right=right, late=late)
    columns = left + 2 * chunk - 1 + right
    if any(x is not None and x.shape[-1] != columns for x in (rows, table)):
        raise ValueError(f"tables of positions: wanted {columns} distances")
    if turns is not None and turns.shape[1] < left + late + q.shape[2]:
        raise ValueError(f"turns of {turns.shape[1]} places: wanted {left + late + q.shape[2]} or more")
    found: tuple[Tensor, Tensor, Tensor] = op(
        q, k, v, mask, cache, filled, at, left, chunk, right, dilation, late, rows, table, turns
    )
    return found


def check(
    q: Tensor, k: Tensor, mask: Tensor, cache: Tensor, filled: Tensor, *, left: int, chunk: int, right: int, late: int
) -> None:
    """ValueError for shapes that do not fit."""
    (batch, heads, frames, dim), groups, history = q.shape, k.shape[1], left + late
    if frames % chunk or late < right or heads % groups:
        raise ValueError(f"{frames} frames in chunks of {chunk}, {late} late with {right} to the right, {heads} heads "
                         f"over {groups}: they do not fit")  # fmt: skip
    if tuple(cache.shape[2:]) != (2, groups, dim) or len(cache) != batch or cache.shape[1] < history + frames:
        raise ValueError(f"cache {tuple(cache.shape)}: wanted {(batch, history + frames, 2, groups, dim)} or longer")
    if tuple(filled.shape) != (batch, history) or tuple(mask.shape) != (batch, frames):
        raise ValueError(f"filled {tuple(filled.shape)}, mask {tuple(mask.shape)}: wanted {(batch, history)} and "
                         f"{(batch, frames)}")  # fmt: skip
    if not cache.is_contiguous() or cache.dtype != q.dtype or k.dtype != q.dtype:
        raise ValueError("the cache is written in place: wanted contiguous memory of the type of queries and keys")


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cache: Tensor, filled: Tensor, at: Tensor, left: int, chunk: int,
    right: int, dilation: int, late: int, rows: Tensor | None, table: Tensor | None, turns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `step`."""
    y, kept, after = empty(q, k, v, mask, cache, filled, at, left, chunk, right, dilation, late, rows, table, turns)
    kernel.forward(
        q, k, v, mask, cache, filled, at, y, kept, after, left=left, chunk=chunk, right=right, dilation=dilation,
        late=late, rows=rows, table=table, turns=turns,
    )  # fmt: skip
    return y, kept, after


def empty(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cache: Tensor, filled: Tensor, at: Tensor, left: int, chunk: int,
    right: int, dilation: int, late: int, rows: Tensor | None, table: Tensor | None, turns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for the results; y lies in memory as [B, T, H, D], as projections want it."""
    batch, heads, frames, dim = q.shape
    y = q.new_empty(batch, frames, heads, dim).transpose(1, 2)
    return y, filled.new_empty(filled.shape), at.new_empty(at.shape)


op = Op("step", run, empty, mutates=("cache",))
