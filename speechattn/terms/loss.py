"""How retrievers learn: the terms of a batch are one another's negatives.

B utterances, N terms of the bank of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["calibration", "contrastive", "in_batch", "presence_loss"]


def in_batch(said: Sequence[Sequence[str]], most: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """The terms of all utterances, each once, shuffled and cut to `most`; and whose they are [B, N] bool."""
    every = sorted({term for terms in said for term in terms})
    order = torch.randperm(len(every), generator=generator)[:most].tolist()
    bank = [every[i] for i in order]
    place = {term: i for i, term in enumerate(bank)}
    label = torch.zeros(len(said), len(bank), dtype=torch.bool)
    for row, terms in enumerate(said):
        for term in terms:
            if term in place:
                label[row, place[term]] = True
    return bank, label


def presence_loss(odds: Tensor, label: Tensor, smoothing: float = 0.1) -> Tensor:
    """Two-class cross entropy with label smoothing, mean over all pairs (arXiv 2508.18701).

    `odds` [B, N] is the difference of the two logits, on which alone it depends.
    """
    target = label.to(odds.dtype) * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(odds, target)


def contrastive(scores: Tensor, label: Tensor) -> Tensor:
    """InfoNCE both ways: each term that was said against those that were not, and each utterance of a term against
    those without it; mean over the pairs. 0 where nothing was said.
    """
    if not bool(label.any()):
        return scores.sum() * 0.0
    return (one_way(scores, label) + one_way(scores.T, label.T)) / 2


def one_way(scores: Tensor, label: Tensor) -> Tensor:
    """Each positive of a row against the negatives of that row."""
    others = scores.masked_fill(label, -torch.inf).logsumexp(1, keepdim=True).expand_as(scores)
    return F.softplus(others - scores)[label].mean()


def calibration(odds: Tensor, label: Tensor) -> tuple[float, float]:
    """Scale and bias by which `odds` [N] say how probable `label` [N] is: logistic regression with the targets of Platt
    (1999), so that odds which tell the two apart do not become infinite. ValueError where nothing or all was said.
    """
    said = int(label.sum())
    if not 0 < said < label.numel():
        raise ValueError("wanted terms that were said, and terms that were not")
    target = torch.where(label, (said + 1) / (said + 2), 1 / (label.numel() - said + 2)).double()
    middle, spread = odds.double().mean(), odds.double().std().clamp(min=1e-9)
    x = (odds.detach().double() - middle) / spread
    line = torch.zeros(2, dtype=torch.float64, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def lost() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(line[0] * x + line[1], target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(lost)  # type: ignore[no-untyped-call]
    slope, level = line.detach().tolist()
    return slope / float(spread), level - slope * float(middle / spread)
