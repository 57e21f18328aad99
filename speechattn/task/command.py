"""Lightning's command line over the tasks and data of this package."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from speechattn.errors import InputError
from speechattn.task.base import Task
from speechattn.task.callbacks import AtomicIO, Checkpoints, newest
from speechattn.task.checkpoint import goes_on, model_config, recipe
from speechattn.task.mistakes import ghosts, lightnings, readable, refused
from speechattn.task.stop import stoppable

__all__ = ["Fit", "keep_memory"]

REFRESH = 10  # steps: the bar waits for the loss of a GPU
CORPUS, TOKENIZER = "--data.init_args.", "--model.init_args.tokenizer"
SECTIONS = ("model", "data", "trainer", "checkpoint", "seed_everything", "init_from", "resume", "plugins")
FULL = {"--init-from": "--init_from", "--tokenizer": TOKENIZER}
NOISE = ("💡 Tip", "TPU available", "HPU available", "Found current_model_state")
NOISY = (
    "LightningCLI's args parameter", ".*does not have many workers", ".*treespec",
    ".*smaller than the logging interval", "Grad strides do not match bucket view",
    "Checkpoint directory .* exists and is not empty", "Found .* in eval mode",
)  # fmt: skip


class Fit(LightningCLI):
    """Model and data by `class_path`, strictly; several `--config` lie over one another, dotted options over those."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where a training begins, and what it keeps."""
        parser.add_argument(
            "--init_from", type=str | None, default=None, help="model folder or checkpoint to start from"
        )
        parser.add_argument(
            "--resume", type=bool, default=False, help="go on from the last checkpoint, if there is one"
        )
        parser.add_argument("--plugins", type=list[str], default=[], help="modules whose classes --init_from names")
        parser.add_class_arguments(Checkpoints, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """InputError also for an unknown key without a value, which the parser overlooks."""
        super().parse_arguments(parser, args)
        for path in self.config.config or []:
            if path is not None and Path(str(path)).is_file() and (key := ghosts(read(Path(str(path))), self.config)):
                raise InputError(f"{path}: unknown key {key}")

    def instantiate_classes(self) -> None:
        """InputError, naming the class, for a value that it refuses."""
        try:
            super().instantiate_classes()
            if isinstance(self.model, Task):
                self.model.configure_optimizers()  # says now what is wrong with it
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise refused(error) from error

    def instantiate_trainer(self, **given: Any) -> Trainer:
        """With a folder of its own, logs, and checkpoints."""
        chosen = self.config_init.trainer
        root = Path(chosen.default_root_dir or Path("runs") / self.run_name())
        callbacks = chosen.callbacks = listed(chosen.callbacks)
        if chosen.enable_progress_bar is not False and not any(isinstance(one, ProgressBar) for one in callbacks):
            callbacks.append(TQDMProgressBar(refresh_rate=REFRESH))
        chosen.default_root_dir = str(root)
        if chosen.logger in (None, True) and not chosen.fast_dev_run:
            chosen.logger = TensorBoardLogger(root, name="", version="")
            callbacks.append(LearningRateMonitor("step"))
        if chosen.enable_checkpointing is not False and not chosen.fast_dev_run:
            callbacks += self.config_init.checkpoint.callbacks(root, *self.model.monitor)
            chosen.plugins = [*listed(chosen.plugins), AtomicIO()]
            if newest(root) is not None and not self.config.resume:
                raise InputError(f"{root}: an earlier run: --resume goes on with it; --trainer.default_root_dir names "
                                 "another folder")  # fmt: skip
        return super().instantiate_trainer(**given)

    def run_name(self) -> str:
        """Named after the files of its configuration and the folder of the first, or after what it begins with."""
        paths = [Path(str(path)).absolute() for path in self.config.config or [] if path is not None]
        names = [path.stem for path in paths]
        if self.config.init_from is not None:
            return "-".join([*names[1:], Path(self.config.init_from).resolve().name])
        within = f"{paths[0].parent.name}/" if paths and paths[0].parent != Path.cwd() else ""
        return within + ("-".join(names) or "run")

    def fit(self) -> None:
        """Train."""
        self.model.config = model_config(self.config.model.init_args)
        last = newest(Path(self.trainer.default_root_dir)) if self.config.resume else None
        if self.config.init_from is not None and last is None:
            self.model.init_from(Path(self.config.init_from), self.config.plugins)
        if isinstance(self.trainer.accelerator, CPUAccelerator):
            keep_memory()
        sizes = [f"{name} {size(part):,}" for name, part in self.model.parts.items()]
        rank_zero_info(f"{', '.join(sizes)} parameters")
        if last is not None:
            made = self.model.configure_optimizers()
            goes_on(last, self.model.state_dict(), (made["optimizer"] if isinstance(made, dict) else made).param_groups)
        with stoppable(self.trainer):
            self.trainer.fit(self.model, self.datamodule, ckpt_path=last, weights_only=True)

    @classmethod
    def run(cls, arguments: Sequence[str]) -> None:
        """Parse and train; InputError of one line for what cannot be parsed."""
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # classes in files of one's own
        given = whole(spelled(arguments))
        with quiet():
            try:
                made = cls(
                    LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
                    seed_everything_default=0, save_config_kwargs={"overwrite": True}, args=given,
                    trainer_defaults={"enable_model_summary": False}, run=False, auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                    parser_kwargs={"exit_on_error": False, "prog": "speechattn fit"},
                )  # fmt: skip
            except ArgumentError as error:
                raise InputError(readable(str(error))) from error
            try:
                made.fit()
            except torch.OutOfMemoryError as error:
                raise InputError(f"too little GPU memory: lower data.init_args.max_seconds ({error})") from error
            except Exception as error:
                if lightnings(error):
                    raise InputError(" ".join(str(error).split())) from error
                raise


def keep_memory() -> bool:
    """Freed memory stays in the process from now on (glibc), so that no step has to ask for it page by page."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


@contextmanager
def quiet() -> Iterator[None]:
    """Without advertisements."""

    def wanted(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in NOISE)

    loggers = [logging.getLogger(f"lightning.{kind}.utilities.rank_zero") for kind in ("pytorch", "fabric")]
    for logger in loggers:
        logger.addFilter(wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Lightning, to its makers
        for text in NOISY:
            warnings.filterwarnings("ignore", text)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(wanted)


def spelled(arguments: Sequence[str]) -> list[str]:
    """Short forms in full: `--init-from`, `--resume` alone, `--tokenizer`; `--train` and `--valid` of the corpus."""
    found: list[str] = []
    manifests: dict[str, list[str]] = {"train": [], "valid": []}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name == "--resume" and not equals and (not rest or rest[0].startswith("-")):
            equals, value = "=", "true"
        if name[2:] in manifests and name.startswith("--"):
            if not equals and not rest:
                raise InputError(f"{name}: wanted a manifest of cuts")
            manifests[name[2:]].append(value if equals else rest.pop(0))
            continue
        found.append(f"{FULL.get(name, name)}{equals}{value}")
    return found + [f"{CORPUS}{name}={json.dumps(paths)}" for name, paths in manifests.items() if paths]


def whole(arguments: list[str]) -> list[str]:
    """With a recipe made from the model to start from, where none is given."""
    values = [*arguments[1:], ""]
    pairs = [(a.partition("=")[0], a.partition("=")[2] or b) for a, b in zip(arguments, values, strict=False)]
    configs = [read(Path(value)) for name, value in pairs if name in ("-c", "--config")]
    said = {key: value for found in configs for key, value in found.items()} | dict(pairs)
    start = said.get("--init_from") or said.get("init_from")
    if start is None or said.keys() & {"model", "--model", "--model.class_path"}:
        return arguments
    made = recipe(Path(start), said.get(TOKENIZER), said.get("plugins") or [])
    return ["--config", yaml.safe_dump(made, sort_keys=False), *arguments]


def read(path: Path) -> dict[str, Any]:
    """A file of a configuration; InputError when it is none."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a mapping of keys to values")
    if unknown := [key for key in found if key not in SECTIONS]:
        raise InputError(f"{path}: unknown key {unknown[0]}; there are {', '.join(SECTIONS)}")
    if wrong := [key for key in ("trainer", "checkpoint") if not isinstance(found.get(key, {}), dict)]:
        raise InputError(f"{path}: {wrong[0]} is not a mapping of keys to values")
    return found


def size(module: nn.Module) -> int:
    """How many parameters it has."""
    return sum(parameter.numel() for parameter in module.parameters())


def listed(value: Any) -> list[Any]:
    """One, several or none -> a list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
