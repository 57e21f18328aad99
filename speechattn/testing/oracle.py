"""Streams by definition: the whole utterance at once, without state, delay or fast kernels."""

from __future__ import annotations

from functools import singledispatch
from math import ceil

import torch
from torch.nn import functional as F

from speechattn.attention.self_attention import SelfAttention
from speechattn.audio.normal import GlobalCMVN
from speechattn.encoder.layers import ChunkDepthwise, Conv2d, Depthwise
from speechattn.frames import Frames
from speechattn.stream import Delay, Parallel, Pointwise, Residual, Serial, Sliding, Stream
from speechattn.testing.attention import dense

__all__ = ["oracle"]


@singledispatch
def oracle(stream: Stream, x: Frames) -> Frames:
    """The whole utterance by definition: no state, no delay. TypeError for a stream that nobody has defined."""
    raise TypeError(f"no oracle for {type(stream).__name__}: register one, or give check_stream a reference")


@oracle.register
def _(stream: Delay, x: Frames) -> Frames:
    return x


@oracle.register
def _(stream: Pointwise, x: Frames) -> Frames:
    return Frames.of(stream.f(x.values), x.mask)


@oracle.register
def _(stream: Serial, x: Frames) -> Frames:
    for member in stream.members:
        x = oracle(member, x)
    return x


@oracle.register
def _(stream: Parallel, x: Frames) -> Frames:
    y = stream.combine(oracle(stream.first, x), oracle(stream.second, x))
    return Frames.of(y.values, y.mask)


@oracle.register
def _(stream: Residual, x: Frames) -> Frames:
    y, z = oracle(stream.first, x), oracle(stream.second, x)
    return Frames.of(z.values + stream.scale * y.values, y.mask & z.mask)


@oracle.register
def _(stream: Sliding, x: Frames) -> Frames:
    """Window by window, out of an utterance between zeros."""
    stride, frames = stream.block or 1, x.mask.shape[1]
    outs, left = ceil(frames / stride), stream.kernel - 1 - stream.right
    space = [0, 0] * (x.values.dim() - 2)
    padded = F.pad(x.values, [*space, left, stream.kernel + stride])
    valid = F.pad(x.mask, [0, stream.kernel + stride])
    ys = [stream.windows(padded[:, o * stride : o * stride + stream.kernel]) for o in range(max(outs, 1))]
    at = torch.arange(outs) * stride
    return Frames.of(torch.cat(ys, 1)[:, :outs], valid[:, at] & valid[:, at + (stream.right if stream.whole else 0)])


@oracle.register
def _(stream: Depthwise, x: Frames) -> Frames:
    stride, conv = stream.block or 1, stream.conv
    padded = F.pad(x.values, [0, 0, stream.kernel - 1 - stream.right, stream.right + stride])
    y = F.conv1d(padded.transpose(1, 2), conv.weight, conv.bias, stride, groups=conv.groups).transpose(1, 2)
    mask = x.mask[:, ::stride]
    return Frames.of(y[:, : mask.shape[1]], mask)


@oracle.register
def _(stream: Conv2d, x: Frames) -> Frames:
    stride, frames = stream.block or 1, x.mask.shape[1]
    image = x.values[..., None] if x.values.dim() == 3 else x.values
    image = F.pad(image.permute(0, 3, 1, 2), [0, 0, stream.kernel - 1 - stream.right, stream.right + stride])
    y = F.conv2d(image, stream.conv.weight, stream.conv.bias, stream.conv.stride).permute(0, 2, 3, 1)
    mask = F.pad(x.mask, [0, stream.kernel])[:, (stream.right if stream.whole else 0) :][:, :frames:stride]
    return Frames.of(y[:, : mask.shape[1]], mask)


@oracle.register
def _(stream: ChunkDepthwise, x: Frames) -> Frames:
    chunk, conv, side = stream.block or max(1, x.mask.shape[1]), stream.conv, stream.kernel // 2
    y = torch.zeros_like(x.values)
    for t in range(x.mask.shape[1]):
        for j in range(-side, side + 1):
            if 0 <= t + j < min((t // chunk + 1) * chunk, x.mask.shape[1]):
                y[:, t] = y[:, t] + x.values[:, t + j] * conv.weight[:, 0, j + side]
    assert conv.bias is not None
    return Frames.of(y + conv.bias, x.mask)


@oracle.register
def _(stream: GlobalCMVN, x: Frames) -> Frames:
    return Frames.of((x.values - stream.mean) / stream.std, x.mask)


@oracle.register
def _(stream: SelfAttention, x: Frames) -> Frames:
    return dense(stream, x)
