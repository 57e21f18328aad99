"""What a stream is."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.frames import Frames
from speechattn.tree import node

__all__ = ["Buffer", "Plan", "Planned", "Spent", "Stream", "flush", "seconds"]

PIECE = 1 << 12  # input frames that `forward` reads at once when no gradient is asked


@node
class Buffer:
    """The last frames of a stream, the newest at the end: `values` [B, Cap, ...], of which `mask` [B, Cap] are there.

    Rows of different age share a batch: the older one decides the capacity, the others have unused room in front.
    """

    values: Tensor
    mask: Tensor

    @classmethod
    def empty(cls, like: Tensor, capacity: int = 0) -> Buffer:
        """Nothing yet, in a capacity of frames like those of `like` [B, T, ...]."""
        values = like.new_zeros(like.shape[0], capacity, *like.shape[2:])
        return cls(values, torch.zeros(values.shape[:2], dtype=torch.bool, device=like.device))

    @property
    def length(self) -> Tensor:
        """Frames of each row [B]."""
        return self.mask.sum(1)

    def append(self, values: Tensor, mask: Tensor) -> Buffer:
        """Newer frames [B, T, ...] behind the others."""
        return Buffer(extended(self.values.to(values.dtype), values), torch.cat([self.mask, mask], 1))

    def last(self, n: int) -> Buffer:
        """The newest `n`, without holding on to the memory of many others."""
        drop = self.values.shape[1] - n
        values = self.values[:, drop:]
        if torch.compiler.is_compiling():
            return Buffer(values, self.mask[:, drop:])
        if drop > 4 * n:
            values = values.clone()
        elif spare := vars(self.values).pop("spare", 0):
            values.spare = spare  # type: ignore[attr-defined]
        return Buffer(values, self.mask[:, drop:])

    def truncate(self, length: int) -> Buffer:
        """Forget what stands behind the first `length` frames of each row."""
        drop = (self.length - length).clamp(min=0)
        cap = self.values.shape[1]
        keep = cap - int(drop.min()) if len(drop) else cap
        at = torch.arange(keep, device=drop.device) + (cap - keep) - drop[:, None]
        rows = torch.arange(len(drop), device=drop.device)[:, None]
        mask = self.mask[rows, at.clamp(min=0)] & (at >= 0)
        return Buffer(self.values[rows, at.clamp(min=0)], mask)

    @staticmethod
    def align(buffers: Sequence[Buffer]) -> list[Buffer]:
        """The same frames in buffers of one capacity."""
        sizes = {buffer.values.shape[1] for buffer in buffers}
        if len(sizes) == 1:
            return list(buffers)
        most = max(sizes)

        def grown(x: Tensor) -> Tensor:
            return F.pad(x, [0, 0] * (x.dim() - 2) + [most - x.shape[1], 0])

        return [Buffer(grown(buffer.values), grown(buffer.mask)) for buffer in buffers]


def extended(old: Tensor, new: Tensor) -> Tensor:
    """`old` [B, N, ...] and behind it `new` [B, T, ...].

    Where no gradient is asked there is room behind what was made here (`spare` frames of it), so that most steps
    write what is new and move nothing. The room goes to the first who takes it: a second use of `old` copies.
    """
    n, frames = old.shape[1], new.shape[1]
    if not frames:
        return old
    if n <= frames or torch.is_grad_enabled() or torch.compiler.is_compiling():  # little to move, or nothing to spare
        return torch.cat([old, new], 1)
    spare = vars(old).pop("spare", 0)
    shape = old.shape[0], n + frames, *old.shape[2:]
    if spare >= frames and old.is_inference() == torch.is_inference_mode_enabled():
        both, spare = old.as_strided(shape, old.stride()), spare - frames
    else:
        spare = max(n, 4 * frames)
        both = old.new_empty(shape[0], n + frames + spare, *shape[2:])[:, : n + frames]
        both[:, :n] = old
    both[:, n:] = new
    both.spare = spare  # type: ignore[attr-defined]
    return both


@node
class Spent:
    """The state of a stream that has read its whole utterance."""


class Plan(NamedTuple):
    """What a stream does to time; `Stream` says what the numbers mean."""

    block: int | None
    ratio: Fraction
    latency: int
    left: int | None
    delay: int  # leading output frames that stand for nothing

    def outputs(self, frames: int) -> int:
        """Output frames of so many input frames; in integers, which compilers follow."""
        return -(-frames * self.ratio.numerator // self.ratio.denominator)


class Stream(nn.Module):
    """Maps `Frames` to `Frames`; the same function whole or in pieces.

    Law: for any split of `flush(x, stream)` into pieces whose lengths are multiples of `block`, the concatenated
    outputs of `step`, without the first `delay`, equal `forward(x)` (in `eval()`), in values and in gradients.
    `speechattn.testing.check_stream` checks it, and more.

    `block = None` is a stream that needs the whole utterance: it takes one step, and refuses a second.
    """

    block: int | None = 1  # input frames of a step come in multiples of this
    ratio: Fraction = Fraction(1)  # output frames per input frame
    latency: int = 0  # input frames that must follow a block before its output appears
    left: int | None = 0  # input frames before a block that matter to its output; None: all of them

    def plan(self) -> Plan:
        """The four numbers, and the leading output frames that a delayed stream begins with."""
        return Plan(self.block, self.ratio, self.latency, self.left, int(self.latency * self.ratio))

    @property
    def delay(self) -> int:
        """Leading output frames that stand for nothing, because the stream still waits."""
        return self.plan().delay

    def earliest(self, output: int) -> int | None:
        """The first input frame that output frame `output` may depend on, were there frames before 0; None: all."""
        plan = self.plan()
        if plan.block is None or plan.left is None:
            return None
        return output // int(plan.block * plan.ratio) * plan.block - plan.left

    def init_state(self, x: Frames) -> Any:
        """The state before the first step, for the rows, type and device of `x`; its frames are not read."""
        return ()

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        """The next piece of input -> what can be said now, and the next state. `state` is consumed."""
        raise NotImplementedError

    def ahead(self, state: Any) -> Frames | None:
        """What the stream thinks of the frames that it will say next, as far as it has read them; None: nothing.

        They are valid where the frames are there, and the next step may say something else of them.
        """
        return None

    def forward(self, x: Frames) -> Frames:
        """The whole utterance: one step over `flush(x)`, without the delay.

        Where no gradient is asked, a long utterance is read in pieces: memory is bounded, and the law makes it equal.
        """
        if torch.is_grad_enabled():
            return self.at_once(x)
        plan = self.plan()
        frames, state = x.mask.shape[1], self.init_state(x)
        if plan.block is None:
            return self.step(x, state)[0]
        x = flush(x, self)
        most = PIECE if x.values.dim() > 2 else 64 * PIECE  # a sample is small
        total, piece = x.mask.shape[1], ceil(most / plan.block) * plan.block
        if plan.left is None or total <= piece:
            piece = max(total, 1)
        outputs = []
        for at in range(0, max(total, 1), piece):
            y, state = self.step(x[at : at + piece], state)
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else Frames.cat(outputs)
        return y[plan.delay : plan.delay + plan.outputs(frames)]

    def at_once(self, x: Frames) -> Frames:
        """`forward` in one step; what is made of streams passes the utterance from one to the next, without a state."""
        plan, frames = self.plan(), x.mask.shape[1]
        y, _ = self.step(flush(x, self), self.init_state(x))
        return y if plan.block is None else y[plan.delay : plan.delay + plan.outputs(frames)]

    def _spend(self, state: Any) -> Spent:
        """What a whole-utterance stream calls in each step."""
        if isinstance(state, Spent):
            raise RuntimeError(f"{type(self).__name__} needs the whole utterance: it cannot take a second step")
        return Spent()


class Planned(Stream):
    """A stream whose numbers follow from its parts: a subclass gives `plan`."""

    def plan(self) -> Plan:
        raise NotImplementedError

    @property
    def block(self) -> int | None:  # type: ignore[override]
        return self.plan().block

    @property
    def ratio(self) -> Fraction:  # type: ignore[override]
        return self.plan().ratio

    @property
    def latency(self) -> int:  # type: ignore[override]
        return self.plan().latency

    @property
    def left(self) -> int | None:  # type: ignore[override]
        return self.plan().left


def flush(x: Frames, stream: Stream) -> Frames:
    """`x` [B, T, ...] and the invalid frames that push its last outputs out."""
    plan = stream.plan()
    if plan.block is None:
        return x
    frames = x.mask.shape[1]
    return x.pad(ceil((frames + plan.latency) / plan.block) * plan.block - frames)


def seconds(stream: Stream, rate: float) -> float:
    """The longest that a frame waits for its output, in seconds, at `rate` input frames a second; inf: to the end."""
    plan = stream.plan()
    return float("inf") if plan.block is None else (plan.block - 1 + plan.latency) / rate
