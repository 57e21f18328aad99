"""Models by name or path, whoever made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from speechattn.errors import ModelError
from speechattn.model.folder import is_model, load_folder
from speechattn.model.recognizer import Recognizer
from speechattn.pretrained.whisper import WhisperModel, load

__all__ = ["DEFAULT", "DTYPES", "load_model", "located", "shipped"]

OURS = "speechattn/"  # before the names of the models in this package
DEFAULT = f"{OURS}en-tiny-stream"  # where nobody names a model
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def shipped() -> dict[str, Path]:
    """The models inside this package: names and folders."""
    place = Path(__file__).parents[1] / "models"
    return {f"{OURS}{path.name}": path for path in sorted(place.iterdir()) if is_model(path)} if place.is_dir() else {}


def located(name: str | Path) -> Path:
    """The folder of a shipped model, or the path that a name may be; ModelError for a model that is not shipped."""
    there, path = shipped(), Path(name).expanduser()
    if str(name) in there:
        return there[str(name)]
    if str(name).startswith(OURS) and not path.exists():
        raise ModelError(f"{name}: no such model in this package, which has {', '.join(there) or 'none'}")
    return path


def load_model(
    name: str | Path = DEFAULT, *, device: str = "cpu", dtype: str = "float32", language: str | None = None,
    task: str | None = None, pad_s: float | None = None, plugins: Sequence[str] = (),
) -> Recognizer | WhisperModel:  # fmt: skip
    """A model by name (`tiny.en`, `large-v3`) or path; ModelError says what was looked for and what to do.

    A name that begins with `speechattn/` is that of a model inside this package (`shipped`); the `DEFAULT` is one. Such
    a model, a folder that `save_model` wrote, or that of an ESPnet2 experiment is a `Recognizer`; all else a Whisper.
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
    path = located(name)
    ours = is_model(path)
    if not ours:
        from speechattn.pretrained.espnet import is_espnet, load_espnet  # which needs this package

        if not is_espnet(path):
            return load(
                str(name), device=place, dtype=DTYPES[dtype], language=language, task=task or "transcribe", pad_s=pad_s
            )
    for option, value in (("task", task), ("pad_s", pad_s)):
        if value not in (None, "transcribe"):
            raise ModelError(f"{name}: {option} {value} belongs to Whisper; this model has no such setting")
    model = load_folder(path, plugins) if ours else load_espnet(path)
    if language not in (None, model.language):
        raise ModelError(f"{name}: this model knows {model.language or 'one language'}, not {language}")
    return model.to(place).cast(DTYPES[dtype])
