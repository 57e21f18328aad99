"""Checkpoints in CTranslate2's layout, and damaged ones."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import apart, package_folder, random_whisper

from speechattn.errors import ModelError
from speechattn.pretrained.whisper import Whisper, load
from speechattn.pretrained.whisper.layouts import read_ctranslate2, read_openai

CPU = torch.device("cpu")
PACKAGE_FILES = ("tokenizer.json", "config.json")


@pytest.fixture(autouse=True)
def _their_warnings() -> None:
    warnings.filterwarnings("ignore", module=r"(transformers|whisper|numba|tiktoken|huggingface_hub).*")


def write_model_bin(path: Path, tensors: dict[str, np.ndarray], aliases: dict[str, str]) -> None:
    """CTranslate2's format, written independently of the reader."""
    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    out = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        out += string(name) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        out += struct.pack("<BI", kinds[value.dtype.name], value.nbytes) + value.tobytes()
    out += struct.pack("<I", len(aliases)) + b"".join(string(a) + string(b) for a, b in aliases.items())
    path.write_bytes(out)


def small_ctranslate2(folder: Path, *, quantise: bool = False) -> Whisper:
    """A random model as a CTranslate2 folder; the network it should give."""
    network = random_whisper(vocab=120, audio_context=40, text_context=30)
    t = {name: tensor.numpy() for name, tensor in apart(network).items()}
    out: dict[str, np.ndarray] = {}

    def put(name: str, *parts: str) -> None:
        weight = np.concatenate([t[f"{part}.weight"] for part in parts])
        if quantise:
            scale = (127 / np.abs(weight).max(1)).astype(np.float32)
            out[f"{name}/weight"], out[f"{name}/weight_scale"] = (
                np.round(weight * scale[:, None]).astype(np.int8),
                scale,
            )
        else:
            out[f"{name}/weight"] = weight
        biases = [t.get(f"{part}.bias", np.zeros(len(t[f"{part}.weight"]), np.float32)) for part in parts]
        out[f"{name}/bias"] = np.concatenate(biases)

    def norm(name: str, mine: str) -> None:
        out[f"{name}/gamma"], out[f"{name}/beta"] = t[f"{mine}.weight"], t[f"{mine}.bias"]

    for half, layers in (("encoder", 2), ("decoder", 3)):
        out[f"{half}/num_heads"] = np.int16(2).reshape(())
        out[f"{half}/position_encodings/encodings"] = t[f"{half}.positions"]
        norm(f"{half}/layer_norm", f"{half}.norm")
        for i in range(layers):
            mine, at = f"{half}.layers.{i}", f"{half}/layer_{i}"
            attention = f"{mine}.{'attention' if half == 'encoder' else 'self_attention'}"
            put(f"{at}/self_attention/linear_0", *(f"{attention}.{p}" for p in ("query", "key", "value")))
            put(f"{at}/self_attention/linear_1", f"{attention}.out")
            norm(f"{at}/self_attention/layer_norm", f"{mine}.{'norm' if half == 'encoder' else 'self_norm'}")
            put(f"{at}/ffn/linear_0", f"{mine}.ff.0")
            put(f"{at}/ffn/linear_1", f"{mine}.ff.2")
            norm(f"{at}/ffn/layer_norm", f"{mine}.ff_norm")
            if half == "decoder":
                put(f"{at}/attention/linear_0", f"{mine}.cross.query")
                put(f"{at}/attention/linear_1", f"{mine}.cross.key", f"{mine}.cross.value")
                put(f"{at}/attention/linear_2", f"{mine}.cross.out")
                norm(f"{at}/attention/layer_norm", f"{mine}.cross_norm")
    for i in (1, 2):
        out[f"encoder/conv{i}/weight"], out[f"encoder/conv{i}/bias"] = (
            t[f"encoder.conv{i}.weight"],
            t[f"encoder.conv{i}.bias"],
        )
    out["decoder/embeddings/weight"] = t["decoder.embed.weight"]
    write_model_bin(folder / "model.bin", out, {"decoder/projection/weight": "decoder/embeddings/weight"})
    (folder / "config.json").write_text(json.dumps({"alignment_heads": [[1, 1]], "suppress_ids": [5]}))
    return network


def test_ctranslate2_layout_is_read_exactly_and_int8_to_its_precision(tmp_path: Path) -> None:
    network = small_ctranslate2(tmp_path)
    config, tensors = read_ctranslate2(tmp_path)
    assert (config.alignment_heads, config.suppress) == (((1, 1),), (5,))
    assert tensors.keys() == apart(network).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in apart(network).items())
    network = small_ctranslate2(tmp_path, quantise=True)
    _, tensors = read_ctranslate2(tmp_path)
    for name, tensor in apart(network).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=float(tensor.abs().max()) / 250 + 1e-6)


def test_damaged_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    small_ctranslate2(tmp_path)
    shutil.copy(package_folder() / "tokenizer.json", tmp_path)
    whole = (tmp_path / "model.bin").read_bytes()
    for cut in (3, 40, 5000, len(whole) - 10):
        (tmp_path / "model.bin").write_bytes(whole[:cut])
        with pytest.raises(ModelError, match=r"model\.bin"):
            load(str(tmp_path), device=CPU, dtype=torch.float32)
    (tmp_path / "model.bin").write_bytes(whole.replace(b"decoder/layer_norm/gamma", b"decoder/layer_norm/gammb"))
    with pytest.raises(ModelError, match=r"1 missing \(decoder\.norm\.weight\).*1 unknown"):
        load(str(tmp_path), device=CPU, dtype=torch.float32)
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match=r"bad\.pt: not a Whisper checkpoint"):
        load(str(bad), device=CPU, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"no model\.bin"):
        load(str(tmp_path / ".."), device=CPU, dtype=torch.float32) if not (
            tmp_path / "../config.json"
        ).exists() else None
    with pytest.raises(ModelError, match="not one of tiny"):
        load("tinny", device=CPU, dtype=torch.float32)


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"dims": Evil()}))
    with pytest.raises(ModelError):
        read_openai(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
