"""Whisper from three layouts, against two reference implementations."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import apart, package_folder, random_whisper

from speechattn.attention.self_attention import joined
from speechattn.audio.hearing import hear
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.pretrained.whisper import Whisper, WhisperConfig, WhisperModel, load
from speechattn.pretrained.whisper.features import FrontEnd, scaled
from speechattn.pretrained.whisper.layouts import read_hugging_face, read_openai
from speechattn.testing import check_export

CPU = torch.device("cpu")
PACKAGE_FILES = ("tokenizer.json", "config.json")


@pytest.fixture(autouse=True)
def _their_warnings() -> None:
    warnings.filterwarnings("ignore", module=r"(transformers|whisper|numba|tiktoken|huggingface_hub).*")


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
