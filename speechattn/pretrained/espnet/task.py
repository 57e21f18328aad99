"""ESPnet's recognition task for training; imported by `__main__` alone, since it needs ESPnet."""

from __future__ import annotations

from espnet2.tasks.asr import ASRTask

from speechattn.pretrained.espnet.register import register

__all__ = ["Task"]

register()


class Task(ASRTask):  # type: ignore[misc]
    """The same. Each process that ESPnet spawns, one a GPU, imports it from here, and so knows our encoders too."""
