"""Training checkpoints -> model folders. Nothing in a checkpoint is run: it is read with `weights_only=True`."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from inspect import isclass, isfunction
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechattn.errors import InputError, ModelError
from speechattn.model import Recognizer, from_config, save_model
from speechattn.model.config import read_yaml
from speechattn.model.folder import CONFIG, WEIGHTS, is_model, load_folder
from speechattn.model.load import located
from speechattn.multimodal.tokens import load_tokenizer
from speechattn.pretrained.espnet import is_espnet, load_espnet
from speechattn.text.pieces import LIST, Pieces

__all__ = [
    "about_of", "average", "export", "goes_on", "model_config", "packed", "read_checkpoint", "recipe", "several",
    "start_from", "tokenizer_of",
]  # fmt: skip

KEYS = (
    "sample_rate", "language", "target_language", "spaceless", "front_end", "encoder", "heads", "network", "matcher",
)  # fmt: skip
FORMAT = 1
PREFIX = "model."
LAST_WEIGHTS = "current_model_state"  # where Lightning keeps them when "state_dict" is the average
CHECKPOINTS, LAST, BEST, STEP = "checkpoints", "last.ckpt", "best-", "step="  # names of files
FINE_LR, FINE_EPOCHS = 1e-4, 10


def tokenizer_of(path: str) -> Pieces:
    """The tokenizer in a folder, or that of a model or a checkpoint; ModelError where there is none."""
    place = located(path)
    if not (place / LIST).exists() and (place.is_file() or is_espnet(place)):
        return parts_of(place)[1]
    return load_tokenizer(place)


def packed(config: Mapping[str, Any] | None, tokenizer: Pieces) -> dict[str, Any]:
    """What a checkpoint says of its model: configuration and tokens, in types that load without running code."""
    with TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        files = {file.name: torch.from_numpy(np.fromfile(file, np.uint8)) for file in sorted(Path(folder).iterdir())}
    return {"format": FORMAT, "config": None if config is None else dict(config), "files": files}


def model_config(init_args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a task as its YAML has them -> the `config.yaml` of its model."""
    return {"format": 1} | {key: plain(init_args[key]) for key in KEYS if key in init_args}


def plain(value: Any) -> Any:
    """Mappings and lists all the way down, functions and classes by name."""
    if isfunction(value) or isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
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
    if (found_format := found["speechattn"].get("format")) != FORMAT:
        raise InputError(f"{path}: format {found_format}; this version of speechattn reads format {FORMAT}")
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


def weights_of(path: Path, plugins: Sequence[str] = (), *, ema: bool | None = None) -> dict[str, Tensor]:
    """Tensors of the model in a checkpoint or a model folder, by the names that they have in the model.

    A checkpoint of a training with averaged weights (`EMAWeightAveraging`) has these and the last ones. `ema` says
    which; None is the averaged ones if there are any. InputError where it is True and there are none.
    """
    path = located(path)
    if path.is_dir():
        return load_any(path, plugins).state_dict()
    found = read_checkpoint(path)
    if ema and LAST_WEIGHTS not in found:
        raise InputError(f"{path}: no averaged weights: the training had no EMAWeightAveraging among its callbacks")
    state = found[LAST_WEIGHTS] if ema is False and LAST_WEIGHTS in found else found["state_dict"]
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def load_any(path: Path, plugins: Sequence[str] = ()) -> Recognizer:
    """The model of a folder, ours or ESPnet's; ModelError where there is none."""
    if is_model(path):
        return load_folder(path, plugins)
    if is_espnet(path):
        return load_espnet(path)
    raise ModelError(f"{path}: no model folder ({CONFIG} and {WEIGHTS}), ESPnet experiment or checkpoint")


def parts_of(path: Path, plugins: Sequence[str] = ()) -> tuple[dict[str, Any], Pieces]:
    """Configuration and tokenizer of a model folder or a checkpoint."""
    if path.is_file():
        about = about_of(path)
        folder = Path(mkdtemp(prefix="speechattn-tokens-"))
        atexit.register(rmtree, folder, ignore_errors=True)
        return about["config"], unpacked(about, folder)
    if is_model(path):
        return read_yaml(path / CONFIG), load_tokenizer(path)
    model = load_any(path, plugins)
    assert model.config is not None
    return model.config, model.tokenizer


def about_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its model; ModelError where it does not know."""
    about: dict[str, Any] = read_checkpoint(path)["speechattn"]
    if about["config"] is None:
        raise ModelError(f"{path}: trained from Python objects, so its configuration is not known")
    return about


def recipe(path: Path, tokenizer: str | None = None, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe that trains the model at `path` further: what is not said in it are the usual settings.

    With the folder of another `tokenizer` its heads are made for that many tokens.
    """
    config, old = parts_of(path, plugins)
    if "heads" not in config:
        raise InputError(f"{path}: a language model; a recipe (--config) says how it is trained further")
    if tokenizer is not None:
        config = {**config, "heads": resized(config["heads"], old.size, tokenizer_of(tokenizer).size)}
    heads = config["heads"]
    weights = {"ctc": 0.3 if len(heads) > 1 else 1.0, "source": 0.3, "attention": 0.7, "transducer": 1.0}
    objectives = [
        {"class_path": f"speechattn.task.objectives.{kind}Objective", "init_args": {"weight": weights[head], **more}}
        for head, kind, more in (
            ("ctc", "CTC", {}), ("source", "CTC", {"head": "source"}), ("attention", "Attention", {}),
            ("transducer", "Transducer", {}),
        ) if head in heads
    ]  # fmt: skip
    task = "translator.Translator" if "source" in heads or config.get("target_language") else "recognizer.Recognizer"
    spec = {"class_path": "speechattn.audio.augment.SpecAugment", "init_args": {"time_masks": 2}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": FINE_LR}}
    parts = {key: notation(config[key]) for key in KEYS if key in config}
    more = {"tokenizer": tokenizer or str(path), "objectives": objectives, "augment": spec, "optimizer": optimizer}
    return {
        "model": {"class_path": f"speechattn.task.{task}", "init_args": parts | more},
        "data": {"class_path": "speechattn.data.corpus.Corpus"},
        "trainer": {"max_epochs": FINE_EPOCHS, "gradient_clip_val": 5.0},
    }


def resized(spec: Any, old: int, new: int) -> Any:
    """The same heads for `new` tokens."""
    if isinstance(spec, list):
        return [resized(item, old, new) for item in spec]
    if not isinstance(spec, Mapping):
        return spec
    return {k: new if (k, v) == ("vocab", old) else resized(v, old, new) for k, v in spec.items()}


def notation(spec: Any) -> Any:
    """As a recipe says it: members by keyword are a mapping there."""
    if isinstance(spec, list):
        return [notation(item) for item in spec]
    if not isinstance(spec, Mapping):
        return spec
    found = {key: notation(value) for key, value in spec.items()}
    if found.get("class_path") in ("speechattn.stream.Serial", "speechattn.stream.serial.Serial"):
        return {"class_path": f"{found['class_path']}.of", "init_args": {"members": found.get("init_args", {})}}
    return found


def goes_on(path: Path, state: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]) -> None:
    """InputError where a training with such tensors and groups of an optimizer cannot go on from a checkpoint."""
    found = read_checkpoint(path)
    theirs = found[LAST_WEIGHTS] if LAST_WEIGHTS in found else found["state_dict"]
    if wrong := [name for name in {**state, **theirs} if shape(theirs.get(name)) != shape(state.get(name))]:
        raise InputError(f"--resume: {path} is of another model: {len(wrong)} tensors do not fit, {wrong[0]} for one")
    saved = found["optimizer_states"][0]["param_groups"]
    alike = [len(group["params"]) for group in saved] == [len(group["params"]) for group in groups]
    asked = [{key for key in group if not key.endswith(("_lr", "_momentum"))} for group in groups]  # not a schedule's
    if not alike or any(not mine <= group.keys() for mine, group in zip(asked, saved, strict=True)):
        raise InputError(f"--resume: {path} has the state of another optimizer; --init-from takes its weights alone")


def shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Of a tensor, if there is one."""
    return None if tensor is None else tuple(tensor.shape)


def several(folder: Path, which: str) -> list[Path]:
    """`last:N` or `best:N` of the checkpoints that a training left in a folder, the best or newest last.

    InputError when there are fewer, or when `which` is something else.
    """
    kind, _, count = which.partition(":")
    if kind not in ("last", "best") or not count.isdecimal() or not int(count):
        raise InputError(f"--average {which}: last:N or best:N")
    place = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    paths = list(place.glob(f"{BEST if kind == 'best' else STEP}*.ckpt"))
    if len(paths) < int(count):
        raise InputError(f"{place}: {len(paths)} checkpoints of the kind {kind}, not {count}")
    if kind == "last":
        return sorted(paths, key=number)[-int(count) :]
    about = {path: read_checkpoint(path)["speechattn"] for path in paths}
    sign = {"min": -1, "max": 1}
    return sorted(paths, key=lambda path: sign[about[path]["mode"]] * about[path]["score"])[-int(count) :]


def number(path: Path) -> int:
    """The step of a checkpoint, from the name of its file."""
    return int(path.stem.removeprefix(STEP))


def export(
    paths: Sequence[Path], folder: Path, plugins: Sequence[str] = (), *, ema: bool | None = None
) -> Recognizer:  # fmt: skip
    """Write the model of a checkpoint, or the average of several, as a folder; returns it. `ema` as in `weights_of`.

    InputError for what is no checkpoint; ModelError where its model cannot be made again.
    """
    if not paths:
        raise InputError("no checkpoint was given")
    weights = average([weights_of(path, plugins, ema=ema) for path in paths])
    about = about_of(paths[-1])
    model = from_config(about["config"], unpacked(about, folder), where=str(paths[-1]), plugins=plugins)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{paths[-1]}: its weights do not fit its configuration ({str(error)[:300]})") from error
    save_model(model.eval().requires_grad_(False), folder, plugins)
    return model


def unpacked(about: Mapping[str, Any], folder: Path) -> Pieces:
    """The tokenizer of a checkpoint, written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if LIST not in about["files"]:
        (folder / LIST).unlink(missing_ok=True)  # of another model that was there
    for name, content in about["files"].items():
        (folder / Path(name).name).write_bytes(content.numpy().tobytes())
    return load_tokenizer(folder)


def start_from(model: Recognizer, path: Path, plugins: Sequence[str] = ()) -> list[str]:
    """Give `model` the weights at `path`, a model folder or a checkpoint, wherever name and shape are the same.

    Returns the names of tensors that keep their own: heads of another vocabulary, say, or gates. InputError when the
    encoder's are not all there, for then it is another model.
    """
    theirs, mine = weights_of(path, plugins), model.state_dict()
    fits = {name: t for name, t in theirs.items() if name in mine and mine[name].shape == t.shape}
    missing = [name for name in mine if name not in fits]
    if wrong := [name for name in missing if name.startswith(("encoder.", "front_end.")) and not gate(name)]:
        raise InputError(f"{path}: another encoder: {len(wrong)} of its tensors do not fit, {wrong[0]} for one")
    model.load_state_dict(fits, strict=False)
    return missing


def gate(name: str) -> bool:
    """A tensor that only a model with gates has, which a usual one can become."""
    return name.endswith((".gates", ".gates.logits"))
