"""Our modules with the weights of other implementations: the same numbers."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speechattn.attention import Relative, Rotary, SelfAttention, Span
from speechattn.attention.position import Position
from speechattn.attention.self_attention import joined
from speechattn.encoder.conformer import ConformerBlock
from speechattn.encoder.layers import Depthwise
from speechattn.frames import Frames
from speechattn.stream import Serial

DIM, HEADS, FRAMES = 16, 2, 23
FULL = Span.full()


@pytest.fixture(autouse=True)
def _their_warnings() -> None:
    warnings.filterwarnings("ignore", module=r"(transformers|torchaudio|huggingface_hub).*")


def whole(x: Tensor) -> Frames:
    return Frames.from_lengths(x, torch.full((len(x),), x.shape[1]))


def randomise(module: nn.Module) -> None:
    """Every parameter and statistic, biases and norms too: what starts at 0 or 1 would hide a wrong mapping."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.3, 3)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor) * (0.5 if tensor.dim() < 2 else tensor[0].numel() ** -0.5))


def renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """By module; KeyError for a tensor that has no place."""
    return {
        f"{names[module]}.{leaf}": t for (module, _, leaf), t in ((n.rpartition("."), t) for n, t in tensors.items())
    }


TORCHAUDIO_LAYER = {
    "self_attn_layer_norm": "attention.first.norm", "self_attn.out_proj": "attention.first.out",
    "conv_module.layer_norm": "convolution.first.gate.f.0", "conv_module.sequential.0": "convolution.first.gate.f.1",
    "conv_module.sequential.2": "convolution.first.depthwise.conv",
    "conv_module.sequential.5": "convolution.first.mix.f.2", "final_layer_norm": "norm.f",
    **{f"ffn{i}.sequential.{theirs}": f"{part}.first.f.{ours}"
       for i, part in ((1, "macaron"), (2, "feed_forward"))
       for theirs, ours in ((0, "norm"), (1, "widen"), (4, "narrow"))},
    **{f"self_attn.{part}": f"attention.first.{part}" for part in ("query", "key", "value")},
}  # fmt: skip


def from_torchaudio(theirs: nn.Module) -> dict[str, Tensor]:
    """One of their layers in our names and shapes; its batch norm goes into the filter before it."""
    tensors = dict(theirs.state_dict())
    for kind in ("weight", "bias"):
        parts = tensors.pop(f"self_attn.in_proj_{kind}").chunk(3)
        tensors |= {f"self_attn.{part}.{kind}": t for part, t in zip(("query", "key", "value"), parts, strict=True)}
    for i in (0, 5):
        tensors[f"conv_module.sequential.{i}.weight"] = tensors[f"conv_module.sequential.{i}.weight"].squeeze(2)
    norm = {kind: tensors.pop(f"conv_module.sequential.3.{kind}")
            for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
    scale = norm["weight"] / (norm["running_var"] + 1e-5).sqrt()
    weight, bias = (f"conv_module.sequential.2.{kind}" for kind in ("weight", "bias"))
    tensors[weight] = tensors[weight] * scale[:, None, None]
    tensors[bias] = (tensors[bias] - norm["running_mean"]) * scale + norm["bias"]
    return renamed(tensors, TORCHAUDIO_LAYER)


def test_torchaudios_conformer() -> None:
    """Equal lengths: its convolution reads the padding of the others."""
    from torchaudio.models import Conformer

    theirs = Conformer(DIM, HEADS, 24, 3, 7).double().eval()
    randomise(theirs)
    blocks = []
    for layer in theirs.conformer_layers:
        block = ConformerBlock(DIM, HEADS, 24, Span.full(), Depthwise(DIM, 7, right=3), norm=nn.Identity()).double()
        block.load_state_dict(joined(block, from_torchaudio(layer)))
        blocks.append(block)
    x = torch.randn(2, FRAMES, DIM, dtype=torch.float64)
    expected, _ = theirs(x, torch.tensor([FRAMES, FRAMES]))
    assert expected.std() > 0.1
    torch.testing.assert_close(Serial(*blocks).eval()(whole(x)).values, expected, rtol=0, atol=1e-9)


def attention(
    position: Position | None, theirs: nn.Module, names: dict[str, str], *, span: Span = FULL, key_heads: int = HEADS
) -> SelfAttention:
    """Our attention with their weights."""
    ours = SelfAttention(DIM, HEADS, span, position=position, key_heads=key_heads).double().eval()
    tensors = theirs.state_dict()
    found = {names.get(n) or f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": t for n, t in tensors.items()}
    ours.load_state_dict(joined(ours, found))
    return ours


WAV2VEC2 = {
    "linear_q": "query", "linear_k": "key", "linear_v": "value", "linear_out": "out", "linear_pos": "position.linear",
    "pos_bias_u": "position.u", "pos_bias_v": "position.v",
}  # fmt: skip


def wav2vec2(kind: str) -> tuple[Any, Any]:
    """transformers' attention with such positions, random; its config."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, position_embeddings_type=kind, attn_implementation="eager"
    )
    theirs = modeling.Wav2Vec2ConformerSelfAttention(config).double().eval()
    randomise(theirs)
    return theirs, config


def test_relative_attention_of_wav2vec2_conformer() -> None:
    theirs, _ = wav2vec2("relative")
    rate = torch.exp(torch.arange(0, DIM, 2, dtype=torch.float64) * (-math.log(10000.0) / DIM))
    angle = torch.arange(FRAMES - 1, -FRAMES, -1, dtype=torch.float64)[:, None] * rate  # theirs is made in float32
    table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
    modeling = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    x = torch.randn(2, FRAMES, DIM, dtype=torch.float64)
    made = modeling.Wav2Vec2ConformerRelPositionalEmbedding(theirs.config)(x)
    torch.testing.assert_close(made[0].double(), table, rtol=0, atol=1e-5)
    ours = attention(Relative(DIM, HEADS), theirs, WAV2VEC2)
    expected = theirs(x, relative_position_embeddings=table[None])[0]
    torch.testing.assert_close(ours(whole(x)).values, expected, rtol=0, atol=1e-9)
    mirrored = theirs(x, relative_position_embeddings=table.flip(0)[None])[0]
    assert (ours(whole(x)).values - mirrored).abs().max() > 1e-3  # the sign of the distance counts


def test_rotary_turns_as_wav2vec2_conformers_does() -> None:
    """Theirs turns the input of the projections, ours what comes out of them: the same where they change nothing."""
    theirs, config = wav2vec2("rotary")
    modeling = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    for linear in (theirs.linear_q, theirs.linear_k):
        linear.load_state_dict({"weight": torch.eye(DIM), "bias": torch.zeros(DIM)})
    embedding = modeling.Wav2Vec2ConformerRotaryPositionalEmbedding(config).double()
    embedding.inv_freq = 10000.0 ** (-torch.arange(0, DIM // HEADS, 2, dtype=torch.float64) * HEADS / DIM)
    x = torch.randn(2, FRAMES, DIM, dtype=torch.float64)
    expected = theirs(x, relative_position_embeddings=embedding(x))[0]
    ours = attention(Rotary(DIM, HEADS), theirs, WAV2VEC2)
    torch.testing.assert_close(ours(whole(x)).values, expected, rtol=0, atol=1e-9)
    still = attention(None, theirs, WAV2VEC2)
    assert (still(whole(x)).values - expected).abs().max() > 1e-3


@pytest.mark.parametrize("key_heads", [1, 2])
def test_rotary_attention_of_llama(key_heads: int) -> None:
    """Turned behind the projections, with key heads that are shared, over the past."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=key_heads, attention_bias=True,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = modeling.LlamaAttention(config, layer_idx=0).double().eval()
    randomise(theirs)
    rate = 10000.0 ** (-torch.arange(0, DIM // HEADS, 2, dtype=torch.float64) * HEADS / DIM)
    angle = (torch.arange(FRAMES)[:, None] * rate).repeat(1, 2)[None]
    x = torch.randn(2, FRAMES, DIM, dtype=torch.float64)
    expected = theirs(x, position_embeddings=(angle.cos(), angle.sin()), attention_mask=None)[0]
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    ours = attention(Rotary(DIM, HEADS), theirs, names, span=Span.causal(), key_heads=key_heads)
    torch.testing.assert_close(ours(whole(x)).values, expected, rtol=0, atol=1e-9)
