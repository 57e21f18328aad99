"""A loss against attention sinks between the first token and the text (arXiv 2510.22603)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["decorrelation", "to_first"]


def to_first(state: Tensor, mask: Tensor) -> Tensor:
    """Cosine of each place of `state` [B, S, D] with the first one of its row [B, S]; 0 where `mask` is False.

    At least in float32, as massive activations squared are more than half precision holds. A state of zeros has the
    cosine 0. Law: what `mask` leaves out, the first place excepted, does not matter, NaN included; nor does the size
    of any state.
    """
    x = state.to(torch.promote_types(state.dtype, torch.float32))
    x = F.normalize(torch.where(mask[..., None], x, 0), dim=-1)
    first = torch.where(mask.any(1)[:, None], state[:, 0].to(x.dtype), 0)
    return (x * F.normalize(first, dim=-1)[:, None]).sum(-1)


def decorrelation(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean of cos(h_0, h_s)^2 over layers and the places of `mask` [B, S], for each row [B] (arXiv 2510.22603).

    `states` [B, S, D] are those of `Inspected`: the embeddings, then behind each of N layers. Layers 1 to N - 1 count;
    the embeddings and what the last layer says do not. Place 0 is BOS, which never counts as a place s; `mask` says
    which others do: marks, sound, lips and prompt, not the text and no padding. A row without any has the loss 0.
    Gradients flow into both sides of the cosine. 0 where all are orthogonal to BOS, 1 where all are like it.

    ValueError where N is 1: no layer lies between the embeddings and the last one.

    The paper adds lambda (10^4 in its code) times the mean over rows to the cross entropy of a token. Where a sum over
    rows is divided by the tokens of the batch, as in `speechattn.task.recognizer`, rows are first multiplied by n, the
    mean tokens of a row: sum_b (CE_b + lambda n L_b) / sum_b n_b = sum_b CE_b / sum_b n_b + lambda mean_b L_b.
    """
    if len(states) < 3:
        raise ValueError(
            f"{len(states) - 1} layer: no layer lies between the embeddings and the last one, so there is nothing to "
            "decorrelate; wanted a language model of 2 layers or more"
        )
    counts = mask.clone()
    counts[:, :1] = False
    squares = torch.stack([to_first(state, counts).square().sum(1) for state in states[1:-1]])
    return squares.mean(0) / counts.sum(1).clamp(min=1)
