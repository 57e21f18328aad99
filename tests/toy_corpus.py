"""Small corpora of synthetic sound, and a model that remembers what it was given."""

from __future__ import annotations

import json
from pathlib import Path

import lightning
import numpy as np
import soundfile
import torch
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lightning.pytorch import LightningModule, Trainer

from speechattn.data.batch import Batch


def write_corpus(folder: Path, seconds: list[float], *, name: str = "toy", rate: int = 16000, **custom: str) -> Path:
    """A cuts manifest with relative paths; utterance i is noise of `seconds[i]`, and says its number."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(seconds))
    cuts = []
    for i, length in enumerate(seconds):
        n, path = round(length * rate), folder / f"{name}-{i}.flac"
        soundfile.write(path, 0.1 * rng.standard_normal(n), rate)
        source = AudioSource("file", [0], path.name)
        recording = Recording(path.stem, [source], rate, n, n / rate, channel_ids=[0])
        said = SupervisionSegment(
            path.stem, path.stem, 0.0, n / rate, text=f"Number {i}!", language="en", speaker="nobody",
            custom=dict(custom) or None,
        )  # fmt: skip
        cuts.append(MonoCut(path.stem, 0.0, n / rate, 0, supervisions=[said], recording=recording))
    path = folder / f"{name}_cuts_train.jsonl"
    path.write_text("".join(json.dumps(cut.to_dict()) + "\n" for cut in cuts), encoding="utf-8")
    return path


class Recorder(LightningModule):
    """One weight; writes the ids of every batch to a file, and fails where told to."""

    def __init__(self, log: Path, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.log_path, self.fail_at = log, fail_at

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == self.fail_at:
            raise KeyboardInterrupt("told to")
        name = f"{self.log_path}.{self.global_rank}" if self.trainer.world_size > 1 else self.log_path
        with open(name, "a", encoding="utf-8") as file:
            row = [batch_idx, sorted(batch.ids), round(float(batch.sound.values.double().square().sum()), 6)]
            file.write(json.dumps(row) + "\n")
        return (self.weight - batch.durations_s.mean()) ** 2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(folder: Path, **options: object) -> Trainer:
    """A quiet one on the CPU."""
    settings: dict[str, object] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": folder, "devices": 1,
    }  # fmt: skip
    return lightning.pytorch.Trainer(**{**settings, **options})  # type: ignore[arg-type]


def rows(path: Path) -> list[list[object]]:
    """What a Recorder wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
