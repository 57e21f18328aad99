"""Models by name or path, whoever made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from speechattn.errors import ModelError
from speechattn.model.folder import is_model, load_folder
from speechattn.model.recognizer import Recognizer
from speechattn.pretrained.whisper import WhisperModel, load

__all__ = ["DTYPES", "load_model"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    name: str | Path = "tiny.en", *, device: str = "cpu", dtype: str = "float32", language: str | None = None,
    task: str | None = None, pad_s: float | None = None, plugins: Sequence[str] = (),
) -> Recognizer | WhisperModel:  # fmt: skip
    """A model by name (`tiny.en`, `large-v3`) or path; ModelError says what was looked for and what to do.

    A folder that `save_model` wrote, or that of an ESPnet2 experiment, is a `Recognizer`; all else is a Whisper.
    `task` (transcribe or translate) and `pad_s`, the silence that follows the sound into the encoder (None: the
    measured default), are Whisper's. `plugins` are modules whose classes the `config.yaml` of a folder may name, too.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype}: wanted {', '.join(DTYPES)}")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
    if place.type == "meta":
        raise ModelError("device meta holds no weights: wanted cpu, cuda or mps")
    path = Path(name).expanduser()
    from speechattn.pretrained.espnet import is_espnet, load_espnet  # which needs this package

    ours = is_model(path)
    if not ours and not is_espnet(path):
        return load(
            str(name), device=place, dtype=DTYPES[dtype], language=language, task=task or "transcribe", pad_s=pad_s
        )
    for option, value in (("task", task), ("pad_s", pad_s)):
        if value not in (None, "transcribe"):
            raise ModelError(f"{path}: {option} {value} belongs to Whisper; this model has no such setting")
    model = load_folder(path, plugins) if ours else load_espnet(path)
    if language not in (None, model.language):
        raise ModelError(f"{path}: this model knows {model.language or 'one language'}, not {language}")
    return model.to(place).cast(DTYPES[dtype])
