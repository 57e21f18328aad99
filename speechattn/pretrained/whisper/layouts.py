"""Three ways Whisper lies on disk, read into one: OpenAI `.pt`, a Hugging Face folder, a CTranslate2 folder.

Each reader returns the config and the tensors under this library's names. Nothing is unpickled that could run code.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from speechattn.errors import ModelError
from speechattn.pretrained.whisper.config import WhisperConfig

__all__ = ["read_ctranslate2", "read_hugging_face", "read_openai"]

Tensors = dict[str, Tensor]
Checkpoint = tuple[WhisperConfig, Tensors]
Rules = list[tuple[str, str]]

OPENAI_NAMES: Rules = [
    (r"\.blocks\.", ".layers."),
    (r"^encoder\.ln_post", "encoder.norm"),
    (r"^decoder\.ln\.", "decoder.norm."),
    (r"positional_embedding", "positions"),
    (r"token_embedding", "embed"),
    (r"\.cross_attn_ln", ".cross_norm"),
    (r"\.cross_attn\.", ".cross."),
    (r"^(decoder.*)\.attn_ln", r"\1.self_norm"),
    (r"^(decoder.*)\.attn\.", r"\1.self_attention."),
    (r"\.attn_ln", ".norm"),
    (r"\.attn\.", ".attention."),
    (r"\.mlp_ln", ".ff_norm"),
    (r"\.mlp\.", ".ff."),
]

HUGGING_FACE_NAMES: Rules = [
    (r"^model\.", ""),
    (r"^(encoder|decoder)\.layer_norm", r"\1.norm"),
    (r"embed_positions\.weight", "positions"),
    (r"embed_tokens", "embed"),
    (r"\.encoder_attn_layer_norm", ".cross_norm"),
    (r"\.encoder_attn\.", ".cross."),
    (r"^(decoder.*)\.self_attn_layer_norm", r"\1.self_norm"),
    (r"^(decoder.*)\.self_attn\.", r"\1.self_attention."),
    (r"\.self_attn_layer_norm", ".norm"),
    (r"\.self_attn\.", ".attention."),
    (r"\.final_layer_norm", ".ff_norm"),
    (r"\.fc1\.", ".ff.0."),
    (r"\.fc2\.", ".ff.2."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.out_proj\.", ".out."),
]

CTRANSLATE2_NAMES: Rules = [
    (r"/", "."),
    (r"\.layer_(\d+)\.", r".layers.\1."),
    (r"position_encodings\.encodings", "positions"),
    (r"embeddings\.weight", "embed.weight"),
    (r"^(encoder|decoder)\.layer_norm", r"\1.norm"),
    (r"^(decoder.*)\.self_attention\.layer_norm", r"\1.self_norm"),
    (r"^(encoder.*)\.self_attention\.layer_norm", r"\1.norm"),
    (r"^(encoder.*)\.self_attention\.", r"\1.attention."),
    (r"\.attention\.layer_norm", ".cross_norm"),
    (r"^(decoder.*)\.attention\.", r"\1.cross."),
    (r"\.ffn\.layer_norm", ".ff_norm"),
    (r"\.ffn\.linear_0", ".ff.0"),
    (r"\.ffn\.linear_1", ".ff.2"),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
]

# CTranslate2 joins projections of the same input into one matrix: its rows in order.
CTRANSLATE2_JOINED = {
    "self_attention": {"linear_0": ("query", "key", "value"), "linear_1": ("out",)},
    "attention": {"linear_0": ("query", "key", "value"), "linear_1": ("out",)},
    "cross": {"linear_0": ("query",), "linear_1": ("key", "value"), "linear_2": ("out",)},
}


def rename(name: str, rules: Rules) -> str:
    """Every rule in turn."""
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def read_openai(path: Path) -> Checkpoint:
    """`whisper` checkpoints: a dict of `dims` and `model_state_dict`; they name no alignment heads."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        dims, tensors = saved["dims"], saved["model_state_dict"]
    except Exception as error:
        raise ModelError(f"{path}: not a Whisper checkpoint of OpenAI's layout ({first_line(error)})") from error
    config = WhisperConfig(
        mels=dims["n_mels"], vocab=dims["n_vocab"], audio_context=dims["n_audio_ctx"],
        text_context=dims["n_text_ctx"], encoder_dim=dims["n_audio_state"], encoder_heads=dims["n_audio_head"],
        encoder_layers=dims["n_audio_layer"], decoder_dim=dims["n_text_state"], decoder_heads=dims["n_text_head"],
        decoder_layers=dims["n_text_layer"], **stated(path.with_name("generation_config.json")),
    )  # fmt: skip
    return config, {rename(name, OPENAI_NAMES): tensor for name, tensor in tensors.items()}


def read_hugging_face(folder: Path) -> Checkpoint:
    """`config.json`, `generation_config.json` and `model.safetensors`, in one file or in shards with an index."""
    from safetensors.torch import load_file

    said = read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors: Tensors = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except Exception as error:
            raise ModelError(f"{folder / name}: cannot be read as safetensors ({first_line(error)})") from error
    try:
        config = WhisperConfig(
            mels=said["num_mel_bins"], vocab=said["vocab_size"], audio_context=said["max_source_positions"],
            text_context=said["max_target_positions"], encoder_dim=said["d_model"],
            encoder_heads=said["encoder_attention_heads"], encoder_layers=said["encoder_layers"],
            decoder_dim=said["d_model"], decoder_heads=said["decoder_attention_heads"],
            decoder_layers=said["decoder_layers"], **stated(folder / "generation_config.json"),
        )  # fmt: skip
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'}: {error} is missing; is this a Whisper model?") from error
    tensors.pop("proj_out.weight", None)  # tied to the embedding
    return config, {rename(name, HUGGING_FACE_NAMES): tensor for name, tensor in tensors.items()}


def read_ctranslate2(folder: Path) -> Checkpoint:
    """`model.bin` and `config.json` of faster-whisper; float32, float16, bfloat16, int16 and int8 weights."""
    raw = read_model_bin(folder / "model.bin")
    try:
        heads = {half: int(raw[f"{half}/num_heads"]) for half in ("encoder", "decoder")}
        layers = {
            half: 1 + max(int(m[1]) for name in raw if (m := re.match(rf"{half}/layer_(\d+)/", name)))
            for half in ("encoder", "decoder")
        }
        audio, text = raw["encoder/position_encodings/encodings"], raw["decoder/position_encodings/encodings"]
        config = WhisperConfig(
            mels=raw["encoder/conv1/weight"].shape[1], vocab=raw["decoder/embeddings/weight"].shape[0],
            audio_context=audio.shape[0], text_context=text.shape[0], encoder_dim=audio.shape[1],
            encoder_heads=heads["encoder"], encoder_layers=layers["encoder"], decoder_dim=text.shape[1],
            decoder_heads=heads["decoder"], decoder_layers=layers["decoder"], **stated(folder / "config.json"),
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise ModelError(f"{folder / 'model.bin'}: not a Whisper model ({first_line(error)})") from error
    tensors: Tensors = {}
    for name, tensor in raw.items():
        if tensor.dim() and not name.endswith("_scale"):
            tensors |= split_joined(rename(name, CTRANSLATE2_NAMES), dequantise(tensor, raw.get(f"{name}_scale")))
    return config, tensors


def split_joined(name: str, tensor: Tensor) -> Tensors:
    """One CTranslate2 matrix or bias -> the projections that it joins; Whisper's keys have no bias."""
    module, _, kind = name.rpartition(".")
    block, _, linear = module.rpartition(".")
    parts = CTRANSLATE2_JOINED.get(block.rpartition(".")[2], {}).get(linear)
    if parts is None:
        return {name: tensor}
    rows = tensor.chunk(len(parts))
    return {
        f"{block}.{part}.{kind}": row for part, row in zip(parts, rows, strict=True) if (part, kind) != ("key", "bias")
    }


def dequantise(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """Integer weights were multiplied by their row's scale before rounding."""
    return tensor if scale is None else tensor.float() / (scale[:, None] if scale.dim() else scale)


MODEL_BIN_TYPES = [
    (np.float32, torch.float32), (np.int8, torch.int8), (np.int16, torch.int16), (np.int32, torch.int32),
    (np.float16, torch.float16), (np.int16, torch.bfloat16),
]  # fmt: skip


def read_model_bin(path: Path) -> Tensors:
    """CTranslate2's flat file of named tensors (versions 4 to 6): every size is checked against the file's own."""
    try:
        with path.open("rb") as file:
            return parse_model_bin(file, path.stat().st_size)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except (struct.error, ValueError, UnicodeDecodeError, IndexError) as error:
        raise ModelError(f"{path}: damaged or not a CTranslate2 model ({first_line(error)})") from error


def parse_model_bin(file: BinaryIO, size: int) -> Tensors:
    """Header, tensors, aliases; ValueError and struct.error when the bytes do not add up."""

    def number(code: str) -> int:
        return int(struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0])

    def string() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    version, spec, _ = number("I"), string(), number("I")
    if not 4 <= version <= 6 or spec != "WhisperSpec":
        raise ValueError(f"version {version} of {spec or 'nothing'}, wanted version 4 to 6 of WhisperSpec")
    tensors: Tensors = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        kind, count = number("B"), number("I")
        if count > size - file.tell():
            raise ValueError(f"{name} is cut off")
        stored, wanted = MODEL_BIN_TYPES[kind]
        values = torch.from_numpy(np.frombuffer(file.read(count), stored).copy())
        tensors[name] = (values.view(wanted) if wanted == torch.bfloat16 else values).reshape(shape)
    for _ in range(number("I")):
        alias, target = string(), string()
        if target not in tensors:
            raise ValueError(f"{alias} points to {target}, which is missing")
    return tensors


def stated(path: Path) -> dict[str, Any]:
    """What a config file says about decoding, under our names; nothing when the file is not there."""
    said = read_json(path) if path.is_file() else {}

    def first(*names: str) -> list[Any]:
        return next((said[name] for name in names if said.get(name)), [])

    return {
        "alignment_heads": tuple((int(layer), int(head)) for layer, head in first("alignment_heads")),
        "suppress": tuple(first("suppress_ids", "suppress_tokens")),
        "suppress_first": tuple(first("suppress_ids_begin", "begin_suppress_tokens")),
    }


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; ModelError names the file when there is none."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({first_line(error)})") from error
    if not isinstance(said, dict):
        raise ModelError(f"{path}: not a JSON object")
    return said


def first_line(error: Exception) -> str:
    """The start of a message that may run over pages."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
