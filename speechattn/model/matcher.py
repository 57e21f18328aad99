"""A retriever or an index as a folder: `config.yaml` and `model.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speechattn.errors import ModelError
from speechattn.model.config import build, read_yaml
from speechattn.model.stored import read_weights
from speechattn.terms.retriever import Retriever
from speechattn.terms.vector import VectorIndex

__all__ = ["load_matcher", "save_matcher"]

CONFIG, WEIGHTS, FORMAT = "config.yaml", "model.safetensors", 1


def save_matcher(matcher: Retriever | VectorIndex, config: Any, encoder: str, folder: Path) -> None:
    """Write the folder: `config` has the matcher's class_path and init_args; it reads frames of the model `encoder`."""
    import yaml
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    said = {"format": FORMAT, "encoder": encoder, "matcher": config}
    (folder / CONFIG).write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in matcher.state_dict().items()}, folder / WEIGHTS)
    load_matcher(folder)  # what cannot be read again is none


def load_matcher(folder: Path) -> tuple[Retriever | VectorIndex, str]:
    """What `save_matcher` wrote, in `eval()`, and the name of the model whose encoder it reads. ModelError for none."""
    said = read_yaml(folder / CONFIG)
    if said.keys() != {"format", "encoder", "matcher"} or said["format"] != FORMAT:
        raise ModelError(f"{folder / CONFIG}: wanted format {FORMAT}, an encoder and a matcher of terms, nothing else")
    matcher = build(said["matcher"], f"{folder / CONFIG}: matcher")
    if not isinstance(matcher, Retriever | VectorIndex):
        raise ModelError(f"{folder / CONFIG}: {type(matcher).__name__} is no matcher of terms")
    tensors, mine = read_weights(folder / WEIGHTS, matcher.state_dict()), matcher.state_dict()
    if wrong := [name for name in {**tensors, **mine} if shape(tensors, name) != shape(mine, name)]:
        raise ModelError(f"{folder / WEIGHTS}: not the weights of its {CONFIG}: {wrong[0]} for one")
    matcher.load_state_dict(tensors)
    return matcher.eval().requires_grad_(False), str(said["encoder"])


def shape(tensors: Any, name: str) -> tuple[int, ...] | None:
    """Of a tensor, if it is there."""
    return tuple(tensors[name].shape) if name in tensors else None
