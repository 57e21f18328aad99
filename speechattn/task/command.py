"""Lightning's command line over the tasks and data of this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from speechattn.task.checkpoint import model_config

__all__ = ["Fit"]


class Fit(LightningCLI):
    """Model and data by `class_path`, strictly; several `--config` lie over one another, dotted options over those."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where a training begins."""
        parser.add_argument(
            "--init_from", type=str | None, default=None, help="model folder or checkpoint to start from"
        )

    def before_fit(self) -> None:
        """The model knows its configuration, and where it starts."""
        chosen = self.config[self.subcommand]
        self.model.config = model_config(chosen.model.init_args)
        if chosen.init_from is not None:
            self.model.init_from(Path(chosen.init_from))

    @classmethod
    def run(cls, arguments: Sequence[str]) -> None:
        """Parse and train."""
        given = ["--init_from" + a.removeprefix("--init-from") if a.startswith("--init-from") else a for a in arguments]
        cls(
            LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
            seed_everything_default=0, save_config_kwargs={"overwrite": True}, args=["fit", *given],
        )  # fmt: skip
