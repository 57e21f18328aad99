"""What an ESPnet2 config.yaml says about its features."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechattn.errors import ModelError
from speechattn.pretrained.espnet.config import Options

__all__ = ["Sound", "read_sound"]

FRONT_END: dict[str, Any] = {  # ESPnet's defaults
    "fs": 16000, "n_fft": 512, "win_length": None, "hop_length": 128, "window": "hann", "center": True,
    "normalized": False, "onesided": True, "n_mels": 80, "fmin": None, "fmax": None, "htk": False,
    "frontend_conf": None, "apply_stft": True,
}  # fmt: skip
FIXED: dict[str, Any] = {"window": "hann", "center": True, "normalized": False, "onesided": True, "apply_stft": True}
NORMAL = {"norm_means": True, "norm_vars": True}


@dataclass(frozen=True)
class Sound:
    """The front-end in words, and whether it normalises by the mean and by the deviation of the corpus."""

    rate: int
    mels: int
    means: bool
    deviations: bool
    spec: dict[str, Any]


def read_sound(path: Path, said: Mapping[str, Any]) -> Sound:
    """`frontend: default` with global or no normalisation; ModelError names what cannot be honoured."""
    top = Options(str(path), said)
    if said.get("input_size") is not None:
        raise ModelError(f"{path}: input_size: {said['input_size']}: its features come from outside; wanted sound")
    top.one_of("frontend", ("default",))
    if said.get("normalize", "utterance_mvn") == "utterance_mvn":
        raise ModelError(
            f"{path}: normalize: utterance_mvn needs the mean of the whole utterance: it cannot stream; "
            "wanted global_mvn or null"
        )
    if said.get("speech_volume_normalize") is not None:
        raise ModelError(f"{path}: speech_volume_normalize needs the loudest sample of the utterance; wanted null")
    normal = Options.of(path, "normalize_conf", said, NORMAL, ("stats_file", "eps"))
    used = top.one_of("normalize", ("global_mvn", None)) is not None
    means, deviations = (used and bool(normal.one_of(key, (True, False))) for key in NORMAL)
    options = Options.of(path, "frontend_conf", said, FRONT_END)
    for key, value in FIXED.items():
        options.one_of(key, (value,))
    inner = Options(f"{options.where}: frontend_conf", options.said["frontend_conf"] or {})
    for key in ("use_wpe", "use_beamformer"):
        inner.one_of(key, (False,))
    rate, mels = sampling(options), options.number("n_mels")
    parts = {"spectrum": spectrum(options, rate, mels)}
    if used:
        parts["normal"] = {"class_path": "speechattn.audio.normal.GlobalCMVN.unknown", "init_args": {"dim": mels}}
    return Sound(rate, mels, means, deviations, {"class_path": "speechattn.stream.Serial", "init_args": parts})


def spectrum(options: Options, rate: int, mels: int) -> dict[str, Any]:
    """The logarithm of mel power, in words. Windows of even length: of an odd one ESPnet's centre is another."""
    transform = options.even("n_fft")
    args: dict[str, Any] = {
        "mels": mels, "rate": rate, "hop": options.number("hop_length"), "transform": transform,
        "window": transform if options.said["win_length"] is None else options.even("win_length"),
    }  # fmt: skip
    if args["window"] > transform:
        raise ModelError(f"{options.where}: win_length: {args['window']} is more than n_fft, {transform}")
    for key, name in (("fmin", "low"), ("fmax", "high")):
        value = options.said[key]
        if value is not None:
            if not isinstance(value, int | float) or not 0 <= value <= rate / 2:
                raise ModelError(f"{options.where}: {key}: {value} is no frequency of sound at {rate} samples a second")
            args[name] = float(value)
    if options.one_of("htk", (False, True)):
        return {"class_path": "speechattn.pretrained.espnet.network.Espnet.htk_log_mel", "init_args": args}
    return {"class_path": "speechattn.audio.spectrum.CentredLogMel", "init_args": args | {"scale": "slaney"}}


def sampling(options: Options) -> int:
    """`fs`: 16000, 16k, 22.05k, 16 kHz."""
    said = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(k?)(?:hz)?", str(options.said["fs"]).strip().lower())
    rate = float(said[1]) * (1000 if said[2] else 1) if said else 0.0
    if rate < 1 or rate != int(rate):
        raise ModelError(f"{options.where}: fs: {options.said['fs']} is no number of samples a second")
    return int(rate)
