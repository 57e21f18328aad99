"""Read the attention decoder of an ESPnet2 recognition model."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from speechattn.attention.self_attention import joined
from speechattn.decoder.attention import AttentionDecoder
from speechattn.errors import ModelError
from speechattn.pretrained.weights import check

__all__ = ["load_decoder", "rename_decoder"]

LAYER_NORM_EPS = 1e-12  # ESPnet's

PLACES = {
    "embed.0": "embed", "after_norm": "norm", "output_layer": "output", "norm1": "self_norm", "norm2": "cross_norm",
    "norm3": "ff_norm", "feed_forward.w_1": "ff.0", "feed_forward.w_2": "ff.2",
} | {
    f"{theirs}.linear_{part}": f"{ours}.{name}"
    for theirs, ours in (("self_attn", "self_attention"), ("src_attn", "cross"))
    for part, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
}  # fmt: skip


def rename_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ESPnet's names, without their prefix `decoder.`, in ours; a name that is not known stays."""
    found = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"(?:decoders\.(\d+)\.)?(.+)\.(weight|bias)", name)
        ours = PLACES.get(layer[2]) if layer else None
        if layer is None or ours is None:
            found[name] = tensor
        else:
            found[f"{f'layers.{layer[1]}.' if layer[1] else ''}{ours}.{layer[3]}"] = tensor
    return found


def load_decoder(
    tensors: dict[str, Tensor], heads: int, *, source: str | Path = "decoder", dropout: float = 0.1
) -> AttentionDecoder:
    """`decoder: transformer` with its defaults (embeddings, norms in front, linear feed-forward), equal in its outputs.

    `tensors` have ESPnet's names without `decoder.`; the sizes follow from them, `heads` does not. ModelError names
    `source` for tensors that do not fit.
    """
    tensors = rename_decoder(tensors)
    depth = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))), default=-1)
    try:
        (vocab, dim), inner = tensors["embed.weight"].shape, len(tensors["layers.0.ff.0.bias"])
    except (KeyError, ValueError) as error:
        raise ModelError(f"{source}: {error} is missing; is this a Transformer decoder?") from error
    with torch.device("meta"):
        decoder = AttentionDecoder.usual(vocab, dim, heads, depth, inner, dropout=dropout)
    tensors = joined(decoder, tensors)
    check(Path(source), decoder, tensors, "a Transformer decoder of these sizes")
    decoder.load_state_dict(tensors, assign=True)
    decoder.positions = decoder.positions.to(tensors["embed.weight"])
    for module in decoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = LAYER_NORM_EPS
    return decoder.eval()
