"""Cuts manifests -> batches for training, validation and test."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from speechattn.audio.clip import SOUND_RATE
from speechattn.audio.vision import SIZE, pyav
from speechattn.data.augment import Augmentation
from speechattn.data.batch import Batch
from speechattn.data.cuts import Manifest
from speechattn.data.join import Join
from speechattn.data.loader import Check, Loader, Skipped, Sounds, progress
from speechattn.data.plan import Plan
from speechattn.errors import InputError
from speechattn.text.normal import normaliser

__all__ = ["Corpus"]

Paths = Sequence[str | Path] | Mapping[str, str | Path]


class Corpus(LightningDataModule):
    """Batches of up to `max_seconds` of padded sound for each device.

    `train`: cuts manifests; as a mapping, with the number of times each is heard in an epoch. `valid` and `test`:
    manifests, by name if a mapping; theirs are whole, unchanged, longest first. Utterances of `train` that are shorter
    than `shortest_s` or longer than `longest_s` are left out, with a warning; texts pass the text normaliser
    `normalise` (`speechattn.text.normal`). Where a supervision has `custom.video` its pictures are read as well, of
    `video_size` pixels each way, and the sound of a batch is a `Clip`; `video=False` leaves them.

    Laws: the batches of an epoch are a function of (manifests, seed, epoch) and not of the number of workers; what
    is done to an utterance one of (seed, epoch, its id). In an epoch each utterance is heard once, over all devices,
    each of which makes equally many steps. A checkpoint goes on with the batch after the last one that was trained on.
    Batches are planned for `shares` devices, by default those that there are; with a multiple of these, fewer devices
    make the same steps, each with several times `max_seconds`. An augmentation that makes utterances longer is
    reckoned with at its longest, so that the limit holds; `join` keeps to it, too.
    """

    def __init__(
        self, train: Sequence[str | Path] | Mapping[str, int] = (), valid: Paths = (), test: Paths = (), *,
        max_seconds: float = 200.0, max_utterances: int | None = None, longest_s: float = 20.0, shortest_s: float = 0.1,
        rate: int = 16000, normalise: str = "none", augment: Sequence[Augmentation] = (), join: Join | None = None,
        workers: int = 2, seed: int = 0, shares: int | None = None, most_broken: float = 0.05, video: bool = True,
        video_size: int = SIZE,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(workers, seed) < 0 or min(rate, video_size) < 1 or max_seconds <= 0:
            raise ValueError(f"workers {workers}, seed {seed}, rate {rate}, video_size {video_size}, max_seconds "
                             f"{max_seconds:g}: wanted 0, 0, 1 or 1 or more, more than 0")  # fmt: skip
        self.train_paths, self.valid_paths, self.test_paths = repeated(train), named(valid), named(test)
        self.max_seconds, self.max_utterances = max_seconds, max_utterances
        self.longest_s, self.shortest_s, self.most_broken = longest_s, shortest_s, most_broken
        self.join, self.video, self.video_size = join, video, video_size
        self.rate, self.augment, self.workers, self.seed, self.shares = rate, tuple(augment), workers, seed, shares
        self.normalise = normaliser(normalise)
        self.check: Check | None = None
        self.kept: Callable[[str, bool], bool] | None = None  # of what no sound is needed in training

    @property
    def valid_names(self) -> tuple[str, ...]:
        """Names of the validation sets, in the order of the data loaders."""
        return tuple(self.valid_paths)

    @property
    def test_names(self) -> tuple[str, ...]:
        """Names of the test sets, in the order of the data loaders."""
        return tuple(self.test_paths)

    def setup(self, stage: str) -> None:
        """Without `valid` nothing is validated."""
        if self.trainer is not None and not self.valid_paths:
            self.trainer.limit_val_batches = 0

    def texts(self) -> list[str]:
        """What is said in the training manifests, normalised: for a tokenizer. No sound is read."""
        manifest = Manifest.read(list(self.train_paths))
        return [self.normalise(manifest[i].text) for i in range(len(manifest))]

    def train_dataloader(self) -> Loader[Batch]:
        """Epoch after epoch, from where the checkpoint says."""
        if not self.train_paths:
            raise InputError("no manifest to train on: set `train`")
        manifest = self.chosen(Manifest.read(list(self.train_paths), list(self.train_paths.values())))
        stretch = float(np.prod([change.stretch for change in self.augment]))
        plan = Plan(
            manifest.durations_s * stretch, self.max_seconds, shares=self.shares or self.world,
            max_utterances=self.max_utterances, seed=self.seed,
        )  # fmt: skip
        limit = int(self.max_seconds * self.rate) * plan.shares // self.world
        sounds = Sounds(
            manifest, self.rate, self.normalise, self.augment, self.seed, self.join, limit, self.check,
            self.pixels(manifest, self.join), self.kept,
        )  # fmt: skip
        return self.loader(sounds, plan, done=progress(self.trainer, len(plan)))

    def val_dataloader(self) -> list[Loader[Batch]]:
        """One for each of `valid`."""
        return [self.whole(path) for path in self.valid_paths.values()]

    def test_dataloader(self) -> list[Loader[Batch]]:
        """One for each of `test`."""
        return [self.whole(path) for path in self.test_paths.values()]

    def whole(self, path: Path) -> Loader[Batch]:
        """Every utterance of a manifest as it is, longest first."""
        manifest = self.checked(Manifest.read([path]), path)
        seconds = max(self.max_seconds, float(manifest.durations_s.max(initial=0)))
        plan = Plan(manifest.durations_s, seconds, shares=self.world, max_utterances=self.max_utterances, seed=None)
        return self.loader(Sounds(manifest, self.rate, self.normalise, video_size=self.pixels(manifest)), plan)

    def pixels(self, manifest: Manifest, join: Join | None = None) -> int | None:
        """How large pictures are wanted; None for none. InputError where they cannot be had."""
        if not (self.video and manifest.filmed):
            return None
        if self.rate != SOUND_RATE:
            raise InputError(f"rate {self.rate}: pictures go with {SOUND_RATE} Hz; `video: false` leaves them")
        if join is not None:
            raise InputError("join: not with pictures, which do not begin at any sample; `video: false` leaves them")
        pyav()
        return self.video_size

    def checked(self, manifest: Manifest, path: Path) -> Manifest:
        """Those whose texts the task can use, asked before the training begins; a warning names the others."""
        sounds, odd = Sounds(manifest, self.rate, self.normalise), dict[int, str]()
        for row in range(len(manifest)) if self.check is not None else ():
            try:
                utterance = manifest[row]
            except InputError:
                continue  # will be skipped like one without sound
            try:
                self.check(self.normalise(utterance.text), sounds.translation(utterance))  # type: ignore[misc]
            except InputError as error:
                odd[row] = f"{utterance.id} ({error})"
        first = f"{'; '.join([*odd.values()][:3])}{'; ...' if len(odd) > 3 else ''}"
        said = f"{path}: {len(odd)} of {len(manifest)} utterances cannot be judged: {first}"
        if len(odd) == len(manifest):
            raise InputError(said if odd else f"{path}: no utterance in it")
        if odd:
            warnings.warn(f"left out: {said}", stacklevel=2)
            return manifest.select(np.array([row for row in range(len(manifest)) if row not in odd]))
        return manifest

    def loader(self, sounds: Sounds, plan: Plan, *, done: Callable[[], int] | None = None) -> Loader[Batch]:
        """The share of this device."""
        rank = self.trainer.global_rank if self.trainer is not None else 0
        return Loader(
            sounds, plan, rank=rank, world=self.world, workers=self.workers, pin_memory=torch.cuda.is_available(),
            done=done, skipped=self.skips(rank),
        )  # fmt: skip

    def skips(self, rank: int) -> Skipped:
        """Where utterances that cannot be loaded are listed: in the folder of the log, if there is one."""
        folder = self.trainer.log_dir if self.trainer is not None and self.trainer.loggers else None
        if folder is None:
            return Skipped(most=self.most_broken)
        Path(folder).mkdir(parents=True, exist_ok=True)
        return Skipped(Path(folder) / (f"skipped-{rank}.tsv" if rank else "skipped.tsv"), self.most_broken)

    @property
    def world(self) -> int:
        """Devices that train together."""
        return int(self.trainer.world_size) if self.trainer is not None else 1

    def chosen(self, manifest: Manifest) -> Manifest:
        """The utterances of a length that can be trained on; a warning names the others."""
        if self.longest_s > self.max_seconds:
            raise InputError(f"longest_s={self.longest_s:g} does not fit into max_seconds={self.max_seconds:g}")
        good = (manifest.durations_s >= self.shortest_s) & (manifest.durations_s <= self.longest_s)
        if len(good) and good.all():
            return manifest
        bad = np.flatnonzero(~good)
        first = ", ".join(f"{manifest[i].id} ({manifest.durations_s[i]:.2f} s)" for i in bad[:5])
        said = (
            f"{len(bad)} of {len(good)} utterances last less than {self.shortest_s:g} s or more than "
            f"{self.longest_s:g} s: {first}{', ...' if len(bad) > 5 else ''}"
        )
        if not len(good):
            raise InputError(f"nothing to train on: no utterance in {', '.join(map(str, self.train_paths))}")
        if not good.any():
            raise InputError(f"nothing to train on: {said}")
        warnings.warn(f"left out: {said}", stacklevel=2)
        return manifest.select(np.flatnonzero(good))


def repeated(train: Sequence[str | Path] | Mapping[str, int]) -> dict[Path, int]:
    """Manifests and how often each is heard in an epoch."""
    if isinstance(train, Mapping):
        return {Path(path): int(times) for path, times in train.items()}
    if len({*map(str, train)}) < len(train):
        raise InputError("a manifest is there twice in `train`: {path: 2} hears it twice")
    return {Path(path): 1 for path in train}


def named(paths: Paths) -> dict[str, Path]:
    """Manifests by name: that of the file without its endings, where none is given."""
    if isinstance(paths, Mapping):
        return {name: Path(path) for name, path in paths.items()}
    found = {Path(path).name.split(".")[0]: Path(path) for path in paths}
    if len(found) < len(paths):
        raise InputError(f"manifests of the same name: {', '.join(map(str, paths))}: wanted {{name: path, ...}}")
    return found
