"""Read the encoder of an ESPnet2 recognition model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from speechattn.attention.pattern import Span
from speechattn.attention.position import Position, Relative
from speechattn.attention.self_attention import joined
from speechattn.encoder.base import Encoder
from speechattn.encoder.branchformer import EBranchformerBlock
from speechattn.encoder.conformer import ConformerBlock
from speechattn.encoder.layers import Depthwise, Subsample
from speechattn.errors import ModelError
from speechattn.pretrained.espnet.config import EncoderConfig, read_config
from speechattn.pretrained.espnet.legacy import LegacyRelative, Whole
from speechattn.pretrained.espnet.names import convert
from speechattn.pretrained.weights import check
from speechattn.stream import Pointwise, Serial

__all__ = ["load_encoder"]

LAYER_NORM_EPS = 1e-12  # ESPnet's


def load_encoder(config_path: str | Path, weights_path: str | Path | None = None) -> Encoder:
    """An ESPnet2 Conformer or E-Branchformer as an `Encoder` with equal outputs over whole utterances.

    `config_path` is config.yaml or the folder that holds it; without `weights_path` the averaged weights beside it
    are taken. The front-end's features and their normalization go in. With `rel_pos_type: latest`, `set_span` makes
    the encoder stream. ModelError for an option that cannot be honoured, and for tensors that do not fit.
    """
    path = Path(config_path).expanduser()
    path = path / "config.yaml" if path.is_dir() else path
    config = read_config(path)
    weights = Path(weights_path).expanduser() if weights_path else find_weights(path.parent)
    tensors = convert(read_weights(weights), config)
    try:
        with torch.device("meta"):
            encoder = build(config, mels_for(tensors, config))
    except ValueError as error:
        raise ModelError(f"{path}: encoder_conf: {error}") from error
    tensors = joined(encoder, tensors)
    check(weights, encoder, tensors, "the encoder of this config.yaml")
    encoder.load_state_dict(tensors, assign=True)
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = LAYER_NORM_EPS
    return encoder.eval()


def find_weights(folder: Path) -> Path:
    """valid.acc.ave.pth, which ESPnet's recipes decode with; else the only averaged weights, or the only ones."""
    found = sorted(folder.glob("*.pth"))
    if (folder / "valid.acc.ave.pth").is_file():
        return folder / "valid.acc.ave.pth"
    averaged = [path for path in found if path.name.startswith("valid.") and ".ave" in path.name]
    chosen = {path.resolve(): path for path in averaged or found}  # links to one file count once
    if len(chosen) == 1:
        return next(iter(chosen.values()))
    names = ", ".join(path.name for path in found) or "no .pth"
    raise ModelError(f"{folder}: found {names}; give the path of the weights as weights_path")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors without their prefix; nothing is unpickled that could run code."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{path}: not ESPnet2 weights ({said})") from error
    named = saved.items() if isinstance(saved, dict) else ()
    tensors = {
        name.removeprefix("encoder."): tensor
        for name, tensor in named
        if isinstance(name, str) and name.startswith("encoder.") and isinstance(tensor, Tensor)
    }
    if not tensors:
        raise ModelError(f"{path}: holds no tensor of an encoder; wanted the .pth of a trained ESPnet2 model")
    return tensors


def mels_for(tensors: dict[str, Tensor], config: EncoderConfig) -> int:
    """The least width of the features that gives the projection as many bins as it reads."""
    bins = tensors[f"subsample.{2 * len(config.convolutions)}.f.1.weight"].shape[1]
    bins //= len(tensors["subsample.0.conv.bias"])
    for kernel, stride in reversed(config.convolutions):
        bins = (bins - 1) * stride + kernel
    return bins


def build(config: EncoderConfig, mels: int) -> Encoder:
    """The modules; each convolution looks as far ahead as back, and the batch norms are gone."""
    front = Subsample(mels, config.dim, convolutions=config.convolutions, whole=True)
    subsample = Serial(*front.members, Whole()) if config.legacy else front
    blocks = [conformer_block(config) if config.kind == "conformer" else branchformer_block(config)
              for _ in range(config.depth)]  # fmt: skip
    return Encoder(subsample, blocks, Pointwise(nn.LayerNorm(config.dim)), dim=config.dim)


def conformer_block(config: EncoderConfig) -> ConformerBlock:
    """One of `encoder: conformer`."""
    return ConformerBlock(
        config.dim, config.heads, config.inner, Span.full(),
        centred(config.dim, config.kernel) if config.kernel else None, position=position(config),
        macaron=config.macaron, norm=nn.Identity(), activation=config.activation, dropout=config.dropout,
    )  # fmt: skip


def branchformer_block(config: EncoderConfig) -> EBranchformerBlock:
    """One of `encoder: e_branchformer`."""
    return EBranchformerBlock(
        config.dim, config.heads, config.inner, config.gate, Span.full(), centred(config.gate, config.kernel),
        centred(2 * config.dim, config.merge_kernel), position=position(config), macaron=config.macaron,
        activation=config.activation, dropout=config.dropout,
    )  # fmt: skip


def centred(dim: int, kernel: int) -> Depthwise:
    """A filter that sees as much ahead as behind."""
    return Depthwise(dim, kernel, right=kernel // 2)


def position(config: EncoderConfig) -> Position:
    """Relative positions, new or old."""
    if config.legacy:
        return LegacyRelative(config.dim, config.heads, longest=config.longest)
    return Relative(config.dim, config.heads)
