"""From the posteriors of the arcs back through softmax and joint network, a slab of pairs at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speechattn_kernels.common import divided, launch, precision
from speechattn_kernels.rnnt.forward import hide
from speechattn_kernels.rnnt.tiles import Slab, Tiles, held, scores, slabs, splits, stands, tiles

__all__ = ["Gradients", "gradients"]


class Gradients(NamedTuple):
    """Of f [B, T, J], g [B, U + 1, J], weight [V, J] and bias [V]."""

    f: Tensor
    g: Tensor
    weight: Tensor
    bias: Tensor


@triton.jit(do_not_specialize=["T", "N", "row", "first", "frames", "blank"])
def rnnt_slopes_kernel(
    hidden, weight, bias, targets, frame_lengths, label_lengths, norms, blank_mass, label_mass, slopes, bias_sums,
    T, N, V, J, STRIDE, row, first, frames, blank,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h of a slab's pairs -> dz = mass of both arcs * softmax(z) - the mass of each at its entry, and its sum."""
    b = row + tl.program_id(2)
    count, length = held(frame_lengths, label_lengths, b, T, N, first, frames)
    if tl.program_id(0) * BLOCK_M >= count * length:
        return
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = at < count * length
    u, place = stands(at, N, first, length)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    segment = tl.program_id(2).to(tl.int64) * frames * N
    z = scores(hidden + segment * J, weight, bias, at, there, v, V, J, BLOCK_M, BLOCK_V, BLOCK_J, PRECISION)  # [M, V]
    label = tl.load(targets + b.to(tl.int64) * (N - 1) + u, mask=there & (u < length - 1), other=-1).to(tl.int32)
    place += b.to(tl.int64) * T * N
    norm = tl.load(norms + place, mask=there, other=0.0)
    silent = tl.load(blank_mass + place, mask=there, other=0.0)
    said = tl.load(label_mass + place, mask=there, other=0.0)
    dz = (silent + said)[:, None] * tl.exp(z - norm[:, None])
    dz -= tl.where((v == blank)[None], silent[:, None], 0.0)
    dz -= tl.where(v[None] == label[:, None], said[:, None], 0.0)
    dz = tl.where(there[:, None], dz, 0.0)
    out = slopes + segment * STRIDE + at[:, None] * STRIDE + v[None]
    tl.store(out, dz.to(slopes.dtype.element_ty), mask=there[:, None] & (v < V)[None])
    part = bias_sums + (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * V + v
    tl.store(part, tl.load(part, mask=v < V, other=0.0) + tl.sum(dz, 0), mask=v < V)


@triton.jit(do_not_specialize=["T", "N", "row", "rows", "first", "frames"])
def rnnt_weight_kernel(
    slopes, hidden, frame_lengths, label_lengths, weight_sums, T, N, V, J, STRIDE, row, rows, first, frames,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz, h of a slab's pairs -> the sum of dz h^T over every so many of them, added to [S, V, J]."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    part = weight_sums + (tl.program_id(2).to(tl.int64) * V + v[:, None]) * J + j[None]  # [V, J]
    there = (v < V)[:, None] & (j < J)[None]
    total = tl.load(part, mask=there, other=0.0)
    size = tl.zeros([], tl.int64) + frames * N
    for r in range(rows):
        count, length = held(frame_lengths, label_lengths, row + r, T, N, first, frames)
        segment = r * size
        for start in range(tl.program_id(2) * BLOCK_M, count * length, tl.num_programs(2) * BLOCK_M):
            at = start + tl.arange(0, BLOCK_M)
            here = at < count * length
            dz = slopes + segment * STRIDE + at[None] * STRIDE + v[:, None]
            dz = tl.load(dz, mask=here[None] & (v < V)[:, None], other=0.0)  # [V, M]
            h = hidden + segment * J + at[:, None] * J + j[None]
            h = tl.load(h, mask=here[:, None] & (j < J)[None], other=0.0)  # [M, J]
            total = tl.dot(dz, h, total, input_precision=PRECISION)
    tl.store(part, total, mask=there)


@triton.jit(do_not_specialize=["T", "N", "row", "first", "frames"])
def rnnt_inner_kernel(
    slopes, weight, hidden, frame_lengths, label_lengths, T, N, V, J, STRIDE, row, first, frames,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz, h of a slab's pairs -> the derivative of f + g, W^T dz (1 - h^2), in place of h."""
    b = row + tl.program_id(2)
    count, length = held(frame_lengths, label_lengths, b, T, N, first, frames)
    if tl.program_id(0) * BLOCK_M >= count * length:
        return
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = at < count * length
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    segment = tl.program_id(2).to(tl.int64) * frames * N
    total = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        dz = slopes + segment * STRIDE + at[:, None] * STRIDE + v[None]
        dz = tl.load(dz, mask=here[:, None] & (v < V)[None], other=0.0)  # [M, V]
        w = tl.load(weight + v.to(tl.int64)[:, None] * J + j[None], mask=(v < V)[:, None] & (j < J)[None], other=0.0)
        total = tl.dot(dz, w, total, input_precision=PRECISION)
    there = here[:, None] & (j < J)[None]
    place = hidden + segment * J + at[:, None] * J + j[None]
    h = tl.load(place, mask=there, other=0.0).to(tl.float32)
    tl.store(place, (total * (1 - h * h)).to(hidden.dtype.element_ty), mask=there)


@triton.jit
def summed(inner, first, step, count, j, J, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr):
    """The sum [J] of `count` of the pairs, from `first` on, `step` apart."""
    total = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
    for start in range(0, count, BLOCK_M):
        k = start + tl.arange(0, BLOCK_M)
        at = inner + (first + k * step)[:, None] * J + j[None]
        total += tl.load(at, mask=(k < count)[:, None] & (j < J)[None], other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["T", "N", "row", "first", "frames"])
def rnnt_frames_kernel(
    inner, frame_lengths, label_lengths, df, T, N, J, row, first, frames, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr
):
    """A slab's derivative of f + g -> that of f [B, T, J], of which the slab has all labels."""
    b = row + tl.program_id(2)
    count, length = held(frame_lengths, label_lengths, b, T, N, first, frames)
    t = tl.program_id(0)
    if t >= count:
        return
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = summed(inner + (b - row).to(tl.int64) * frames * N * J, t * length, 1, length, j, J, BLOCK_M, BLOCK_J)
    tl.store(df + b.to(tl.int64) * T * J + (first + t) * J + j, total.to(df.dtype.element_ty), mask=j < J)


@triton.jit(do_not_specialize=["T", "N", "row", "first", "frames"])
def rnnt_labels_kernel(
    inner, frame_lengths, label_lengths, dg, T, N, J, row, first, frames, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr
):
    """A slab's derivative of f + g, added to that of g [B, N, J]."""
    b = row + tl.program_id(2)
    count, length = held(frame_lengths, label_lengths, b, T, N, first, frames)
    u = tl.program_id(0)
    if u >= length:
        return
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = summed(inner + (b - row).to(tl.int64) * frames * N * J, u, length, count, j, J, BLOCK_M, BLOCK_J)
    place = dg + b.to(tl.int64) * N * J + u * J + j
    tl.store(place, tl.load(place, mask=j < J, other=0.0) + total, mask=j < J)


def gradients(
    f: Tensor, g: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, frame_lengths: Tensor, label_lengths: Tensor,
    norm: Tensor, mass: tuple[Tensor, Tensor], blank: int,
) -> Gradients:  # fmt: skip
    """What `arcs` took, and the posteriors of blanks and labels [B, T, U + 1] -> the gradient of it all.

    Besides the slab, a few sums for the weight (`splits`) and one of a vocabulary for each tile of pairs are kept. All
    are added in one order: the gradient is the same in each run.
    """
    (b, t, inner), n, vocab = f.shape, g.shape[1], len(weight)
    size, stride = tiles(f.dtype), 16 * divided(vocab, 16)
    plan = list(slabs(b, t, n, inner + stride))
    pairs = max((s.rows * s.frames * n for s in plan), default=0)
    parts = max((s.rows * divided(s.frames * n, size.pairs) for s in plan), default=0)
    hidden, slopes = f.new_empty(pairs * inner), f.new_empty(pairs * stride)
    wide: dict[str, torch.dtype] = {"dtype": torch.float32}
    dg, df = torch.zeros_like(g, **wide), torch.zeros_like(f)
    weight_sums = weight.new_zeros(splits(pairs, vocab, inner, size), vocab, inner, **wide)
    bias_sums = bias.new_zeros(parts, vocab, **wide)
    shared = {"frame_lengths": frame_lengths, "label_lengths": label_lengths, "T": t, "N": n, "J": inner}
    product = {"V": vocab, "STRIDE": stride, "PRECISION": precision(f.dtype)}
    for slab in plan:
        hide(f, g, frame_lengths, label_lengths, slab, hidden)
        here = {**shared, "row": slab.row, "first": slab.frame, "frames": slab.frames}
        slope(
            slab, size,
            {**here, **product, "hidden": hidden, "weight": weight, "bias": bias, "targets": targets, "norms": norm,
             "blank_mass": mass[0], "label_mass": mass[1], "slopes": slopes, "bias_sums": bias_sums, "blank": blank},
        )  # fmt: skip
        add(slab, size, {**here, **product, "slopes": slopes, "hidden": hidden, "weight_sums": weight_sums})
        through(slab, size, {**here, **product, "slopes": slopes, "weight": weight, "hidden": hidden})
        reduce(slab, {**here, "inner": hidden}, df, dg)
    return Gradients(df, dg.to(g.dtype), weight_sums.sum(0).to(weight.dtype), bias_sums.sum(0).to(bias.dtype))


def slope(slab: Slab, size: Tiles, args: dict[str, Any]) -> None:
    """Launch `rnnt_slopes_kernel`."""
    grid = divided(slab.frames * args["N"], size.pairs), divided(args["V"], size.vocab), slab.rows
    args |= {"BLOCK_M": size.pairs, "BLOCK_V": size.vocab, "BLOCK_J": size.inner}
    launch(rnnt_slopes_kernel, grid, args, warps=size.warps, stages=size.stages)


def add(slab: Slab, size: Tiles, args: dict[str, Any]) -> None:
    """Launch `rnnt_weight_kernel`: its tiles are of the weight, through which the pairs run."""
    grid = divided(args["V"], size.vocab), divided(args["J"], size.vocab), len(args["weight_sums"])
    args |= {"rows": slab.rows, "BLOCK_M": size.inner, "BLOCK_V": size.vocab, "BLOCK_J": size.vocab}
    launch(rnnt_weight_kernel, grid, args, warps=size.weight_warps, stages=size.stages)


def through(slab: Slab, size: Tiles, args: dict[str, Any]) -> None:
    """Launch `rnnt_inner_kernel`: its tiles are of the inner features, through which the vocabulary runs."""
    grid = divided(slab.frames * args["N"], size.pairs), divided(args["J"], size.vocab), slab.rows
    args |= {"BLOCK_M": size.pairs, "BLOCK_V": size.inner, "BLOCK_J": size.vocab}
    launch(rnnt_inner_kernel, grid, args, warps=size.warps, stages=size.stages)


def reduce(slab: Slab, args: dict[str, Any], df: Tensor, dg: Tensor) -> None:
    """Launch the sums over labels and over frames."""
    args |= {"BLOCK_M": 16, "BLOCK_J": 128}
    columns = divided(args["J"], 128)
    launch(rnnt_frames_kernel, (slab.frames, columns, slab.rows), {**args, "df": df}, warps=4, stages=2)
    launch(rnnt_labels_kernel, (args["N"], columns, slab.rows), {**args, "dg": dg}, warps=4, stages=2)
