"""What an ESPnet2 config.yaml says about its encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from speechattn.errors import ModelError
from speechattn.model import config

__all__ = ["ACTIVATIONS", "CONVOLUTIONS", "EncoderConfig", "Options", "encoder_of", "read_config", "read_yaml"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU, "hardtanh": nn.Hardtanh, "relu": nn.ReLU, "selu": nn.SELU, "swish": nn.SiLU, "tanh": nn.Tanh,
}  # fmt: skip
CONVOLUTIONS = {  # kernel, stride
    "conv2d": ((3, 2), (3, 2)), "conv2d1": ((3, 1), (3, 1)), "conv2d2": ((3, 2), (3, 1)),
    "conv2d6": ((3, 2), (5, 3)), "conv2d8": ((3, 2), (3, 2), (3, 2)),
}  # fmt: skip

# What ESPnet assumes where the config is silent.
BOTH: dict[str, Any] = {
    "output_size": 256, "attention_heads": 4, "linear_units": 2048, "dropout_rate": 0.1, "input_layer": "conv2d",
    "pos_enc_layer_type": "rel_pos", "zero_triu": False, "max_pos_emb_len": 5000, "positionwise_layer_type": "linear",
    "interctc_use_conditioning": False,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "conformer": BOTH | {
        "num_blocks": 6, "normalize_before": True, "concat_after": False, "macaron_style": False,
        "rel_pos_type": "legacy", "selfattention_layer_type": "rel_selfattn", "activation_type": "swish",
        "use_cnn_module": True, "cnn_module_kernel": 31, "ctc_trim": False,
    },
    "e_branchformer": BOTH | {
        "num_blocks": 12, "rel_pos_type": "latest", "attention_layer_type": "rel_selfattn", "cgmlp_linear_units": 2048,
        "cgmlp_conv_kernel": 31, "use_linear_after_conv": False, "gate_activation": "identity", "use_ffn": False,
        "macaron_ffn": False, "ffn_activation_type": "swish", "merge_conv_kernel": 3,
    },
}  # fmt: skip

# Options with one value that can be honoured.
FIXED: dict[str, Any] = {
    "normalize_before": True, "concat_after": False, "positionwise_layer_type": "linear", "zero_triu": False,
    "interctc_use_conditioning": False, "ctc_trim": False, "use_linear_after_conv": False,
    "gate_activation": "identity",
}  # fmt: skip

# Options that change training alone, or layers that this encoder cannot have.
WITHOUT_EFFECT = {
    "positional_dropout_rate", "attention_dropout_rate", "layer_drop_rate", "stochastic_depth_rate", "padding_idx",
    "positionwise_conv_kernel_size", "interctc_layer_idx", "qk_norm", "use_flash_attn", "gradient_checkpoint_layers",
}  # fmt: skip


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder's sizes; `kernel`, `gate` and `inner` are 0 where there is no such part."""

    kind: str
    dim: int
    depth: int
    heads: int
    inner: int
    kernel: int
    gate: int
    merge_kernel: int
    macaron: bool
    activation: type[nn.Module]
    convolutions: tuple[tuple[int, int], ...]
    legacy: bool
    longest: int
    dropout: float


def read_config(path: Path) -> EncoderConfig:
    """The encoder of a config.yaml; ModelError names an option that cannot be honoured."""
    return encoder_of(path, read_yaml(path))


def encoder_of(path: Path, said: Mapping[str, Any]) -> EncoderConfig:
    """The encoder of what a config.yaml at `path` said."""
    kind = said.get("encoder")
    if kind not in DEFAULTS:
        raise ModelError(f"{path}: encoder: {kind} cannot be read; wanted one of {', '.join(DEFAULTS)}")
    options = Options.of(path, "encoder_conf", said, DEFAULTS[kind], WITHOUT_EFFECT)
    for key, value in FIXED.items():
        options.one_of(key, (value,))
    return (conformer if kind == "conformer" else e_branchformer)(options)


@dataclass(frozen=True)
class Options:
    """One section of a config.yaml with ESPnet's defaults; what cannot be used is a ModelError that names the key."""

    where: str
    said: Mapping[str, Any]

    @classmethod
    def of(
        cls, path: Path, section: str, said: Mapping[str, Any], defaults: Mapping[str, Any],
        ignored: Collection[str] = (),
    ) -> Options:  # fmt: skip
        """The `section` of what was said; options of neither `defaults` nor `ignored` are not known."""
        given = said.get(section) or {}
        if not isinstance(given, Mapping):
            raise ModelError(f"{path}: {section}: {given} is not a mapping of options to values")
        unknown = sorted(map(str, given.keys() - defaults.keys() - {*ignored}))
        if unknown:
            raise ModelError(f"{path}: {section} has options that are not known here: {', '.join(unknown)}")
        return cls(f"{path}: {section}", {**defaults, **given})

    def one_of(self, key: str, known: tuple[Any, ...]) -> Any:
        """The value, which must be one of the known; where nothing is said of the option, the first of them."""
        value = self.said.get(key, known[0])
        if value not in known:
            wanted = " or ".join(
                "null" if one is None else str(one).lower() if isinstance(one, bool) else str(one) for one in known
            )
            raise ModelError(f"{self.where}: {key}: {value} cannot be honoured; wanted {wanted}")
        return value

    def number(self, key: str) -> int:
        """A positive whole number."""
        value = self.said[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.where}: {key}: {value} is not a positive whole number")
        return value

    def odd(self, key: str) -> int:
        """The length of a centred filter."""
        value = self.number(key)
        if value % 2 == 0:
            raise ModelError(f"{self.where}: {key}: {value} is even; a centred filter is odd")
        return value

    def even(self, key: str) -> int:
        """The length of a centred window."""
        value = self.number(key)
        if value % 2:
            raise ModelError(f"{self.where}: {key}: {value} is odd; a centred window is even")
        return value

    def share(self, key: str) -> float:
        """From 0 to 1."""
        value = self.said[key]
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ModelError(f"{self.where}: {key}: {value} is not between 0 and 1")
        return float(value)

    def legacy(self, attention: str) -> bool:
        """Whether relative positions are of the old kind; `attention` is the key that names the attention."""
        old: bool = self.one_of("rel_pos_type", ("latest", "legacy")) == "legacy"
        self.one_of("pos_enc_layer_type", ("rel_pos", "legacy_rel_pos") if old else ("rel_pos",))
        self.one_of(attention, ("rel_selfattn", "legacy_rel_selfattn") if old else ("rel_selfattn",))
        return old

    def dropout(self) -> float:
        """A rate; it matters to those who train on."""
        value = self.share("dropout_rate")
        if value == 1:
            raise ModelError(f"{self.where}: dropout_rate: 1 leaves nothing")
        return value


def conformer(options: Options) -> EncoderConfig:
    """`encoder: conformer`."""
    return EncoderConfig(
        kind="conformer", dim=options.number("output_size"), depth=options.number("num_blocks"),
        heads=options.number("attention_heads"), inner=options.number("linear_units"),
        kernel=options.odd("cnn_module_kernel") if options.said["use_cnn_module"] else 0, gate=0, merge_kernel=0,
        macaron=bool(options.said["macaron_style"]),
        activation=ACTIVATIONS[options.one_of("activation_type", tuple(ACTIVATIONS))],
        convolutions=CONVOLUTIONS[options.one_of("input_layer", tuple(CONVOLUTIONS))],
        legacy=options.legacy("selfattention_layer_type"), longest=options.number("max_pos_emb_len"),
        dropout=options.dropout(),
    )  # fmt: skip


def e_branchformer(options: Options) -> EncoderConfig:
    """`encoder: e_branchformer`; its `cgmlp_linear_units` count both halves of the gated branch."""
    return EncoderConfig(
        kind="e_branchformer", dim=options.number("output_size"), depth=options.number("num_blocks"),
        heads=options.number("attention_heads"),
        inner=options.number("linear_units") if options.said["use_ffn"] else 0,
        kernel=options.odd("cgmlp_conv_kernel"), gate=options.number("cgmlp_linear_units") // 2,
        merge_kernel=options.odd("merge_conv_kernel"), macaron=bool(options.said["macaron_ffn"]),
        activation=ACTIVATIONS[options.one_of("ffn_activation_type", tuple(ACTIVATIONS))],
        convolutions=CONVOLUTIONS[options.one_of("input_layer", tuple(CONVOLUTIONS))],
        legacy=options.legacy("attention_layer_type"), longest=options.number("max_pos_emb_len"),
        dropout=options.dropout(),
    )  # fmt: skip


def read_yaml(path: Path) -> Mapping[str, Any]:
    """A mapping with a section for the encoder; ModelError names the file when there is none."""
    said = config.read_yaml(path)
    if not isinstance(said.get("encoder_conf") or {}, dict):
        raise ModelError(f"{path}: not the config.yaml of an ESPnet2 experiment")
    return said
