"""Lips by a residual network whose every convolution sees time: R3D (Tran et al., arXiv 1711.11248)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from speechattn.audio.lips import Norm, grouped
from speechattn.stream import Pointwise, Residual, Serial, Sliding, Stream

__all__ = ["Conv3d", "LipResNet3D"]


class Conv3d(Sliding):
    """A convolution over time and picture: [B, T, C, H, W] (or [B, T, H, W]) -> [B, T, C', H / stride, W / stride].

    Of its `frames`, `right` are ahead.
    """

    def __init__(self, inputs: int, outputs: int, frames: int, pixels: int, *, stride: int = 1, right: int = 0) -> None:
        super().__init__(frames, right=right)
        edge = pixels // 2
        self.conv = nn.Conv3d(
            inputs, outputs, (frames, pixels, pixels), (1, stride, stride), (0, edge, edge), bias=False
        )

    def windows(self, x: Tensor) -> Tensor:
        x = x[:, :, None] if x.dim() == 4 else x
        y: Tensor = self.conv(x.transpose(1, 2))
        return y.transpose(1, 2)


class Pictures(nn.Module):
    """What a module makes of each picture [N, C, H, W], for [B, T, C, H, W]."""

    def __init__(self, *f: nn.Module) -> None:
        super().__init__()
        self.f = nn.Sequential(*f)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, T, C, H, W]."""
        y: Tensor = self.f(x.flatten(0, 1))
        return y.view(*x.shape[:2], *y.shape[1:])


class Average(nn.Module):
    """Pictures [B, T, C, H, W] -> [B, T, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the pixels."""
        return x.mean((3, 4))


class LipResNet3D(Serial):
    """Mouths [B, T, H, W] -> features [B, T, channels[-1]], 25 a second: ResNet-18 in three dimensions.

    Time keeps its rate; pictures become half as wide with each stage. Every convolution reads three frames, so that
    the whole sees 35 of them; with `right` 1 half of them are ahead, 17 frames or 0.68 s of delay, with 0 none.
    """

    def __init__(
        self, *, channels: Sequence[int] = (64, 128, 256, 512), blocks: Sequence[int] = (2, 2, 2, 2), right: int = 0,
        norm: Norm = grouped, activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:  # fmt: skip
        if len(channels) != len(blocks) or not channels or min(*channels, *blocks) < 1 or right not in (0, 1):
            raise ValueError(f"channels {channels}, blocks {blocks}, right {right}: wanted as many positive numbers of "
                             "blocks as of channels, and 0 or 1")  # fmt: skip
        members: list[Stream] = [
            Conv3d(1, channels[0], 3, 7, stride=2, right=right), Pointwise(Pictures(norm(channels[0]), activation()))
        ]  # fmt: skip
        inputs = channels[0]
        for i, (outputs, n) in enumerate(zip(channels, blocks, strict=True)):
            for j in range(n):
                members += residual(inputs, outputs, 2 if i and not j else 1, right, norm, activation)
                inputs = outputs
        super().__init__(*members, Pointwise(Average()))


def residual(
    inputs: int, outputs: int, stride: int, right: int, norm: Norm, activation: Callable[[], nn.Module]
) -> list[Stream]:  # fmt: skip
    """Two convolutions beside a shortcut, and what follows their sum."""
    body = Serial(
        Conv3d(inputs, outputs, 3, 3, stride=stride, right=right), Pointwise(Pictures(norm(outputs), activation())),
        Conv3d(outputs, outputs, 3, 3, right=right), Pointwise(Pictures(norm(outputs))),
    )  # fmt: skip
    skip = None
    if stride > 1 or inputs != outputs:
        skip = Serial(Conv3d(inputs, outputs, 1, 1, stride=stride), Pointwise(Pictures(norm(outputs))))
    return [Residual(body, skip=skip), Pointwise(Pictures(activation()))]
