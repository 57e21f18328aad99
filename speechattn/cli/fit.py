"""`speechattn fit --config recipe.yaml`: training by Lightning's command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from speechattn.errors import InputError

__all__ = ["add_parser", "fit"]

HELP = """\
usage: speechattn fit --config RECIPE.yaml [--config OVERLAY.yaml ...] [options]
       speechattn fit --init-from MODEL --train CUTS.jsonl.gz [--valid CUTS.jsonl.gz] [options]

Train a model. A recipe is a YAML file with the sections model, data and trainer; each part of it is a class_path with
its init_args. Later files and options lie over earlier ones. --init-from alone takes the model from MODEL.

  --model.init_args.encoder.init_args.dim 128   change any value; an unknown key is an error
  --train CUTS, --valid CUTS                    manifests of cuts, from `speechattn prepare`; may be repeated
  --init-from MODEL                             start with the weights of a model folder or a checkpoint
  --tokenizer FOLDER                            of another vocabulary: heads start anew
  --resume                                      go on from the last checkpoint of this run, if there is one
  --trainer.default_root_dir runs/mine          where checkpoints, logs and config.yaml go (default: runs/RECIPE)
  --trainer.max_steps 10000, --trainer.max_epochs 20
  --trainer.precision bf16-mixed                also 32-true (default), 16-mixed, bf16-true
  --trainer.devices 2 --trainer.strategy ddp    several GPUs; --trainer.num_nodes for more machines
  --trainer.accumulate_grad_batches 4           larger batches than fit into memory
  --checkpoint.every_n_steps 1000               how much a kill may cost
  --model.init_args.compile inductor            torch.compile for the encoder
  --trainer.fast_dev_run true                   one batch of everything, no files
  --print_config                                the whole configuration, with all defaults
  --help all                                    every option of Lightning
"""
PACKAGES = {"lightning", "jsonargparse", "lhotse", "sacrebleu", "tensorboard", "sentencepiece", "matplotlib"}


def add_parser(commands: Any) -> None:
    """The options are Lightning's: `main` hands them over as they are."""
    parser = commands.add_parser("fit", help="train a model from a YAML file", add_help=False, allow_abbrev=False)
    parser.set_defaults(run=lambda options: fit([]))


def fit(arguments: Sequence[str]) -> int:
    """Train; InputError for a key or an option that is not known, naming it."""
    if not arguments:
        raise InputError("fit: wanted --config RECIPE.yaml, or --init-from MODEL --train CUTS; --help says more")
    if arguments[0] in ("-h", "--help") and list(arguments[1:]) != ["all"]:
        print(HELP, end="")
        return 0
    try:
        from speechattn.task.command import Fit
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in PACKAGES:
            raise
        raise InputError(f"training needs {error.name}: pip install 'speechattn[train]'") from error
    Fit.run(["--help"] if list(arguments[1:]) == ["all"] else arguments)
    return 0
