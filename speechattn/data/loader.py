"""Planned batches, loaded by worker processes, from any batch of any epoch on."""

from __future__ import annotations

import atexit
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from speechattn.audio.resample import Samples
from speechattn.audio.vision import Image
from speechattn.data.augment import Augmentation, augmented, lots
from speechattn.data.batch import Batch, collate
from speechattn.data.cuts import Manifest, Utterance, load_lips, load_sound
from speechattn.data.join import Join
from speechattn.data.plan import Indices, Plan
from speechattn.errors import InputError

__all__ = ["SILENCE", "Broken", "Check", "Loader", "Skipped", "Sounds", "Source", "progress"]

Check = Callable[[str, str | None], object]  # of text and translation: InputError where nothing can be learnt from them
SILENCE = "silence"  # the id of what stands in for a batch of which nothing could be loaded


class Named(Protocol):
    """A batch."""

    @property
    def ids(self) -> tuple[str, ...]:
        """One for each utterance."""
        ...


B = TypeVar("B", bound=Named, covariant=True)


@dataclass(frozen=True)
class Broken:
    """An utterance that could not be loaded, and why."""

    id: str
    reason: str


class Source(Protocol[B]):
    """What batches are made of. Law: a pure function of rows and epoch."""

    def batch(self, rows: Indices, epoch: int) -> tuple[B, list[Broken]]:
        """The rows that could be loaded, and those that could not."""
        ...


@dataclass(frozen=True)
class Sounds:
    """Cuts of a manifest as samples at `rate` and texts; augmented by lots of (seed, epoch, id) alone.

    With `video_size` their pictures as well, where they have any, of so many pixels each way: `rate` is 16 kHz then.
    What is `kept` of an utterance (by its id, and whether it has pictures) makes its sound needless: it is silence, and
    its pictures a single black one.
    """

    manifest: Manifest
    rate: int
    normalise: Callable[[str], str]
    augment: tuple[Augmentation, ...] = ()
    seed: int = 0
    join: Join | None = None
    limit: int = 0  # samples of a padded batch: `join` makes none that is larger
    check: Check | None = None
    video_size: int | None = None
    kept: Callable[[str, bool], bool] | None = None

    def load(self, row: int, epoch: int) -> tuple[Samples, Utterance, Image | None] | Broken:
        """Samples [N], what the manifest says, and pictures [T, S, S]."""
        try:
            utterance = self.manifest[row]
            if self.check is not None:
                self.check(self.normalise(utterance.text), self.translation(utterance))
            size = None if utterance.video is None else self.video_size
            if self.kept is not None and self.kept(utterance.id, size is not None):
                silence = np.zeros(round(utterance.duration_s * self.rate), np.float32)
                return silence, utterance, None if size is None else np.zeros((1, size, size), np.uint8)
            x = load_sound(utterance, self.rate)
            y = augmented(x, self.rate, self.augment, key=(self.seed, epoch, utterance.id))
            if self.video_size is None:
                return y, utterance, None
            return y, utterance, load_lips(utterance, len(y), size=self.video_size, pace=Fraction(len(y), len(x)))
        except InputError as error:
            return Broken(self.manifest.row(row)["id"], str(error))

    def translation(self, utterance: Utterance) -> str | None:
        """Normalised."""
        return None if utterance.translation is None else self.normalise(utterance.translation)

    def batch(self, rows: Indices, epoch: int) -> tuple[Batch, list[Broken]]:
        """Where nothing can be loaded, every device still has to make its step: one second of silence, nothing said."""
        loaded = [self.load(row, epoch) for row in rows]
        broken = [item for item in loaded if isinstance(item, Broken)]
        whole = [item for item in loaded if not isinstance(item, Broken)]
        if not whole:
            silence = np.zeros(self.rate, np.float32)
            return collate([silence], texts=[""], translations=[""], ids=[SILENCE], rate=self.rate), broken
        heard, lips = [(x, utterance) for x, utterance, _ in whole], [images for _, _, images in whole]
        if self.join is not None:
            generator = lots(self.seed, epoch, f"join {heard[0][1].id}")
            heard, lips = self.join(heard, self.rate, limit=self.limit, generator=generator), []
        utterances = [utterance for _, utterance in heard]
        batch = collate(
            [x for x, _ in heard], rate=self.rate, lips=lips,
            texts=[self.normalise(u.text) for u in utterances], ids=[u.id for u in utterances],
            translations=[self.translation(u) for u in utterances],
        )  # fmt: skip
        return batch, broken


@dataclass(frozen=True)
class Planned(Dataset[tuple[B, list[Broken]]]):
    """Item k is batch k of an epoch."""

    source: Source[B]
    batches: Sequence[Indices]
    epoch: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> tuple[B, list[Broken]]:
        return self.source.batch(self.batches[k], self.epoch)


@dataclass
class Skipped:
    """Utterances that could not be loaded: counted, listed in `path`, warned of; more than `most` of all is an error.

    The share is asked only when 20 were skipped or at the end of an epoch.
    """

    path: Path | None = None
    most: float = 0.05
    tried: int = 0
    broken: list[Broken] = field(default_factory=list)

    def add(self, tried: int, broken: Sequence[Broken]) -> None:
        """Count a batch of so many. InputError when too many are broken."""
        self.tried += tried
        self.broken += broken
        if broken and self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{b.id}\t{b.reason}\n" for b in broken)
        if broken and len(self.broken) >= 20:
            self.check()

    def check(self) -> None:
        """InputError when too many are broken."""
        if len(self.broken) > self.most * self.tried:
            raise InputError(f"{self} of {self.tried}: more than {100 * self.most:g} %")

    def __str__(self) -> str:
        first = "; ".join(f"{b.id} ({b.reason})" for b in self.broken[:3])
        more = ", ..." if len(self.broken) > 3 else ""
        where = f"; all are listed in {self.path}" if self.path is not None else ""
        return f"{len(self.broken)} utterances could not be loaded: {first}{more}{where}"

    def report(self) -> None:
        """Warn of those skipped since the last report. InputError when there are too many."""
        if self.broken:
            self.check()
            warnings.warn(f"{self}; training went on without them", stacklevel=2)
        self.tried, self.broken = 0, []


class Loader(Generic[B]):
    """The batches of device `rank` of `world`, epoch after epoch: a stream in which `iter` picks up at batch `done()`.

    `done` counts the batches that were trained on in all epochs; each `iter` gives as many as an epoch has, from there
    on. So nothing is lost or repeated, whatever the trainer thinks where an epoch ends, and however many batches the
    worker processes have prepared. Without `done` each `iter` is one epoch more.

    Not a `DataLoader`, so that Lightning puts no sampler of its own into it: nobody has to set
    `use_distributed_sampler`. The worker processes of an epoch end with it.
    """

    def __init__(
        self, source: Source[B], plan: Plan, *, rank: int = 0, world: int = 1, workers: int = 0,
        pin_memory: bool = False, done: Callable[[], int] | None = None, skipped: Skipped | None = None,
    ) -> None:  # fmt: skip
        if plan.shares % world:
            raise InputError(f"batches planned for {plan.shares} devices cannot be dealt to {world}")
        self.source, self.plan, self.rank, self.world = source, plan, rank, world
        self.workers, self.pin_memory, self.done = workers, pin_memory, done
        self.skipped = skipped or Skipped()
        self.given, self.waited_s = 0, 0.0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.plan)

    def __iter__(self) -> Iterator[B]:
        epoch, start = divmod(self.done() if self.done is not None else self.given, len(self))
        self.given = (epoch + 1) * len(self)
        yield from self.batches(epoch, start, len(self))
        yield from self.batches(epoch + 1, 0, start)

    def batches(self, epoch: int, start: int, stop: int) -> Iterator[B]:
        """Batches `start` to `stop` of an epoch."""
        if start == stop:
            return
        planned = [self.share(batch) for batch in self.plan.epoch(epoch)]
        loader: DataLoader[Any] = DataLoader(
            Planned(self.source, planned, epoch), sampler=range(start, stop), batch_size=None,
            num_workers=self.workers, pin_memory=self.pin_memory, worker_init_fn=undisturbed,
        )  # fmt: skip
        for k, (batch, broken) in enumerate(self.timed(loader), start + 1):
            self.skipped.add(len(planned[k - 1]), broken)
            if k == len(planned):
                self.skipped.report()
            yield batch

    def timed(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The items; `waited_s` counts the seconds until each was there."""
        began, items = time.perf_counter(), iter(loader)
        # Workers ignore the signal by which Python would end them at exit, and it would wait for them.
        end: Callable[[], object] = getattr(items, "_shutdown_workers", lambda: None)
        atexit.register(end)
        try:
            for item in items:
                self.waited_s += time.perf_counter() - began
                yield item
                began = time.perf_counter()
        finally:
            atexit.unregister(end)

    def share(self, batch: Indices) -> Indices:
        """What this device gets of a batch."""
        return np.concatenate([batch[s :: self.plan.shares] for s in range(self.rank, self.plan.shares, self.world)])

    def state_dict(self) -> dict[str, int]:
        """Nothing, as `done` knows all; Lightning looks for this to see whether a loader can go on in mid-epoch."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing."""


def undisturbed(worker: int) -> None:
    """SIGTERM of a cluster and Ctrl-C reach all processes of a job: the main one saves and ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def progress(trainer: Any, batches: int) -> Callable[[], int] | None:
    """How many batches a Lightning trainer has trained on, in all epochs: its own count, which checkpoints restore.

    What a loader has handed out is more while a step is under way. To overfit, the first batches come again.
    """
    if trainer is None:
        return None

    def done() -> int:
        n, limit = int(trainer.fit_loop.epoch_loop.batch_progress.total.processed), trainer.overfit_batches
        if not limit:
            return n
        return n % (limit if isinstance(limit, int) else max(1, int(batches * limit)))

    return done
