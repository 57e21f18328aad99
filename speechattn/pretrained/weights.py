"""Weights that must fit."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from speechattn.errors import ModelError

__all__ = ["check"]


def check(path: Path, network: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """ModelError names the first tensors that are missing, left over, or of another shape than those of `what`."""
    wanted = network.state_dict()
    wrong = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - wanted.keys()),
        "of the wrong shape": sorted(k for k in wanted.keys() & tensors.keys() if wanted[k].shape != tensors[k].shape),
    }
    said = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in wrong.items() if names]
    if said:
        raise ModelError(f"{path}: tensors do not fit {what}: {'; '.join(said)}")
