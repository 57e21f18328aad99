"""What an ESPnet2 config.yaml says about what stands behind its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from speechattn.pretrained.espnet.config import Options
from speechattn.pretrained.espnet.decoder import rename_decoder

__all__ = ["head_specs", "head_tensors"]

TRANSFORMER: dict[str, Any] = {  # ESPnet's defaults
    "attention_heads": 4, "linear_units": 2048, "num_blocks": 6, "dropout_rate": 0.1, "input_layer": "embed",
    "use_output_layer": True, "normalize_before": True, "concat_after": False, "qk_norm": False,
}  # fmt: skip
FIXED: dict[str, Any] = {
    "input_layer": "embed", "use_output_layer": True, "normalize_before": True, "concat_after": False, "qk_norm": False,
}  # fmt: skip
TRANSDUCER: dict[str, Any] = {"rnn_type": "lstm", "num_layers": 1, "hidden_size": 320, "dropout": 0.0, "embed_pad": 0}
JOINT: dict[str, Any] = {"joint_space_size": 256, "joint_activation_type": "tanh", "lin_dec_bias": True}
MODEL: dict[str, Any] = {
    "ctc_weight": 0.5, "sym_blank": "<blank>", "sym_sos": "<sos/eos>", "sym_eos": "<sos/eos>",
    "transducer_multi_blank_durations": [],
}  # fmt: skip

# Options that change training alone.
TRANSFORMER_TRAINING = {
    "positional_dropout_rate", "self_attention_dropout_rate", "src_attention_dropout_rate", "layer_drop_rate",
    "use_flash_attn", "gradient_checkpoint_layers",
}  # fmt: skip
MODEL_TRAINING = {
    "aux_ctc", "interctc_weight", "ignore_id", "lsm_weight", "length_normalized_loss", "report_cer", "report_wer",
    "sym_space", "transducer_multi_blank_sigma", "autocast_frontend", "extract_feats_in_collect_stats", "lang_token_id",
}  # fmt: skip
CTC_TRAINING = {
    "dropout_rate", "ctc_type", "reduce", "ignore_nan_grad", "zero_infinity", "brctc_risk_strategy",
    "brctc_group_strategy", "brctc_risk_factor",
}  # fmt: skip

Specs = dict[str, dict[str, Any]]


def head_specs(path: Path, said: Mapping[str, Any], dim: int, vocab: int) -> Specs:
    """Heads over frames [B, T, `dim`] in words; a decoder that `ctc_weight: 1.0` left untrained is none."""
    top = Options(str(path), said)
    top.one_of("model", ("espnet",))
    for key in ("use_lang_prompt", "use_nlp_prompt"):
        top.one_of(key, (False, None))
    options = Options.of(path, "model_conf", said, MODEL, MODEL_TRAINING)
    for key, value in MODEL.items():
        if key != "ctc_weight":
            options.one_of(key, (value,))
    Options.of(path, "ctc_conf", said, {}, CTC_TRAINING)
    weight = options.share("ctc_weight")
    kind = said.get("decoder")
    if weight < 1 or kind == "transducer":
        top.one_of("decoder", ("transformer", "transducer", None))
    specs: Specs = {}
    if weight > 0:
        specs["ctc"] = {"class_path": "speechattn.decoder.ctc.CTC", "init_args": {"dim": dim, "vocab": vocab}}
    if kind == "transformer" and weight < 1:
        specs["attention"] = attention(path, said, dim, vocab)
    if kind == "transducer":
        specs["transducer"] = transducer(path, said, dim, vocab)
    return specs


def attention(path: Path, said: Mapping[str, Any], dim: int, vocab: int) -> dict[str, Any]:
    """`decoder: transformer`."""
    options = Options.of(path, "decoder_conf", said, TRANSFORMER, TRANSFORMER_TRAINING)
    for key, value in FIXED.items():
        options.one_of(key, (value,))
    return {
        "class_path": "speechattn.pretrained.espnet.network.Espnet.decoder",
        "init_args": {
            "vocab": vocab, "dim": dim, "heads": options.number("attention_heads"),
            "depth": options.number("num_blocks"), "inner": options.number("linear_units"),
            "dropout": options.dropout(),
        },
    }  # fmt: skip


def transducer(path: Path, said: Mapping[str, Any], dim: int, vocab: int) -> dict[str, Any]:
    """`decoder: transducer`, an LSTM, and its joint network."""
    options = Options.of(path, "decoder_conf", said, TRANSDUCER, ("dropout_embed",))
    options.one_of("rnn_type", ("lstm",))
    options.one_of("embed_pad", (0,))
    joint = Options.of(path, "joint_net_conf", said, JOINT)
    joint.one_of("joint_activation_type", ("tanh",))
    labels = options.number("hidden_size")
    depth, dropout = options.number("num_layers"), options.share("dropout")
    predictor = {"vocab": vocab, "dim": labels, "depth": depth, "dropout": dropout}
    inner = {"frames": dim, "labels": labels, "inner": joint.number("joint_space_size"), "vocab": vocab}
    return {
        "class_path": "speechattn.decoder.transducer.Transducer",
        "init_args": {
            "predictor": {"class_path": "speechattn.decoder.predictor.LSTMPredictor", "init_args": predictor},
            "joint": {"class_path": "speechattn.decoder.transducer.Joint", "init_args": inner},
        },
    }


def head_tensors(heads: Specs, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by ESPnet's names -> those of the heads, by ours; what is not known keeps a name that is not ours."""
    found: dict[str, Tensor] = {}
    if "ctc" in heads:
        found |= {f"ctc.{name}".replace("ctc.ctc_lo.", "ctc.head."): t for name, t in part(tensors, "ctc.").items()}
    if "attention" in heads:
        found |= {f"attention.{name}": t for name, t in rename_decoder(part(tensors, "decoder.")).items()}
    if "transducer" in heads:
        decoder, joint = part(tensors, "decoder."), part(tensors, "joint_network.")
        found |= {f"transducer.predictor.{lstm_name(name)}": t for name, t in decoder.items()}
        found |= {f"transducer.joint.{name}": t for name, t in rename_joint(joint).items()}
    return found


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def lstm_name(name: str) -> str:
    """ESPnet's layers are LSTMs of one layer."""
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "decoder" and parts[2].endswith("_l0"):
        return f"lstm.{parts[2].removesuffix('0')}{parts[1]}"
    return name


def rename_joint(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both of ESPnet's projections have a bias; their sum is what counts."""
    tensors = dict(tensors)
    bias = tensors.pop("lin_enc.bias", None)
    if bias is not None:
        other = tensors.pop("lin_dec.bias", None)
        tensors["lin_dec.bias"] = bias if other is None else bias + other
    places = {"lin_enc": "frames", "lin_dec": "labels", "lin_out": "out"}
    return {f"{places.get((at := name.partition('.'))[0], at[0])}.{at[2]}": tensor for name, tensor in tensors.items()}
