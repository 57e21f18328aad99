"""From pictures of a mouth to features, 25 a second: how lips are read (Ma, Petridis, Pantic, arXiv 2102.06657)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.frames import Frames
from speechattn.stream import Sliding, Stream

__all__ = ["Grey", "LipAugment", "LipNet", "grouped"]

PIECE = 256  # frames that are looked at together where no gradient is asked: 64 channels of them are 130 MB
GROUP = 8  # channels

Norm = Callable[[int], nn.Module]


class Grey(Stream):
    """Grey pixels [B, T, H, W] from 0 to 255 (bytes or not), over 255, minus `mean`, over `std`.

    The numbers are those of recipes for LRS2 and LRS3. With `shrink` each is the mean of so many pixels each way.
    """

    def __init__(self, *, mean: float = 0.421, std: float = 0.165, shrink: int = 1) -> None:
        super().__init__()
        if std <= 0 or shrink < 1:
            raise ValueError(f"deviation {std}, shrink {shrink}: wanted positive numbers")
        self.shrink = shrink
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    mean: Tensor
    std: Tensor

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        pixels = x.values.to(self.mean.dtype)
        if self.shrink > 1:
            pixels = pixels.unfold(2, self.shrink, self.shrink).unfold(3, self.shrink, self.shrink).mean((-1, -2))
        return Frames.of((pixels / 255 - self.mean) / self.std, x.mask), state


def grouped(channels: int) -> nn.Module:
    """A norm over 8 channels of one picture: it knows neither other rows nor other frames, in training neither."""
    return nn.GroupNorm(max(1, channels // GROUP), channels)


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al., arXiv 1512.03385): [N, C, H, W] -> [N, C', H / s, W / s]."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs), activation(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs),
        )  # fmt: skip
        changes = stride > 1 or inputs != outputs
        self.skip = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
            if changes else nn.Identity()
        )  # fmt: skip
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """`x` [N, C, H, W]."""
        y: Tensor = self.activation(self.body(x) + self.skip(x))
        return y


class LipNet(Sliding):
    """Mouths [B, T, H, W] -> features [B, T, channels[-1]]: one 3D convolution, then a ResNet for each frame.

    The convolution reads 5 frames, `right` of them ahead (0: no delay), and 7 x 7 pixels. The defaults are ResNet-18,
    11.2 million weights, for 88 x 88 pixels; `channels` and `blocks` (of each stage) make it smaller, and `shrink`
    first takes the mean of so many pixels each way. `norm` makes a norm from a number of channels. nn.BatchNorm2d is
    for weights that were trained with it: in training it would mix the rows of a batch, and count padding.
    """

    def __init__(
        self, *, channels: Sequence[int] = (64, 128, 256, 512), blocks: Sequence[int] = (2, 2, 2, 2), right: int = 2,
        shrink: int = 1, norm: Norm = grouped, activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:  # fmt: skip
        super().__init__(5, right=right)
        if len(channels) != len(blocks) or min(*channels, *blocks, shrink) < 1 or not channels:
            raise ValueError(f"channels {channels}, blocks {blocks}, shrink {shrink}: wanted as many positive numbers "
                             "of blocks as of channels")  # fmt: skip
        self.shrink = shrink
        self.stem = nn.Conv3d(1, channels[0], (5, 7, 7), (1, 2, 2), (0, 3, 3), bias=False)
        self.opening = nn.Sequential(norm(channels[0]), activation(), nn.MaxPool2d(3, 2, 1))
        stages: list[nn.Module] = []
        inputs = channels[0]
        for i, (outputs, n) in enumerate(zip(channels, blocks, strict=True)):
            for j in range(n):
                stages.append(Block(inputs, outputs, 2 if i and not j else 1, norm, activation))
                inputs = outputs
        self.trunk = nn.Sequential(*stages)

    def windows(self, x: Tensor) -> Tensor:
        frames, side = x.shape[1], self.kernel - 1
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or frames - side <= PIECE:
            return self.seen(x)
        pieces = [self.seen(x[:, at : at + PIECE + side]) for at in range(0, frames - side, PIECE)]
        return torch.cat(pieces, 1)

    def seen(self, x: Tensor) -> Tensor:
        """Mouths [B, T + 4, H, W] -> [B, T, D]."""
        if self.shrink > 1:
            x = F.avg_pool2d(x, self.shrink)
        y: Tensor = self.stem(x[:, None])  # [B, C, T, H / 2, W / 2]
        y = self.trunk(self.opening(y.transpose(1, 2).flatten(0, 1)))
        return y.mean((2, 3)).view(len(x), x.shape[1] - self.kernel + 1, y.shape[1])


class LipAugment(nn.Module):
    """Other pictures of the same mouth, in training only: [B, T, H, W] -> [B, T, size, size].

    Each row as a whole is cut out at a random place of its larger picture, mirrored with the probability `flip`, and
    turned by up to `degrees` each way (bilinear; beyond the edge its last pixels). Then, for each `every` frames of the
    row, up to `longest` frames in one place become the mean picture of the row (arXiv 2202.13084). In `eval()` the
    middle is cut out, and that is all.
    """

    def __init__(
        self, *, size: int = 88, flip: float = 0.5, degrees: float = 8.0, every: int = 25, longest: int = 10
    ) -> None:
        super().__init__()
        if size < 1 or not 0 <= flip <= 1 or degrees < 0 or every < 1 or longest < 0:
            raise ValueError(f"size {size}, flip {flip}, degrees {degrees}, every {every}, longest {longest}: wanted "
                             "a probability, and no negative number")  # fmt: skip
        self.size, self.flip, self.degrees, self.every, self.longest = size, flip, degrees, every, longest

    def forward(self, x: Frames, *, generator: torch.Generator | None = None) -> Frames:
        """The same frames, changed. ValueError for pictures that are smaller than `size`."""
        spare = min(x.values.shape[2:]) - self.size
        if spare < 0:
            raise ValueError(f"pictures {list(x.values.shape[2:])} are smaller than {self.size}")
        if not self.training:
            top, left = ((n - self.size) // 2 for n in x.values.shape[2:])
            return Frames(x.values[:, :, top : top + self.size, left : left + self.size], x.mask)
        return self.masked(self.turned(x, generator), generator)

    def turned(self, x: Frames, generator: torch.Generator | None) -> Frames:
        """Cut out, mirrored and turned, by one grid of places for each row."""
        rows, _, height, width = x.values.shape
        chance = drawn((4, rows, 1, 1), x, generator)
        angle = (2 * chance[0] - 1) * torch.pi * self.degrees / 180
        mirror = 1 - 2 * (chance[1] < self.flip).to(chance.dtype)
        top, left = (chance[2] * (height - self.size + 1)).floor(), (chance[3] * (width - self.size + 1)).floor()
        places = torch.arange(self.size, device=chance.device, dtype=chance.dtype) - (self.size - 1) / 2
        down, across = places[:, None], mirror * places
        middle = (self.size - 1) / 2
        u = left + middle + across * angle.cos() + down * angle.sin()
        v = top + middle + down * angle.cos() - across * angle.sin()
        grid = torch.stack([(2 * u + 1) / width - 1, (2 * v + 1) / height - 1], -1).to(x.values.dtype)
        values = F.grid_sample(x.values, grid, padding_mode="border", align_corners=False)
        return Frames.finite(values, x.mask)

    def masked(self, x: Frames, generator: torch.Generator | None) -> Frames:
        """Stretches of time are the mean picture; frames that are not valid are not counted and not touched."""
        lengths, place = x.lengths[:, None], (x.mask.cumsum(1) - 1)[:, :, None]
        count = lengths.div(self.every, rounding_mode="floor") + (lengths % self.every > 0)
        most = int(count.max()) if len(count) else 0
        chance = drawn((2, len(lengths), most), x, generator)
        width = (chance[0] * (lengths.clamp(max=self.longest) + 1)).long()
        begin = (chance[1] * (lengths - width + 1)).long()
        used = torch.arange(most, device=lengths.device) < count
        inside = (place >= begin[:, None]) & (place < (begin + width)[:, None]) & used[:, None]
        mean = x.values.sum(1, keepdim=True) / lengths.clamp(min=1)[:, :, None, None]
        return Frames(torch.where((inside.any(-1) & x.mask)[:, :, None, None], mean, x.values), x.mask)


def drawn(shape: tuple[int, ...], x: Frames, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers on the device of `x`, from `generator` where it lives."""
    where = generator.device if generator is not None else x.mask.device
    return torch.rand(shape, generator=generator, device=where, dtype=torch.float64).to(x.mask.device)
