"""Learning rates step by step: functions of the number of the step alone, so that a resumed run goes on exactly."""

from __future__ import annotations

from abc import abstractmethod
from math import cos, pi, sqrt

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["InverseRoot", "Schedule", "WarmupCosine"]


class Schedule(LRScheduler):
    """`share(n)` of the optimizer's own learning rate in step n = 1, 2, ..."""

    @abstractmethod
    def share(self, n: int) -> float:
        """Of step n."""

    def get_lr(self) -> list[float | Tensor]:
        """For every group of parameters."""
        share = self.share(self.last_epoch + 1)
        return [float(base) * share for base in self.base_lrs]


class InverseRoot(Schedule):
    """From 0 in `warmup` steps to the whole, then with the inverse root of the step (arXiv 1706.03762, eq. 3).

    The paper's schedule with d features is that of the learning rate (d * `warmup`)^-0.5.
    """

    def __init__(self, optimizer: Optimizer, warmup: int = 4000, last_epoch: int = -1) -> None:
        if warmup < 1:
            raise ValueError(f"warmup {warmup}: wanted 1 step or more")
        self.warmup = warmup
        super().__init__(optimizer, last_epoch)

    def share(self, n: int) -> float:
        return min(n / self.warmup, sqrt(self.warmup / n))


class WarmupCosine(Schedule):
    """From 0 in `warmup` steps to the whole, then half a cosine down to the share `floor` in step `total`."""

    def __init__(
        self, optimizer: Optimizer, warmup: int, total: int, floor: float = 0.0, last_epoch: int = -1
    ) -> None:  # fmt: skip
        if not 0 <= warmup < total or not 0 <= floor <= 1:
            raise ValueError(f"warmup {warmup}, total {total}, floor {floor}: wanted fewer steps than all, and a share")
        self.warmup, self.total, self.floor = warmup, total, floor
        super().__init__(optimizer, last_epoch)

    def share(self, n: int) -> float:
        if n <= self.warmup:
            return n / self.warmup
        done = min(1.0, (n - self.warmup) / (self.total - self.warmup))
        return self.floor + (1 - self.floor) * (1 + cos(pi * done)) / 2
