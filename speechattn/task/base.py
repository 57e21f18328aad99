"""What all tasks share: optimizer, randomness of a step, figures of a validation, and what a checkpoint knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from speechattn.task.checkpoint import packed
from speechattn.task.tally import Tally
from speechattn.text.pieces import Pieces

__all__ = ["Task", "seeded"]


class Task(LightningModule):
    """Trains `model`, whose text is spelled by `tokenizer`.

    The randomness of a step comes from (`seed`, step, rank): a run that was killed and resumed goes on as if it had
    not been.
    """

    model: Any  # a module, and what a task needs of it

    def __init__(
        self, *, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None, seed: int
    ) -> None:  # fmt: skip
        super().__init__()
        self.optimizer, self.scheduler, self.seed = optimizer, scheduler, seed
        self.tallies: dict[str, Tally] = {}
        self.config: dict[str, Any] | None = None  # of the model, where it was made from YAML
        self.lr: float | None = None  # that a learning-rate finder found
        self.begun = 0  # batches, over all epochs

    @property
    def spelling(self) -> Pieces:
        """The tokens of the model."""
        raise NotImplementedError

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Of the model, by the names under which their sizes are told."""
        raise NotImplementedError

    def tally(self) -> Tally:
        """What counts the figures of a validation set."""
        raise NotImplementedError

    def init_from(self, path: Path, plugins: Any = ()) -> None:
        """Start with the weights of a model folder or a checkpoint."""
        raise NotImplementedError

    @property
    def monitor(self) -> tuple[str, str]:
        """The figure that the best checkpoint is judged by, and whether `min` or `max` is best."""
        tally = self.tally()
        return f"valid/{tally.shown}", tally.best

    def configure_optimizers(self) -> Any:
        """The optimizer, which knows the names of parameters, and its schedule step by step."""
        optimizer = self.optimizer([(name, p) for name, p in self.named_parameters() if p.requires_grad])
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        torch.manual_seed(seeded(self.seed, self.begun, self.global_rank + 1))
        self.begun += 1

    def mean(self, x: Tensor) -> Tensor:
        """Over processes."""
        x = x.to(torch.float32)
        return x if self.trainer.world_size == 1 else self.trainer.strategy.reduce(x, reduce_op="mean")

    def counted(self, dataloader_idx: int) -> Tally:
        """The figures of that validation set so far."""
        name = self.trainer.datamodule.valid_names[dataloader_idx]  # type: ignore[attr-defined]
        return self.tallies.setdefault(name, self.tally())

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self.tallies = {}

    def on_validation_epoch_end(self) -> None:
        """Log all; the bar shows the main figures of the first set."""
        for i, (name, tally) in enumerate(self.tallies.items()):
            for key, value in tally.result().items():
                place = f"valid/{key}" if i == 0 else f"valid/{name}/{key}"
                self.log(place, value, prog_bar=i == 0 and key.startswith(tally.shown), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint knows its model and its tokens: `speechattn export` needs nothing else."""
        name, mode = self.monitor
        score = self.trainer.callback_metrics.get(name)
        checkpoint["speechattn"] = packed(self.config, self.spelling) | {
            "batches": self.begun, "score": None if score is None else float(score), "mode": mode
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the random numbers of the next batch."""
        self.begun = checkpoint["speechattn"]["batches"]


def seeded(seed: int, batch: int, who: int) -> int:
    """A seed for `who` in a batch."""
    return int(np.random.SeedSequence([seed, batch, who]).generate_state(1, np.uint64)[0] >> 1)
