"""Training checkpoints -> model folders. Nothing in a checkpoint is run: it is read with `weights_only=True`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechattn.errors import InputError, ModelError
from speechattn.model import Recognizer, from_config, save_model
from speechattn.model.folder import is_model, load_folder
from speechattn.text.pieces import BACKEND, Pieces

__all__ = ["average", "export", "model_config", "packed", "read_checkpoint", "start_from", "tokenizer_of"]

KEYS = ("sample_rate", "language", "spaceless", "front_end", "encoder", "heads")
FORMAT = 1
PREFIX = "model."


def tokenizer_of(folder: str) -> Pieces:
    """The tokenizer in a folder; ModelError where there is none."""
    return Pieces.load(Path(folder))


def packed(config: Mapping[str, Any] | None, tokenizer: Pieces) -> dict[str, Any]:
    """What a checkpoint says of its model: configuration and tokens, in types that load without running code."""
    backend = tokenizer.model.read_bytes() if tokenizer.model is not None else b""
    return {
        "format": FORMAT, "config": None if config is None else dict(config), "pieces": list(tokenizer.pieces),
        "backend": torch.frombuffer(bytearray(backend or b"\0"), dtype=torch.uint8)[: len(backend)],
    }  # fmt: skip


def model_config(init_args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a task as its YAML has them -> the `config.yaml` of its model."""
    return {"format": 1} | {key: plain(init_args[key]) for key in KEYS if key in init_args}


def plain(value: Any) -> Any:
    """Mappings and lists all the way down."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint that `speechattn fit` wrote; InputError for any other file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        raise InputError(f"{path}: not a checkpoint that can be read ({str(error).splitlines()[0][:200]})") from error
    if not isinstance(found, dict) or "speechattn" not in found or "state_dict" not in found:
        raise InputError(f"{path}: not a checkpoint of `speechattn fit`")
    return found


def average(checkpoints: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor, added up in float64; whole numbers are those of the last checkpoint."""
    last = checkpoints[-1]
    for one in checkpoints:
        if one.keys() != last.keys() or any(one[name].shape != last[name].shape for name in last):
            raise InputError("the checkpoints are not of one model: their tensors differ")
    return {
        name: torch.stack([one[name].double() for one in checkpoints]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point() else tensor
        for name, tensor in last.items()
    }  # fmt: skip


def weights_of(path: Path) -> dict[str, Tensor]:
    """Tensors of the model in a checkpoint or a model folder, by the names that they have in the model."""
    if is_model(path):
        return load_folder(path).state_dict()
    state = read_checkpoint(path)["state_dict"]
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def export(paths: Sequence[Path], folder: Path, plugins: Sequence[str] = ()) -> Recognizer:
    """Write the model of a checkpoint, or the average of several, as a folder; returns it.

    InputError for what is no checkpoint; ModelError where its model cannot be made again.
    """
    if not paths:
        raise InputError("no checkpoint was given")
    about = read_checkpoint(paths[-1])["speechattn"]
    if about.get("format") != FORMAT:
        raise InputError(f"{paths[-1]}: format {about.get('format')}; this version reads format {FORMAT}")
    if about["config"] is None:
        raise ModelError(f"{paths[-1]}: trained from Python objects, so its configuration is not known")
    model = from_config(about["config"], unpacked(about, folder), where=str(paths[-1]), plugins=plugins)
    try:
        model.load_state_dict(average([weights_of(path) for path in paths]))
    except RuntimeError as error:
        raise InputError(f"{paths[-1]}: its weights do not fit its configuration ({str(error)[:300]})") from error
    save_model(model.eval().requires_grad_(False), folder, plugins)
    return model


def unpacked(about: Mapping[str, Any], folder: Path) -> Pieces:
    """The tokenizer of a checkpoint, written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = bytes(about["backend"].numpy())
    if backend:
        (folder / BACKEND).write_bytes(backend)
    tokenizer = Pieces(about["pieces"], model=folder / BACKEND if backend else None)
    tokenizer.save(folder)
    return tokenizer


def start_from(model: Recognizer, path: Path) -> list[str]:
    """Give `model` the weights at `path`, a model folder or a checkpoint, wherever name and shape are the same.

    Returns the names of tensors that keep their own: heads of another vocabulary, say. InputError when the encoder's
    are not all there, for then it is another model.
    """
    theirs, mine = weights_of(path), model.state_dict()
    fits = {name: t for name, t in theirs.items() if name in mine and mine[name].shape == t.shape}
    missing = [name for name in mine if name not in fits]
    if wrong := [name for name in missing if name.startswith(("encoder.", "front_end."))]:
        raise InputError(f"{path}: another encoder: {len(wrong)} of its tensors do not fit, {wrong[0]} for one")
    model.load_state_dict(fits, strict=False)
    return missing
