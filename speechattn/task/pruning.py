"""Objectives that close gates: so many of them, or those that are not missed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speechattn.attention.duo import DuoAttention, opened
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.model import Recognizer
from speechattn.model.pruning import sparsity
from speechattn.task.objectives import Heard, Objective, Said

__all__ = ["DuoObjective", "SparsityObjective"]


def shared_out(penalty: Tensor, said: Said) -> Tensor:
    """A penalty of the whole step as losses [B], which the step adds up and divides by the number of tokens."""
    return penalty * said.lengths


class SparsityObjective(Objective):
    """The `target` share of the parameters behind gates shall go, by an augmented Lagrangian (arXiv 2306.01385).

    The step pays linear * (s - t) + square * (s - t)**2 for the expected sparsity s; t rises from 0 to `target` in the
    first `ramp` training batches. The model descends; both multipliers ascend, by `rate` times what they stand for,
    until s is t. They begin at 0 and `square`: where both begin at 0, s swings around t for thousands of steps. The
    encoder has gates: `speechattn.model.pruning.GatedEncoder`.
    """

    seen: Tensor  # training batches so far: like the multipliers a part of the checkpoint
    multipliers: Tensor  # linear and square

    def __init__(
        self, target: float, weight: float = 1.0, rate: float = 0.1, square: float = 10.0, ramp: int = 1000
    ) -> None:  # fmt: skip
        super().__init__("sparsity", weight, heads=())
        if not 0 <= target < 1 or not rate > 0 or not square >= 0 or ramp < 0:
            raise ValueError(f"target {target}, rate {rate}, square {square}, ramp {ramp}: "
                             "wanted a share, more than 0, and 0 or more")  # fmt: skip
        self.target, self.rate, self.ramp = target, rate, ramp
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("multipliers", torch.tensor([0.0, square]))

    def fit(self, model: Recognizer) -> None:
        sparsity(model.encoder)

    def wanted(self) -> Tensor:
        """The sparsity of this step."""
        return self.target * (self.seen / self.ramp).clamp(max=1.0) if self.ramp else self.target + 0.0 * self.seen

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        gap = sparsity(model.encoder) - self.wanted()
        gaps = torch.stack([gap, gap.square()])
        penalty = (self.multipliers.clone() * gaps).sum()
        if self.training:
            self.multipliers += self.rate * gaps.detach()
            self.seen += 1
        return shared_out(penalty, said)


class DuoObjective(Objective):
    """Finds the heads that need a long history (DuoAttention, arXiv 2410.10819): it trains their gates alone.

    The squared distance of the encoder's output from the one that it has with all gates 1, the mean over frames and
    features, and `penalty` times the sum of the gates. Every frame counts: in sound there is no token that asks for
    what was said long ago. ModelError for an encoder without `DuoAttention`, or with dropout, which would be most of
    the distance.
    """

    def __init__(self, weight: float = 1.0, penalty: float = 0.05) -> None:
        super().__init__("duo", weight, heads=())
        if not penalty >= 0:
            raise ValueError(f"penalty {penalty}: wanted 0 or more")
        self.penalty = penalty

    def fit(self, model: Recognizer) -> None:
        layers = [module for module in model.encoder.modules() if isinstance(module, DuoAttention)]
        if not layers:
            raise ModelError(f"{self.name}: {type(model.encoder).__name__} has no DuoAttention")
        for name, module in model.encoder.named_modules():
            if module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0.0):
                raise ModelError(f"{self.name}: encoder.{name} has dropout: wanted dropout 0 in the encoder")
        model.requires_grad_(False)
        for layer in layers:
            layer.gates.requires_grad_(True)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        with torch.no_grad(), opened(model.encoder):
            full: Frames = model.encoder(heard.features)
        apart = (heard.frames.values - full.values).square().mean(-1).sum(1) / full.lengths.clamp(min=1)
        layers = [module for module in model.encoder.modules() if isinstance(module, DuoAttention)]
        gates = torch.stack([layer.mixture.sum() for layer in layers]).sum()
        return (apart + self.penalty * gates) * said.lengths
