"""Read a whole ESPnet2 model that recognises or translates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechattn.attention.pattern import Span
from speechattn.attention.self_attention import joined
from speechattn.audio.spectrum import LogMel
from speechattn.errors import ModelError
from speechattn.model.folder import from_config
from speechattn.model.recognizer import Recognizer
from speechattn.pretrained.espnet.config import Options, encoder_of, read_yaml
from speechattn.pretrained.espnet.heads import RECOGNITION, Task, head_specs, head_tensors, task_of
from speechattn.pretrained.espnet.load import config_at, encoder_tensors, find_weights, read_weights
from speechattn.pretrained.espnet.network import encoder_spec
from speechattn.pretrained.espnet.sound import Sound, read_sound
from speechattn.pretrained.espnet.tokens import read_tokens
from speechattn.pretrained.weights import check

__all__ = ["is_espnet", "load_espnet"]

# Parts of every ESPnet model: taken over, of constants, and for training alone.
PARTS = {"encoder", "normalize", "frontend", "specaug"}
UNDETERMINED = "und"  # BCP 47's language that nobody names


def is_espnet(path: Path) -> bool:
    """The config.yaml of an ESPnet2 experiment, or a folder with one."""
    path = config_at(path)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    try:
        said = read_yaml(path)
    except ModelError:
        return False
    return "encoder" in said and "token_list" in said


def load_espnet(
    path: str | Path, weights: str | Path | None = None, *, span: Span | None = None, language: str | None = None,
    target_language: str | None = None,
) -> Recognizer:  # fmt: skip
    """An ESPnet2 model with equal outputs; it does not need ESPnet, and `save_model` writes it as one of ours.

    `path` is config.yaml or the folder that holds it; without `weights` the averaged ones beside it are taken. As it
    was trained it hears whole utterances; with a `span` (in frames of the encoder) it streams. Its config names no
    language, so that what is given is believed: the `language` that is heard, and the `target_language` of a translator
    (None: und). ModelError for an option that cannot be honoured, and for tensors that do not fit.
    """
    path = config_at(path)
    said = read_yaml(path)
    sound, encoder, tokens = read_sound(path, said), encoder_of(path, said), read_tokens(path, said)
    for key in ("preencoder", "postencoder"):
        Options(str(path), said).one_of(key, (None,))
    heads, task = head_specs(path, said, encoder.dim, tokens.size), task_of(said)
    if "attention" in heads and tokens.end is None:
        raise ModelError(f"{path}: token_list: the last token is not <sos/eos>, where the decoder ends")
    config = {
        "format": 1, "sample_rate": sound.rate, "front_end": sound.spec,
        "encoder": encoder_spec(encoder, sound.mels, span), "heads": heads,
    }  # fmt: skip
    config |= languages(path, task, language, target_language)
    file = Path(weights).expanduser() if weights else find_weights(path.parent)
    theirs = read_weights(file)
    known(file, theirs, PARTS | task.dropped | {name for head in heads for name in task.parts[head]})
    ours = {f"encoder.{name}": tensor for name, tensor in encoder_tensors(file, theirs, encoder).items()}
    ours |= {f"heads.{name}": tensor for name, tensor in head_tensors(heads, theirs, task).items()}
    model = from_config(config, tokens, where=str(path))
    same_filters(file, theirs, model)
    ours = joined(model, ours | statistics(file, theirs, sound))
    check(file, model, ours, "the model of this config.yaml")
    model.cast(next(tensor.dtype for tensor in ours.values() if tensor.is_floating_point()))
    model.load_state_dict(ours)
    return model.eval().requires_grad_(False)


def languages(path: Path, task: Task, heard: str | None, written: str | None) -> dict[str, str]:
    """Those of a model, as it calls them."""
    if task is RECOGNITION and written is not None:
        raise ModelError(
            f"{path}: target_language {written}: this model does not translate, it was trained to recognise"
        )
    said = {} if task is RECOGNITION else {"target_language": written or UNDETERMINED}
    return said if heard is None else {"language": heard, **said}


def known(path: Path, tensors: Mapping[str, Any], parts: set[str]) -> None:
    """ModelError names tensors of none of these parts."""
    others = sorted(name for name in tensors if name.partition(".")[0] not in parts)
    if others:
        raise ModelError(f"{path}: {len(others)} tensors of parts that are not known here ({', '.join(others[:3])})")


def same_filters(path: Path, tensors: Mapping[str, Tensor], model: Recognizer) -> None:
    """ESPnet saves its mel filters: ModelError unless they are those of the front-end that the config describes."""
    theirs, spectrum = tensors.get("frontend.logmel.melmat"), getattr(model.front_end, "spectrum", None)
    if theirs is None or not isinstance(spectrum, LogMel):
        return
    if theirs.shape != spectrum.bank.shape or not torch.allclose(theirs.to(spectrum.bank), spectrum.bank, atol=1e-6):
        raise ModelError(f"{path}: frontend.logmel.melmat: other filters than frontend_conf describes")


def statistics(path: Path, tensors: Mapping[str, Tensor], sound: Sound) -> dict[str, Tensor]:
    """Mean and deviation of the corpus, as the front-end calls them; none where features are not normalised."""
    if "normal" not in sound.spec["init_args"]:
        return {}
    found = {}
    for name, used, nothing in (("mean", sound.means, torch.zeros), ("std", sound.deviations, torch.ones)):
        tensor = tensors.get(f"normalize.{name}")
        if tensor is None:
            raise ModelError(f"{path}: normalize.{name} is missing, the statistics of global_mvn")
        found[f"front_end.normal.{name}"] = tensor if used else nothing(tensor.shape)
    return found
