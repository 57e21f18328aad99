"""Streams that read frame by frame, later, or through a sliding window."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any

from torch import Tensor, nn

from speechattn.frames import Frames
from speechattn.linear import run
from speechattn.stream.contract import Buffer, Stream

__all__ = ["Delay", "Pointwise", "Sliding", "delayed"]


class Pointwise(Stream):
    """Any function of one frame: `f` maps [B, T, D] to [B, T, D'] and treats every frame alike; f(0) is finite.

    An `f` that works in place changes what the stream before it gave: only behind one that keeps no hold of that.
    """

    def __init__(self, *f: nn.Module) -> None:
        super().__init__()
        self.f = f[0] if len(f) == 1 else nn.Sequential(*f)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        return Frames.finite(run(self.f, x.values), x.mask), state


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

    masked = staticmethod(Frames.of)

    def windows(self, x: Tensor) -> Tensor:
        """Inputs [B, T, ...] -> an output for every window that lies inside, [B, (T - kernel) // stride + 1, ...]."""
        raise NotImplementedError

    def init_state(self, x: Frames) -> Buffer:
        return Buffer.empty(x.values, self.kernel - 1 - self.right + self.latency)

    def step(self, x: Frames, state: Buffer) -> tuple[Frames, Buffer]:
        stride, left = self.block or 1, self.kernel - 1 - self.right
        frames = x.mask.shape[1]
        z = state.append(x.values, x.mask)
        mask = z.mask[:, left : left + frames : stride] if stride > 1 or self.latency else x.mask
        if self.whole:
            mask = mask & z.mask[:, left + self.right : left + self.right + frames : stride]
        if frames:
            y = self.windows(z.values[:, : frames - stride + self.kernel])
        else:
            y = self.windows(z.values.new_zeros(z.values.shape[0], self.kernel, *z.values.shape[2:]))[:, :0]
        return self.masked(y, mask), z.last(state.mask.shape[1])
