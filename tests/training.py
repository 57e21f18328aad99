"""A corpus and a recipe so small that tests can train; callbacks that watch, and one that kills."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import soundfile
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

DIGITS = Path(__file__).parent / "digits"
LINES = json.loads((DIGITS / "transcripts.json").read_text())


def corpus(path: Path, *, times: int = 1, first: int = 14) -> Path:
    """A manifest of the recordings in `digits`, each `times` times under another name."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for copy in range(times):
            for line in LINES[:first]:
                info, name = soundfile.info(DIGITS / line["file"]), f"{line['file'][:2]}-{copy}"
                seconds = info.frames / info.samplerate
                source = {"type": "file", "channels": [0], "source": str(DIGITS / line["file"])}
                file.write(json.dumps({
                    "id": name, "start": 0, "duration": seconds, "channel": 0, "type": "MonoCut",
                    "supervisions": [{
                        "id": name, "recording_id": name, "start": 0, "duration": seconds, "channel": 0,
                        "text": line["text"], "speaker": line["voice"], "language": "en",
                    }],
                    "recording": {
                        "id": name, "sources": [source], "sampling_rate": info.samplerate, "num_samples": info.frames,
                        "duration": seconds, "channel_ids": [0],
                    },
                }) + "\n")  # fmt: skip
    return path


def part(name: str, **args: Any) -> dict[str, Any]:
    """Of a recipe."""
    return {"class_path": name, "init_args": args}


def recipe(train: Path, valid: Path | None, **changes: Any) -> dict[str, Any]:
    """A Conformer of a few thousand parameters with two heads, dropout, masks and dynamic chunks."""
    front_end = part("speechattn.stream.Serial.of", members={
        "spectrum": part("speechattn.audio.spectrum.LogMel", mels=40, low=20.0, floor=1e-6),
        "normal": part("speechattn.audio.normal.GlobalCMVN.unknown", dim=40),
    })  # fmt: skip
    encoder = part(
        "speechattn.encoder.Conformer", mels=40, dim=16, depth=2, inner=32, kernel=5, heads=2, dropout=0.1,
        span=part("speechattn.attention.Span", left=16, chunk=8),
        subsample=part("speechattn.encoder.layers.Subsample", mels=40, dim=16, factor=4, channels=4),
    )  # fmt: skip
    attention = part(
        "speechattn.decoder.attention.AttentionDecoder.usual", vocab=39, dim=16, heads=2, depth=1, inner=32
    )
    model = {
        "front_end": front_end, "encoder": encoder, "tokenizer": str(DIGITS),
        "heads": {"ctc": part("speechattn.decoder.ctc.CTC", dim=16, vocab=39), "attention": attention},
        "objectives": [
            part("speechattn.task.objectives.CTCObjective", weight=0.3),
            part("speechattn.task.objectives.AttentionObjective", weight=0.7),
        ],
        "augment": part("speechattn.audio.augment.SpecAugment", time_masks=2, frequency_width=8),
        "spans": part("speechattn.task.chunks.DynamicChunks", chunks=[4, 8], left=[None, 16]),
        "optimizer": part("torch.optim.AdamW", lr=0.003),
    }  # fmt: skip
    data = {
        "train": [str(train)], "valid": {} if valid is None else {"digits": str(valid)}, "max_seconds": 8.0,
        "longest_s": 6.0, "workers": 0,
    }  # fmt: skip
    quiet = {
        "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1, "logger": False,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    return {
        "model": part("speechattn.task.recognizer.Recognizer", **(model | changes)),
        "data": part("speechattn.data.corpus.Corpus", **data),
        "trainer": quiet,
    }


def written(path: Path, content: dict[str, Any]) -> Path:
    """As YAML."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


class Losses(Callback):
    """Writes what every batch was, and its loss, as lines of a file."""

    def __init__(self, path: str, kill_before: int | None = None) -> None:
        self.path, self.kill_before, self.ids = Path(path), kill_before, list[str]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        row = {"batch": pl_module.begun, "step": trainer.global_step, "loss": loss, "ids": batch.ids}
        rank = f".{trainer.global_rank}" if trainer.global_rank else ""
        with self.path.with_name(self.path.name + rank).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def losses(path: Path) -> list[dict[str, Any]]:
    """What `Losses` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
