"""Llama's weights from a folder of Hugging Face, without its library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from speechattn.errors import InputError
from speechattn.multimodal.attention import AttentionMaker, Usual
from speechattn.multimodal.llama import Llama
from speechattn.pretrained.weights import check

__all__ = ["from_hugging_face", "renamed"]

# What a `config.json` may say that changes what is computed, and the only value of it that is computed here.
PLAIN: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None),
    "rope_scaling": (None,), "pretraining_tp": (1, None),
}  # fmt: skip


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Hugging Face's `LlamaForCausalLM` under the names of `Llama`: without "model." in front.

    Tables of positions, which old files hold, go.
    """
    return {name.removeprefix("model."): x for name, x in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def from_hugging_face(
    folder: Path, *, attention: AttentionMaker = Usual, window: Sequence[int] | None = None
) -> Llama:  # fmt: skip
    """The model of a local folder with `config.json` and safetensors, in float32; what `attention` learns is new.

    InputError for an architecture that `Llama` does not compute, ModelError for weights that do not fit.
    """
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}
    except Exception as error:
        raise InputError(f"{folder}: cannot be read as a folder of Hugging Face ({str(error)[:200]})") from error
    model = Llama(**arguments(config, folder), attention=attention, window=window)
    tensors = renamed(tensors)
    if model.lm_head is None:
        tensors.pop("lm_head.weight", None)
    learned = {name: x for name, x in model.state_dict().items() if ".self_attn.attend." in name}
    check(folder, model, learned | tensors, "the model of its config.json")
    model.load_state_dict(learned | tensors)
    return model.eval()


def arguments(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of `Llama`, from a `config.json`."""
    rope = config.get("rope_parameters") or {}
    said = dict(config) | ({"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {})
    wrong = [f"{key} {said[key]}" for key, known in PLAIN.items() if key in said and said[key] not in known]
    try:
        dim, heads = config["hidden_size"], config["num_attention_heads"]
        if config.get("head_dim") not in (None, dim // heads):
            wrong.append(f"head_dim {config['head_dim']}")
        if wrong:
            raise InputError(f"{folder}: {', '.join(wrong)}: not what Llama computes; HuggingFaceLM may")
        return {
            "vocab": config["vocab_size"], "dim": dim, "heads": heads, "depth": config["num_hidden_layers"],
            "inner": config["intermediate_size"], "key_heads": config.get("num_key_value_heads"),
            "base": rope.get("rope_theta") or config.get("rope_theta", 10000.0), "eps": config["rms_norm_eps"],
            "tied": config.get("tie_word_embeddings", False),
        }  # fmt: skip
    except KeyError as error:
        raise InputError(f"{folder}: config.json says nothing of {error}") from error
