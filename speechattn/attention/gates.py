"""Gates that learn to close: hard-concrete ones (Louizos et al., arXiv 1712.01312), before a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from torch import Tensor, nn

from speechattn.attention.pattern import Pattern
from speechattn.attention.position import Position
from speechattn.attention.self_attention import SelfAttention
from speechattn.linear import linear

__all__ = ["GateMaker", "GatedLinear", "GatedSelfAttention", "HardConcrete", "StraightThrough"]

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # temperature, and the stretch of the interval from 0 to 1


class HardConcrete(nn.Module):
    """`n` gates in [0, 1] that are exactly 0 or 1 with a probability of their own (arXiv 1712.01312, section 2.2).

    In training they are drawn anew in each call: u ~ U(0, 1), s = sigmoid((log u - log(1 - u) + a) / beta),
    z = clamp(s * 1.2 - 0.1, 0, 1), with a learned `a` for each. In `eval()` z = clamp(sigmoid(a) * 1.2 - 0.1, 0, 1)
    (eq. 13). Law: `opening` is the mean of (z > 0) over the draws, so its sum is the expected number of open gates.
    They start open with probability `start`; from 0.983 on they are all 1 in `eval()`, so that nothing is changed yet.
    """

    def __init__(self, n: int, *, start: float = 0.99) -> None:
        super().__init__()
        if not 0 < start < 1:
            raise ValueError(f"gates that start open with probability {start}: wanted more than 0 and less than 1")
        self.logits = nn.Parameter(torch.full((n,), log(start / (1 - start)) + self.threshold()))

    @staticmethod
    def threshold() -> float:
        """What `a` must exceed for a gate that is more often open than closed."""
        return BETA * log(-LOW / HIGH)

    @property
    def opening(self) -> Tensor:
        """P(z > 0) of each gate [N] = sigmoid(a - beta log(0.1 / 1.1)) (eq. 12)."""
        return (self.logits - self.threshold()).sigmoid()

    @property
    def settled(self) -> Tensor:
        """The gates [N] of `eval()`."""
        return stretched(self.logits.sigmoid())

    def drawn(self) -> Tensor:
        """The gates [N] of one step of training."""
        return stretched(((torch.rand_like(self.logits).logit() + self.logits) / BETA).sigmoid())

    def forward(self) -> Tensor:
        """The gates [N]."""
        return self.drawn() if self.training else self.settled


def stretched(s: Tensor) -> Tensor:
    """From (0, 1) to [0, 1], with both ends."""
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


class StraightThrough(HardConcrete):
    """The same gates rounded to 0 or 1, with the gradient of those that are not (arXiv 2306.01385).

    So in `eval()` nothing is between open and closed, and what is pruned needs no scale.
    """

    @staticmethod
    def threshold() -> float:
        """z > 1/2 where s > 1/2."""
        return 0.0

    @property
    def settled(self) -> Tensor:
        return rounded(super().settled)

    def drawn(self) -> Tensor:
        return rounded(super().drawn())


def rounded(z: Tensor) -> Tensor:
    """To 0 or 1; the gradient does not notice."""
    return (z > 0.5).to(z.dtype) + (z - z.detach())


GateMaker = Callable[[int], HardConcrete]  # from their number


class GatedLinear(nn.Linear):
    """A linear layer of x [..., N * width], each stretch of `width` features as loud as its gate says."""

    def __init__(self, inputs: int, outputs: int, gates: HardConcrete) -> None:
        super().__init__(inputs, outputs)
        if inputs % len(gates.logits):
            raise ValueError(f"{inputs} features, {len(gates.logits)} gates: they do not divide")
        self.gates, self.width = gates, inputs // len(gates.logits)

    @classmethod
    def of(cls, layer: nn.Linear, gates: HardConcrete) -> GatedLinear:
        """With the weights of `layer`."""
        gated = cls(layer.in_features, layer.out_features, gates)
        gated.weight, gated.bias = layer.weight, layer.bias
        return gated.to(layer.weight.device, layer.weight.dtype).train(layer.training)

    @property
    def settled(self) -> Tensor:
        """The weight that does the same in `eval()` without gates."""
        return self.weight * self.gates.settled.repeat_interleave(self.width)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        return linear(x * self.gates().repeat_interleave(self.width), self.weight, self.bias)


class GatedSelfAttention(SelfAttention):
    """Self-attention whose heads have gates that can close for good: `speechattn.model.pruning` takes those out."""

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        norm: nn.Module | None = None, dropout: float = 0.0, gates: GateMaker = HardConcrete,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, span, position=position, key_heads=key_heads, norm=norm, dropout=dropout)
        self.out = GatedLinear.of(self.out, gates(heads))
