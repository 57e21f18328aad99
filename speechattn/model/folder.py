"""A model as a folder: `config.yaml`, `model.safetensors` and the files of its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from speechattn.errors import ModelError
from speechattn.model.config import build, read_yaml
from speechattn.model.recognizer import Recognizer
from speechattn.pretrained.weights import check
from speechattn.stream import Stream
from speechattn.text.pieces import Pieces

__all__ = ["CONFIG", "WEIGHTS", "from_config", "is_model", "load_folder", "save_model"]

CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
FORMAT = 1
KEYS = {"format", "sample_rate", "language", "spaceless", "front_end", "encoder", "heads"}
NEEDED = ("front_end", "encoder", "heads")


def is_model(path: Path) -> bool:
    """A folder that `save_model` wrote."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def from_config(config: dict[str, Any], tokenizer: Pieces, *, where: str = CONFIG) -> Recognizer:
    """A model without its weights; ModelError for what is missing, unknown or does not fit."""
    if unknown := sorted(map(str, config.keys() - KEYS)):
        raise ModelError(f"{where}: unknown: {', '.join(unknown)}; known: {', '.join(sorted(KEYS))}")
    if config.get("format") != FORMAT:
        raise ModelError(f"{where}: format {config.get('format')}: this version reads format {FORMAT}")
    if missing := [key for key in NEEDED if key not in config]:
        raise ModelError(f"{where}: {', '.join(missing)} missing")
    parts = {key: build(config[key], f"{where}: {key}") for key in NEEDED}
    for key in ("front_end", "encoder"):
        if not isinstance(parts[key], Stream):
            raise ModelError(f"{where}: {key}: {type(parts[key]).__name__} is not a stream")
    if not isinstance(parts["heads"], dict):
        raise ModelError(f"{where}: heads: not a mapping of names to heads")
    return Recognizer(
        parts["front_end"], parts["encoder"], parts["heads"], tokenizer, sample_rate=config.get("sample_rate", 16000),
        language=config.get("language"), spaceless=bool(config.get("spaceless", False)), config=config,
    )  # fmt: skip


def load_folder(path: Path) -> Recognizer:
    """The model of a folder; every tensor must be there, and no other."""
    from safetensors.torch import load_file

    model = from_config(read_yaml(path / CONFIG), Pieces.load(path), where=str(path / CONFIG))
    try:
        tensors = load_file(path / WEIGHTS)
    except Exception as error:
        raise ModelError(f"{path / WEIGHTS}: not safetensors ({str(error)[:200]})") from error
    check(path / WEIGHTS, model, tensors, "the model of this config.yaml")
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def save_model(model: Recognizer, path: Path) -> None:
    """Write the folder; ModelError when the model does not know its configuration."""
    import yaml
    from safetensors.torch import save_file

    if model.config is None:
        raise ModelError("a model that was not built from a configuration cannot be written as one; use from_config")
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(yaml.safe_dump(model.config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    save_file({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, path / WEIGHTS)
    model.tokenizer.save(path)
    with torch.no_grad():
        load_folder(path)  # what cannot be read again is no model
