"""How a training is stopped from outside: by Ctrl-C, or by the SIGTERM of a cluster."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from speechattn.errors import SpeechAttnError
from speechattn.task.callbacks import newest
from speechattn.task.checkpoint import number

__all__ = ["stoppable"]


@contextmanager
def stoppable(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C ends a training as SIGTERM does, when its step is made and saved; the second one at once.

    Both leave as an error of one line; Lightning's own way out says nothing, or that all went well.
    """
    asked: list[int] = []

    def ask(kind: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        listening = signal.getsignal(signal.SIGTERM) not in (None, signal.SIG_DFL, signal.SIG_IGN)
        if not trainer.global_step or not listening:
            raise KeyboardInterrupt
        asked.append(kind)
        rank_zero_info("stopping after this step; Ctrl-C again stops at once")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGINT)
    mine = threading.current_thread() is threading.main_thread() and before != signal.SIG_IGN
    if mine:
        signal.signal(signal.SIGINT, ask)
    try:
        yield
    except SIGTERMException:
        last = newest(Path(trainer.default_root_dir))
        where = "nothing is saved" if last is None else f"--resume goes on after step {number(last.resolve())}"
        raise SpeechAttnError(f"{'interrupted' if asked else 'stopped by SIGTERM'}: {where}") from None
    except SystemExit:
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from None
    finally:
        if mine:
            signal.signal(signal.SIGINT, before)
