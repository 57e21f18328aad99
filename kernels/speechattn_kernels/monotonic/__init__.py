"""Expected monotonic alignment (Raffel et al., arXiv 1704.00784) in one kernel: an exact scan in linear numbers.

A head that stands at a frame stops there for token i with probability p, else looks at the next one:

    q[i, j] = (1 - p[i, j-1]) q[i, j-1] + alpha[i-1, j]        alpha[i, j] = p[i, j] q[i, j]

with alpha[-1] = start. Maps y -> a y + b are composed in any grouping, so that q of a tile is one associative scan, to
which the q of the last frame before it is carried. Nothing is negative, nothing is divided, so each of the roughly j
operations behind a number adds at most half a unit in its last place: no number cancels. A sum of logarithms
would add to each exponent an error of its size, and the smaller a probability the larger that is; what falls below the
smallest float here is zero in the result anyway. (The tests measure both against float64.)

Backward. With g the gradient of alpha, let h[i, j] be what standing at frame j for token i is worth:

    G[i, j] = g[i, j] + h[i+1, j]        h[i, j] = p[i, j] G[i, j] + (1 - p[i, j]) h[i, j+1]        h[U] = 0

the same recurrence from the right, a mean of values of G, so that it cannot grow. Then

    d p[i, j] = q[i, j] (G[i, j] - h[i, j+1])        d start[j] = h[0, j]

where q is scanned anew from alpha[i-1]: alpha / p says nothing where p is 0. Saved are p, start, alpha (all there
anyway, alpha in float32) and the carried q, one number for each tile of 1024 frames and token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speechattn_kernels.common import Op
from speechattn_kernels.monotonic import kernel

__all__ = ["monotonic"]


def monotonic(p: Tensor, start: Tensor) -> Tensor:
    """p [N, U, T], and where rows stand at first, start [N, T] -> alpha [N, U, T] of the dtype of p.

    Both in [0, 1], float32, bfloat16 or float16; computed in float32. Frames that are not there have p = 0.
    """
    if p.dim() != 3 or start.shape != (p.shape[0], p.shape[2]):
        raise ValueError(f"p {tuple(p.shape)} and start {tuple(start.shape)}: wanted [N, U, T] and [N, T]")
    alpha, _ = forward(p, start)
    return alpha.to(p.dtype)


def run(p: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """alpha [N, U, T] and the carried q [N, tiles, U], both in float32."""
    alpha, edges = empty(p, start)
    kernel.forward(p.contiguous(), start.contiguous(), alpha, edges)
    return alpha, edges


def empty(p: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    return p.new_empty(p.shape, dtype=torch.float32), p.new_empty(kernel.shape(p), dtype=torch.float32)


def run_back(p: Tensor, start: Tensor, alpha: Tensor, edges: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of p and start, of their dtypes."""
    to_p, to_start = empty_back(p, start, alpha, edges, grad)
    p, start, grad = p.contiguous(), start.contiguous(), grad.contiguous()
    kernel.backward(p, start, alpha, edges, grad, to_p=to_p, to_start=to_start)
    return to_p, to_start


def empty_back(p: Tensor, start: Tensor, alpha: Tensor, edges: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return p.new_empty(p.shape), start.new_empty(start.shape)


def save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return backward(*ctx.saved_tensors, grad)


forward = Op("monotonic", run, empty)
backward = Op("monotonic_backward", run_back, empty_back)
forward.register_autograd(gradients, setup_context=save)
