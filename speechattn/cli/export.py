"""`speechattn export CHECKPOINT... FOLDER`: a training checkpoint, or the average of several, as a model folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from speechattn.errors import InputError
from speechattn.model import Recognizer
from speechattn.model.stored import KINDS

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("export", help="training checkpoints to a model folder", allow_abbrev=False)
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="several are averaged; with --average the folder of a run"
    )
    parser.add_argument("folder", metavar="FOLDER", help="where the model is written")
    parser.add_argument("--average", metavar="last:N|best:N", help="average these checkpoints of a run")
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=None,
        help="of a training with averaged weights: these (default where there are any), or with --no-ema the last ones",
    )  # fmt: skip
    parser.add_argument("--prune", action="store_true", help="without heads and hidden units whose gates are closed")
    parser.add_argument(
        "--split", type=float, metavar="SHARE", help="of DuoAttention's heads, those with the lowest gates, that forget"
    )
    parser.add_argument(
        "--weights", choices=KINDS, help="bfloat16: half the size; int8: a quarter, each row of a matrix with a scale"
    )
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="whose classes the model uses")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the folder, and say what is in it."""
    from speechattn.model import save_model
    from speechattn.task.checkpoint import CHECKPOINTS, about_of, export, several
    from speechattn.task.language_model import export_language_model

    folder, paths = Path(options.folder), [Path(name) for name in options.checkpoints]
    if folder.suffix == ".ckpt" or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}: the last argument is the folder to write")
    if (folder / CHECKPOINTS).is_dir():
        raise InputError(f"{folder}: the folder of a training; a model needs one of its own")
    if options.average is not None:
        if len(paths) != 1 or not paths[0].is_dir():
            raise InputError("--average: wanted the folder of one run, and the folder to write")
        paths = several(paths[0], options.average)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where plugins are
    told = f"from {', '.join(path.name for path in paths)}"
    if "network" in about_of(paths[-1])["config"]:
        if options.prune or options.split is not None or options.weights is not None:
            raise InputError("--prune, --split and --weights: for recognisers, this is a language model")
        network = export_language_model(paths, folder, options.plugin, ema=options.ema)
        print(f"{folder}: language model, {size(network):,} parameters, {network.vocab} tokens, {told}")
        return 0
    model = changed(export(paths, folder, options.plugin, ema=options.ema), options)
    if options.prune or options.split is not None or options.weights is not None:
        save_model(model, folder, options.plugin, weights=options.weights or "float32")
    heads = ", ".join(model.heads)
    print(f"{folder}: {size(model):,} parameters, heads {heads}, {model.tokenizer.size} tokens, {told}")
    return 0


def changed(model: Recognizer, options: argparse.Namespace) -> Recognizer:
    """With fewer heads, or heads that forget, where it is asked for; InputError where that cannot be."""
    from speechattn.model.pruning import forgetful, gates_of, smaller

    if options.prune and not gates_of(model.encoder):
        raise InputError("--prune: this encoder has no gates; train it with speechattn.model.pruning.GatedEncoder")
    try:
        model = smaller(model) if options.prune else model
        return model if options.split is None else forgetful(model, options.split)
    except ValueError as error:
        raise InputError(f"--{'prune' if options.split is None else 'split'}: {error}") from error


def size(module: nn.Module) -> int:
    """How many parameters it has."""
    return sum(parameter.numel() for parameter in module.parameters())
