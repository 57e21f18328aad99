"""Block, ratio, latency and history as the outputs show them."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import torch

from speechattn.frames import Frames
from speechattn.stream import Plan, Stream

__all__ = ["measure", "needed_delay"]


def measure(stream: Stream, x: Frames) -> Plan:
    """The plan that the outputs themselves show, from one long valid row `x`.

    History and grid are read off which inputs move which outputs (in the third quarter of the utterance, which must
    be more than twice as long as the history), the delay off the step in which the first valid output appears. `left`
    is None when the first input moves every output.
    """
    assert stream.plan().block is not None, "a whole-utterance stream has no plan to measure"
    reads, frames = depends(stream, x), x.mask.shape[1]
    y, _ = stream.step(x, stream.init_state(x))
    delay, ratio = int(y.mask[0].to(torch.int8).argmax()), Fraction(y.mask.shape[1], frames)
    unbounded = all(first == 0 for first, _ in reads.values())
    block = next(
        b for b in range(1, frames)
        if (b * ratio).denominator == 1 and all(
            shifted(reads[o], reads[o + int(b * ratio)], b, unbounded) for o in reads if o + b * ratio in reads
        )
    )  # fmt: skip
    out = int(block * ratio)
    left = None if unbounded else max(0, *(o // out * block - first for o, (first, _) in reads.items()))
    latency = next(n for n in range(frames) if all(
        ceil((t + n) / block) * out >= delay + ceil(t * ratio) for t in range(2 * block)
    ))  # fmt: skip
    return Plan(block, ratio, latency, left, delay)


def needed_delay(stream: Stream, x: Frames) -> int:
    """The least delay in output frames with which steps of one block could say what `stream` says of x."""
    plan = stream.plan()
    assert plan.block is not None, "a whole-utterance stream has no delay to measure"
    reads, out = depends(stream, x), int(plan.block * plan.ratio)
    enough = (d for d in range(x.mask.shape[1]) if all(
        ceil((o + 1 + d) / out) * plan.block > last for o, (_, last) in reads.items()
    ))  # fmt: skip
    return next(enough)


def shifted(reads: tuple[int, int], later: tuple[int, int], block: int, unbounded: bool) -> bool:
    """Does the later output read the same, one block later?"""
    return later[1] - reads[1] == block and (unbounded or later[0] - reads[0] == block)


def depends(stream: Stream, x: Frames) -> dict[int, tuple[int, int]]:
    """First and last input frame that each output of the third quarter depends on.

    By gradients; for labels by changing them.
    """
    stream.eval()
    frames = x.mask.shape[1]
    leaf = x.values.clone()
    y = stream(Frames(leaf.requires_grad_() if leaf.is_floating_point() else leaf, x.mask)).values.flatten(2)
    outputs = range(y.shape[1] // 2, y.shape[1] * 3 // 4)
    if leaf.is_floating_point():
        weights = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(0), dtype=y.dtype)
        moved = []
        for o in outputs:
            (grad,) = torch.autograd.grad((y[0, o] * weights).sum(), leaf, retain_graph=True)
            moved.append(grad[0].reshape(frames, -1).abs().sum(1) > 0)
        table = torch.stack(moved)
    else:
        columns, most = [], int(x.values.max())
        for t in range(frames):
            values = x.values.clone()
            values[0, t] = most - values[0, t] if most != 2 * values[0, t] else most
            columns.append((stream(Frames(values, x.mask)).values - y)[0].abs().sum(-1) > 0)
        table = torch.stack(columns, 1)[outputs.start : outputs.stop]
    found = [row.nonzero().flatten().tolist() for row in table]
    assert found, "a longer utterance is needed"
    assert all(found), "an output depends on nothing"
    return {o: (row[0], row[-1]) for o, row in zip(outputs, found, strict=True)}
