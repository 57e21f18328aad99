"""Sparse weights in place of a softmax: alpha-entmax (Peters et al., arXiv 1905.05702, eq. 4)."""

from __future__ import annotations

from math import factorial, log, log2
from typing import Any

import torch
from torch import Tensor, nn

from speechattn.frames import known

__all__ = ["Entmax", "Normaliser", "Softmax", "entmax"]

STEPS = 24  # at most; most rows need 3 to 6
LEAST = 1e-10  # of alpha - 1: with less, entmax is softmax to the last digit
NEAR = 0.02  # with less, differences of nearly equal numbers cost more digits than a series


def entmax(scores: Tensor, alpha: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """Scores z [..., T] -> the p on the simplex that maximises p . z + H_alpha(p), entropy of Tsallis [..., T].

        p_i = [(alpha - 1) z_i - tau]_+ ^ (1 / (alpha - 1)),  with the tau that makes the sum 1

    `alpha`, from 1 (softmax) to 2 (sparsemax), broadcasts to [..., 1]: [H, 1, 1] is one for each head. What is not in
    `mask` gets exactly 0; a row without a key gets zeros, a row with one key 1. It has gradients with respect to both,
    also at alpha = 1. ValueError for an alpha out of range.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    alpha = torch.as_tensor(alpha, dtype=wide, device=scores.device)
    if known(alpha) and not bool(((alpha >= 1) & (alpha <= 2)).all()):
        raise ValueError(f"alpha from {float(alpha.min()):.4g} to {float(alpha.max()):.4g}: wanted 1 to 2")
    if not scores.shape[-1]:
        return scores
    z, gap = scores.to(wide), alpha - 1
    if mask is not None:
        z = z.masked_fill(~mask, -torch.inf)
    if torch.is_grad_enabled() and (z.requires_grad or gap.requires_grad):
        p: Tensor = Solved.apply(z, gap)
    else:
        p = solved(z, gap)
    return p.to(scores.dtype)


def solved(z: Tensor, gap: Tensor) -> Tensor:
    """z [..., T], minus infinity for who is not there, and gap = alpha - 1 [..., 1] -> p [..., T].

    p = (1 + gap z - u)^(1 / gap), of which the root u of the convex function (sum p)^gap - 1 is found by Newton's
    method from the left: it never steps over, and is exact at once where all scores are equal, or gap is 0.
    """
    gap = gap.clamp(min=LEAST)
    top = z.amax(-1, keepdim=True)
    x, power = gap * (z - top.masked_fill(top == -torch.inf, 0.0)), 1 / gap
    u, least = torch.zeros_like(top), gap * torch.finfo(z.dtype).eps ** 0.75
    for _ in range(STEPS):
        base, p = raised(x, u, power)
        total, slope = p.sum(-1, keepdim=True), p.div_(base).sum(-1, keepdim=True)
        step = total / slope * -torch.expm1(-gap * total.log())
        step = torch.where(total > 1, step, 0.0)  # also where nobody is: 0 / 0
        u = u + step
        if known(step) and bool((step <= least).all()):
            break
    _, p = raised(x, u, power)
    return p.div_(p.sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny))


def raised(x: Tensor, u: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """The base 1 + x - u, and its power; 0 for a base that is not positive.

    Without infinities, numbers below the normal ones and truth values, all of which are slow on a CPU.
    """
    info = torch.finfo(x.dtype)
    x = (x - u).clamp_(min=-1.0)
    there = (x + 1).sign_()
    x.clamp_(min=info.eps - 1)
    p = torch.log1p(x).mul_(power / log(2)).clamp_(min=log2(info.tiny)).exp2_().mul_(there)
    return x.add_(1.0), p


class Solved(torch.autograd.Function):
    """`solved`, differentiated through the condition that the weights sum to 1 (arXiv 1909.00015, section 3.2)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gap: Tensor) -> Tensor:
        """z [..., T], gap [..., 1] -> p [..., T]."""
        p = solved(z, gap)
        ctx.save_for_backward(p, gap)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """With s = p^(2 - alpha) on the support: dp/dz = diag(s) - s s' / sum(s), and dp/dalpha is centred alike."""
        p, gap = ctx.saved_tensors
        shape, gap = gap.shape, gap.clamp(min=LEAST)
        to_z = to_gap = None
        there, logs = p.sign(), p.clamp(min=torch.finfo(p.dtype).tiny).log()
        s = ((1 - gap) * logs).exp() * there
        share = s / s.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        grad = grads[0]
        centred = grad - (share * grad).sum(-1, keepdim=True)
        if ctx.needs_input_grad[0]:
            to_z = s * centred
        if ctx.needs_input_grad[1]:
            to_gap = (moved(logs, gap) * s * centred).sum_to_size(shape)
        return to_z, to_gap


def moved(logs: Tensor, gap: Tensor) -> Tensor:
    """What alpha does to p at a fixed threshold, by s = p^(2 - alpha): (x - (1 + x) log(1 + x)) / gap^2.

    x = p^gap - 1, and y = log(1 + x) = gap log p. By its series in y where gap is small and the two terms cancel.
    """
    y = gap * logs
    if known(gap) and bool((gap > NEAR).all()):
        return (torch.expm1(y) - y * y.exp()) / gap.square()
    series = torch.zeros_like(y)
    for k in range(12, 1, -1):
        series = series * y - (k - 1) / factorial(k)
    found = (torch.expm1(y) - y * y.exp()) / gap.square()
    return torch.where(gap > NEAR, found, series * logs.square())


class Normaliser(nn.Module):
    """Scores [B, H, U, T] -> weights of the same shape that sum to 1 over the keys in `mask`, which broadcasts.

    What is not in the mask gets exactly 0, and a query without a key zeros. It is made from the number of heads.
    """

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


class Softmax(Normaliser):
    """Everybody gets something; the same for any number of heads."""

    def __init__(self, heads: int = 1) -> None:
        super().__init__()

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, wide)
        return weights.masked_fill(~mask, 0.0).to(scores.dtype)


class Entmax(Normaliser):
    """Entmax with a fixed alpha, or one that each head learns: 1 + sigmoid(a), at first 1.5 (arXiv 1909.00015)."""

    def __init__(self, heads: int, alpha: float | None = None) -> None:
        super().__init__()
        if alpha is not None and not 1 <= alpha <= 2:
            raise ValueError(f"alpha {alpha}: wanted 1 (softmax) to 2 (sparsemax), or none to learn it")
        self.heads, self.fixed = heads, alpha
        if alpha is None:
            self.a = nn.Parameter(torch.zeros(heads))

    @property
    def alpha(self) -> Tensor:
        """Of each head [H]."""
        if self.fixed is None:
            return 1 + self.a.sigmoid()
        return torch.full((self.heads,), self.fixed)

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        return entmax(scores, self.alpha[:, None, None] if self.fixed is None else self.fixed, mask)
