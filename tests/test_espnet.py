"""ESPnet's encoders in our modules, against ESPnet itself."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from speechattn.attention import Span, set_span
from speechattn.encoder import Encoder
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.pretrained.espnet import load_encoder, names
from speechattn.stream import flush

pytest.importorskip("espnet2")
conformer_encoder = pytest.importorskip("espnet2.asr.encoder.conformer_encoder")
e_branchformer_encoder = pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder")

MELS = 40
SIZES: dict[str, dict[str, Any]] = {
    "conformer": {
        "output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2, "cnn_module_kernel": 7,
        "macaron_style": True, "rel_pos_type": "latest",
    },
    "e_branchformer": {
        "output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2, "cgmlp_linear_units": 40,
        "cgmlp_conv_kernel": 7, "merge_conv_kernel": 5, "use_ffn": True, "macaron_ffn": True,
    },
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    ("conformer", {}),
    *(("conformer", {"input_layer": layer}) for layer in ("conv2d1", "conv2d2", "conv2d6", "conv2d8")),
    ("conformer", {"macaron_style": False, "activation_type": "relu"}),
    ("conformer", {"use_cnn_module": False}),
    ("conformer", {"rel_pos_type": "legacy"}),
    ("conformer", {"rel_pos_type": "legacy", "max_pos_emb_len": 10}),
    ("conformer", {"interctc_layer_idx": [1], "attention_dropout_rate": 0.1, "activation_type": "tanh"}),
    ("e_branchformer", {}),
    *(("e_branchformer", {"input_layer": layer}) for layer in ("conv2d1", "conv2d2", "conv2d6", "conv2d8")),
    ("e_branchformer", {"macaron_ffn": False, "ffn_activation_type": "relu"}),
    ("e_branchformer", {"use_ffn": False}),
    ("e_branchformer", {"rel_pos_type": "legacy", "max_pos_emb_len": 30}),
]


def said(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def espnet_encoder(kind: str, options: dict[str, Any], mels: int = MELS) -> nn.Module:
    """ESPnet's own, every parameter and statistic random, its table of positions as exact as the rest."""
    classes = {
        "conformer": conformer_encoder.ConformerEncoder,
        "e_branchformer": e_branchformer_encoder.EBranchformerEncoder,
    }
    encoder: nn.Module = classes[kind](input_size=mels, **SIZES[kind] | options).double().eval()
    for name, tensor in encoder.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.3, 3)
        elif tensor.dtype == torch.float64:
            tensor.normal_(float(tensor.dim() == 1 and name.endswith("weight")), 0.3)  # norms about 1, others about 0
    make_exact(next(m for m in encoder.modules() if type(m).__name__.endswith("PositionalEncoding")))
    return encoder


def make_exact(positions: Any) -> None:
    """ESPnet makes its sines in float32: make them anew, in float64, whenever it makes a table."""
    make, latest = positions.extend_pe, type(positions).__name__.startswith("Rel")

    def extend(x: Tensor) -> None:
        make(x)
        rows = positions.pe.shape[1]
        at = torch.arange(rows - 1, -1, -1) - (rows // 2 if latest else 0)
        angle = at[:, None].double() * torch.exp(torch.arange(0, 16, 2).double() * (-math.log(10000.0) / 16))
        exact = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[None]
        torch.testing.assert_close(positions.pe.double(), exact, rtol=0, atol=1e-3)
        positions.pe = exact

    positions.extend_pe = extend


def write(folder: Path, kind: str, options: dict[str, Any], encoder: nn.Module) -> Path:
    """config.yaml and weights as ESPnet's training leaves them."""
    conf = SIZES[kind] | options
    (folder / "config.yaml").write_text(yaml.safe_dump({"encoder": kind, "encoder_conf": conf, "input_size": None}))
    others = {"ctc.ctc_lo.weight": torch.randn(5, 16), "decoder.embed.0.weight": torch.randn(5, 16)}
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()} | others
    torch.save(state, folder / "valid.acc.ave_10best.pth")
    (folder / "valid.acc.ave.pth").symlink_to(folder / "valid.acc.ave_10best.pth")
    torch.save({"model": {}, "epoch": 1}, folder / "checkpoint.pth")
    return folder


def whole(x: Tensor) -> Frames:
    return Frames.from_lengths(x, torch.full((len(x),), x.shape[1]))


@torch.no_grad()
def worst(theirs: nn.Module, ours: Encoder, frames: int) -> float:
    """The greatest difference over two utterances of so many frames; they must say the same length."""
    x = torch.randn(2, frames, MELS, dtype=torch.float64)
    expected, lengths, _ = theirs(x, torch.tensor([frames, frames]))
    if isinstance(expected, tuple):  # outputs of inner layers beside it
        expected = expected[0]
    y = ours(whole(x))
    assert y.lengths.tolist() == lengths.tolist()
    assert expected.std() > 0.1
    return float((y.values[:, : expected.shape[1]] - expected).abs().max())


@pytest.mark.parametrize("case", CASES, ids=said)
def test_outputs_are_espnets(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    kind, options = case
    theirs = espnet_encoder(kind, options)
    ours = load_encoder(write(tmp_path, kind, options, theirs))
    assert isinstance(ours, Encoder)
    for frames in (15, 47, 80, 101):
        assert worst(theirs, ours, frames) < 1e-9


def test_rows_of_a_batch_are_espnets_single_utterances(tmp_path: Path) -> None:
    """ESPnet's convolutions read what stands in the padding; ours do not."""
    theirs = espnet_encoder("conformer", {})
    ours = load_encoder(write(tmp_path, "conformer", {}, theirs))
    x, lengths = torch.randn(3, 90, MELS, dtype=torch.float64), torch.tensor([90, 61, 34])
    with torch.no_grad():
        y = ours(Frames.from_lengths(x, lengths))
        for row, length in enumerate(lengths.tolist()):
            expected = theirs(x[row : row + 1, :length], lengths[row : row + 1])[0][0]
            torch.testing.assert_close(y.values[row, : len(expected)], expected, rtol=0, atol=1e-9)
            assert y.lengths[row] == len(expected)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("linear_q", "key"), ("pos_bias_u", "position.v"), ("linear_pos", None)],
    ids=["queries for keys", "u for v", "positions lost"],
)
def test_a_wrong_mapping_would_be_seen(
    theirs: str, ours: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = espnet_encoder("conformer", {})
    folder = write(tmp_path, "conformer", {}, encoder)
    table = names.LAYERS["conformer"]
    at = "attention.first"
    if ours is None:
        monkeypatch.delitem(table, f"self_attn.{theirs}")
        with pytest.raises(ModelError, match=r"2 missing .*linear\.weight.*2 unknown .*self_attn\.linear_pos"):
            load_encoder(folder)
        return
    other = next(name for name, value in table.items() if value == f"{at}.{ours}")
    monkeypatch.setitem(table, other, table[f"self_attn.{theirs}"])
    monkeypatch.setitem(table, f"self_attn.{theirs}", f"{at}.{ours}")
    assert worst(encoder, load_encoder(folder), 60) > 1e-3


@pytest.mark.parametrize(
    "change", ["flatten", "scale", "running_mean", "running_var", "eps"], ids=lambda change: f"without {change}"
)
def test_each_conversion_counts(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is sharp enough for the least of them."""
    encoder = espnet_encoder("conformer", {})
    ours = load_encoder(write(tmp_path, "conformer", {}, encoder))
    assert worst(encoder, ours, 60) < 1e-9
    linear = ours.subsample.members[-1].f[1]  # type: ignore[attr-defined]
    filters = ours.layers.members[0].convolution.first.depthwise.conv  # type: ignore[attr-defined]
    with torch.no_grad():
        if change == "flatten":
            linear.weight.copy_(linear.weight.view(16, -1, 16).transpose(1, 2).flatten(1))
        elif change == "scale":
            linear.bias.div_(4)
        elif change == "running_mean":
            filters.bias.add_(encoder.encoders[0].conv_module.norm.running_mean)  # type: ignore[attr-defined]
        elif change == "running_var":
            filters.weight.mul_(1.01)
        else:
            ours.norm.f.eps = 1e-5  # type: ignore[attr-defined]
    assert worst(encoder, ours, 60) > 1e-7


@pytest.mark.parametrize("kind", ["conformer", "e_branchformer"])
def test_what_was_loaded_streams(kind: str, tmp_path: Path) -> None:
    """Pieces of any size that the span allows say what the whole says."""
    ours = load_encoder(write(tmp_path, kind, {}, espnet_encoder(kind, {})))
    x = whole(torch.randn(2, 700, MELS, dtype=torch.float64))
    with torch.no_grad():
        full = ours(x).values[:, :174]
        set_span(ours, Span(64, 16))
        plan = ours.plan()
        assert plan.block == 64
        expected = ours(x)
        flushed = flush(x, ours)
        state, outputs, at = ours.init_state(flushed), [], 0
        for piece in (64, 128, 64, 256, 10**6):
            y, state = ours.step(flushed[at : at + piece], state)
            outputs.append(y)
            at += piece
    y = Frames.cat(outputs)[plan.delay : plan.delay + expected.mask.shape[1]]
    torch.testing.assert_close(y.values, expected.values, rtol=0, atol=1e-9)
    assert torch.equal(y.mask, expected.mask)
    assert expected.lengths.tolist() == [174, 174]
    assert (expected.values[:, :174] - full).abs().max() > 1e-2  # the span was set


def test_legacy_positions_refuse_everything_but_whole_utterances(tmp_path: Path) -> None:
    options = {"rel_pos_type": "legacy"}
    theirs = espnet_encoder("conformer", options)
    ours = load_encoder(write(tmp_path, "conformer", options, theirs))
    for span in (Span(64, 16), Span(0, 4), Span.causal()):
        with pytest.raises(ValueError, match=r"length of the utterance: only Span\.full\(\) works"):
            set_span(ours, span)
    set_span(ours, Span.full())
    assert worst(theirs, ours, 60) < 1e-9
    position = ours.layers.members[0].attention.first.position  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="only Span"):
        position.bias(torch.randn(1, 2, 4, 8), range(4), range(-4, 4))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("conformer", {"normalize_before": False}, r"normalize_before: False cannot be honoured; wanted true"),
        ("conformer", {"concat_after": True}, "concat_after: True"),
        ("conformer", {"positionwise_layer_type": "conv1d"}, "positionwise_layer_type: conv1d .* wanted linear"),
        ("conformer", {"zero_triu": True}, "zero_triu"),
        ("conformer", {"input_layer": "linear"}, "input_layer: linear cannot be honoured; wanted conv2d or conv2d1"),
        ("conformer", {"selfattention_layer_type": "selfattn"}, "selfattention_layer_type: selfattn"),
        ("conformer", {"pos_enc_layer_type": "abs_pos"}, "pos_enc_layer_type: abs_pos"),
        ("conformer", {"rel_pos_type": "newest"}, "rel_pos_type: newest .* wanted latest or legacy"),
        ("conformer", {"activation_type": "mish"}, "activation_type: mish"),
        ("conformer", {"interctc_use_conditioning": True}, "interctc_use_conditioning"),
        ("conformer", {"num_blocks": "two"}, "num_blocks: two is not a positive whole number"),
        ("conformer", {"cnn_module_kernel": 8}, "cnn_module_kernel: 8 is even"),
        ("conformer", {"dropout_rate": 2}, "dropout_rate: 2 is not between 0 and 1"),
        ("conformer", {"attention_heads": 3}, "encoder_conf: 16 features, 3 heads"),
        ("conformer", {"warp": 1, "block_size": 40}, "not known here: block_size, warp"),
        ("conformer", {"num_blocks": 3}, r"tensors do not fit .*missing \(layers\.2\.attention"),
        ("conformer", {"num_blocks": 1}, r"unknown \(layers\.1\.attention"),
        ("conformer", {"linear_units": 25}, r"of the wrong shape \(layers\.0\.feed_forward"),
        ("conformer", {"input_layer": "conv2d8"}, r"encoder\.embed\.out\.weight is missing"),
        ("e_branchformer", {"use_linear_after_conv": True}, "use_linear_after_conv"),
        ("e_branchformer", {"gate_activation": "tanh"}, "gate_activation: tanh .* wanted identity"),
        ("e_branchformer", {"attention_layer_type": "fast_selfattn"}, "attention_layer_type: fast_selfattn"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_honoured_is_named(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, kind, options, espnet_encoder(kind, {}))
    with pytest.raises(ModelError, match=message):
        load_encoder(tmp_path / "config.yaml")


def test_silent_configs_mean_espnets_defaults(tmp_path: Path) -> None:
    """Of ESPnet's own signatures, which it writes into config.yaml only since it has them."""
    import inspect

    from speechattn.pretrained.espnet.config import DEFAULTS, WITHOUT_EFFECT

    for kind, cls in (
        ("conformer", conformer_encoder.ConformerEncoder),
        ("e_branchformer", e_branchformer_encoder.EBranchformerEncoder),
    ):
        theirs = {name: p.default for name, p in inspect.signature(cls).parameters.items() if name != "input_size"}
        assert theirs.keys() - WITHOUT_EFFECT == DEFAULTS[kind].keys()
        assert {name: theirs[name] for name in DEFAULTS[kind]} == DEFAULTS[kind]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.yaml: No such file"):
        load_encoder(tmp_path)
    config = tmp_path / "config.yaml"
    for text, message in (
        ("encoder: [", "not YAML"),
        ("hello", "not a mapping"),
        ("encoder_conf: hello", "not the config.yaml of an ESPnet2 experiment"),
        ("encoder: rnn", "encoder: rnn cannot be read; wanted one of conformer, e_branchformer"),
    ):
        config.write_text(text)
        with pytest.raises(ModelError, match=message):
            load_encoder(config)
    config.write_text("encoder: conformer")
    with pytest.raises(ModelError, match=r"found no \.pth; give the path of the weights"):
        load_encoder(config)
    for name in ("1epoch.pth", "2epoch.pth", "checkpoint.pth"):
        torch.save({"decoder.x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ModelError, match=r"found 1epoch\.pth, 2epoch\.pth, checkpoint\.pth; give the path"):
        load_encoder(config)
    with pytest.raises(ModelError, match=r"1epoch\.pth: holds no tensor of an encoder"):
        load_encoder(config, tmp_path / "1epoch.pth")
    with pytest.raises(ModelError, match=r"3epoch\.pth: No such file"):
        load_encoder(config, tmp_path / "3epoch.pth")
    (tmp_path / "4epoch.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match=r"4epoch\.pth: not ESPnet2 weights"):
        load_encoder(config, tmp_path / "4epoch.pth")


@pytest.mark.parametrize("positions", ["latest", "legacy"])
def test_too_short_utterances_give_no_frame(positions: str, tmp_path: Path) -> None:
    options = {"rel_pos_type": positions}
    ours = load_encoder(write(tmp_path, "conformer", options, espnet_encoder("conformer", options)))
    for frames in (0, 1, 6):
        assert ours(whole(torch.randn(1, frames, MELS, dtype=torch.float64))).lengths.tolist() == [0]
    assert ours(whole(torch.randn(1, 7, MELS, dtype=torch.float64))).lengths.tolist() == [1]


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "espnet.md").read_text(encoding="utf-8")
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_encoder" in block)
    folder = tmp_path / "exp" / "asr_train_conformer"
    folder.mkdir(parents=True)
    write(folder, "conformer", {}, espnet_encoder("conformer", {}, mels=80).float())
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}
    exec(compile(example, "espnet.md", "exec"), seen)
    assert seen["whole"].lengths.tolist() == [124]
    assert seen["streamed"].lengths.tolist() == [124]
    with torch.inference_mode():
        expected = seen["encoder"](whole(seen["features"]))
    torch.testing.assert_close(seen["streamed"].values[:, :124], expected.values[:, :124], rtol=0, atol=1e-4)
