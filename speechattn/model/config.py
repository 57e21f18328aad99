"""Modules by the names of their classes: what a `config.yaml` may say, and nothing that runs other code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from speechattn.attention.pattern import Blocks, Span
from speechattn.errors import ModelError

__all__ = ["build", "read_yaml"]

VALUES = (Span, Blocks)  # besides modules


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping; ModelError names the file when there is none."""
    import yaml

    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(said, dict):
        raise ModelError(f"{path}: not a mapping of keys to values")
    return said


MOST_PARTS = 10_000  # that a configuration may have; aliases count every time
DEEPEST = 50


def build(spec: Any, where: str) -> Any:
    """`{class: name, args: {...}}` -> the object, all the way down; a bare name of a class is that class.

    Classes are modules or patterns of this package, or modules of `torch.nn`. `where` says in a ModelError what part
    of which file is wrong.
    """
    measure(spec, where, 0, [0])
    return made(spec, where)


def measure(spec: Any, where: str, depth: int, count: list[int]) -> None:
    """ModelError for what is too deep or too large to be a model."""
    count[0] += 1
    if depth > DEEPEST or count[0] > MOST_PARTS:
        raise ModelError(f"{where}: too {'deep' if depth > DEEPEST else 'large'} for a model")
    parts = spec.values() if isinstance(spec, Mapping) else spec if isinstance(spec, list) else ()
    for part in parts:
        measure(part, where, depth + 1, count)


def made(spec: Any, where: str) -> Any:
    """The object that a part stands for."""
    if isinstance(spec, str):
        return resolve(spec, where) if spec.startswith(("speechattn.", "torch.nn.")) else spec
    if isinstance(spec, list):
        return [made(item, f"{where}[{i}]") for i, item in enumerate(spec)]
    if not isinstance(spec, Mapping):
        return spec
    if "class" not in spec:
        return {key: made(value, f"{where}.{key}") for key, value in spec.items()}
    if unknown := sorted(map(str, spec.keys() - {"class", "args"})):
        raise ModelError(f"{where}: {', '.join(unknown)}: a part has a class and args, and nothing else")
    args = spec.get("args") or {}
    if not isinstance(args, Mapping):
        raise ModelError(f"{where}.args: not a mapping of names to values")
    kind = resolve(str(spec["class"]), f"{where}.class")
    given = {str(key): made(value, f"{where}.{key}") for key, value in args.items()}
    try:
        inspect.signature(kind).bind(**given)
        return kind(**given)
    except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, MemoryError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{where}: {spec['class']}: {said}") from error


def resolve(name: str, where: str) -> Any:
    """The class of that name, or a constructor of it (`Span.causal`)."""
    parts = name.split(".")
    if name.startswith("torch.nn.") and len(parts) == 3:
        found: Any = getattr(nn, parts[2], None)
        if inspect.isclass(found) and issubclass(found, nn.Module):
            return found
    elif parts[0] == "speechattn" and all(part.isidentifier() and not part.startswith("_") for part in parts):
        for split in range(max(1, len(parts) - 2), len(parts)):
            found = lookup(".".join(parts[:split]), parts[split:])
            owner = getattr(found, "__self__", found)  # of a classmethod
            if inspect.isclass(owner) and issubclass(owner, (nn.Module, *VALUES)):
                return found
    raise ModelError(f"{where}: {name} is no module of speechattn or torch.nn")


def lookup(module: str, names: list[str]) -> Any:
    """What stands in a module under these names, or None."""
    try:
        found: Any = import_module(module)
    except ImportError:
        return None
    for name in names:
        found = getattr(found, name, None)
    return found
