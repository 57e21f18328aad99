"""Cross attention that serves simultaneous policies: beside the context only the rows that a policy looks at.

B recordings, K hypotheses of each, H heads of tokens over G heads of frames, U tokens, T frames, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speechattn_kernels.common import Op
from speechattn_kernels.policy import backward, forward

__all__ = ["policy"]

WIDEST = 256  # features of a head


def policy(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, *, heads: Sequence[int], newest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B * K, H, U, D], k, v [B, G, T, D], valid [B, T] -> context, mean, each.

    The context [B * K, H, U, D] is that of softmax(q k / sqrt(D)) over valid frames, of which two things are written
    in float32: `mean` [B * K, U, T] over the S chosen `heads`, and `each` [B * K, S, newest, T], the rows of the last
    tokens for each of them, in the order asked for. Row b * K + k looks at recording b, head h at h // (H / G). Nothing
    of the size H U T ever exists. A row without a valid frame gets zeros. The context has a gradient, the rows do not.
    """
    refused = wrong(q, k, v, valid, heads, newest)
    if refused:
        raise ValueError(f"policy: {refused}")
    context, mean, each, _ = seen(q, k, v, valid, list(heads), newest)
    return context, mean, each


def wrong(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, heads: Sequence[int], newest: int) -> str | None:
    """What does not fit together."""
    rows, groups, frames, features = k.shape
    if v.shape != k.shape or valid.shape != (rows, frames) or q.shape[3] != features:
        return f"queries {list(q.shape)}, keys {list(k.shape)}, values {list(v.shape)}, valid {list(valid.shape)}"
    if q.shape[1] % max(groups, 1) or q.shape[0] % max(rows, 1) or (q.shape[0] and not rows):
        return f"{q.shape[0]} rows and {q.shape[1]} heads of tokens do not divide by {rows} and {groups} of frames"
    if features > WIDEST:
        return f"{features} features of a head, at most {WIDEST}"
    if not all(0 <= head < q.shape[1] for head in heads):
        return f"heads {list(heads)} of {q.shape[1]}"
    if not 0 <= newest <= q.shape[2]:
        return f"the {newest} newest of {q.shape[2]} tokens"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, heads: Sequence[int], newest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Context, mean, each, and the logarithms (base 2) of the sums of the softmax [B * K, U, H]."""
    context, sums = forward.look(q, k, v, valid)
    mean, each = forward.rows(q, k, valid, sums, tuple(heads), newest)
    return context, mean, each, sums


def like(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, heads: Sequence[int], newest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `run` gives, of no value."""
    n, many, tokens, features = q.shape
    frames = k.shape[2]
    return (
        q.new_empty(n, tokens, many, features).transpose(1, 2),
        q.new_empty(n, tokens, frames, dtype=torch.float32),
        q.new_empty(n, len(heads), newest, frames, dtype=torch.float32),
        q.new_empty(n, tokens, many, dtype=torch.float32),
    )


def like_inputs(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, context: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `backward.back` gives, of no value."""
    n, many, tokens, features = q.shape
    return q.new_empty(n, tokens, many, features).transpose(1, 2), k.new_empty(k.shape), v.new_empty(v.shape)


seen = Op("policy", run, like)
gradients = Op("policy_backward", backward.back, like_inputs)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For the way back. The rows are read by policies, nobody learns by them."""
    context, mean, each, sums = output
    ctx.save_for_backward(*inputs[:4], context, sums)
    ctx.mark_non_differentiable(mean, each, sums)


def back(ctx: Any, grad: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    """The gradient of the context alone."""
    return *gradients(grad, *ctx.saved_tensors), None, None, None


seen.register_autograd(back, setup_context=keep)
