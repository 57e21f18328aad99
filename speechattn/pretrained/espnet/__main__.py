"""`python -m speechattn.pretrained.espnet asr_train --config train.yaml ...`: ESPnet, with this library's encoders."""

from __future__ import annotations

import importlib
import sys

from speechattn.errors import ModelError
from speechattn.pretrained.espnet.register import register

__all__ = ["PROGRAMS", "main"]

PROGRAMS = ("asr_train", "asr_inference", "asr_align")


def main(argv: list[str]) -> int:
    """Register, then run the named program of espnet2.bin with its own arguments; 2 when there is none such."""
    if not argv or argv[0] not in PROGRAMS:
        print(f"usage: python -m speechattn.pretrained.espnet {{{','.join(PROGRAMS)}}} ...", file=sys.stderr)
        return 2
    try:
        register()
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    sys.argv = [f"espnet2.bin.{argv[0]}", *argv[1:]]  # --print_config reads it there
    if argv[0] == "asr_train":
        importlib.import_module("speechattn.pretrained.espnet.task").Task.main(cmd=argv[1:])
    else:
        importlib.import_module(f"espnet2.bin.{argv[0]}").main(argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
