"""Training that was stopped anywhere goes on with the next batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toy_corpus import Recorder, rows, trainer, write_corpus

from speechattn.data.augment import Level
from speechattn.data.batch import Batch
from speechattn.data.corpus import Corpus

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*logger", "ignore:.*isinstance.treespec", "ignore:.*LeafSpec",
    "ignore:Checkpoint directory", "ignore:Be aware that when using .ckpt_path", "ignore:.*defined a .validation_step.",
)  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seconds = np.random.default_rng(0).uniform(0.2, 1.0, 30)
    return write_corpus(tmp_path_factory.mktemp("corpus"), seconds.tolist())


def corpus(manifest: Path, workers: int = 0, **changes: object) -> Corpus:
    options: dict[str, object] = {"max_seconds": 4, "longest_s": 2, "workers": workers, "augment": [Level()]}
    return Corpus([manifest], **{**options, **changes})  # type: ignore[arg-type]


def uninterrupted(folder: Path, manifest: Path, *, epochs: int = 3, **options: object) -> list[list[object]]:
    log = folder / "whole.jsonl"
    trainer(folder, max_epochs=epochs, **options).fit(Recorder(log), datamodule=corpus(manifest))
    return rows(log)


def checkpoints(folder: Path, **options: object) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "saved", filename="{step}", save_top_k=-1, **options)  # type: ignore[arg-type]


def newest(folder: Path) -> Path:
    return max((folder / "saved").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))


def test_epochs_differ_and_are_whole(tmp_path: Path, manifest: Path) -> None:
    whole = uninterrupted(tmp_path, manifest)
    n = len(corpus(manifest).train_dataloader())
    assert [row[0] for row in whole] == list(range(n)) * 3
    epochs = [[name for row in whole[n * e : n * (e + 1)] for name in row[1]] for e in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 30 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("workers", "accumulate", "stop"), [(0, 1, 4), (2, 1, 14), (0, 2, 7), (2, 3, 12)])
def test_an_error_in_mid_epoch_loses_nothing(
    tmp_path: Path, manifest: Path, workers: int, accumulate: int, stop: int
) -> None:
    whole = uninterrupted(tmp_path, manifest, accumulate_grad_batches=accumulate)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    saver = checkpoints(tmp_path, every_n_train_steps=1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, callbacks=[saver], **options).fit(Recorder(first, stop), datamodule=corpus(manifest, workers))
    assert rows(first) == whole[:stop]
    resumed = trainer(tmp_path, callbacks=[saver], **options)
    resumed.fit(Recorder(second), datamodule=corpus(manifest, workers), ckpt_path=newest(tmp_path))
    kept = len(whole) - len(rows(second))
    assert rows(second) == whole[kept:]
    n = len(whole) // 3
    assert stop - accumulate < kept <= stop  # the last batches before it were not yet a step
    assert kept % n % accumulate == 0


class Saver(Recorder):
    """Saves in the middle of a step, and goes no further."""

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == 8:
            self.trainer.save_checkpoint(self.log_path.parent / "saved/step=8.ckpt")
            raise KeyboardInterrupt("told to")
        return super().training_step(batch, batch_idx)


def test_a_checkpoint_in_the_middle_of_a_step_does_that_step_again(tmp_path: Path, manifest: Path) -> None:
    whole = uninterrupted(tmp_path, manifest)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, max_epochs=3).fit(Saver(first), datamodule=corpus(manifest))
    trainer(tmp_path, max_epochs=3).fit(Recorder(second), datamodule=corpus(manifest), ckpt_path=newest(tmp_path))
    assert rows(first) + rows(second) == whole


@pytest.mark.parametrize("when", ["train_batch", "epoch", "validation", "end"])
@pytest.mark.parametrize("steps", [5, 0])
def test_every_kind_of_checkpoint_goes_on(tmp_path: Path, manifest: Path, when: str, steps: int) -> None:
    whole = uninterrupted(tmp_path, manifest)
    n = len(whole) // 3
    steps = steps or 2 * n  # in mid-epoch, or at the end of the second
    kinds = {"train_batch": {"every_n_train_steps": 1}, "epoch": {"save_on_train_epoch_end": True}}
    saver = [checkpoints(tmp_path, **kinds[when])] if when in kinds else []
    data = corpus(manifest, valid={"toy": manifest} if when == "validation" else ())
    if when == "validation":
        saver = [checkpoints(tmp_path, every_n_epochs=1, save_on_train_epoch_end=False)]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    options = {"callbacks": saver, "enable_checkpointing": bool(saver), "num_sanity_val_steps": 0}
    begun = trainer(tmp_path, max_steps=steps, **options)
    begun.fit(Recorder(first), datamodule=data)
    (tmp_path / "saved").mkdir(exist_ok=True)
    if when == "end":
        begun.save_checkpoint(tmp_path / "saved/step=0.ckpt")
    if not list((tmp_path / "saved").glob("*.ckpt")):
        assert (when, steps) == ("validation", 5)  # no epoch has ended
        return
    assert rows(first) == whole[:steps]
    resumed = trainer(tmp_path, max_steps=3 * n, num_sanity_val_steps=0)
    resumed.fit(Recorder(second), datamodule=data, ckpt_path=newest(tmp_path))
    # Lightning's own batch index may go on from n at the end of an epoch.
    assert [row[1:] for row in rows(second)] == [row[1:] for row in whole[steps:]]


def test_short_epochs_walk_through_the_data(tmp_path: Path, manifest: Path) -> None:
    whole = uninterrupted(tmp_path, manifest, epochs=2)
    log = tmp_path / "short.jsonl"
    trainer(tmp_path, max_epochs=3, limit_train_batches=4).fit(Recorder(log), datamodule=corpus(manifest))
    assert [row[1:] for row in rows(log)] == [row[1:] for row in whole[:12]]


def test_overfitting_hears_the_same_batches_again(tmp_path: Path, manifest: Path) -> None:
    log = tmp_path / "log.jsonl"
    trainer(tmp_path, max_epochs=3, overfit_batches=2).fit(Recorder(log), datamodule=corpus(manifest))
    assert rows(log)[:2] * 3 == rows(log)
    assert rows(log)[0] != rows(log)[1]


CHILD = """
import sys, time; sys.path.insert(0, {tests!r})
from pathlib import Path
from toy_corpus import Recorder, trainer
from test_corpus_resume import checkpoints, corpus, newest
class Slow(Recorder):
    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)
folder, manifest, log = map(Path, sys.argv[1:])
saver = checkpoints(folder, every_n_train_steps=3)
training = trainer(folder, max_epochs=3, callbacks=[saver], enable_checkpointing=True)
training.fit(Slow(log), datamodule=corpus(manifest, 2))
"""


@pytest.mark.slow
def test_kill_9(tmp_path: Path, manifest: Path) -> None:
    whole = uninterrupted(tmp_path, manifest)
    log, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    code = CHILD.format(tests=str(Path(__file__).parent))
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(manifest), str(log)])
    try:
        began = time.monotonic()
        while not log.exists() or len(rows(log)) < 11:
            assert child.poll() is None
            assert time.monotonic() - began < 60
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert len(rows(log)) < len(whole)
    resumed = trainer(tmp_path, max_epochs=3)
    resumed.fit(Recorder(second), datamodule=corpus(manifest, 2), ckpt_path=newest(tmp_path))
    kept = len(whole) - len(rows(second))
    assert kept % 3 == 0
    assert kept >= 6
    assert rows(second) == whole[kept:]


LEFT_IN_MID_EPOCH = """
import sys
from pathlib import Path
from speechattn.data.corpus import Corpus
corpus = Corpus([Path(sys.argv[1])], max_seconds=4, longest_s=2, workers=1)
corpus.trainer = None
batches = iter(corpus.train_dataloader())
next(batches)
"""


def test_a_program_that_ends_in_mid_epoch_ends(manifest: Path) -> None:
    """Workers ignore SIGTERM, which is what Python ends its children with: without help it would wait for ever."""
    subprocess.run([sys.executable, "-c", LEFT_IN_MID_EPOCH, str(manifest)], check=True, timeout=150)
