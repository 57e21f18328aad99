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
    target_language: str | None = None, task: str | None = None, pad_s: float | None = None,
    plugins: Sequence[str] = (),
) -> Recognizer | WhisperModel:  # fmt: skip
    """A model by name (`tiny.en`, `large-v3`) or path; ModelError says what was looked for and what to do.

    A name that begins with `speechattn/` is that of a model inside this package (`shipped`); the `DEFAULT` is one. Such
    a model, a folder that `save_model` wrote, or that of an ESPnet2 experiment is a `Recognizer`; all else a Whisper.
    `language` is what is heard, `target_language` what a translator says (Whisper: en); an ESPnet experiment names
    neither and believes both. With a `task`, transcribe or translate, a model that does something else is refused;
    Whisper does either (None: transcribe). `pad_s`, the silence that follows the sound into the encoder (None: the
    measured default), is Whisper's. `plugins` are modules whose classes the `config.yaml` of a folder may name, too.
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
            if target_language not in (None, "en"):
                raise ModelError(f"{name}: Whisper translates to English (en), not to {target_language}")
            if target_language is not None and task != "translate":
                raise ModelError(f"{name}: target_language {target_language} goes with task translate")
            return load(
                str(name), device=place, dtype=DTYPES[dtype], language=language, task=task or "transcribe", pad_s=pad_s
            )
    if pad_s is not None:
        raise ModelError(f"{name}: pad_s {pad_s} belongs to Whisper; this model has no such setting")
    if ours:
        model = load_folder(path, plugins)
    else:
        model = load_espnet(path, language=language, target_language=target_language)
    if language not in (None, model.language):
        raise ModelError(f"{name}: this model knows {model.language or 'one language'}, not {language}")
    fits(str(name), model, task, target_language)
    return model.to(place).cast(DTYPES[dtype])


def fits(name: str, model: Recognizer, task: str | None, target: str | None) -> None:
    """ModelError where a model does something else than the task, or says another language."""
    if task == "transcribe" and model.translates:
        says = f" to {model.target_language}" if model.target_language else ""
        raise ModelError(f"{name}: task transcribe: this model translates{says}; say `speechattn translate`")
    if task == "translate" and not model.translates:
        raise ModelError(f"{name}: task translate: this model cannot, it says what it hears; name a translator")
    if target not in (None, model.target_language):
        says = f"translates to {model.target_language or 'a language that it does not name'}"
        raise ModelError(f"{name}: this model {says if model.translates else 'does not translate'}, not to {target}")
