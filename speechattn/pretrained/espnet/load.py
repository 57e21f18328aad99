"""Read the encoder of an ESPnet2 recognition model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from speechattn.attention.self_attention import joined
from speechattn.encoder.base import Encoder
from speechattn.errors import ModelError
from speechattn.pretrained.espnet.config import EncoderConfig, read_config
from speechattn.pretrained.espnet.names import convert
from speechattn.pretrained.espnet.network import build
from speechattn.pretrained.weights import check

__all__ = ["config_at", "encoder_tensors", "find_weights", "load_encoder", "read_weights"]


def load_encoder(config_path: str | Path, weights_path: str | Path | None = None) -> Encoder:
    """An ESPnet2 Conformer or E-Branchformer as an `Encoder` with equal outputs over whole utterances.

    `config_path` is config.yaml or the folder that holds it; without `weights_path` the averaged weights beside it
    are taken. The front-end's features and their normalization go in. With `rel_pos_type: latest`, `set_span` makes
    the encoder stream. ModelError for an option that cannot be honoured, and for tensors that do not fit.
    """
    path = config_at(config_path)
    config = read_config(path)
    weights = Path(weights_path).expanduser() if weights_path else find_weights(path.parent)
    tensors = encoder_tensors(weights, read_weights(weights), config)
    try:
        with torch.device("meta"):
            encoder = build(config, mels_for(tensors, config))
    except ValueError as error:
        raise ModelError(f"{path}: encoder_conf: {error}") from error
    tensors = joined(encoder, tensors)
    check(weights, encoder, tensors, "the encoder of this config.yaml")
    encoder.load_state_dict(tensors, assign=True)
    return encoder.eval()


def config_at(path: str | Path) -> Path:
    """A config.yaml, or the folder that holds it."""
    path = Path(path).expanduser()
    return path / "config.yaml" if path.is_dir() else path


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
    """All tensors by ESPnet's names; nothing is unpickled that could run code."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{path}: not ESPnet2 weights ({said})") from error
    named = saved.items() if isinstance(saved, dict) else ()
    return {name: tensor for name, tensor in named if isinstance(name, str) and isinstance(tensor, Tensor)}


def encoder_tensors(path: Path, tensors: dict[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Those of the encoder among all that stood in `path`, by our names."""
    found = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
    if not found:
        raise ModelError(f"{path}: holds no tensor of an encoder; wanted the .pth of a trained ESPnet2 model")
    return convert(found, config)


def mels_for(tensors: dict[str, Tensor], config: EncoderConfig) -> int:
    """The least width of the features that gives the projection as many bins as it reads."""
    bins = tensors[f"subsample.{2 * len(config.convolutions)}.f.1.weight"].shape[1]
    bins //= len(tensors["subsample.0.conv.bias"])
    for kernel, stride in reversed(config.convolutions):
        bins = (bins - 1) * stride + kernel
    return bins
