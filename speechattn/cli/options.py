"""Options that commands share, and what they build."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from speechattn.audio.vad import AlwaysSpeech, SileroVAD, VoiceActivity
from speechattn.errors import InputError
from speechattn.live.listener import WindowModel as Model
from speechattn.live.session import Session
from speechattn.live.windowed import FRAME_THRESHOLD, Settings, Windowed
from speechattn.model import load_model
from speechattn.policy import Policy
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.local_agreement import LocalAgreement

__all__ = ["add_model_options", "add_session_options", "build_model", "build_session", "resolved"]

NEVER_S = 1e9
POLICIES = ("alignatt", "alignatt-fbk", "local-agreement")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where, in which language."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="tiny.en", help="name or path: OpenAI .pt, Hugging Face or CTranslate2 folder"
    )
    group.add_argument("--language", help="code such as en or de (multilingual models; without it: detected)")
    group.add_argument(
        "--task", default="transcribe", choices=("transcribe", "translate"), help="translate: to English"
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default cpu)")
    group.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    group.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: small models are fastest so)")


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """When words are committed."""
    group = parser.add_argument_group("policy")
    group.add_argument("--policy", default="alignatt", choices=POLICIES, help="default alignatt")
    group.add_argument(
        "--frame-threshold", type=int, metavar="N",
        help=f"alignatt: commit a word N frames (of 20 ms) behind the newest sound (default {FRAME_THRESHOLD})",
    )  # fmt: skip
    group.add_argument("--attn-layer", type=int, metavar="N", help="alignatt-fbk: the decoder layer to look at")
    group.add_argument(
        "--min-chunk-size", type=float, metavar="S", help="look at the sound every S seconds (default 1)"
    )
    group.add_argument(
        "--audio-max-len", type=float, metavar="S", help="longest window of sound in seconds (default 12)"
    )
    group.add_argument("--no-vad", action="store_true", help="no voice detection: everything is speech")


def build_model(options: argparse.Namespace) -> Model:
    """The model that the options name."""
    if options.threads < 1:
        raise InputError(f"--threads {options.threads}: at least 1")
    torch.set_num_threads(options.threads)
    return load_model(
        options.model, device=options.device, dtype=options.dtype, language=options.language, task=options.task
    )


def build_policy(options: argparse.Namespace, model: Model) -> Policy:
    """The policy that the options name; InputError for a setting that it does not have."""
    threshold, layer = options.frame_threshold, options.attn_layer
    if threshold is not None and threshold < 0:
        raise InputError(f"--frame-threshold {threshold}: 0 or more frames")
    if threshold is not None and options.policy == "local-agreement":
        raise InputError("--frame-threshold belongs to alignatt; local-agreement has no such setting")
    if layer is not None and options.policy != "alignatt-fbk":
        raise InputError(f"--attn-layer belongs to alignatt-fbk; {options.policy} has no such setting")
    if options.policy == "local-agreement":
        return LocalAgreement()
    if options.policy == "alignatt":
        return AlignAtt.whisper(model.alignment_heads, FRAME_THRESHOLD if threshold is None else threshold)
    layers, heads = model.decoder_size
    layer = layers // 2 if layer is None else layer
    if not 0 <= layer < layers:
        raise InputError(f"--attn-layer {layer}: this model has decoder layers 0 to {layers - 1}")
    return AlignAtt.fbk(layer, heads, *([] if threshold is None else [threshold]))


def build_session(options: argparse.Namespace, model: Model, *, offline: bool = False) -> Session:
    """A session as the options say; offline it looks only when an utterance ends."""
    named = {"min_chunk_s": options.min_chunk_size, "max_window_s": options.audio_max_len}
    given = {name: value for name, value in named.items() if value is not None}
    if offline:
        for name in ("policy", "frame_threshold", "attn_layer", "min_chunk_size"):
            if getattr(options, name) not in (None, "alignatt"):
                raise InputError(
                    f"--{name.replace('_', '-')} does nothing with --offline, which commits at utterance ends"
                )
        given |= {"min_chunk_s": NEVER_S, "pause_s": NEVER_S}
        given.setdefault("max_window_s", model.max_s - 2)
    vad: VoiceActivity = AlwaysSpeech() if options.no_vad else SileroVAD()
    return Session(model, policy=build_policy(options, model), settings=Settings(**given), vad=vad)


def resolved(options: argparse.Namespace, session: Session) -> str:
    """One line that says, in milliseconds, how the session listens."""
    listener, place = session.listener, f"{options.device} {options.dtype}"
    assert isinstance(listener, Windowed)
    settings = listener.settings
    parts = [options.model, options.policy, f"look every {1e3 * settings.min_chunk_s:.0f} ms"]
    if isinstance(listener.policy, AlignAtt):
        parts.append(f"threshold {1e3 * listener.policy.frame_threshold * session.model.frame_s:.0f} ms")
    return ", ".join([*parts, f"window {1e3 * settings.max_window_s:.0f} ms", place])


def folder(path: str) -> Path:
    """A folder that exists after this call; InputError when it cannot be made."""
    place = Path(path)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    return place
