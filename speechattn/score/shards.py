"""Work in pieces, by this process or by several: utterances that are heard in batches, for one."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from speechattn.errors import InputError
from speechattn.score.listening import Ears, Heard, listen
from speechattn.score.utterances import Utterance

__all__ = ["batches", "hear_all", "shared_out"]

Tool = TypeVar("Tool")
Piece = TypeVar("Piece")
Result = TypeVar("Result")
TOOLS: list[Any] = []  # of a worker process


def batches(utterances: Sequence[Utterance], *, seconds: float) -> list[list[Utterance]]:
    """Utterances of like length together, as many as fit into `seconds` with their padding; the longest first."""
    found: list[list[Utterance]] = []
    for one in sorted(utterances, key=lambda one: -one.duration_s):
        if found and found[-1][0].duration_s * (len(found[-1]) + 1) <= seconds:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def hear_all(
    ears: Callable[[], Ears], work: Sequence[Sequence[Utterance]], add: Callable[[Sequence[Heard]], None], *,
    processes: int = 1,
) -> None:  # fmt: skip
    """Every batch; `add` gets the results of each as they come, in this process. `ears` can be sent to others."""
    bar = tqdm(
        total=round(sum(one.duration_s for batch in work for one in batch), 1), unit="s", desc="evaluate",
        disable=not sys.stderr.isatty(), bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]",
    )  # fmt: skip
    with bar:
        for batch, results in shared_out(ears, work, heard, processes=processes):
            add(results)
            bar.update(sum(one.duration_s for one in batch))


def heard(ears: Ears, batch: Sequence[Utterance]) -> list[Heard]:
    """Both ways."""
    return listen(ears, batch)


def shared_out(
    make: Callable[[], Tool], work: Sequence[Piece], do: Callable[[Tool, Piece], Result], *, processes: int = 1
) -> Iterator[tuple[Piece, Result]]:
    """Every piece of work and its result, in the order in which they are ready.

    `do` gets a tool that `make` makes once in every process; with more than one both can be sent to others.
    InputError when a process ends before its time.
    """
    if processes == 1:
        tool = make()
        for piece in work:
            yield piece, do(tool, piece)
        return
    pool = ProcessPoolExecutor(min(processes, max(1, len(work))), multiprocessing.get_context("spawn"), begin, (make,))
    try:
        jobs = {pool.submit(work_on, do, piece): piece for piece in work}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a process of the evaluation has ended (out of memory?): what is finished is kept; "
            "run the same command again, with fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def begin(make: Callable[[], Any]) -> None:
    """A process of the pool loads its model; the parent alone answers to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    TOOLS.append(make())


def work_on(do: Callable[[Any, Any], Any], piece: Any) -> Any:
    """In a process of the pool."""
    return do(TOOLS[0], piece)
