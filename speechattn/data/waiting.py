"""How much of the training time is spent waiting for data."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["Waiting"]


class Waiting(Callback):
    """Logs `train/waiting`: the share of the last `steps` steps' time in which a batch of `Corpus` was not yet there.

    Time between steps that is spent on something else (validation, checkpoints) is not counted. `share` says it, too.
    """

    def __init__(self, *, steps: int = 100) -> None:
        self.times: deque[tuple[float, float]] = deque(maxlen=steps)  # waiting and computing, of each step
        self.waited_s = self.began = 0.0

    @property
    def share(self) -> float:
        """Waiting, as part of all time; 0 before the first step."""
        waiting, computing = sum(w for w, _ in self.times), sum(c for _, c in self.times)
        return waiting / (waiting + computing) if self.times else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.times.clear()
        self.waited_s = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is made."""
        waited_s = float(getattr(trainer.train_dataloader, "waited_s", 0.0))
        self.times.append((waited_s - self.waited_s, time.perf_counter() - self.began))
        self.waited_s = waited_s
        pl_module.log("train/waiting", self.share, batch_size=1)
