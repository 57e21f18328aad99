"""The transducer's loss from the halves of its joint network, without a tensor of frames x labels x vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speechattn_kernels.common import Op
from speechattn_kernels.rnnt.backward import gradients
from speechattn_kernels.rnnt.forward import Arcs, arcs
from speechattn_kernels.rnnt.lattice import backward_scores, forward_scores

__all__ = ["rnnt"]


def rnnt(
    frames: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, frame_lengths: Tensor,
    label_lengths: Tensor, *, blank: int = 0,
) -> Tensor:  # fmt: skip
    """Minus log P [B] of `targets` [B, U], where P(next | t, u) = softmax(W tanh(f[t] + g[u]) + b).

    `frames` f [B, T, J], `labels` g [B, U + 1, J], `weight` W [V, J] and `bias` [V] are of one type, `blank` is an
    entry of the vocabulary; `frame_lengths` and `label_lengths` [B] say how much of each row counts. What is outside
    is not read. Without frames there is no path: infinite, and zero where there are no targets either; so it is where a
    target has no probability, or is not in the vocabulary.

    Forward (arXiv 1211.3711): h = tanh(f + g) of as many pairs (t, u) as `WORKSPACE` holds, their logits tile by tile,
    of which an online softmax keeps three numbers for each pair; then alpha[t, u], a scan over u for each t. Backward:
    beta gives each arc's posterior, and with it, a slab of pairs after the other, once more from h,

        dz = (p_blank + p_label) softmax(z) - p_blank onehot(blank) - p_label onehot(label)
        dh = W^T dz, dW = sum dz h^T, db = sum dz, df[t] = sum over u of dh (1 - h^2), dg[u] = sum over t of it.

    Memory is that of the inputs, 6 B T (U + 1) numbers and the slab; sums are always taken in the same order.
    """
    if len(kinds := {x.dtype for x in (frames, labels, weight, bias)}) > 1:
        raise ValueError(f"frames, labels, weight and bias are of one type, not of {sorted(map(str, kinds))}")
    (b, t, inner), vocab = frames.shape, len(weight)
    u = targets.shape[1]
    if labels.shape != (b, u + 1, inner) or weight.shape != (vocab, inner) or bias.shape != (vocab,):
        raise ValueError(
            f"frames {[b, t, inner]} and targets {[b, u]}: wanted labels {[b, u + 1, inner]}, weight [V, {inner}] and "
            f"bias [V], not {list(labels.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        )
    if not 0 <= blank < vocab:
        raise ValueError(f"blank is {blank}, the vocabulary has 0 to {vocab - 1}")
    loss: Tensor = rnnt_forward(frames, labels, weight, bias, targets, frame_lengths, label_lengths, blank)[0]
    return loss


def whole(
    frames: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, frame_lengths: Tensor,
    label_lengths: Tensor, blank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss [B], and [B, T, U + 1] for the way back: alpha, the arcs of blanks and labels, what divides them."""
    inputs = (x.contiguous() for x in (frames, labels, weight, bias, targets, frame_lengths, label_lengths))
    f, g, weight, bias, targets, frame_lengths, label_lengths = inputs
    found = arcs(f, g, weight, bias, targets, frame_lengths, label_lengths, blank)
    alpha, loss = forward_scores(found, frame_lengths, label_lengths)
    return loss, alpha, found.blank, found.label, found.norm


def whole_fake(
    frames: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, frame_lengths: Tensor,
    label_lengths: Tensor, blank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Their shapes."""
    b, t, n = frames.shape[0], frames.shape[1], labels.shape[1]
    loss = frames.new_empty(b, dtype=torch.float32)
    alpha, blanks, said, norm = (frames.new_empty(b, t, n, dtype=torch.float32) for _ in range(4))
    return loss, alpha, blanks, said, norm


def back(
    grad: Tensor, frames: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, frame_lengths: Tensor,
    label_lengths: Tensor, loss: Tensor, alpha: Tensor, blanks: Tensor, said: Tensor, norm: Tensor, blank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of frames, labels, weight and bias, from that of the loss [B]."""
    inputs = (x.contiguous() for x in (frames, labels, weight, bias, targets, frame_lengths, label_lengths, grad))
    f, g, weight, bias, targets, frame_lengths, label_lengths, grad = inputs
    found = Arcs(blanks, said, norm)
    mass = backward_scores(found, alpha, loss, grad, frame_lengths, label_lengths)
    return gradients(f, g, weight, bias, targets, frame_lengths, label_lengths, norm, mass, blank)


def back_fake(
    grad: Tensor, frames: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, frame_lengths: Tensor,
    label_lengths: Tensor, loss: Tensor, alpha: Tensor, blanks: Tensor, said: Tensor, norm: Tensor, blank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Their shapes."""
    f, g, w, c = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (frames, labels, weight, bias))
    return f, g, w, c


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For the way back."""
    *tensors, ctx.blank = inputs
    ctx.save_for_backward(*tensors, *output)


def derivative(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    """Of the loss alone."""
    return (*rnnt_backward(grad, *ctx.saved_tensors, ctx.blank), None, None, None, None)


rnnt_forward = Op("rnnt", whole, whole_fake)
rnnt_backward = Op("rnnt_backward", back, back_fake)
rnnt_forward.register_autograd(derivative, setup_context=remember)
