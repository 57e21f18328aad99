"""The laws of streams, as checks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from speechattn import tree
from speechattn.frames import Frames
from speechattn.stream import Spent, Stream, flush
from speechattn.stream.packing import stacked
from speechattn.testing.oracle import oracle

__all__ = ["check_export", "check_stream", "random_frames", "random_pieces", "stepped"]


def random_frames(
    lengths: Sequence[int], *features: int, seed: int = 0, vocab: int | None = None, frames: int | None = None
) -> Frames:
    """Random valid frames [B, T, *features], or labels below `vocab`; the padding was made of NaN."""
    maker = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths) if frames is None else frames, *features
    if vocab:
        values = torch.randint(vocab, shape, generator=maker)
    else:
        values = torch.randn(shape, generator=maker, dtype=torch.get_default_dtype())
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    if not vocab:
        values[~mask] = torch.nan
    return Frames.of(values, mask)


def random_pieces(stream: Stream, frames: int, seed: int) -> list[int]:
    """Sizes of steps, multiples of the block, that add up to a flushed input of so many frames."""
    draw, sizes, block = random.Random(seed), list[int](), stream.plan().block or 1
    while sum(sizes) < frames:
        sizes.append(min(block * draw.choice([1, 1, 2, 3, 7]), frames - sum(sizes)))
    return sizes


def stepped(stream: Stream, x: Frames, pieces: Sequence[int] | None = None, *, seed: int = 0) -> Frames:
    """What `forward` says, from steps over `pieces` of the flushed input (random ones if not given)."""
    plan, frames = stream.plan(), x.mask.shape[1]
    state, x = stream.init_state(x), flush(x, stream)
    outputs = [stream.step(x[:0], state)[0]]
    at = 0
    for size in random_pieces(stream, x.mask.shape[1], seed) if pieces is None else pieces:
        y, state = stream.step(x[at : at + size], state)
        outputs.append(y)
        at += size
    return Frames.cat(outputs)[plan.delay : plan.delay + ceil(frames * plan.ratio)]


def check_stream(
    stream: Stream, x: Frames, *, reference: Callable[[Stream, Frames], Frames] | None = None, seed: int = 0,
    tolerance: float = 1e-9,
) -> None:  # fmt: skip
    """Run every law on `stream` with input `x`, of two rows or more and in float64; AssertionError names what broke.

    `reference` is an independent implementation of `forward`; by default `oracle`.
    """
    stream.eval()
    y = stream(x)
    expected = (reference or oracle)(stream, x)
    same(y, expected, "forward differs from the reference", tolerance)
    assert not y.values[~y.mask].any(), "values are not zero where the mask says that nothing is"
    alone(stream, x, y, tolerance)
    short(stream, x, reference or oracle, tolerance)
    if stream.plan().block is None:
        refuses(stream, x)
        return
    for i in range(4):
        with torch.set_grad_enabled(i % 2 == 0):  # without a gradient, states are written in place
            same(stepped(stream, x, seed=seed + i), y, "steps differ from forward", tolerance)
    gradients(stream, x, seed, tolerance)
    with torch.no_grad():
        slots(stream, x, seed, tolerance)


def same(a: Frames, b: Frames, what: str, tolerance: float) -> None:
    """Equal masks and values."""
    assert a.mask.shape == b.mask.shape, f"{what}: {list(a.mask.shape)} frames, not {list(b.mask.shape)}"
    assert torch.equal(a.mask, b.mask), f"{what}: other frames are valid"
    close(a.values, b.values, what, tolerance)


def close(a: Tensor, b: Tensor, what: str, tolerance: float) -> None:
    """Equal up to the tolerance, relative to the largest value; NaN is never equal."""
    if a.numel():
        gap = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
        assert gap <= tolerance, f"{what}: by {gap:.2g}"


def alone(stream: Stream, x: Frames, y: Frames, tolerance: float) -> None:
    """A row does not know its batch, nor the length of its padding."""
    for row, length in enumerate(x.lengths.tolist()):
        one = stream(Frames(x.values[row : row + 1, :length], x.mask[row : row + 1, :length]))
        n = one.mask.shape[1]
        same(one, Frames(y.values[row : row + 1], y.mask[row : row + 1])[:n], "a row alone is another", tolerance)
        assert not y.mask[row, n:].any(), "padding became valid"


def short(stream: Stream, x: Frames, reference: Callable[[Stream, Frames], Frames], tolerance: float) -> None:
    """No frames, one frame, and less than a block."""
    block = stream.plan().block or 2
    for frames in sorted({0, 1, block - 1}):
        if frames <= x.mask.shape[1]:
            piece = x[:frames]
            same(stream(piece), reference(stream, piece), f"{frames} frames differ from the reference", tolerance)


def refuses(stream: Stream, x: Frames) -> None:
    """A whole-utterance stream takes one step."""
    _, state = stream.step(x, stream.init_state(x))
    assert isinstance(state, Spent), "a whole-utterance stream must end in Spent"
    try:
        stream.step(x, state)
    except RuntimeError:
        return
    raise AssertionError("a whole-utterance stream took a second step")


def gradients(stream: Stream, x: Frames, seed: int, tolerance: float) -> None:
    """Steps and forward have the same gradients with respect to the input and every parameter."""
    wanted = [p for p in stream.parameters() if p.requires_grad]
    found = []
    for run in (lambda z: stream(z), lambda z: stepped(stream, z, seed=seed)):
        leaf = x.values.clone()
        inputs = [leaf.requires_grad_(), *wanted] if leaf.is_floating_point() else wanted
        y = run(Frames.of(leaf, x.mask))
        if not y.values.requires_grad:
            return
        weights = torch.randn(y.values.shape, generator=torch.Generator().manual_seed(seed), dtype=y.values.dtype)
        found.append(torch.autograd.grad((y.values * weights).sum(), inputs, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None), "a parameter has a gradient only in steps or only in forward"
        if a is not None and b is not None:
            close(b, a, "gradients of steps differ from those of forward", tolerance)


def slots(stream: Stream, x: Frames, seed: int, tolerance: float) -> None:
    """Rows are paused, reset, moved and joined by tree operations, and none of them notices."""
    plan, frames = stream.plan(), x.mask.shape[1]
    x = flush(x, stream)
    block = plan.block or 1
    out = int(block * plan.ratio)
    steps = x.mask.shape[1] // block
    rows, draw = len(x.mask), random.Random(seed)
    state = fresh = stream.init_state(x)
    at = [-draw.randint(1, 3) for _ in range(rows)]  # a row begins with other sound, and is reset at step 0
    order = list(range(rows))  # which row of x lives in which slot
    parts: list[list[Frames]] = [[] for _ in range(rows)]
    while min(at) < steps:
        runs = [at[row] < steps and draw.random() < 0.7 for row in order]
        pieces = [row_of(x, row, max(at[row], 0) % steps * block, block) for row in order]
        y, new = stream.step(stacked(pieces), tree.clone(state))
        state = tree.where(torch.tensor(runs), new, state)
        for slot, row in enumerate(order):
            if runs[slot]:
                if at[row] >= 0:
                    parts[row].append(row_of(y, slot, 0, out))
                at[row] += 1
        began = torch.tensor([runs[slot] and at[row] == 0 for slot, row in enumerate(order)])
        state = tree.where(began, fresh, state)
        if draw.random() < 0.3:
            moved = draw.sample(range(rows), rows)
            state, order = tree.select(state, moved), [order[slot] for slot in moved]
        if draw.random() < 0.2 and tree.leaves(state):
            state = tree.concat(tree.split(state))
    y = stream(x[:frames])
    end = plan.delay + ceil(frames * plan.ratio)
    for row, pieces in enumerate(parts):
        same(Frames.cat(pieces)[plan.delay : end], row_of(y, row, 0, end), "a paused, reset or moved row differs",
             tolerance)  # fmt: skip


def row_of(x: Frames, row: int, at: int, n: int) -> Frames:
    """A stretch of one row as a batch of one."""
    return Frames(x.values[row : row + 1, at : at + n], x.mask[row : row + 1, at : at + n])


def check_export(stream: Stream, x: Frames) -> None:
    """`step` is exported with the batch of `x` and a few blocks, and the exported program gives the same."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stream = stream

        def forward(self, x: Frames, state: Any) -> tuple[Frames, Any]:
            return self.stream.step(x, state)

    plan = stream.plan()
    with torch.no_grad():
        state = stream.init_state(x)
        if plan.block is not None:
            _, state = stream.step(flush(x, stream)[: plan.block], state)
            x = flush(x, stream)[plan.block : 3 * plan.block]
        program = torch.export.export(Step().eval(), (x, state))
        (y, after), (z, expected) = program.module()(x, state), stream.step(x, state)
    same(y, z, "the exported step differs", 1e-9)
    for a, b in zip(tree.leaves(after), tree.leaves(expected), strict=True):
        close(a.double(), b.double(), "the exported state differs", 1e-9)
