"""Attention with alpha-entmax in place of the softmax (Peters et al., arXiv 1905.05702, eq. 4), without a U x T tensor.

With scores z = q . k / sqrt(D) and gap = alpha - 1, from 0 (softmax) to 1 (sparsemax), the weights are

    p = [1 + gap (z - level)]_+ ^ (1 / gap)        with the level that makes their sum 1

The level is log sum exp z for softmax, and 1 more than the usual threshold for sparsemax. It is the root of
(total^gap - 1) / gap, which is convex and falls (total^gap is the norm of order 1 / gap of positive parts): Newton's
method from the left, where level is the largest score, never steps over, needs no bracket, and is exact at once where
gap is 0 or all scores are equal. Each step reads the keys once more, most rows take 3 to 6, where bisection takes 24.

Backward, by the condition that the sum is 1 (arXiv 1909.00015, section 3.2). With s = p^(1 - gap) on the support,
g = grad . v and centre = sum(s g) / sum(s):

    d z = s (g - centre)      d v = p grad      d alpha = sum (e^y - 1 - y e^y) / gap^2 d z, with y = gap log p

Saved are the arguments and the level. `centre` is found before d q; d k and d v are sums over queries in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speechattn_kernels.common import Op
from speechattn_kernels.entmax import backward as back
from speechattn_kernels.entmax.forward import attended

__all__ = ["entmax_attention"]


def entmax_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, H, U, D], k and v [B, G, T, D], valid [B, T], alpha [H] -> context [B, H, U, D], levels [B, H, U].

    float32, bfloat16 or float16, summed in float32. Each alpha is from 1 to 2 (not checked: nothing waits for the GPU).
    G groups of keys serve H / G heads each. A query without a key gets zeros. Gradients of all but `valid` and levels.
    """
    (rows, heads, _, width), groups = q.shape, k.shape[1]
    if k.shape != v.shape or k.shape[::3] != (rows, width) or heads % groups:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: wanted [B, H, U, D] and twice "
                         "[B, G, T, D] with G a divisor of H")  # fmt: skip
    if valid.shape != (rows, k.shape[2]) or alpha.shape != (heads,):
        raise ValueError(f"valid {tuple(valid.shape)}, alpha {tuple(alpha.shape)}: wanted [B, T] and [H]")
    return forward(q, k, v, valid, alpha)


def ready(x: Tensor) -> Tensor:
    """With features side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def run(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The context and the levels."""
    out, levels = empty(q, k, v, valid, alpha)
    attended(ready(q), ready(k), ready(v), valid.contiguous(), alpha.contiguous(), out=out, levels=levels)
    return out, levels


def empty(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def run_back(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, alpha: Tensor, levels: Tensor, grad: Tensor, learnt: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and alpha; that of alpha is zero where it is not `learnt`."""
    to_q, to_k, to_v, to_alpha = empty_back(q, k, v, valid, alpha, levels, grad, learnt)
    centres = torch.empty_like(levels)
    parts = levels.new_empty(*q.shape[:2], back.blocks(q)) if learnt else None
    args = (ready(q), ready(k), ready(v), valid.contiguous(), alpha.contiguous(), levels, grad.contiguous())
    back.to_queries(*args, to_q=to_q, centres=centres, to_alpha=parts)
    back.to_keys(*args, centres=centres, to_k=to_k, to_v=to_v)
    if parts is not None:
        return to_q, to_k, to_v, parts.sum((0, 2)).to(alpha.dtype)
    return to_q, to_k, to_v, to_alpha.zero_()


def empty_back(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, alpha: Tensor, levels: Tensor, grad: Tensor, learnt: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), alpha.new_empty(alpha.shape)


def save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    learnt = ctx.needs_input_grad[4]
    to_q, to_k, to_v, to_alpha = backward(*ctx.saved_tensors, grad, learnt)
    return to_q, to_k, to_v, None, to_alpha if learnt else None


forward = Op("entmax_attention", run, empty)
backward = Op("entmax_attention_backward", run_back, empty_back)
forward.register_autograd(gradients, setup_context=save)
