"""What an ESPnet2 config.yaml says about what stands behind its encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from speechattn.model.searches import SOURCE
from speechattn.pretrained.espnet.config import Options
from speechattn.pretrained.espnet.decoder import rename_decoder
from speechattn.pretrained.espnet.tokens import read_tokens

__all__ = ["RECOGNITION", "TRANSLATION", "Task", "head_specs", "head_tensors", "task_of"]

TRANSFORMER: dict[str, Any] = {  # ESPnet's defaults
    "attention_heads": 4, "linear_units": 2048, "num_blocks": 6, "dropout_rate": 0.1, "input_layer": "embed",
    "use_output_layer": True, "normalize_before": True, "concat_after": False, "qk_norm": False,
}  # fmt: skip
FIXED: dict[str, Any] = {
    "input_layer": "embed", "use_output_layer": True, "normalize_before": True, "concat_after": False, "qk_norm": False,
}  # fmt: skip
TRANSDUCER: dict[str, Any] = {"rnn_type": "lstm", "num_layers": 1, "hidden_size": 320, "dropout": 0.0, "embed_pad": 0}
JOINT: dict[str, Any] = {"joint_space_size": 256, "joint_activation_type": "tanh", "lin_dec_bias": True}

# Options that change training alone.
TRANSFORMER_TRAINING = {
    "positional_dropout_rate", "self_attention_dropout_rate", "src_attention_dropout_rate", "layer_drop_rate",
    "use_flash_attn", "gradient_checkpoint_layers",
}  # fmt: skip
CTC_TRAINING = {
    "dropout_rate", "ctc_type", "reduce", "ignore_nan_grad", "zero_infinity", "brctc_risk_strategy",
    "brctc_group_strategy", "brctc_risk_factor",
}  # fmt: skip

Specs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """What a task of ESPnet calls what stands behind its encoder.

    `parts`: the tensors of each head begin so. `weight` is the share of the head `ctc` in training, an option of
    `model_conf`, whose `shares` are between 0 and 1; the others are `fixed`, or act in `training` alone. The tensors
    that are `dropped` are not those of its inference, and `absent` are keys for parts that cannot be honoured.
    """

    parts: Mapping[str, tuple[str, ...]]
    weight: str
    shares: Mapping[str, float]
    fixed: Mapping[str, Any]
    training: set[str]
    dropped: set[str]
    absent: tuple[str, ...] = ()

    @property
    def joint(self) -> str:
        """The joint network of the transducer; less `work` and with `_conf` a section of the config."""
        return self.parts["transducer"][1]


RECOGNITION = Task(
    parts={"ctc": ("ctc",), "attention": ("decoder",), "transducer": ("decoder", "joint_network")},
    weight="ctc_weight", shares={"ctc_weight": 0.5},
    fixed={"sym_blank": "<blank>", "sym_sos": "<sos/eos>", "sym_eos": "<sos/eos>",
           "transducer_multi_blank_durations": []},
    training={"aux_ctc", "interctc_weight", "ignore_id", "lsm_weight", "length_normalized_loss", "report_cer",
              "report_wer", "sym_space", "transducer_multi_blank_sigma", "autocast_frontend",
              "extract_feats_in_collect_stats", "lang_token_id"},
    dropped={"ctc", "decoder", "joint_network", "criterion_att", "criterion_transducer", "error_calculator"},
)  # fmt: skip
TRANSLATION = Task(
    parts={"ctc": ("st_ctc",), SOURCE: ("ctc",), "attention": ("decoder",),
           "transducer": ("decoder", "st_joint_network")},
    weight="st_mtlalpha", shares={"st_mtlalpha": 0.0, "asr_weight": 0.0, "mtlalpha": 0.0},
    fixed={"tgt_sym_blank": "<blank>", "tgt_sym_sos": "<sos/eos>", "tgt_sym_eos": "<sos/eos>"},
    training={"mt_weight", "ignore_id", "tgt_ignore_id", "lsm_weight", "length_normalized_loss", "report_cer",
              "report_wer", "report_bleu", "sym_space", "sym_blank", "tgt_sym_space", "ctc_sample_rate",
              "extract_feats_in_collect_stats", "lang_token_id"},
    dropped={"extra_asr_decoder", "extra_mt_encoder", "extra_mt_decoder", "criterion_st", "criterion_asr",
             "st_criterion_transducer", "mt_error_calculator", "asr_error_calculator"},
    absent=("hier_encoder", "md_encoder"),
)  # fmt: skip


def task_of(said: Mapping[str, Any]) -> Task:
    """What a config.yaml was trained for; those of ESPnet's ST task name the tokens of the source."""
    return TRANSLATION if "src_token_list" in said else RECOGNITION


def head_specs(path: Path, said: Mapping[str, Any], dim: int, vocab: int) -> Specs:
    """Heads over frames [B, T, `dim`] in words; a decoder that a CTC of weight 1 left untrained is none.

    The CTC of what was said, of which a translator has learnt beside the translation, is the head `source`.
    """
    top, task = Options(str(path), said), task_of(said)
    top.one_of("model", ("espnet",))
    for key in ("use_lang_prompt", "use_nlp_prompt"):
        top.one_of(key, (False, None))
    for key in task.absent:
        top.one_of(key, (None,))
    options = Options.of(path, "model_conf", said, {**task.shares, **task.fixed}, task.training)
    for key, value in task.fixed.items():
        options.one_of(key, (value,))
    Options.of(path, "ctc_conf", said, {}, CTC_TRAINING)
    shares = {key: options.share(key) for key in task.shares}
    weight, kind = shares[task.weight], said.get("decoder")
    if weight < 1 or kind == "transducer":
        top.one_of("decoder", ("transformer", "transducer", None))
    specs: Specs = {}
    if weight > 0:
        specs["ctc"] = {"class_path": "speechattn.decoder.ctc.CTC", "init_args": {"dim": dim, "vocab": vocab}}
    if SOURCE in task.parts and shares["asr_weight"] > 0 and shares["mtlalpha"] > 0:
        specs[SOURCE] = source(path, said, dim)
    if kind == "transformer" and weight < 1:
        specs["attention"] = attention(path, said, dim, vocab)
    if kind == "transducer":
        specs["transducer"] = transducer(path, said, dim, vocab, f"{task.joint.removesuffix('work')}_conf")
    return specs


def source(path: Path, said: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """The CTC over `src_token_list`."""
    tokens = "\n".join(read_tokens(path, said, "src_").pieces)
    place = "speechattn.pretrained.espnet.network.Espnet.own_tokens"
    return {"class_path": place, "init_args": {"dim": dim, "tokens": tokens}}


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


def transducer(path: Path, said: Mapping[str, Any], dim: int, vocab: int, section: str) -> dict[str, Any]:
    """`decoder: transducer`, an LSTM, and its joint network, which a `section` of the config describes."""
    options = Options.of(path, "decoder_conf", said, TRANSDUCER, ("dropout_embed",))
    options.one_of("rnn_type", ("lstm",))
    options.one_of("embed_pad", (0,))
    joint = Options.of(path, section, said, JOINT)
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


def head_tensors(heads: Specs, tensors: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
    """Tensors by ESPnet's names -> those of the heads, by ours; what is not known keeps a name that is not ours."""
    found: dict[str, Tensor] = {}
    for head in heads.keys() & {"ctc", SOURCE}:
        theirs = part(tensors, f"{task.parts[head][0]}.")
        found |= {f"{head}.{re.sub('^ctc_lo[.]', 'head.', name)}": t for name, t in theirs.items()}
    if "attention" in heads:
        found |= {f"attention.{name}": t for name, t in rename_decoder(part(tensors, "decoder.")).items()}
    if "transducer" in heads:
        decoder, joint = part(tensors, "decoder."), part(tensors, f"{task.joint}.")
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
