"""Streams: the same function of a sequence, whole or in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.frames import Frames
from speechattn.tree import node

__all__ = ["Buffer", "Delay", "Join", "Pair", "Parallel", "Plan", "Planned", "Pointwise", "Residual", "Serial",
           "Sliding", "Spent", "Stream", "flush", "seconds"]  # fmt: skip

PIECE = 1 << 14  # input frames that `forward` reads at once when no gradient is asked


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
        return Buffer(torch.cat([self.values.to(values.dtype), values], 1), torch.cat([self.mask, mask], 1))

    def last(self, n: int) -> Buffer:
        """The newest `n`, without holding on to the memory of many others."""
        drop = self.values.shape[1] - n
        values, mask = self.values[:, drop:], self.mask[:, drop:]
        return Buffer(values.clone() if drop > n else values, mask)

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
        most = max(buffer.values.shape[1] for buffer in buffers)

        def grown(x: Tensor) -> Tensor:
            return F.pad(x, [0, 0] * (x.dim() - 2) + [most - x.shape[1], 0])

        return [Buffer(grown(buffer.values), grown(buffer.mask)) for buffer in buffers]


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

    def forward(self, x: Frames) -> Frames:
        """The whole utterance: one step over `flush(x)`, without the delay.

        Where no gradient is asked, a long utterance is read in pieces: memory is bounded, and the law makes it equal.
        """
        plan = self.plan()
        frames, state = x.mask.shape[1], self.init_state(x)
        if plan.block is None:
            return self.step(x, state)[0]
        x = flush(x, self)
        total, piece = x.mask.shape[1], ceil(PIECE / plan.block) * plan.block
        if torch.is_grad_enabled() or plan.left is None or total <= piece:
            piece = max(total, 1)
        outputs = []
        for at in range(0, max(total, 1), piece):
            y, state = self.step(x[at : at + piece], state)
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else Frames.cat(outputs)
        return y[plan.delay : plan.delay + ceil(frames * plan.ratio)]

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


class Pointwise(Stream):
    """Any function of one frame: `f` maps [B, T, D] to [B, T, D'] and treats every frame alike."""

    def __init__(self, *f: nn.Module) -> None:
        super().__init__()
        self.f = f[0] if len(f) == 1 else nn.Sequential(*f)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        return Frames.of(self.f(x.values), x.mask), state


class Delay(Stream):
    """The same frames, `n` frames later."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.latency = n

    def init_state(self, x: Frames) -> Buffer:
        return Buffer.empty(x.values, self.latency)

    def step(self, x: Frames, state: Buffer) -> tuple[Frames, Buffer]:
        return delayed(x, state)


def delayed(x: Frames, state: Buffer) -> tuple[Frames, Buffer]:
    """`x` behind the frames that wait in `state`; as many wait afterwards."""
    waiting = state.values.shape[1]
    if not waiting:
        return x, state
    z = state.append(x.values, x.mask)
    frames = x.mask.shape[1]
    return Frames(z.values[:, :frames], z.mask[:, :frames]), z.last(waiting)


class Sliding(Stream):
    """Base of everything that reads a window every `stride` frames: convolutions, stacking, spectra.

    Output t reads the `kernel` inputs up to t * stride + `right`; beyond the ends there are zeros. It is valid when
    input t * stride is; with `whole` its last input must be too, so outputs that would read past the end are not.
    """

    def __init__(self, kernel: int, stride: int = 1, *, right: int = 0, whole: bool = False) -> None:
        super().__init__()
        if not 0 <= right < kernel or stride < 1:
            raise ValueError(f"kernel {kernel}, stride {stride}, right {right}: wanted 0 <= right < kernel, stride > 0")
        self.kernel, self.right, self.whole = kernel, right, whole
        self.block, self.ratio, self.left = stride, Fraction(1, stride), kernel - 1 - right
        self.latency = ceil(max(0, right - (stride - 1)) / stride) * stride  # the phase stays

    def windows(self, x: Tensor) -> Tensor:
        """Inputs [B, T, ...] -> an output for every window that lies inside, [B, (T - kernel) // stride + 1, ...]."""
        raise NotImplementedError

    def init_state(self, x: Frames) -> Buffer:
        return Buffer.empty(x.values, self.kernel - 1 - self.right + self.latency)

    def step(self, x: Frames, state: Buffer) -> tuple[Frames, Buffer]:
        stride, left = self.block or 1, self.kernel - 1 - self.right
        frames = x.mask.shape[1]
        z = state.append(x.values, x.mask)
        mask = z.mask[:, left : left + frames : stride]
        if self.whole:
            mask = mask & z.mask[:, left + self.right : left + self.right + frames : stride]
        if frames:
            y = self.windows(z.values[:, : frames - stride + self.kernel])
        else:
            y = self.windows(z.values.new_zeros(z.values.shape[0], self.kernel, *z.values.shape[2:]))[:, :0]
        return Frames.of(y, mask), z.last(state.mask.shape[1])


class Serial(Planned):
    """One stream after the other.

    Ratios multiply, latencies add up, and a delayed stream is pushed onto the grid of the next one. A member given
    by keyword is an attribute of that name.
    """

    def __init__(self, *members: Stream, **named: Stream) -> None:
        super().__init__()
        for i, member in enumerate(members):
            self.add_module(str(i), member)
        for name, member in named.items():
            self.add_module(name, member)

    @property
    def members(self) -> list[Stream]:
        """The streams in order."""
        return list(self._modules.values())  # type: ignore[arg-type]

    def gaps(self) -> list[int]:
        """Frames by which the input of each member is delayed, so that it falls onto that member's grid."""
        return gaps([member.plan() for member in self.members])

    def delays(self) -> list[int]:
        """Leading output frames of each member that stand for nothing."""
        return delays([member.plan() for member in self.members])

    def plan(self) -> Plan:
        plans = [member.plan() for member in self.members]
        ratio, block = Fraction(1), Fraction(1)
        for plan in plans:
            if plan.block is not None:
                block = common(block, plan.block / ratio)
            ratio *= plan.ratio
        if any(plan.block is None for plan in plans):
            return Plan(None, ratio, 0, None, 0)
        latency = 0
        for plan, gap in zip(reversed(plans), reversed(gaps(plans)), strict=True):
            latency = ceil(latency / plan.ratio) + plan.latency + gap
        first = self.earliest(0)
        return Plan(block.numerator, ratio, latency, None if first is None else -first, (delays(plans) or [0])[-1])

    def earliest(self, output: int) -> int | None:
        at: int | None = output
        for member in reversed(self.members):
            at = None if at is None else member.earliest(at)
        return at

    def init_state(self, x: Frames) -> Any:
        if self.block is None:
            return ()
        states, x = [], x[:0]
        for member, gap in zip(self.members, self.gaps(), strict=True):
            state = member.init_state(x)
            states.append((Buffer.empty(x.values, gap), state))
            x, _ = member.step(x, state)
        return tuple(states)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        return self.trace(x, state, None)

    def trace(self, x: Frames, state: Any, seen: list[Frames] | None) -> tuple[Frames, Any]:
        """As `step`; what comes out of each member is added to `seen`."""
        members = self.members
        if isinstance(state, Spent) or (not state and members):
            spent = self._spend(state)
            for member in members:
                x = member(x)
                if seen is not None:
                    seen.append(x)
            return x, spent
        states = []
        for member, (gap, before) in zip(members, state, strict=True):
            x, gap = delayed(x, gap)
            x, after = member.step(x, before)
            states.append((gap, after))
            if seen is not None:
                seen.append(x)
        return x, tuple(states)


def common(a: Fraction, b: Fraction) -> Fraction:
    """The least number that is a whole multiple of both."""
    return Fraction(lcm(a.numerator * b.denominator, b.numerator * a.denominator), a.denominator * b.denominator)


def gaps(plans: Sequence[Plan]) -> list[int]:
    """For each of a series: the frames that push the delay before it onto its grid."""
    found, delay = [], 0
    for plan in plans:
        gap = -delay % (plan.block or 1)
        found.append(gap)
        delay = int((delay + gap) * plan.ratio) + plan.delay
    return found


def delays(plans: Sequence[Plan]) -> list[int]:
    """For each of a series: the output frames by which everything up to it is delayed."""
    found, delay = [], 0
    for plan, gap in zip(plans, gaps(plans), strict=True):
        delay = int((delay + gap) * plan.ratio) + plan.delay
        found.append(delay)
    return found


class Parallel(Planned):
    """Two streams over the same input, brought to the same delay; their features stand side by side.

    Both must have the same ratio. A subclass may combine them in another way.
    """

    def __init__(self, first: Stream, second: Stream) -> None:
        super().__init__()
        self.first, self.second = first, second

    def plan(self) -> Plan:
        a, b = self.first.plan(), self.second.plan()
        if a.ratio != b.ratio:
            raise ValueError(f"parallel streams with ratios {a.ratio} and {b.ratio}")
        if a.block is None or b.block is None:
            return Plan(None, a.ratio, 0, None, 0)
        block = lcm(a.block, b.block)
        first = self.earliest(0)
        left = None if first is None else -first
        return Plan(block, a.ratio, max(a.latency, b.latency), left, max(a.delay, b.delay))

    def earliest(self, output: int) -> int | None:
        a, b = self.first.earliest(output), self.second.earliest(output)
        return None if a is None or b is None else min(a, b)

    def combine(self, first: Frames, second: Frames) -> Frames:
        """Outputs [B, T, D] and [B, T, D'] -> [B, T, D + D']."""
        return Frames(torch.cat([first.values, second.values], -1), first.mask & second.mask)

    def init_state(self, x: Frames) -> Any:
        if self.block is None:
            return ()
        x, late = x[:0], self.delay
        states = []
        for member in (self.first, self.second):
            state = member.init_state(x)
            y, _ = member.step(x, state)
            states.append((state, Buffer.empty(y.values, late - member.delay)))
        return tuple(states)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        if isinstance(state, Spent) or not state:
            spent = self._spend(state)
            return self.combine(self.first(x), self.second(x)), spent
        (a, a_late), (b, b_late) = state
        y, a = self.first.step(x, a)
        y, a_late = delayed(y, a_late)
        z, b = self.second.step(x, b)
        z, b_late = delayed(z, b_late)
        return self.combine(y, z), ((a, a_late), (b, b_late))


class Residual(Parallel):
    """`x + scale * body(x)`, the input delayed as much as the body; `skip` stands in where the body changes shape."""

    def __init__(self, body: Stream, *, scale: float = 1.0, skip: Stream | None = None) -> None:
        super().__init__(body, skip or Delay(0))
        self.scale = scale

    def combine(self, first: Frames, second: Frames) -> Frames:
        values = torch.add(second.values, first.values, alpha=self.scale)
        return Frames(values, second.mask)


@node
class Pair:
    """The input of two clocks: pieces of the same stretch of time."""

    first: Frames
    second: Frames


class Join(nn.Module):
    """Two streams with clocks of their own (sound and lips), side by side at one output rate.

    `rates` are the input frames a second of both; their outputs must fall together exactly, else ValueError. A step
    takes the same stretch of time of both; an input that is late or missing comes as invalid frames. An output frame
    is valid when either side is, and zero on the side that is not.
    """

    def __init__(self, first: Stream, second: Stream, *, rates: tuple[Fraction | int, Fraction | int]) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.rates = Fraction(rates[0]), Fraction(rates[1])
        out = [rate * stream.ratio for rate, stream in zip(self.rates, (first, second), strict=True)]
        if out[0] != out[1]:
            raise ValueError(f"outputs at {out[0]} and {out[1]} frames a second cannot be joined")

    @property
    def blocks(self) -> tuple[int, int]:
        """Input frames of each clock: a step takes multiples of both, the same multiple."""
        a, b = self.first.plan(), self.second.plan()
        if a.block is None or b.block is None:
            raise ValueError("a stream that needs the whole utterance cannot be joined with another clock")
        out = common(a.block * a.ratio, b.block * b.ratio)
        return int(out / a.ratio), int(out / b.ratio)

    @property
    def delay(self) -> int:
        """Leading output frames that stand for nothing."""
        return max(self.first.delay, self.second.delay)

    def init_state(self, x: Pair) -> Any:
        """The state before the first step."""
        states = []
        for stream, input in ((self.first, x.first[:0]), (self.second, x.second[:0])):
            state = stream.init_state(input)
            y, _ = stream.step(input, state)
            states.append((state, Buffer.empty(y.values, self.delay - stream.delay)))
        return tuple(states)

    def step(self, x: Pair, state: Any) -> tuple[Frames, Any]:
        """The next stretch of time of both -> [B, T, D + D'] and the next state."""
        (a, a_late), (b, b_late) = state
        y, a = self.first.step(x.first, a)
        y, a_late = delayed(y, a_late)
        z, b = self.second.step(x.second, b)
        z, b_late = delayed(z, b_late)
        joined = Frames(torch.cat([y.values, z.values], -1), y.mask | z.mask)
        return joined, ((a, a_late), (b, b_late))

    def forward(self, x: Pair) -> Frames:
        """Both whole utterances; the shorter one ends in invalid frames."""
        plans, blocks = (self.first.plan(), self.second.plan()), self.blocks
        both = (x.first, x.second)
        outs = [ceil(i.mask.shape[1] * p.ratio) for i, p in zip(both, plans, strict=True)]
        steps = max(
            ceil((i.mask.shape[1] + p.latency + (self.delay - p.delay) / p.ratio) / b)
            for i, p, b in zip(both, plans, blocks, strict=True)
        )
        x = Pair(*(i.pad(steps * b - i.mask.shape[1]) for i, b in zip(both, blocks, strict=True)))
        y, _ = self.step(x, self.init_state(x))
        return y[self.delay : self.delay + max(outs)]
