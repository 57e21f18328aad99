"""`speechattn fit --config recipe.yaml`: training by Lightning's command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from speechattn.errors import InputError

__all__ = ["add_parser", "fit"]


def add_parser(commands: Any) -> None:
    """The options are Lightning's: `speechattn fit --help` is answered by its own parser."""
    parser = commands.add_parser("fit", help="train a model from a YAML file", add_help=False, allow_abbrev=False)
    parser.set_defaults(run=lambda options: fit([]))


def fit(arguments: Sequence[str]) -> int:
    """Train; the exit code is 2 for a key or an option that is not known, naming it."""
    try:
        from speechattn.task.command import Fit
    except ImportError as error:
        raise InputError(f"training needs {error.name}: pip install 'speechattn[train]'") from error
    Fit.run(arguments)
    return 0
