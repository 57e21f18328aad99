"""What all tasks share: optimizer, randomness of a step, figures of a validation, and what a checkpoint knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from speechattn.data.loader import Check
from speechattn.errors import InputError
from speechattn.task.checkpoint import packed
from speechattn.task.tally import Tally
from speechattn.text.pieces import Pieces

__all__ = ["Spells", "Task", "seeded"]

LOOK = 10  # batches


@dataclass(frozen=True)
class Spells:
    """Asks of an utterance whether the tokenizer spells its text."""

    tokenizer: Pieces

    def __call__(self, text: str, translation: str | None) -> None:
        """InputError where it does not."""
        self.tokenizer.encode(text)


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
        self.recent: list[tuple[Tensor, Sequence[str]]] = []  # losses that were not looked at yet, and of what
        if seed < 0:
            raise ValueError(f"seed {seed}: wanted 0 or more")

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

    def spells(self) -> Check:
        """What the data is asked of each text, so that it leaves out what cannot be learnt from."""
        return Spells(self.spelling)

    def setup(self, stage: str) -> None:
        """Let the data know what can be spelled."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "check"):
            data.check = self.spells()

    def watch(self, loss: Tensor, ids: Sequence[str]) -> None:
        """Stop where a loss is no number; a GPU, which would have to wait, is asked every `LOOK` batches alone."""
        self.recent.append((loss.detach(), ids))
        if len(self.recent) >= LOOK or (loss.device.type == "cpu" and not self.scaled):
            self.look()

    @property
    def scaled(self) -> bool:
        """Losses are scaled (16-mixed): a step that overflows is left out, and the scale sinks."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def look(self) -> None:
        """InputError, naming the utterances, where a loss was no number; with a scale, where `LOOK` in a row were."""
        recent, self.recent = self.recent, []
        values = torch.stack([loss for loss, _ in recent]).tolist() if recent else []
        bad = [(value, ids) for value, (_, ids) in zip(values, recent, strict=True) if not isfinite(value)]
        if bad and (not self.scaled or len(bad) >= LOOK):
            value, ids = bad[0]
            names = f"{', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''}"
            raise InputError(f"the loss is {value} near step {self.trainer.global_step} (batch of {names}); the last "
                             "checkpoint is from before: a lower learning rate, a longer warmup or "
                             "trainer.gradient_clip_val may help")  # fmt: skip

    def on_train_end(self) -> None:
        """Look at the last losses."""
        self.look()

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
        self.look()
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
