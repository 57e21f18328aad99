"""From samples to features, 25 a second: a ResNet over the waveform (Ma, Petridis, Pantic, arXiv 2102.06657)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.stream import Pointwise, Residual, Serial, Sliding, Stream

__all__ = ["Conv1d", "Mean", "WaveResNet"]

STEM, HOP, LAST = 80, 4, 20  # samples that the first convolution reads, and its step; frames of the mean at the end


class Conv1d(Sliding):
    """A convolution over time, centred: [B, T, D] (or samples [B, T]) -> [B, T / stride, D']."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(kernel, stride, right=kernel // 2 if kernel % 2 else kernel // 2 - 1)
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=False)

    def windows(self, x: Tensor) -> Tensor:
        x = x[:, :, None] if x.dim() == 2 else x
        return F.conv1d(x.transpose(1, 2), self.conv.weight, None, self.conv.stride).transpose(1, 2)


class Mean(Sliding):
    """The mean of each `n` frames; a row's last one is over what is there of it, and silence."""

    def __init__(self, n: int) -> None:
        super().__init__(n, n, right=n - 1)

    def windows(self, x: Tensor) -> Tensor:
        return x.unfold(1, self.kernel, self.kernel).mean(-1)


class WaveResNet(Serial):
    """Samples [B, N] at 16 kHz -> [B, N / 640, channels[-1]], the clock of the lips: ResNet-18 in one dimension.

    A convolution over 5 ms every 0.25 ms, stages of residual blocks that halve the rate but for the first, and a mean.
    Norms are over the channels of one frame, so a row does not know its batch, in training neither. `channels` and
    `blocks` (of each of the four stages) make it smaller.
    """

    def __init__(
        self, *, channels: Sequence[int] = (64, 128, 256, 512), blocks: Sequence[int] = (2, 2, 2, 2),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:  # fmt: skip
        if len(channels) != 4 or len(blocks) != 4 or min(*channels, *blocks) < 1:
            raise ValueError(f"channels {channels}, blocks {blocks}: wanted four positive numbers each")
        stem = Conv1d(1, channels[0], STEM, HOP)
        members: list[Stream] = [stem, Pointwise(nn.LayerNorm(channels[0]), activation())]
        inputs = channels[0]
        for i, (outputs, n) in enumerate(zip(channels, blocks, strict=True)):
            for j in range(n):
                members += [residual(inputs, outputs, 2 if i and not j else 1, activation), Pointwise(activation())]
                inputs = outputs
        super().__init__(*members, Mean(LAST))


def residual(inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module]) -> Residual:
    """Two convolutions over three frames beside a shortcut: [B, T, D] -> [B, T / stride, D']."""
    body = Serial(
        Conv1d(inputs, outputs, 3, stride), Pointwise(nn.LayerNorm(outputs), activation()),
        Conv1d(outputs, outputs, 3), Pointwise(nn.LayerNorm(outputs)),
    )  # fmt: skip
    if stride == 1 and inputs == outputs:
        return Residual(body)
    return Residual(body, skip=Serial(Conv1d(inputs, outputs, 1, stride), Pointwise(nn.LayerNorm(outputs))))
