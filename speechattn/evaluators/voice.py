"""A model with its options, as evaluators ask for it: one session for each recording, and languages by their codes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from speechattn.cli.options import (
    add_backend_option,
    add_model_options,
    add_session_options,
    build_live_model,
    build_session,
)  # fmt: skip
from speechattn.errors import InputError
from speechattn.live.session import Session
from speechattn.model import Recognizer
from speechattn.pretrained.whisper import WhisperModel

__all__ = ["Strict", "Voice", "add_voice_options", "options_of"]


def add_voice_options(parser: argparse.ArgumentParser) -> None:
    """The options of `speechattn stream` that belong to a model and its sessions."""
    add_model_options(parser)
    add_backend_option(parser)
    add_session_options(parser)


class Voice:
    """Who speaks to an evaluator: all sessions share the weights.

    `options` are those of `add_voice_options`; InputError for what the model cannot honour, before the first sound.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.model = options, build_live_model(options)
        self.session()

    def session(self, source: str | None = None, target: str | None = None) -> Session:
        """For one recording in the language `source`, whose text is in `target`; None leaves it to the model.

        InputError for languages that the model does not hear or write.
        """
        model = self.hearing(source)
        if target not in (None, written(model)):
            known = written(model) or "a language that it does not name"
            raise InputError(f"{self.options.model} writes {known}, not {target}")
        return build_session(self.options, model)

    def hearing(self, source: str | None) -> Recognizer | WhisperModel:
        """The model for this language; a multilingual Whisper of its own: it keeps the language that it detects."""
        model = self.model
        if isinstance(model, WhisperModel):
            if not model.network.config.multilingual and source in (None, "en"):
                return model
            return WhisperModel(
                model.network, model.tokenizer, name=model.name, language=source or self.options.language,
                task=model.task, pad_s=model.pad_s,
            )  # fmt: skip
        if source not in (None, model.language):
            raise InputError(f"{self.options.model} knows {model.language or 'one language'}, not {source}")
        return model


def written(model: Recognizer | WhisperModel) -> str | None:
    """The language of the text; None where nobody told."""
    if not model.translates:
        return model.language
    return "en" if isinstance(model, WhisperModel) else model.target_language


class Strict(argparse.ArgumentParser):
    """Errors are `InputError`, so that they reach whoever gave the settings."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def options_of(settings: Mapping[str, Any], parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Settings of a YAML file by the names of the options (`beam_size: 4`) as these; InputError for any other.

    `true` sets an option that has no value, `false` and `null` leave it out; a list gives it several times.
    """
    known = vars(parser.parse_args([]))
    words = list[str]()
    for name, value in settings.items():
        if name not in known:
            raise InputError(f"{name}: no such setting; there are {', '.join(sorted(known))}")
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str | int | float | None):
                raise InputError(f"{name}: wanted a text, a number, true or false")
            if one is not None and one is not False:
                words.append(option if one is True else f"{option}={one}")
    return parser.parse_args(words)
