"""`speechattn doctor`: what is here, what is not, and why."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from speechattn.errors import SpeechAttnError
from speechattn.version import __version__

__all__ = ["add_parser"]

PACKAGES = ("torch", "torchaudio", "triton", "soundfile", "soxr", "silero-vad", "tokenizers", "rich", "sounddevice",
            "lightning", "espnet")  # fmt: skip


def add_parser(commands: Any) -> None:
    """The command has no options."""
    parser = commands.add_parser("doctor", help="versions, devices, models, microphone", allow_abbrev=False)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print a table; nothing that is missing is an error here."""
    import torch

    print(f"speechattn   {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        try:
            print(f"{name:<12} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<12} not installed")
    print(f"{'threads':<12} {torch.get_num_threads()}")
    for name, found in devices():
        print(f"{name:<12} {found}")
    from speechattn.pretrained.whisper.load import NAMES, local

    print(f"{'model':<12} {own()}")
    for name in NAMES:
        place = local(name)
        if place:
            print(f"{'model':<12} {name}: {place}")
    for name, found in backends():
        print(f"{'attention':<12} {name}: {found}")
    print(f"{'kernels':<12} {kernels()}")
    print(attempt(microphones))
    return 0


def own() -> str:
    """The model that commands use where none is named: where it is, and whether its files are whole."""
    from speechattn.model.load import DEFAULT, load_model, located

    try:
        load_model()
    except SpeechAttnError as error:
        return f"{DEFAULT}: broken, install speechattn again: {error}"
    place = located(DEFAULT)
    size = sum(path.stat().st_size for path in place.iterdir())
    return f"{DEFAULT} (default): whole, {size / 1e6:.0f} MB, {place}"


def backends() -> Iterator[tuple[str, str]]:
    """Each attention backend, and whether it can compute chunks here or why not."""
    import torch

    from speechattn.attention import BACKENDS, Span

    q = torch.zeros(1, 1, 16, 64, device="cuda" if torch.cuda.is_available() else "cpu")
    for name, backend in BACKENDS.items():
        reason = backend.supports(q, Span(64, 16), None)
        yield name, "yes" if reason is None else f"no: {reason}"


def kernels() -> str:
    """How the kernels run that speechattn brings (attention, policies, alignments, a loss), or why they do not."""
    import torch

    from speechattn.attention.triton import installed

    if not installed():
        return "no: triton is not installed (pip install 'speechattn[kernels]')"
    from speechattn_kernels.common import unable

    x = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    if reason := unable(x):
        return f"no: {reason}"
    return f"yes, on {torch.cuda.get_device_name()}" if x.is_cuda else "yes, in Triton's interpreter: only for tests"


def devices() -> Iterator[tuple[str, str]]:
    """Each kind of device, and what it is or why it cannot be used."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield f"cuda:{i}", torch.cuda.get_device_name(i)
    else:
        yield (
            "cuda",
            "no: " + ("this torch has no CUDA" if torch.version.cuda is None else "no NVIDIA GPU or driver found"),
        )
    yield "mps", "yes" if torch.backends.mps.is_available() else "no: not an Apple GPU"
    yield "cpu", f"yes, {torch.backends.cpu.get_cpu_capability()}"


def microphones() -> str:
    """The default microphone and how many there are."""
    from speechattn.audio.microphone import backend

    inputs = [device for device in backend().query_devices() if device["max_input_channels"] > 0]
    if not inputs:
        return "microphone   none found"
    return "\n".join(f"{'microphone':<12} {device['index']}: {device['name']}" for device in inputs)


def attempt(look: Callable[[], str]) -> str:
    """What it found, or why it could not look."""
    try:
        return look()
    except SpeechAttnError as error:
        return f"microphone   {error}"
