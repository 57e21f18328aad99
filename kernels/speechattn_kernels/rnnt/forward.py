"""Frames and labels -> the log-probabilities of the lattice's arcs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speechattn_kernels.common import divided, launch, precision
from speechattn_kernels.rnnt.tiles import NOTHING, Slab, held, scores, slabs, stands, tiles

__all__ = ["Arcs", "arcs", "hide"]


class Arcs(NamedTuple):
    """Log-probabilities [B, T, U + 1] of blank and of the next label, and the logarithm of what divides them.

    Nothing is written outside of a row's lengths.
    """

    blank: Tensor
    label: Tensor
    norm: Tensor


@triton.jit(do_not_specialize=["T", "N", "row", "first", "frames"])
def rnnt_hidden_kernel(
    f, g, hidden, frame_lengths, label_lengths, T, N, J, row, first, frames,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """f [B, T, J], g [B, N, J] -> h = tanh(f + g) of a slab's pairs."""
    b = row + tl.program_id(2)
    count, length = held(frame_lengths, label_lengths, b, T, N, first, frames)
    if tl.program_id(0) * BLOCK_M >= count * length:
        return
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    there = (at < count * length)[:, None] & (j < J)[None]  # [M, J]
    frame = f + b.to(tl.int64) * T * J + (first + at // length)[:, None] * J
    label = g + b.to(tl.int64) * N * J + (at % length)[:, None] * J
    x = tl.load(frame + j[None], mask=there, other=0.0).to(tl.float32)
    x += tl.load(label + j[None], mask=there, other=0.0).to(tl.float32)
    far = tl.exp(-2 * tl.abs(x))  # never overflows
    h = (1 - far) / (1 + far)
    h = tl.where(x < 0, -h, h)
    out = hidden + tl.program_id(2).to(tl.int64) * frames * N * J
    tl.store(out + at[:, None] * J + j[None], h.to(hidden.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["T", "N", "row", "first", "frames", "blank"])
def rnnt_arcs_kernel(
    hidden, weight, bias, targets, frame_lengths, label_lengths, blanks, labels, norms,
    T, N, V, J, row, first, frames, blank,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h of a slab's pairs -> what the softmax over the vocabulary gives blank and the next label, online."""
    b = row + tl.program_id(1)
    count, length = held(frame_lengths, label_lengths, b, T, N, first, frames)
    if tl.program_id(0) * BLOCK_M >= count * length:
        return
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = at < count * length
    u, place = stands(at, N, first, length)
    follows = there & (u < length - 1)
    label = tl.load(targets + b.to(tl.int64) * (N - 1) + u, mask=follows, other=0).to(tl.int32)
    hidden += tl.program_id(1).to(tl.int64) * frames * N * J
    most = tl.full([BLOCK_M], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    silent = tl.full([BLOCK_M], NOTHING, tl.float32)
    said = tl.full([BLOCK_M], NOTHING, tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = scores(hidden, weight, bias, at, there, v, V, J, BLOCK_M, BLOCK_V, BLOCK_J, PRECISION)  # [M, V]
        higher = tl.maximum(most, tl.max(z, 1))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        most = higher
        silent = tl.maximum(silent, tl.max(tl.where((v == blank)[None], z, NOTHING), 1))
        said = tl.maximum(said, tl.max(tl.where(v[None] == label[:, None], z, NOTHING), 1))
    norm = most + tl.log(total)
    place += b.to(tl.int64) * T * N
    tl.store(norms + place, norm, mask=there)
    tl.store(blanks + place, silent - norm, mask=there)
    tl.store(labels + place, said - norm, mask=follows)


def hide(f: Tensor, g: Tensor, frame_lengths: Tensor, label_lengths: Tensor, slab: Slab, hidden: Tensor) -> None:
    """The hidden layer of a slab of f [B, T, J], g [B, N, J] into the buffer `hidden`."""
    (_, t, inner), n = f.shape, g.shape[1]
    args = {
        "f": f, "g": g, "hidden": hidden, "frame_lengths": frame_lengths, "label_lengths": label_lengths,
        "T": t, "N": n, "J": inner, "row": slab.row, "first": slab.frame, "frames": slab.frames,
        "BLOCK_M": 32, "BLOCK_J": 128,
    }  # fmt: skip
    grid = divided(slab.frames * n, 32), divided(inner, 128), slab.rows
    launch(rnnt_hidden_kernel, grid, args, warps=4, stages=1)


def arcs(
    f: Tensor, g: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, frame_lengths: Tensor, label_lengths: Tensor,
    blank: int,
) -> Arcs:  # fmt: skip
    """f [B, T, J], g [B, U + 1, J], weight [V, J], bias [V], targets [B, U] -> the lattice."""
    (b, t, inner), n, vocab = f.shape, g.shape[1], len(weight)
    found = Arcs(*(f.new_empty(b, t, n, dtype=torch.float32) for _ in range(3)))
    size, plan = tiles(f.dtype), list(slabs(b, t, n, inner))
    hidden = f.new_empty(max((s.rows * s.frames * n * inner for s in plan), default=0))
    for slab in plan:
        hide(f, g, frame_lengths, label_lengths, slab, hidden)
        args = {
            "hidden": hidden, "weight": weight, "bias": bias, "targets": targets, "frame_lengths": frame_lengths,
            "label_lengths": label_lengths, "blanks": found.blank, "labels": found.label, "norms": found.norm,
            "T": t, "N": n, "V": vocab, "J": inner, "row": slab.row, "first": slab.frame, "frames": slab.frames,
            "blank": blank, "BLOCK_M": size.pairs, "BLOCK_V": size.vocab, "BLOCK_J": size.inner,
            "PRECISION": precision(f.dtype),
        }  # fmt: skip
        grid = divided(slab.frames * n, size.pairs), slab.rows
        launch(rnnt_arcs_kernel, grid, args, warps=size.warps, stages=size.stages)
    return found
