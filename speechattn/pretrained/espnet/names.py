"""ESPnet's names of tensors in this library's, and its tensors in this library's shapes."""

from __future__ import annotations

import re
from math import sqrt

import torch
from torch import Tensor

from speechattn.errors import ModelError
from speechattn.pretrained.espnet.config import EncoderConfig

__all__ = ["convert"]

Tensors = dict[str, Tensor]

BATCH_NORM_EPS = 1e-5

FEED_FORWARD = {
    "norm_ff_macaron": "macaron.first.f.norm", "feed_forward_macaron.w_1": "macaron.first.f.widen",
    "feed_forward_macaron.w_2": "macaron.first.f.narrow", "norm_ff": "feed_forward.first.f.norm",
    "feed_forward.w_1": "feed_forward.first.f.widen", "feed_forward.w_2": "feed_forward.first.f.narrow",
    "norm_final": "norm.f",
}  # fmt: skip
ATTENTION = {
    "linear_q": "query", "linear_k": "key", "linear_v": "value", "linear_out": "out", "linear_pos": "position.linear",
    "pos_bias_u": "position.u", "pos_bias_v": "position.v",
}  # fmt: skip
DISTANT = "branches.first.both.first"
LOCAL = "branches.first.both.second"
LAYERS: dict[str, dict[str, str]] = {
    "conformer": FEED_FORWARD | {
        "norm_mha": "attention.first.norm", "norm_conv": "convolution.first.gate.f.0",
        "conv_module.pointwise_conv1": "convolution.first.gate.f.1",
        "conv_module.depthwise_conv": "convolution.first.depthwise.conv",
        "conv_module.pointwise_conv2": "convolution.first.mix.f.2",
    } | {f"self_attn.{theirs}": f"attention.first.{ours}" for theirs, ours in ATTENTION.items()},
    "e_branchformer": FEED_FORWARD | {
        "norm_mha": f"{DISTANT}.norm", "norm_mlp": f"{LOCAL}.widen.f.0",
        "cgmlp.channel_proj1.0": f"{LOCAL}.widen.f.1",
        "cgmlp.csgu.norm": f"{LOCAL}.gate.second.norm.f.1", "cgmlp.csgu.conv": f"{LOCAL}.gate.second.depthwise.conv",
        "cgmlp.channel_proj2": f"{LOCAL}.narrow.f.1", "depthwise_conv_fusion": "branches.first.merge.first.conv",
        "merge_proj": "branches.first.narrow.f.0",
    } | {f"attn.{theirs}": f"{DISTANT}.{ours}" for theirs, ours in ATTENTION.items()},
}  # fmt: skip


def convert(tensors: Tensors, config: EncoderConfig) -> Tensors:
    """The encoder's tensors without their prefix -> ours; a name that is not known keeps a name that is not ours."""
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith("conv_module.norm.weight")]:
        fold_batch_norm(tensors, name.removesuffix("norm.weight"))
    out = "embed.out" if len(config.convolutions) == 3 else "embed.out.0"
    unfold_channels(tensors, out, config.dim)
    for name, tensor in tensors.items():
        if "pointwise_conv" in name and tensor.dim() == 3:
            tensors[name] = tensor.squeeze(2)
    return {rename(name, out, config): tensor for name, tensor in tensors.items()}


def rename(name: str, out: str, config: EncoderConfig) -> str:
    """One tensor's name; `out` is where ESPnet keeps the projection behind the convolutions."""
    if layer := re.fullmatch(r"encoders\.(\d+)\.(.+)", name):
        table, (module, _, leaf) = LAYERS[config.kind], layer[2].rpartition(".")
        ours = table.get(layer[2]) or (f"{table[module]}.{leaf}" if module in table else None)
        return f"layers.{layer[1]}.{ours}" if ours else f"encoder.{name}"
    if convolution := re.fullmatch(r"embed\.conv\.(\d+)\.(weight|bias)", name):
        return f"subsample.{convolution[1]}.conv.{convolution[2]}"
    module, _, leaf = name.rpartition(".")
    places = {out: f"subsample.{2 * len(config.convolutions)}.f.1", "after_norm": "norm.f"}
    return f"{places[module]}.{leaf}" if module in places else f"encoder.{name}"


def taken(tensors: Tensors, name: str) -> Tensor:
    """The tensor, which is no longer there afterwards."""
    if name not in tensors:
        raise ModelError(f"encoder.{name} is missing among the weights: are they of another config.yaml?")
    return tensors.pop(name)


def fold_batch_norm(tensors: Tensors, module: str) -> None:
    """A batch norm in evaluation is one factor and one summand a feature: the filter before it can have both."""
    scale = taken(tensors, f"{module}norm.weight") / torch.sqrt(
        taken(tensors, f"{module}norm.running_var") + BATCH_NORM_EPS
    )
    shift = taken(tensors, f"{module}norm.bias") - taken(tensors, f"{module}norm.running_mean") * scale
    tensors.pop(f"{module}norm.num_batches_tracked", None)
    filters = f"{module}depthwise_conv"
    tensors[f"{filters}.weight"] = taken(tensors, f"{filters}.weight") * scale[:, None, None]
    tensors[f"{filters}.bias"] = taken(tensors, f"{filters}.bias") * scale + shift


def unfold_channels(tensors: Tensors, out: str, dim: int) -> None:
    """The projection reads channels by bins, here bins by channels; it takes over ESPnet's factor of sqrt(dim)."""
    weight, channels = taken(tensors, f"{out}.weight"), taken(tensors, "embed.conv.0.bias")
    tensors["embed.conv.0.bias"] = channels
    if weight.dim() != 2 or weight.shape[1] % len(channels):
        raise ModelError(f"encoder.{out}.weight {list(weight.shape)} does not fit {len(channels)} channels")
    by_bin = weight.view(len(weight), len(channels), -1).transpose(1, 2).flatten(1)
    tensors[f"{out}.weight"] = by_bin * sqrt(dim)
    tensors[f"{out}.bias"] = taken(tensors, f"{out}.bias") * sqrt(dim)
