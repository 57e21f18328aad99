"""State trees: tuples and dataclasses of tensors, batch first in every leaf.

The state of anything that streams is such a tree, so a batch of live streams is reset, paused, reordered, joined and
taken apart here, once, and no module knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["clone", "concat", "leaves", "map", "node", "select", "split", "where"]

C = TypeVar("C")


@dataclass_transform(frozen_default=True)
def node(cls: type[C]) -> type[C]:
    """A frozen dataclass of subtrees, known to `torch.export` as well."""
    made = dataclass(frozen=True)(cls)
    name = f"{cls.__module__}.{cls.__qualname__}"
    names = [field.name for field in fields(made)]  # type: ignore[arg-type]
    pytree.register_pytree_node(
        made,
        lambda value: ([getattr(value, name) for name in names], None),
        lambda values, _: made(*values),
        serialized_type_name=name,
        flatten_with_keys_fn=lambda value: ([(pytree.GetAttrKey(n), getattr(value, n)) for n in names], None),
    )
    return made


def map(f: Callable[..., Tensor], *trees: Any) -> Any:
    """`f` of the corresponding leaves of trees of one shape.

    A node class with an `align` (`Buffer`) first brings its nodes to one size. TypeError for a leaf that is none.
    """
    first = trees[0]
    if isinstance(first, Tensor):
        return f(*trees)
    if any(type(tree) is not type(first) for tree in trees):
        raise TypeError(f"trees of different kinds: {', '.join(sorted({type(tree).__name__ for tree in trees}))}")
    if isinstance(first, tuple):
        return tuple(map(f, *parts) for parts in zip(*trees, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        if hasattr(first, "align"):
            trees = first.align(trees)
        return type(first)(*(map(f, *(getattr(tree, field.name) for tree in trees)) for field in fields(first)))
    raise TypeError(f"{type(first).__name__} is not a tensor, tuple or dataclass")


def leaves(tree: Any) -> list[Tensor]:
    """Every tensor, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree if isinstance(tree, tuple) else [getattr(tree, field.name) for field in fields(tree)]
    return [leaf for part in parts for leaf in leaves(part)]


def where(keep: Tensor, new: Any, old: Any) -> Any:
    """Rows of `new` where `keep` [B] is True, else those of `old`: to pause a row, or to reset it."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(keep.view(-1, *[1] * (a.dim() - 1)), a, b)

    return map(choose, new, old)


def select(tree: Any, rows: Tensor | Sequence[int]) -> Any:
    """The given rows, in that order: beams, slots of a pool."""
    return map(lambda leaf: leaf.index_select(0, torch.as_tensor(rows, dtype=torch.long, device=leaf.device)), tree)


def concat(trees: Sequence[Any]) -> Any:
    """One batch of all rows."""
    return map(lambda *parts: torch.cat(parts), *trees)


def split(tree: Any) -> list[Any]:
    """Each row as a batch of one, with memory of its own."""
    rows = leaves(tree)
    size = len(rows[0]) if rows else 0
    return [map(lambda leaf, i=i: leaf[i : i + 1].clone(), tree) for i in range(size)]


def clone(tree: Any) -> Any:
    """A copy that shares nothing: for whoever forks a stream."""
    return map(lambda leaf: leaf.clone(), tree)
