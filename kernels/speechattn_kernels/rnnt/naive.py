"""The transducer's loss as its definition reads."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rnnt_naive"]


def rnnt_naive(
    frames: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, frame_lengths: Tensor,
    label_lengths: Tensor, *, blank: int = 0,
) -> Tensor:  # fmt: skip
    """The same in plain torch, node by node, with the whole of (B, T, U + 1, V) in memory."""
    (b, t, _), n = frames.shape, labels.shape[1]
    at, u = torch.arange(t, device=frames.device), torch.arange(n, device=frames.device)
    frames = frames.masked_fill((at >= frame_lengths[:, None])[..., None], 0)
    labels = labels.masked_fill((u > label_lengths[:, None])[..., None], 0)
    targets = targets.masked_fill(u[:-1] >= label_lengths[:, None], 0)
    log_probs = ((frames[:, :, None] + labels[:, None]).tanh() @ weight.T + bias).log_softmax(-1)
    rows = torch.arange(b, device=frames.device)
    ways: dict[tuple[int, int], Tensor] = {}  # the logarithm of the sum over all ways to (t, u), as [B]
    for i in range(t):
        for k in range(n):
            silent = ways[i - 1, k] + log_probs[:, i - 1, k, blank] if i else None
            said = ways[i, k - 1] + log_probs[rows, i, k - 1, targets[:, k - 1]] if k else None
            both = [x for x in (silent, said) if x is not None]
            ways[i, k] = torch.stack(both).logsumexp(0) if both else log_probs.new_zeros(b)
    loss = torch.where(label_lengths > 0, torch.inf, 0.0).to(log_probs) + 0 * log_probs.exp().sum()
    for i in range(t):
        for k in range(n):
            ends = (frame_lengths == i + 1) & (label_lengths == k)
            loss = torch.where(ends, -ways[i, k] - log_probs[:, i, k, blank], loss)
    return loss
