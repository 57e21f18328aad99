"""`speechattn export CHECKPOINT... FOLDER`: a training checkpoint, or the average of several, as a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from speechattn.errors import InputError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("export", help="training checkpoints to a model folder", allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="several are averaged")
    parser.add_argument("folder", metavar="FOLDER", help="where the model is written")
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="whose classes the model uses")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the folder, and say what is in it."""
    from speechattn.task.checkpoint import export

    folder = Path(options.folder)
    if folder.suffix == ".ckpt" or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}: the last argument is the folder to write")
    model = export([Path(name) for name in options.checkpoints], folder, options.plugin)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {count:,} parameters, heads {', '.join(model.heads)}, {model.tokenizer.size} tokens")
    return 0
