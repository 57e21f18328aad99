"""Checkpoints that a kill cannot destroy, and which of them to go on from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException

from speechattn.task.checkpoint import BEST, CHECKPOINTS, LAST, STEP, number

__all__ = ["AtomicIO", "Checkpoints", "Latest", "newest"]


class AtomicIO(TorchCheckpointIO):
    """A checkpoint is written beside its place and moved there when it is whole and on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it. A kill at any moment leaves what was at `path` before, or the new one."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f".{place.name}.part")
        with beside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(place)


class Latest(ModelCheckpoint):
    """The last `keep` states of a training, one every `every` steps and one at the end; `last.ckpt` is a link.

    The end is that of all steps or epochs, a stop by another callback, or a SIGTERM, which clusters send some time
    before they kill.
    """

    def __init__(self, folder: str | Path, every: int, keep: int) -> None:
        super().__init__(
            folder, "{step}", monitor="step", mode="max", save_top_k=keep, save_last="link", every_n_train_steps=every,
            enable_version_counter=False,
        )  # fmt: skip

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save here, where resuming is exact: later, averaged weights may have replaced the last ones."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
        over = trainer.is_last_batch and 0 <= epochs <= trainer.current_epoch + 1
        if over or 0 <= trainer.max_steps <= trainer.global_step or trainer.should_stop:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Early stopping is decided here."""
        if trainer.should_stop:
            self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A SIGTERM leaves here, between two batches of the training or, where it came in one, of a validation."""
        if not isinstance(exception, SIGTERMException) or trainer.sanity_checking:
            return
        for callback in trainer.callbacks if trainer.validating else ():  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.on_validation_epoch_end(trainer, pl_module)  # gives the last weights back
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Now, unless this step was saved already."""
        if trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is saved."""

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """There is a `last.ckpt` at every moment."""
        if trainer.is_global_zero:
            beside = Path(f"{linkpath}.part")
            beside.unlink(missing_ok=True)
            beside.symlink_to(Path(filepath).name)
            beside.replace(linkpath)
        trainer.strategy.barrier()


@dataclass(frozen=True)
class Checkpoints:
    """What is kept in `checkpoints`: the last few, one every so many steps, and the best of those validated.

    Args:
        every_n_steps: Steps from one to the next; a run that was killed loses what came after.
        keep_last: How many of these are kept.
        keep_best: How many of the best are kept.
    """

    every_n_steps: int = 1000
    keep_last: int = 3
    keep_best: int = 5

    def __post_init__(self) -> None:
        if self.every_n_steps < 1 or self.keep_last < 1 or self.keep_best < 0:
            raise ValueError(f"every {self.every_n_steps} steps, {self.keep_last} last, {self.keep_best} best: "
                             "wanted 1 or more, 1 or more, 0 or more")  # fmt: skip

    def callbacks(self, root: Path, monitor: str, mode: str) -> list[Callback]:
        """For a run in the folder `root`, whose validation is judged by `monitor`."""
        found: list[Callback] = [Latest(root / CHECKPOINTS, self.every_n_steps, self.keep_last)]
        if self.keep_best:
            name = f"{BEST}step={{step}}-{monitor.rpartition('/')[2]}={{{monitor}:.4f}}"
            found.append(ModelCheckpoint(
                root / CHECKPOINTS, name, monitor=monitor, mode=mode, save_top_k=self.keep_best,
                auto_insert_metric_name=False, save_on_train_epoch_end=False, enable_version_counter=False,
            ))  # fmt: skip
        return found


def newest(root: Path) -> Path | None:
    """The checkpoint that a run in this folder goes on from; None where there is none.

    For a moment the link may lead nowhere, while what it will lead to is there.
    """
    last = root / CHECKPOINTS / LAST
    found = [last] if last.exists() else sorted((root / CHECKPOINTS).glob(f"{STEP}*.ckpt"), key=number)
    return found[-1] if found else None
