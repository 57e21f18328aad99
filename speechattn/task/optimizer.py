"""Optimizers beyond those of torch, to be named in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """Muon for the matrices of the layers, AdamW for all else, with one learning rate for both.

    Muon (K. Jordan et al. 2024) makes each update of a matrix nearly orthogonal; scaled by 0.2 * sqrt(longer side)
    (arXiv 2502.16982, eq. 4) it is as large as one of AdamW, whose learning rate and weight decay therefore serve.
    Of the *named* parameters those are Muon's that are 2-D, called `weight`, and inside of something called as one of
    `inside` says, but not in one of `but`: in `layers`, and no table of positions. So embeddings, heads, positions,
    the input and the joint network of a transducer are AdamW's, as they should be. Vectors do not decay.
    """

    def __init__(
        self, params: Iterable[tuple[str, Tensor]], lr: float = 1e-3, *, weight_decay: float = 0.01,
        momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8,
        inside: Sequence[str] = ("layers",), but: Sequence[str] = ("table",),
    ) -> None:  # fmt: skip
        named = [*params]
        if not all(isinstance(one, tuple) for one in named):
            raise ValueError("MuonAdamW tells parameters apart by their names: give it (name, parameter) pairs")
        chosen = [(n, p) for n, p in named if p.ndim == 2 and hidden(n, inside, but)]
        taken = {name for name, _ in chosen}
        rest = [(name, p) for name, p in named if name not in taken]
        if not chosen or not rest:
            found = f"{len(chosen)} matrices inside {', '.join(inside)}, {len(rest)} others"
            raise ValueError(f"{found}: wanted some of each")
        decays = [{"params": [(n, p) for n, p in rest if p.ndim >= 2], "weight_decay": weight_decay},
                  {"params": [(n, p) for n, p in rest if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
        muon = Muon(chosen, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        adamw = AdamW([group for group in decays if group["params"]], lr, (betas[0], betas[1]), eps)
        self.parts: list[tuple[Optimizer, slice]] = [(muon, slice(0, 1)), (adamw, slice(1, None))]
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Both, over these groups and this state, which a checkpoint or a schedule may have changed."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, groups in self.parts:
            part.param_groups, part.state = self.param_groups[groups], self.state
            part.step()
        return loss


def hidden(name: str, inside: Sequence[str], but: Sequence[str]) -> bool:
    """It is a weight in one of `inside` and in none of `but`."""
    *path, last = name.split(".")
    return last == "weight" and not {*path}.isdisjoint(inside) and {*path}.isdisjoint(but)
