"""Utterances heard in batches, by this process or by several."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from speechattn.errors import InputError
from speechattn.score.listening import Ears, Heard, listen
from speechattn.score.utterances import Utterance

__all__ = ["batches", "hear_all"]

EARS: list[Ears] = []  # of a worker process


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
        for batch, results in alone(ears, work) if processes == 1 else together(ears, work, processes):
            add(results)
            bar.update(sum(one.duration_s for one in batch))


Results = Iterator[tuple[Sequence[Utterance], list[Heard]]]


def alone(ears: Callable[[], Ears], work: Sequence[Sequence[Utterance]]) -> Results:
    """One batch after the other."""
    both = ears()
    for batch in work:
        yield batch, listen(both, batch)


def together(ears: Callable[[], Ears], work: Sequence[Sequence[Utterance]], processes: int) -> Results:
    """Batches in the order in which they are ready; InputError when a process ends before its time."""
    pool = ProcessPoolExecutor(min(processes, max(1, len(work))), multiprocessing.get_context("spawn"), begin, (ears,))
    try:
        jobs = {pool.submit(work_on, batch): batch for batch in work}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a process of the evaluation has ended (out of memory?): what is finished is kept; "
            "run the same command again, with fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def begin(ears: Callable[[], Ears]) -> None:
    """A process of the pool loads its model; the parent alone answers to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    EARS.append(ears())


def work_on(batch: Sequence[Utterance]) -> list[Heard]:
    """In a process of the pool."""
    return listen(EARS[0], batch)
