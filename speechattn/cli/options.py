"""Options that commands share, and what they build."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from speechattn.attention import BACKENDS
from speechattn.audio.vad import AlwaysSpeech, SileroVAD, VoiceActivity
from speechattn.cli.policies import SETTINGS, add_policy_options, build_policy, build_streaming_policy
from speechattn.cli.terms import add_terms_options, build_terms
from speechattn.errors import InputError
from speechattn.live.endings import StreamSettings
from speechattn.live.listener import WindowModel
from speechattn.live.session import Session, choose_backend
from speechattn.live.streaming import Streaming
from speechattn.live.terms import Terms
from speechattn.live.windowed import Settings, Windowed
from speechattn.model import Recognizer, load_model
from speechattn.model.chunks import set_chunk
from speechattn.model.load import DEFAULT
from speechattn.model.searches import SEARCHES
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.stream_att import Characters, Punctuation, TextHistory, Words
from speechattn.pretrained.whisper import WhisperModel

__all__ = [
    "add_backend_option", "add_model_options", "add_running_options", "add_session_options", "add_trace_option",
    "build_live_model", "build_model", "build_session", "resolved",
]  # fmt: skip

NEVER_S = 1e9
WINDOWS = ("min_chunk_size", "audio_max_len", "history", "no_vad", "prompt_phrases")
STREAMS = ("chunk_ms", "search", "beam_size", "silence")


def add_model_options(parser: argparse.ArgumentParser, *, translate: bool = False) -> None:
    """Which model, where, in which language; a command that can only `translate` asks for no task."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=DEFAULT,
        help="name or path: a model folder, or a Whisper (tiny.en, OpenAI .pt, Hugging Face, CTranslate2); "
        f"default {DEFAULT}, which is here",
    )  # fmt: skip
    add_running_options(group, translate=translate)


def add_running_options(group: Any, *, translate: bool = False) -> None:
    """What `build_model` needs besides a model's name."""
    group.add_argument(
        "--language", "--source-language", help="what is heard: code such as en or de (Whisper; without it: detected)"
    )
    group.add_argument("--target-language", help="what a translator says (Whisper: en)")
    if translate:
        group.set_defaults(task="translate")
    else:
        group.add_argument("--task", choices=("transcribe", "translate"), help="Whisper: translate is to English")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default cpu)")
    group.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    group.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="whose classes the model's config.yaml names"
    )
    group.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: small models are fastest so)")


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    """Who computes attention, for `build_live_model`."""
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS),
        help="who computes the attention of the model's layers (default auto; speechattn doctor says which can here)",
    )  # fmt: skip


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """When words are committed, and which."""
    group = parser.add_argument_group("policy (models that read windows of sound, and the search aligned)")
    add_policy_options(group)
    group.add_argument(
        "--min-chunk-size", type=float, metavar="S", help="look at the sound every S seconds (default 1)"
    )
    group.add_argument(
        "--audio-max-len", type=float, metavar="S", help="longest window of sound in seconds (default 12)"
    )
    group.add_argument(
        "--history", metavar="words=N|chars=N|punctuation",
        help="StreamAtt: behind every look keep so many words (words alone: 20), characters, or what follows the last "
        "mark, and the sound that they look at (default: only a window that is too long is cut)",
    )  # fmt: skip
    group.add_argument("--no-vad", action="store_true", default=None, help="everything is speech")
    group = parser.add_argument_group("phrases and terms")
    group.add_argument("--hotwords-file", metavar="FILE", help="phrases to prefer, one a line, as plain text")
    group.add_argument(
        "--hotwords-score", type=float, metavar="X",
        help="log-probability for each token of these and of terms (default 1.5; where attention searches greedily 4)",
    )  # fmt: skip
    add_terms_options(group)
    group.add_argument(
        "--prompt-phrases", action="store_true", default=None,
        help="put phrases and terms into the prompt of a model that reads windows instead (100 tokens at most)",
    )  # fmt: skip
    group = parser.add_argument_group("search (models that stream)")
    group.add_argument(
        "--chunk-ms", type=int, metavar="MS", help="wait for so much sound; fewer are faster, more are more often right"
    )
    group.add_argument("--search", choices=tuple(SEARCHES), help="default: the best that the model's heads allow")
    group.add_argument("--beam-size", "--beams", type=int, metavar="K", help="hypotheses (default 10; 1 is greedy)")
    group.add_argument("--silence", type=float, metavar="S", help="an utterance ends after S seconds (default 0.6)")


def text_history(said: str) -> TextHistory:
    """What `--history` names; InputError for anything else."""
    name, _, number = said.partition("=")
    kinds: dict[str, Callable[..., TextHistory]] = {"words": Words, "chars": Characters, "punctuation": Punctuation}
    try:
        if name not in kinds or (number and (name == "punctuation" or not number.isdecimal())) or said.endswith("="):
            raise ValueError("wanted words, words=N, chars, chars=N or punctuation")
        return kinds[name](int(number)) if number else kinds[name]()
    except ValueError as error:
        raise InputError(f"--history {said}: {error}") from error


def add_trace_option(parser: argparse.ArgumentParser) -> None:
    """For those who show events."""
    parser.add_argument(
        "--trace", action="store_true", help="tell at every step what waits and why (in jsonl: a field of each event)"
    )


def build_model(options: argparse.Namespace) -> Recognizer | WhisperModel:
    """The model that the options name."""
    if options.threads < 1:
        raise InputError(f"--threads {options.threads}: at least 1")
    torch.set_num_threads(options.threads)
    if options.plugin and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where plugins are
    return load_model(
        options.model, device=options.device, dtype=options.dtype, language=options.language,
        target_language=options.target_language, task=options.task, plugins=options.plugin,
    )  # fmt: skip


def build_live_model(options: argparse.Namespace) -> Recognizer | WhisperModel:
    """The same, computing by `--backend`; InputError for one that it cannot run with."""
    model = build_model(options)
    if options.backend is not None:
        choose_backend(model, options.backend)
    return model


def build_session(
    options: argparse.Namespace, model: Recognizer | WhisperModel, *, offline: bool = False, trace: bool = False
) -> Session:  # fmt: skip
    """A session as the options say; InputError for those that this kind of model does not have."""
    if options.chunk_ms is not None and isinstance(model, Recognizer):
        set_chunk(model, options.chunk_ms)
    reader = model.windowed() if isinstance(model, Recognizer) and model.listening.plan().block is None else model
    if isinstance(reader, Recognizer):
        refuse(options, WINDOWS, "streams: it is for models that read windows, as --model tiny.en")
        if offline:
            raise InputError("--offline changes nothing for a model that streams: it hears live what it hears offline")
        return build_stream(options, reader, trace=trace)
    if reader is None:
        raise InputError(f"{options.model}: an encoder that needs whole utterances, and no attention decoder to follow")
    refuse(options, STREAMS, "reads windows of sound")
    return build_window(options, reader, offline=offline, trace=trace)


def refuse(options: argparse.Namespace, names: Sequence[str], kind: str) -> None:
    """InputError for the first of these options that was given."""
    for name in names:
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} does nothing with {options.model}, which {kind}")


def build_stream(options: argparse.Namespace, model: Recognizer, *, trace: bool) -> Session:
    """A session of a model that streams."""
    phrases, terms = build_preferences(options)
    phrases = [] if phrases is None and terms is not None else phrases
    given = {"beam_size": options.beam_size, "bonus": options.hotwords_score}
    search = model.search(
        options.search, phrases=phrases, **{name: value for name, value in given.items() if value is not None}
    )
    if search.size == 1 and options.beam_size not in (None, 1):
        raise InputError(f"--beam-size {options.beam_size}: the search of this model has one hypothesis; see --search")
    settings = StreamSettings() if options.silence is None else StreamSettings(silence_s=options.silence)
    policy = build_streaming_policy(options, model, search)
    return Session(model, settings=settings, search=search, terms=terms, policy=policy, trace=trace)


def build_preferences(options: argparse.Namespace) -> tuple[list[str] | None, Terms | None]:
    """Phrases and terms that the options name, None where they name none; InputError for a score of nothing."""
    if options.hotwords_score is not None and options.hotwords_file is None and options.terms is None:
        raise InputError("--hotwords-score needs --hotwords-file or --terms")
    phrases = None if options.hotwords_file is None else read_phrases(Path(options.hotwords_file))
    return phrases, build_terms(options)


def read_phrases(path: Path) -> list[str]:
    """One a line; empty lines are none. InputError when the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return [line.strip() for line in lines if line.strip()]


def build_window(options: argparse.Namespace, model: WindowModel, *, offline: bool, trace: bool) -> Session:
    """A session of a model that reads windows; offline it looks only when an utterance ends."""
    named = {
        "min_chunk_s": options.min_chunk_size, "max_window_s": options.audio_max_len, "bonus": options.hotwords_score
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if options.history is not None:
        given = {"max_window_s": model.max_s - 2, **given, "history": text_history(options.history)}
    if offline:
        for name in ("policy", *SETTINGS, "min_chunk_size", "history"):
            if getattr(options, name) not in (None, "alignatt"):
                raise InputError(
                    f"--{name.replace('_', '-')} does nothing with --offline, which commits at utterance ends"
                )
        given |= {"min_chunk_s": NEVER_S, "pause_s": NEVER_S}
        given.setdefault("max_window_s", model.max_s - 2)
    vad: VoiceActivity = AlwaysSpeech() if options.no_vad else SileroVAD()
    phrases, terms = build_preferences(options)
    if options.prompt_phrases is not None:
        if (phrases, terms) == (None, None) or options.hotwords_score is not None:
            raise InputError("--prompt-phrases goes with --hotwords-file or --terms, and has no --hotwords-score")
        given["prompted"] = True
    policy, settings = build_policy(options, model), Settings(**given)
    session = Session(model, policy=policy, settings=settings, vad=vad, terms=terms, trace=trace)
    if phrases is not None:
        session.prefer(phrases)
    return session


def resolved(options: argparse.Namespace, session: Session) -> str:
    """One line that says, in milliseconds, how the session listens."""
    listener, place, frame_s = session.listener, f"{options.device} {options.dtype}", session.model.frame_s
    if isinstance(listener, Streaming):
        block, silence = listener.block / session.model.sample_rate, listener.settings.silence_s
        kind = f"beam {listener.search.size}"
        return f"{options.model}, {kind}, steps of {1e3 * block:.0f} ms, silence {1e3 * silence:.0f} ms, {place}"
    assert isinstance(listener, Windowed)
    settings = listener.settings
    parts = [options.model, options.policy or "alignatt", f"look every {1e3 * settings.min_chunk_s:.0f} ms"]
    if options.history is not None:
        parts.append(f"history {options.history}")
    if isinstance(listener.policy, AlignAtt):
        parts.append(f"threshold {1e3 * listener.policy.frame_threshold * frame_s:.0f} ms")
    return ", ".join([*parts, f"window {1e3 * settings.max_window_s:.0f} ms", place])


def folder(path: str) -> Path:
    """A folder that exists after this call; InputError when it cannot be made."""
    place = Path(path)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    return place
