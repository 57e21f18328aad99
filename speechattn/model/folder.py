"""A model as a folder: `config.yaml`, `model.safetensors` and the files of its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from speechattn.audio.resample import HIGHEST_RATE, LOWEST_RATE
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.decoder.in_turns import InTurns
from speechattn.decoder.letters import OwnTokens
from speechattn.decoder.segmental import Segmental
from speechattn.decoder.transducer import Transducer
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.model.config import build, read_yaml
from speechattn.model.recognizer import Recognizer
from speechattn.model.stored import Unfilled, compact, read_weights
from speechattn.multimodal.speech_llm import SpeechLLM
from speechattn.multimodal.tokens import load_tokenizer
from speechattn.pretrained.weights import check
from speechattn.search.language_model import LanguageModel
from speechattn.stream import Stream
from speechattn.text.pieces import Pieces

__all__ = [
    "CONFIG", "WEIGHTS", "build_language_model", "from_config", "is_model", "load_folder", "load_language_model",
    "save_language_model", "save_model",
]  # fmt: skip

CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
FORMAT = 1
KEYS = {"format", "sample_rate", "language", "target_language", "spaceless", "front_end", "encoder", "heads"}
NEEDED = ("front_end", "encoder", "heads")
USUAL = {"sample_rate": 16000, "language": None, "target_language": None, "spaceless": False}


def is_model(path: Path) -> bool:
    """A folder that `save_model` wrote."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def from_config(
    config: dict[str, Any], tokenizer: Pieces, *, where: str = CONFIG, plugins: Sequence[str] = ()
) -> Recognizer:
    """A model without its weights; ModelError for what is missing, unknown or does not fit.

    Its classes are those of this package, of `torch.nn`, and of the modules `plugins`: naming one runs its code.
    """
    if unknown := sorted(map(str, config.keys() - KEYS)):
        raise ModelError(f"{where}: unknown: {', '.join(unknown)}; known: {', '.join(sorted(KEYS))}")
    if config.get("format") != FORMAT:
        raise ModelError(f"{where}: format {config.get('format')}: this version reads format {FORMAT}")
    if missing := [key for key in NEEDED if key not in config]:
        raise ModelError(f"{where}: {', '.join(missing)} missing")
    parts = {key: build(config[key], f"{where}: {key}", plugins) for key in NEEDED}
    for key in ("front_end", "encoder"):
        if not isinstance(parts[key], Stream):
            raise ModelError(f"{where}: {key}: {type(parts[key]).__name__} is not a stream")
    heads = parts["heads"]
    if not isinstance(heads, dict) or not all(isinstance(head, nn.Module) for head in heads.values()):
        raise ModelError(f"{where}: heads: not a mapping of names to heads")
    rate, language, target, spaceless = (config.get(key, usual) for key, usual in USUAL.items())
    if type(rate) is not int or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise ModelError(f"{where}: sample_rate {rate}: wanted {LOWEST_RATE} to {HIGHEST_RATE} Hz")
    if not isinstance(language, str | None) or not isinstance(target, str | None) or not isinstance(spaceless, bool):
        said = f"language {language}, target_language {target}, spaceless {spaceless}"
        raise ModelError(f"{where}: {said}: wanted codes, and true or false")
    try:
        model = Recognizer(
            parts["front_end"], parts["encoder"], {str(name): head for name, head in heads.items()}, tokenizer,
            sample_rate=rate, language=language, target_language=target, spaceless=spaceless, config=config,
        )  # fmt: skip
    except ValueError as error:
        raise ModelError(f"{where}: front_end and encoder do not fit together: {error}") from error
    try_out(model, where)
    return model


def says(head: nn.Module) -> int | None:
    """How many tokens a head knows."""
    if isinstance(head, CTC) and not isinstance(head, OwnTokens):
        return head.head.out_features
    if isinstance(head, Transducer):
        return head.joint.out.out_features
    head = head.decoder if isinstance(head, Segmental) else head
    return head.vocab if isinstance(head, AttentionDecoder | SpeechLLM | InTurns) else None


@torch.no_grad()
def try_out(model: Recognizer, where: str) -> None:
    """ModelError where the parts do not fit together, or the vocabulary does not fit the heads."""
    for name, head in model.heads.items():
        if says(head) not in (None, model.tokenizer.size):
            raise ModelError(f"{where}: heads.{name} says {says(head)} tokens; there are {model.tokenizer.size}")
    try:
        block = model.listening.plan().block or model.sample_rate
        sound = torch.zeros(1, block)
        model.eval().listening(Frames(sound, torch.ones_like(sound, dtype=torch.bool)))
        model.train()
    except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{where}: front_end and encoder do not fit together: {said}") from error


def load_folder(path: Path, plugins: Sequence[str] = ()) -> Recognizer:
    """The model of a folder; every tensor must be there, and no other."""
    config, tokenizer = read_yaml(path / CONFIG), load_tokenizer(path)
    with Unfilled():
        model = from_config(config, tokenizer, where=str(path / CONFIG), plugins=plugins)
    tensors = read_weights(path / WEIGHTS, model.state_dict())
    check(path / WEIGHTS, model, tensors, "the model of this config.yaml")
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def save_model(model: Recognizer, path: Path, plugins: Sequence[str] = (), *, weights: str = "float32") -> None:
    """Write the folder, with `weights` in float32, bfloat16 or int8 (see `stored`); they are read as float32.

    ModelError when the model does not know its configuration; InputError for other weights.
    """
    import yaml
    from safetensors.torch import save_file

    if model.config is None:
        raise ModelError("a model that was not built from a configuration cannot be written as one; use from_config")
    tensors = compact(model.state_dict(), weights)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(yaml.safe_dump(model.config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    save_file(tensors, path / WEIGHTS)
    model.tokenizer.save(path)
    with torch.no_grad():
        load_folder(path, plugins)  # what cannot be read again is no model


def build_language_model(
    config: dict[str, Any], *, where: str = CONFIG, plugins: Sequence[str] = ()
) -> LanguageModel:  # fmt: skip
    """The `network` of a configuration, without its weights; ModelError for anything else."""
    if config.keys() != {"format", "network"} or config["format"] != FORMAT:
        raise ModelError(f"{where}: not a language model: wanted format {FORMAT} and a network, nothing else")
    network = build(config["network"], f"{where}: network", plugins)
    if not isinstance(network, LanguageModel):
        raise ModelError(f"{where}: network: {type(network).__name__} is not a language model")
    return network


def load_language_model(path: Path, plugins: Sequence[str] = ()) -> tuple[LanguageModel, Pieces]:
    """What `save_language_model` wrote: a model for a `LanguageModelScorer`, and its tokens."""
    from safetensors.torch import load_model

    config, tokenizer = read_yaml(path / CONFIG), load_tokenizer(path)
    network = build_language_model(config, where=str(path / CONFIG), plugins=plugins)
    if (network.vocab, network.end) != (tokenizer.size, tokenizer.end):
        said = f"{network.vocab} tokens, of which {network.end} is the end"
        raise ModelError(f"{path}: the language model has {said}; the tokenizer has {tokenizer.size}, {tokenizer.end}")
    try:
        load_model(network, path / WEIGHTS)
    except Exception as error:
        raise ModelError(f"{path / WEIGHTS}: not the weights of this config.yaml ({str(error)[:200]})") from error
    return network.eval().requires_grad_(False), tokenizer


def save_language_model(
    network: LanguageModel, config: dict[str, Any], tokenizer: Pieces, path: Path, plugins: Sequence[str] = ()
) -> None:
    """Write the folder: `config` has its format and the `network` it is built from; a tied weight is there once."""
    import yaml
    from safetensors.torch import save_model

    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    save_model(network, str(path / WEIGHTS))
    tokenizer.save(path)
    load_language_model(path, plugins)  # what cannot be read again is no model
