"""The kernels of the expected monotonic alignment: one program for each row, tile after tile, token after token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from speechattn_kernels.common import divided, launch, power

__all__ = ["LARGEST", "backward", "forward", "frames", "shape"]

LARGEST = 1024  # frames of a tile


@triton.jit
def then(a, s, b, c, t, d):
    """First y -> a y + b with a = 1 - s, then y -> c y + d with c = 1 - t.

    Of a and s the smaller one is made of its kind: each keeps its digits, s also where a rounds to 1.
    """
    stop = s + a * t
    return tl.where(stop < 0.5, 1 - stop, a * c), stop, b * c + d


@triton.jit
def monotonic_forward_kernel(p, start, alpha, edges, U, T, BLOCK: tl.constexpr):
    """alpha [N, U, T] of p [N, U, T] and start [N, T]; edges [N, T / BLOCK, U], q at the last frame of each tile."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(T, BLOCK)
    for tile in range(tiles):
        j = tile * BLOCK + tl.arange(0, BLOCK)
        there = j < T
        stood = tl.load(start + row * T + j, mask=there, other=0.0).to(tl.float32)
        tl.debug_barrier()  # the edges of the tile before were written by other threads
        for i in range(U):
            line, edge = (row * U + i) * T, edges + (row * tiles + tile) * U + i
            stop = tl.load(p + line + j, mask=there, other=0.0).to(tl.float32)
            before = tl.load(p + line + j - 1, mask=there & (j > 0), other=1.0).to(tl.float32)
            came = tl.load(edge - U, mask=tile > 0, other=0.0)
            way, _, q = tl.associative_scan((1 - before, before, stood), 0, then)
            q += way * came
            stood = stop * q
            tl.store(alpha + line + j, stood, mask=there)
            tl.store(edge, tl.sum(tl.where(j == tile * BLOCK + BLOCK - 1, q, 0.0)))


@triton.jit
def monotonic_backward_kernel(p, start, alpha, edges, grad, to_p, to_start, back, U, T, BLOCK: tl.constexpr):
    """to_p [N, U, T] and to_start [N, T]; back [N, T / BLOCK, U], the worth h behind the first frame of each tile."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(T, BLOCK)
    for k in range(tiles):
        tile = tiles - 1 - k
        j = tile * BLOCK + tl.arange(0, BLOCK)
        there, follows = j < T, j + 1 < T
        here, ahead = (
            tl.zeros([BLOCK], tl.float32),
            tl.zeros([BLOCK], tl.float32),
        )  # h of the token after, at j and j + 1
        tl.debug_barrier()  # what is behind the tile was written by other threads
        for u in range(U):
            i = U - 1 - u
            line, edge = (row * U + i) * T, (row * tiles + tile) * U + i
            stop = tl.load(p + line + j, mask=there, other=0.0).to(tl.float32)
            worth = here + tl.load(grad + line + j, mask=there, other=0.0)
            # How much the place behind each frame is worth, from the right.
            stop_ahead = tl.load(p + line + j + 1, mask=follows, other=1.0).to(tl.float32)
            worth_ahead = ahead + tl.load(grad + line + j + 1, mask=follows, other=0.0)
            came = tl.load(back + edge + U, mask=k > 0, other=0.0)
            maps = (1 - stop_ahead, stop_ahead, stop_ahead * worth_ahead)
            way, _, ahead = tl.associative_scan(maps, 0, then, reverse=True)
            ahead += way * came
            here = stop * worth + (1 - stop) * ahead
            tl.store(back + edge, tl.sum(tl.where(j == tile * BLOCK, ahead, 0.0)))
            # Who stands at each frame, from the left, as before.
            before = tl.load(p + line + j - 1, mask=there & (j > 0), other=1.0).to(tl.float32)
            if i > 0:
                stood = tl.load(alpha + line - T + j, mask=there, other=0.0)
            else:
                stood = tl.load(start + row * T + j, mask=there, other=0.0).to(tl.float32)
            came = tl.load(edges + edge - U, mask=tile > 0, other=0.0)
            way, _, q = tl.associative_scan((1 - before, before, stood), 0, then)
            q += way * came
            tl.store(to_p + line + j, q * (worth - ahead), mask=there)
        tl.store(to_start + row * T + j, here, mask=there)


def frames(count: int) -> int:
    """Frames of a tile, for so many frames of a row."""
    return min(power(count, 32), LARGEST)


def shape(p: Tensor) -> tuple[int, int, int]:
    """Of `edges`: an entry for each row, tile and token."""
    rows, tokens, count = p.shape
    return rows, divided(count, LARGEST), tokens


def warps(block: int) -> int:
    """Of a program with so many frames in a tile."""
    return max(1, min(block // 128, 8))


def forward(p: Tensor, start: Tensor, alpha: Tensor, edges: Tensor) -> None:
    """Fills `alpha` and `edges`."""
    rows, tokens, count = p.shape
    block = frames(count)
    args = {"p": p, "start": start, "alpha": alpha, "edges": edges, "U": tokens, "T": count, "BLOCK": block}
    launch(monotonic_forward_kernel, (rows,), args, warps=warps(block), stages=1)


def backward(
    p: Tensor, start: Tensor, alpha: Tensor, edges: Tensor, grad: Tensor, *, to_p: Tensor, to_start: Tensor
) -> None:
    """Fills `to_p` and `to_start` with the gradients."""
    rows, tokens, count = p.shape
    block = frames(count)
    args = {
        "p": p, "start": start, "alpha": alpha, "edges": edges, "grad": grad, "to_p": to_p, "to_start": to_start,
        "back": p.new_empty(edges.shape, dtype=edges.dtype), "U": tokens, "T": count, "BLOCK": block,
    }  # fmt: skip
    launch(monotonic_backward_kernel, (rows,), args, warps=warps(block), stages=1)
