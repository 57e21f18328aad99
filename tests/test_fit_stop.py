"""`speechattn fit` that ends early: by a signal, by a loss that is no number, by what cannot be trained on."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from training import DIGITS, LINES, corpus, losses, part, recipe, written

from speechattn.attention.pattern import Span
from speechattn.attention.self_attention import Spanned
from speechattn.cli import main
from speechattn.data.corpus import Corpus
from speechattn.data.loader import SILENCE
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.model import load_model
from speechattn.task.base import Task
from speechattn.task.checkpoint import read_checkpoint

KEPT: list[LightningModule] = []


class Signals(Callback):
    """Sends a signal to its own process in batch `at` of the training, or in the validation behind it."""

    def __init__(self, at: int, kind: str, validating: bool = False) -> None:
        self.at, self.kind, self.validating = at, getattr(signal, kind), validating

    def send(self, trainer: Trainer) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
            os.kill(os.getpid(), self.kind)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if not self.validating:
            self.send(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.validating:
            self.send(trainer)


class Watched(Task):
    """With no model at all."""


class Keeper(Callback):
    """Keeps the task."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        KEPT[:] = [pl_module]


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Trains the small recipe, with changes, into the folder `name`; the exit code."""
    monkeypatch.chdir(tmp_path)
    train, valid = corpus(tmp_path / "train.jsonl.gz", first=8), corpus(tmp_path / "valid.jsonl.gz", first=3)

    def run(name: str, *options: str, more: Any = None, callbacks: Any = (), steps: int = 3, **trainer: Any) -> int:
        content = deepcopy(recipe(train, valid))
        log = part("training.Losses", path=str(tmp_path / f"{name}.jsonl"))
        settings = {"default_root_dir": str(tmp_path / name), "max_steps": steps, "callbacks": [log, *callbacks]}
        content["trainer"] |= settings | trainer
        files = ["--config", str(written(tmp_path / f"{name}.yaml", content))]
        if more is not None:
            files += ["--config", str(written(tmp_path / f"{name}-more.yaml", more))]
        return main(["fit", *files, *options])

    return run


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


EMA = part("lightning.pytorch.callbacks.EMAWeightAveraging", decay=0.5)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("kind", "validating"), [("SIGTERM", False), ("SIGTERM", True), ("SIGINT", False)])
def test_a_signal_saves_and_resuming_is_exact(
    fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, validating: bool
) -> None:
    ema = [EMA] if validating else []
    usual = {"steps": 4, "val_check_interval": 2, "more": {"data": {"init_args": {"max_utterances": 1}}}}
    assert fit("whole", callbacks=ema, **usual) == 0
    stop = part("test_fit_stop.Signals", at=1, kind=kind, validating=validating)
    capsys.readouterr()
    assert fit("parts", callbacks=[stop, *ema], **usual) == 2
    said = {"SIGTERM": "stopped by SIGTERM", "SIGINT": "interrupted"}[kind]
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1] == f"speechattn: {said}: --resume goes on after step 2"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert fit("parts", "--resume", callbacks=ema, **usual) == 0
    rows = [losses(tmp_path / f"{name}.jsonl") for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    states = [read_checkpoint(last(tmp_path / name)) for name in ("whole", "parts")]
    for key in ("state_dict", "current_model_state") if ema else ("state_dict",):
        assert all(torch.equal(tensor, states[1][key][name]) for name, tensor in states[0][key].items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SIGTERM", "SIGINT"])
def test_a_signal_to_all_processes_of_a_job_leaves_a_checkpoint(fit: Any, tmp_path: Path, kind: str) -> None:
    assert fit("run", fast_dev_run=True) == 0
    (tmp_path / "run.jsonl").unlink()
    command = [
        sys.executable, "-m", "speechattn", "fit", "--config", "run.yaml", "--trainer.fast_dev_run=false",
        "--trainer.max_steps=100000", "--data.init_args.workers=1",
    ]  # fmt: skip
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    try:
        began = time.monotonic()
        while not (log := tmp_path / "run.jsonl").exists() or len(losses(log)) < 7:
            assert child.poll() is None
            assert time.monotonic() - began < 200
            time.sleep(0.05)
        os.killpg(child.pid, getattr(signal, kind))
        _, said = child.communicate(timeout=100)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 2, said[-2000:]
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("speechattn: ")
    assert read_checkpoint(last(tmp_path / "run"))["speechattn"]["batches"] == len(losses(log))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_loss_that_is_no_number_stops_before_it_is_saved(fit: Any, tmp_path: Path, capsys: Any) -> None:
    wild = {"model": {"init_args": {"optimizer": {"init_args": {"lr": 1e30}}}}, "checkpoint": {"every_n_steps": 1}}
    assert fit("run", more=wild, steps=9) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    row = losses(tmp_path / "run.jsonl")
    assert len(row) == 1  # the next one had none
    assert "the loss is nan near step 1" in said
    assert "-0" in said.partition("batch of")[2]  # ids
    saved = read_checkpoint(last(tmp_path / "run"))
    assert (saved["global_step"], saved["speechattn"]["batches"]) == (1, 1)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_that_was_not_looked_at_yet_is_not_saved(scaled: bool) -> None:
    task = Watched(optimizer=torch.optim.AdamW, scheduler=None, seed=0)
    plugin = SimpleNamespace(scaler=object()) if scaled else SimpleNamespace()
    task.trainer = SimpleNamespace(precision_plugin=plugin, global_step=7)  # type: ignore[assignment]
    task.recent = [(torch.tensor(1.0), ["a"]), (torch.tensor(float("nan")), ["b", "c"])]
    if scaled:  # such a step is left out, and the scale sinks
        task.look()
        task.recent = [(torch.tensor(float("inf")), ["b", "c"])] * 10
    with pytest.raises(InputError, match=r"near step 7 \(batch of b, c\)"):
        task.on_save_checkpoint({})


MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "task": ({"model": {"init_args": {"encodr": {}}}}, {}, "unknown key model.init_args.encodr"),
    "encoder": ({"model": {"init_args": {"encoder": {"init_args": {"dimm": {}}}}}}, {}, "encoder.init_args.dimm"),
    "data": ({"data": {"max_sec": {}}}, {}, "unknown key data.max_sec"),
    "trainer": ({"trainer": {"max_stepz": {}}}, {}, "unknown key trainer.max_stepz"),
    "list": (
        {"model": {"init_args": {"objectives": [
            {"class_path": "speechattn.task.objectives.CTCObjective", "init_args": {"wait": {}}},
        ]}}}, {}, "unknown key model.init_args.objectives.init_args.wait",
    ),
    "null": ({"trainer": None}, {}, "trainer is not a mapping"),
    "rate": ({"data": {"init_args": {"rate": 8000}}}, {}, "data.rate 8000: the model hears 16000"),
    "workers": ({"data": {"init_args": {"workers": -1}}}, {}, "Corpus: workers -1"),
    "seed": ({"model": {"init_args": {"seed": -1}}}, {}, "seed -1: wanted 0 or more"),
    "search": ({"model": {"init_args": {"search": "loud"}}}, {}, "search loud"),
    "beam": ({"model": {"init_args": {"beam_size": 0}}}, {}, "beam size 0"),
    "lr": ({"model": {"init_args": {"optimizer": {"init_args": {"lr": -1}}}}}, {}, "Invalid learning rate: -1"),
    "compile": ({"model": {"init_args": {"compile": "loud"}}}, {}, "compile: Invalid backend: 'loud'"),
    "interval": (None, {"val_check_interval": 1000}, "val_check_interval"),
    "share": (None, {"limit_val_batches": 0.01}, "0.01 of the `val_dataloader`"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MISTAKES])
def test_a_mistake_is_found_before_the_training_begins(fit: Any, name: str, tmp_path: Path, capsys: Any) -> None:
    more, trainer, said = MISTAKES[name]
    assert fit("run", more=more, **trainer) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("speechattn: ")
    assert said in line
    assert not (tmp_path / "run.jsonl").exists()


def test_what_cannot_be_resumed_is_said(fit: Any, tmp_path: Path, capsys: Any) -> None:
    assert fit("run", steps=1) == 0
    place = last(tmp_path / "run").resolve()
    good = torch.load(place, weights_only=True)
    other = {
        "of another model": {"model": {"init_args": {"encoder": {"init_args": {"inner": 64}}}}},
        "another optimizer": {"model": {"init_args": {"optimizer": part("torch.optim.SGD", lr=0.1)}}},
    }
    for said, more in other.items():
        assert fit("run", "--resume", more=more, steps=2) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
    newer = {**good, "speechattn": good["speechattn"] | {"format": 2}}
    for content, said in ((newer, "format 2"), ({"state_dict": {}}, "not a checkpoint of")):
        torch.save(content, place)
        assert fit("run", "--resume", steps=2) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
    place.write_bytes(b"half")
    assert fit("run", "--resume", steps=2) == 2
    assert "cannot be read" in capsys.readouterr().err.strip().splitlines()[-1].replace("that can be", "cannot be")
    torch.save(good, place)
    rate = part("speechattn.task.schedule.InverseRoot", warmup=3)
    assert fit("run", "--resume", more={"model": {"init_args": {"scheduler": rate}}}, steps=2) == 0


def changed(path: Path, **said: Any) -> Path:
    """One utterance that says something else; a new name."""
    row = json.loads(gzip.decompress(corpus(path, first=1).read_bytes()).decode())
    row["id"] = path.name.split(".")[0]
    row["supervisions"][0] |= said
    path.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
    return path


@pytest.mark.filterwarnings("ignore:1 utterances could not be loaded")
def test_what_the_tokenizer_cannot_spell_is_left_out_and_listed(fit: Any, tmp_path: Path, capsys: Any) -> None:
    odd, valid = changed(tmp_path / "odd.jsonl.gz", text="Ünspelt"), str(tmp_path / "valid.jsonl.gz")
    changes = {"train": [str(tmp_path / "train.jsonl.gz"), str(odd)], "most_broken": 0.5, "valid": {"v": valid}}
    assert fit("run", more={"data": {"init_args": changes}}, max_epochs=1, steps=-1, logger=True) == 0
    heard = [name for row in losses(tmp_path / "run.jsonl") for name in row["ids"]]
    assert sorted({*heard} - {SILENCE}) == sorted(f"{line['file'][:2]}-0" for line in LINES[:8])
    assert "odd\t'Ü' of" in (tmp_path / "run" / "skipped.tsv").read_text()
    assert fit("other", more={"data": {"init_args": {"valid": {"v": str(odd)}}}}) == 2
    assert "1 of 1 utterances cannot be judged: odd ('Ü'" in capsys.readouterr().err
    assert not (tmp_path / "other.jsonl").exists()
    assert fit("translator", more={"model": {"class_path": "speechattn.task.translator.Translator"}}) == 2
    assert "has no translation" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "translator.jsonl").exists()


def test_a_translator_bears_a_batch_of_which_nothing_can_be_loaded(tmp_path: Path) -> None:
    row = json.loads(gzip.decompress(corpus(tmp_path / "a.jsonl.gz", first=1).read_bytes()).decode())
    row["recording"]["sources"][0]["source"] = "/nowhere.flac"
    (tmp_path / "gone.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.warns(UserWarning, match=r"could not be loaded: 00-0 \(.*nowhere\.flac"):
        (batch,) = Corpus([tmp_path / "gone.jsonl"], workers=0, most_broken=1.0).train_dataloader()
    assert (batch.ids, batch.translations) == ((SILENCE,), ("",))


def test_manifests_of_one_name_and_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="manifests of the same name"):
        Corpus(valid=["a/cuts.jsonl.gz", "b/cuts.jsonl.gz"])
    with pytest.raises(InputError, match="there twice in `train`"):
        Corpus(["a/cuts.jsonl.gz", "a/cuts.jsonl.gz"])
    (empty := tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"no utterance in .*empty\.jsonl"):
        Corpus([empty]).train_dataloader()
    with pytest.raises(InputError, match=r"empty\.jsonl: no utterance in it"):
        Corpus(valid=[empty]).val_dataloader()
    whole = bytearray(corpus(tmp_path / "broken.jsonl.gz").read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff" * 40
    (tmp_path / "broken.jsonl.gz").write_bytes(whole)
    (tmp_path / "number.jsonl").write_text('{"id": 5, "type": "MonoCut", "duration": 1, "supervisions": [{}]}\n')
    for name in ("broken.jsonl.gz", "number.jsonl"):
        with pytest.raises(InputError, match=name):
            Corpus([tmp_path / name]).train_dataloader()


def test_what_was_trained_is_what_is_exported(fit: Any, tmp_path: Path, capsys: Any) -> None:
    spans = {"model": {"init_args": {"spans": {"init_args": {"full": 1.0}}}}}
    assert fit("run", more=spans, steps=2, callbacks=[part("test_fit_stop.Keeper")], limit_val_batches=0) == 0
    (task,) = KEPT
    assert main(["export", str(last(tmp_path / "run")), str(tmp_path / "out")]) == 0
    model, x = load_model(tmp_path / "out"), torch.from_numpy(soundfile.read(DIGITS / "00.flac", dtype="float32")[0])
    sound = Frames(x[None], torch.ones(1, len(x), dtype=torch.bool))
    with torch.no_grad():
        theirs = model.encoder(model.front_end(sound)).values
        mine: Any = task.eval()
        mine.augment = None
        assert torch.equal(mine.hear(sound).frames.values, theirs)
    spans_of = {m.span for m in model.encoder.modules() if isinstance(m, Spanned)}
    assert spans_of == {Span(left=16, chunk=8)}
    capsys.readouterr()
    assert main(["export", str(last(tmp_path / "run")), str(tmp_path / "run")]) == 2
    assert "the folder of a training" in capsys.readouterr().err
