"""What the kernels of the transducer's loss share: where a pair stands, how large a slab of pairs and a tile are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from speechattn_kernels.common import divided

__all__ = [
    "NOTHING", "WORKSPACE", "Slab", "Tiles", "clipped", "held", "scores", "slabs", "splits", "stands", "tiles",
]  # fmt: skip

# The most elements of the buffers that the pairs of one slab need: 128 MiB in bfloat16. A slab of one frame of one row
# is the least there is, whatever it needs.
WORKSPACE = 1 << 26

# The logarithm of nothing. It is finite, so that the difference of two is no NaN; thousands of them can be added.
NOTHING = tl.constexpr(-1e30)


@dataclass(frozen=True)
class Slab:
    """Pairs that are in memory at once: `frames` frames from `frame` on of `rows` rows of the batch from `row` on."""

    row: int
    rows: int
    frame: int
    frames: int


def slabs(batch: int, frames: int, labels: int, width: int) -> Iterator[Slab]:
    """All of B rows and T frames of `labels` = U + 1 pairs each, of which each needs `width` elements."""
    room = max(WORKSPACE // (labels * width), 1)
    rows = max(min(batch, room), 1)
    long = max(min(frames, room // rows), 1)
    for row in range(0, batch, rows):
        for frame in range(0, frames, long):
            yield Slab(row, min(rows, batch - row), frame, min(long, frames - frame))


@dataclass(frozen=True)
class Tiles:
    """How many pairs, vocabulary entries and inner features a program multiplies at a time, by how many warps.

    What sums over pairs, for the weight, has tiles of `vocab` x `vocab`.
    """

    pairs: int
    vocab: int
    inner: int
    warps: int
    weight_warps: int
    stages: int


def tiles(dtype: torch.dtype) -> Tiles:
    """What fits into the registers: float32 is multiplied without tensor cores, or with TF32."""
    if dtype == torch.float32:
        return Tiles(pairs=64, vocab=64, inner=16, warps=4, weight_warps=4, stages=2)
    return Tiles(pairs=64, vocab=128, inner=64, warps=4, weight_warps=8, stages=3)


@triton.jit
def clipped(lengths, b, most):
    """The length of row `b`, of at most what there is in memory."""
    return tl.minimum(tl.load(lengths + b).to(tl.int32), most)


@triton.jit
def held(frame_lengths, label_lengths, b, T, N, first, frames):
    """How many frames of row `b` the slab holds, and how many pairs each has."""
    return (
        tl.maximum(tl.minimum(clipped(frame_lengths, b, T) - first, frames), 0),
        clipped(label_lengths, b, N - 1) + 1,
    )


@triton.jit
def stands(row, N, first, length):
    """Where the pairs `row` [M] of a slab stand: label u, and the place in [T, N].

    Pairs of a row of the batch are side by side, only its own: nothing is computed for what pads it.
    """
    u = row % length
    return u, (first + row // length) * N + u


@triton.jit
def scores(
    hidden, weight, bias, row, here, v, V, J,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z [M, V] of the pairs `row` [M], whose h [M, J] is in memory, for the entries `v` [V]."""
    known = v < V
    z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        h = tl.load(hidden + row[:, None] * J + j[None], mask=here[:, None] & (j < J)[None], other=0.0)  # [M, J]
        w = tl.load(weight + v[None] * J + j[:, None], mask=known[None] & (j < J)[:, None], other=0.0)
        z = tl.dot(h, w, z, input_precision=PRECISION)  # [J, V]
    z += tl.load(bias + v, mask=known, other=0.0).to(tl.float32)[None]
    return tl.where(known[None], z, NOTHING)


def splits(pairs: int, vocab: int, inner: int, sizes: Tiles) -> int:
    """In how many parts a slab's pairs are summed for the weight: enough programs for a GPU, and bounded memory."""
    programs = divided(vocab, sizes.vocab) * divided(inner, sizes.vocab)
    return max(min(256 // programs, pairs // 1024), 1)
