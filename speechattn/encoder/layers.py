"""The parts that encoders are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position
from speechattn.attention.self_attention import SelfAttention, Spanned
from speechattn.frames import Frames
from speechattn.linear import activated, bare, dropped, linear, plain, product, run
from speechattn.stream import Buffer, Plan, Pointwise, Residual, Serial, Sliding, Stream

__all__ = [
    "AttentionMaker", "ChunkDepthwise", "Conv2d", "Depthwise", "Every", "FeedForward", "Half", "Stack", "Subsample",
    "convolution", "feed_forward", "filters", "self_attention",
]  # fmt: skip

# From width, heads and span; and by name position, key_heads, norm, dropout.
AttentionMaker = Callable[[int, int, Pattern], Stream]

SUBSAMPLING = {2: ((3, 2),), 4: ((3, 2), (3, 2)), 6: ((3, 2), (5, 3)), 8: ((3, 2), (3, 2), (3, 2))}  # kernel, stride


class Depthwise(Sliding):
    """One filter for each feature: `kernel` frames, `right` of them ahead."""

    def __init__(self, dim: int, kernel: int, *, right: int = 0, stride: int = 1) -> None:
        super().__init__(kernel, stride, right=right)
        self.conv = nn.Conv1d(dim, dim, kernel, stride, groups=dim)

    masked = staticmethod(Frames.finite)

    def windows(self, x: Tensor) -> Tensor:
        return filtered(x, self.conv)


class ChunkDepthwise(Spanned):
    """One filter for each feature, centred; what follows the own chunk counts as zero.

    So it sees ahead inside the chunk and adds no latency to the attention's; in training the same zeros are there.
    """

    def __init__(self, dim: int, kernel: int, span: Pattern) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel}: a centred one is odd")
        self.kernel, self.span = kernel, span
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim)

    def plan(self) -> Plan:
        chunk = self.span.chunk if isinstance(self.span, Span) else None
        return Plan(chunk, Fraction(1), 0, None if chunk is None else self.kernel // 2, 0)

    def init_state(self, x: Frames) -> Any:
        return () if self.block is None else Buffer.empty(x.values, self.kernel // 2)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        side, chunk = self.kernel // 2, self.block
        spent = self._spend(state) if chunk is None else state
        if not x.mask.shape[1]:
            return x, spent
        if chunk is None:
            return Frames.of(filtered(F.pad(x.values, [0, 0, side, side]), self.conv), x.mask), spent
        z = state.append(x.values, x.mask)
        windows = F.pad(z.values.unfold(1, side + chunk, chunk).transpose(2, 3), [0, 0, 0, side])  # [B, N, W, D]
        y = filtered(windows.flatten(0, 1), self.conv).reshape(x.values.shape)
        return Frames.finite(y, x.mask), z.last(side)


def filtered(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """The convolution of x [B, T, D] over time. As an image of height 1 it keeps features last: nothing is moved."""
    y = F.conv2d(
        x[:, None].permute(0, 3, 1, 2), conv.weight[:, :, None], conv.bias, (1, *conv.stride), groups=conv.groups
    )
    return y.permute(0, 2, 3, 1)[:, 0]


class Half(nn.Module):
    """The first (0) or second (1) half of the features."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, -1)[self.which]


class Conv2d(Sliding):
    """A convolution over time and feature axis: [B, T, F] or [B, T, F, C] -> [B, T / stride, F', C']."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, *, right: int, whole: bool = False) -> None:
        super().__init__(kernel, stride, right=right, whole=whole)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride).to(memory_format=torch.channels_last)

    masked = staticmethod(Frames.finite)

    def windows(self, x: Tensor) -> Tensor:
        if x.dim() == 3:  # one channel: a multiplication, whose result has its channels last as the next one wants them
            x = x.unfold(1, self.kernel, self.block or 1).unfold(2, self.kernel, self.block or 1)
            return linear(x.flatten(3), self.conv.weight.flatten(1), self.conv.bias)
        y: Tensor = convolved(x.permute(0, 3, 1, 2), self.conv).permute(0, 2, 3, 1)
        return y


def convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(x)` of x [B, C, T, F], channels last in memory."""
    weight = conv.weight
    if torch.is_grad_enabled() and weight.requires_grad and bare(conv) and plain(x, weight):
        found: Tensor = Convolution.apply(x, weight, conv.bias, conv.stride)
        return found
    y: Tensor = conv(x)
    return y


class Convolution(torch.autograd.Function):
    """A strided convolution, channels last, and the gradient of its weights as one product for each of their places.

    oneDNN has a convolution for that, too; with channels last it takes more than three times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
        """x [B, C, T, F], weight [C', C, K, K] -> [B, C', T', F']."""
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, bias, stride)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By input, weight and bias; torch's own where these gradients shall have gradients."""
        (x, weight), wanted, stride = ctx.saved_tensors, ctx.needs_input_grad[:3], ctx.stride
        ours = wanted[1] and not torch.is_grad_enabled()
        asked = [wanted[0], False, False] if ours else list(wanted)
        found = torch.ops.aten.convolution_backward(
            grads[0], x, weight, weight.shape[:1], stride, (0, 0), (1, 1), False, (0, 0), 1, asked
        )
        to_x, to_weight, to_bias = found
        if ours:
            to_weight, to_bias = by_place(x, grads[0], weight.shape[2:], stride)
        return to_x, to_weight, to_bias if wanted[2] else None, None


def by_place(x: Tensor, grad: Tensor, kernel: Sequence[int], stride: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What `grad` [B, C', T', F'] means for the weights [C', C, *kernel] over x [B, C, T, F], and for the bias [C']."""
    image, ends = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    rows = image.new_empty(*ends.shape[:3], image.shape[3])
    last = [s * (n - 1) + 1 for s, n in zip(stride, ends.shape[1:3], strict=True)]
    columns = ends.flatten(0, 2).t().contiguous()
    found = x.new_empty(*kernel, len(columns), image.shape[3])
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows.copy_(image[:, i : i + last[0] : stride[0], j : j + last[1] : stride[1]])
            found[i, j] = product(columns, rows.flatten(0, 2).t(), None, "none")
    return found.permute(2, 3, 0, 1), columns.sum(1)


class Stack(Sliding):
    """`frames` neighbours side by side, every `stride` frames: [B, T, D] -> [B, T / stride, frames * D]."""

    def __init__(self, frames: int, stride: int, *, right: int | None = None) -> None:
        super().__init__(frames, stride, right=min(frames, stride) - 1 if right is None else right)

    def windows(self, x: Tensor) -> Tensor:
        return x.unfold(1, self.kernel, self.block or 1).transpose(2, 3).flatten(2)


class Every(Sliding):
    """Every `stride`-th frame, projected."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(1, stride)
        self.linear = nn.Linear(inputs, outputs)

    def windows(self, x: Tensor) -> Tensor:
        return run(self.linear, x[:, :: self.block])


class Subsample(Serial):
    """Strided convolutions over log-mel [B, T, mels] -> [B, T / factor, dim]: 2, 4, 6 or 8 times fewer frames.

    Every convolution keeps its last frames, so nothing is computed twice. They are centred, which needs no frame
    beyond the block. With `whole` they look ahead and drop the outputs that would read past the end, as toolkits do
    that convolve without padding. `convolutions` are (kernel, stride) pairs in place of those that `factor` stands for.
    """

    def __init__(
        self, mels: int, dim: int, *, factor: int = 4, convolutions: Sequence[tuple[int, int]] | None = None,
        channels: int | None = None, whole: bool = False,
    ) -> None:  # fmt: skip
        if not convolutions and factor not in SUBSAMPLING:
            raise ValueError(f"subsampling by {factor}: wanted one of {', '.join(map(str, SUBSAMPLING))}")
        channels = channels or dim
        members: list[Stream] = []
        inputs, bins = 1, mels
        for kernel, stride in convolutions or SUBSAMPLING[factor]:
            right = kernel - 1 if whole else kernel // 2
            conv = Conv2d(inputs, channels, kernel, stride, right=right, whole=whole)
            members += [conv, Pointwise(nn.ReLU(inplace=True))]
            inputs, bins = channels, (bins - kernel) // stride + 1
        super().__init__(*members, Pointwise(nn.Flatten(2), nn.Linear(channels * bins, dim)))


def self_attention(
    dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
    group: int = 1, dropout: float = 0.0, attention: AttentionMaker = SelfAttention,
) -> Stream:  # fmt: skip
    """Attention of one kind behind a norm. ValueError for an argument that this kind does not have."""
    asked = {"position": position, "key_heads": key_heads, "group": None if group == 1 else group}
    given = {name: value for name, value in asked.items() if value is not None}
    maker = cast(Callable[..., Stream], attention)
    try:
        return maker(dim, heads, span, norm=nn.LayerNorm(dim), dropout=dropout, **given)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{error}: what this attention does not take is left out, or null") from error


class FeedForward(nn.Module):
    """Norm, widen, activate, narrow: [B, T, D] -> the same shape."""

    def __init__(self, dim: int, inner: int, *, activation: Callable[[], nn.Module], dropout: float) -> None:
        super().__init__()
        self.norm, self.widen, self.narrow = nn.LayerNorm(dim), nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.activation, self.dropout = activation(), dropout

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, T, D]."""
        y = activated(self.widen, self.activation, self.norm(x))
        if not self.training:
            return run(self.narrow, y)
        return dropped(run(self.narrow, dropped(y, self.dropout)), self.dropout)


def feed_forward(
    dim: int, inner: int, *, activation: Callable[[], nn.Module] = nn.SiLU, dropout: float = 0.0, scale: float = 1.0
) -> Residual:
    """A feed-forward that is added to its input."""
    return Residual(Pointwise(FeedForward(dim, inner, activation=activation, dropout=dropout)), scale=scale)


def convolution(
    dim: int, depthwise: Stream, *, outputs: int | None = None, norm: nn.Module | None = None,
    activation: Callable[[], nn.Module] = nn.SiLU, dropout: float = 0.0,
) -> Serial:  # fmt: skip
    """The Conformer's convolution (arXiv 2005.08100, figure 2): gate, depthwise filter, norm, activate, mix.

    The gate comes before the frames are masked, so padding stays zero where the filter reads it.
    """
    return Serial(
        gate=Pointwise(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GLU()),
        depthwise=depthwise,
        mix=Pointwise(norm or nn.LayerNorm(dim), activation(), nn.Linear(dim, outputs or dim), nn.Dropout(dropout)),
    )


def filters(dim: int, kernel: int, right: int | None, span: Pattern) -> Stream:
    """A depthwise filter that looks `right` frames ahead, or (None) to the end of its chunk."""
    return ChunkDepthwise(dim, kernel, span) if right is None else Depthwise(dim, kernel, right=right)
