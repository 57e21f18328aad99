"""Modules by the names of their classes: what a `config.yaml` may say, and nothing that runs other code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from torch import nn

from speechattn.attention.pattern import Blocks, Span
from speechattn.decoder.groups import Grouped, Interleaved, Wait
from speechattn.errors import ModelError
from speechattn.multimodal.huggingface import Lora

__all__ = ["build", "read_yaml"]

VALUES = (Span, Blocks, Grouped, Interleaved, Wait, Lora)  # besides modules
FUNCTIONS = {
    *(f"speechattn.decoder.attention.{name}" for name in ("learned", "sinusoids")),
    *(f"speechattn.cross.expected.{name}" for name in ("doubling", "fused", "matrix", "ratio", "scan", "sequential")),
    "speechattn.audio.lips.grouped",
}  # that make tables of positions, expected alignments, or norms


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


def build(spec: Any, where: str, plugins: Sequence[str] = ()) -> Any:
    """`{class_path: name, init_args: {...}}` -> the object, all the way down; a bare name of a class is that class.

    It is the notation of a recipe. Where a constructor wants something to call (a maker of positions), a part is its
    class with these arguments given. Classes are modules or patterns of this package, of `torch.nn`, or of the modules
    `plugins`, which are imported. `where` says in a ModelError what part of which file is wrong.
    """
    measure(spec, where, 0, [0])
    return Builder(tuple(plugins)).made(spec, where)


def measure(spec: Any, where: str, depth: int, count: list[int]) -> None:
    """ModelError for what is too deep or too large to be a model."""
    count[0] += 1
    if depth > DEEPEST or count[0] > MOST_PARTS:
        raise ModelError(f"{where}: too {'deep' if depth > DEEPEST else 'large'} for a model")
    parts = spec.values() if isinstance(spec, Mapping) else spec if isinstance(spec, list) else ()
    for part in parts:
        measure(part, where, depth + 1, count)


@dataclass(frozen=True)
class Builder:
    """Makes parts of the classes of this package, of `torch.nn` and of the modules `plugins`."""

    plugins: tuple[str, ...]

    def made(self, spec: Any, where: str, *, maker: bool = False) -> Any:
        """The object that a part stands for, or with `maker` what makes it."""
        if isinstance(spec, str):
            return self.resolve(spec, where) if self.known(spec) else spec
        if isinstance(spec, list):
            return [self.made(item, f"{where}[{i}]", maker=maker) for i, item in enumerate(spec)]
        if not isinstance(spec, Mapping):
            return spec
        if "class_path" not in spec:
            return {key: self.made(value, f"{where}.{key}", maker=maker) for key, value in spec.items()}
        if unknown := sorted(map(str, spec.keys() - {"class_path", "init_args"})):
            raise ModelError(f"{where}: {', '.join(unknown)}: a part has a class_path and init_args, and nothing else")
        args = spec.get("init_args") or {}
        if not isinstance(args, Mapping):
            raise ModelError(f"{where}.init_args: not a mapping of names to values")
        kind = self.resolve(str(spec["class_path"]), f"{where}.class_path")
        makers, named = callables(kind), values(kind)
        args = {str(k): named[str(k)] | {"init_args": v} if bare(v) and str(k) in named else v for k, v in args.items()}
        given = {k: self.made(v, f"{where}.{k}", maker=k in makers) for k, v in args.items()}
        try:
            if maker:
                inspect.signature(kind).bind_partial(**given)
                return partial(kind, **given)
            inspect.signature(kind).bind(**given)
            return kind(**given)
        except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, MemoryError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{where}: {spec['class_path']}: {said}") from error

    def known(self, name: str) -> bool:
        """It may be the name of a class."""
        return name.startswith(("speechattn.", "torch.nn.", *(f"{plugin}." for plugin in self.plugins)))

    def resolve(self, name: str, where: str) -> Any:
        """The class of that name, or a constructor of it (`Span.causal`)."""
        parts = name.split(".")
        if name in FUNCTIONS:
            return lookup(".".join(parts[:-1]), parts[-1:])
        if name.startswith("torch.nn.") and len(parts) == 3:
            found: Any = getattr(nn, parts[2], None)
            if inspect.isclass(found) and issubclass(found, nn.Module):
                return found
        elif self.known(name) and all(part.isidentifier() and not part.startswith("_") for part in parts):
            for split in range(max(1, len(parts) - 2), len(parts)):
                found = lookup(".".join(parts[:split]), parts[split:])
                owner = getattr(found, "__self__", found)  # of a classmethod
                if inspect.isclass(owner) and issubclass(owner, (nn.Module, *VALUES)):
                    return found
        allowed = ", ".join(["speechattn", "torch.nn", *self.plugins])
        raise ModelError(f"{where}: {name} is no module of {allowed}")


def hints(kind: Any) -> dict[str, tuple[Any, ...]]:
    """What the arguments of a constructor may be: each hint and its parts."""
    try:
        found = get_type_hints(kind.__init__ if inspect.isclass(kind) else kind)
    except (NameError, TypeError):
        return {}
    return {name: (hint, *get_args(hint)) for name, hint in found.items()}


def callables(kind: Any) -> set[str]:
    """The arguments for which a constructor wants something to call."""
    return {name for name, parts in hints(kind).items() if Callable in {get_origin(part) for part in parts}}


def values(kind: Any) -> dict[str, dict[str, str]]:
    """The arguments that are one of `VALUES`, with its name: a recipe, once parsed, has its fields alone."""
    found = {name: part for name, parts in hints(kind).items() for part in parts if part in VALUES}
    return {name: {"class_path": f"{part.__module__}.{part.__qualname__}"} for name, part in found.items()}


def bare(value: Any) -> bool:
    """Fields without the name of their class."""
    return isinstance(value, Mapping) and "class_path" not in value


def lookup(module: str, names: list[str]) -> Any:
    """What stands in a module under these names, or None."""
    try:
        found: Any = import_module(module)
    except ImportError:
        return None
    for name in names:
        found = getattr(found, name, None)
    return found
