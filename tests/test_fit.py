"""`speechattn fit`: recipes, what is wrong with them, resuming, precision, fine-tuning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training import DIGITS, corpus, losses, part, recipe, written

from speechattn.cli import main
from speechattn.task.checkpoint import read_checkpoint

TYPOS = {
    "top": ({"modle": {}}, "modle"),
    "task": ({"model": {"init_args": {"encodr": 1}}}, "encodr"),
    "encoder": ({"model": {"init_args": {"encoder": {"init_args": {"dimm": 8}}}}}, "dimm (did you mean dim?)"),
    "span": ({"model": {"init_args": {"encoder": {"init_args": {"span": {"init_args": {"chunkk": 8}}}}}}}, "chunkk"),
    "head": ({"model": {"init_args": {"heads": {"ctc": part("speechattn.decoder.ctc.CTC", dimm=8)}}}}, "dimm"),
    "objective": (
        {"model": {"init_args": {"objectives": [part("speechattn.task.objectives.CTCObjective", weigth=1)]}}},
        "weigth",
    ),
    "optimizer": ({"model": {"init_args": {"optimizer": {"init_args": {"lrr": 1}}}}}, "AdamW: unknown key lrr"),
    "data": ({"data": {"init_args": {"trian": []}}}, "trian (did you mean train?)"),
    "trainer": ({"trainer": {"max_stepz": 1}}, "max_stepz"),
    "checkpoint": ({"checkpoint": {"every": 1}}, "every"),
    "class": ({"model": {"init_args": {"encoder": {"class_path": "speechattn.encoder.Konformer"}}}}, "Konformer"),
}
WRONG = {
    "tokenizer": ({"model": {"init_args": {"tokenizer": "/nowhere"}}}, "/nowhere"),
    "vocabulary": (
        {"model": {"init_args": {"heads": {"ctc": part("speechattn.decoder.ctc.CTC", dim=16, vocab=40)}}}},
        "40 tokens",
    ),
    "width": ({"model": {"init_args": {"encoder": {"init_args": {"dim": 15}}}}}, "15"),
    "value": ({"model": {"init_args": {"encoder": {"init_args": {"dim": "wide"}}}}}, "model.encoder.dim"),
    "precision": ({"trainer": {"precision": "bf17"}}, "bf17"),
    "manifest": ({"data": {"init_args": {"train": ["/nowhere.jsonl.gz"]}}}, "/nowhere.jsonl.gz"),
    "objective": ({"model": {"init_args": {"objectives": []}}}, "objectives"),
    "spans": ({"model": {"init_args": {"spans": {"init_args": {"full": 2}}}}}, "DynamicChunks"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Manifests to train on and to validate with."""
    folder = tmp_path_factory.mktemp("sound")
    return corpus(folder / "train.jsonl.gz", times=2), corpus(folder / "valid.jsonl.gz", first=3)


@pytest.fixture
def fit(sound: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains the small recipe with changes to its sections, into the folder `name`; the exit code."""
    monkeypatch.chdir(tmp_path)

    def train(name: str, *options: str, steps: int = 4, more: Any = None, watch: bool = True, **trainer: Any) -> int:
        content = deepcopy(recipe(*sound))
        content["checkpoint"] = {"every_n_steps": 2}
        content["trainer"] |= {"default_root_dir": str(tmp_path / name), "max_steps": steps} | trainer
        if watch:
            log = part("training.Losses", path=str(tmp_path / f"{name}.jsonl"))
            content["trainer"]["callbacks"] = [log, *trainer.get("callbacks", [])]
        files = ["--config", str(written(tmp_path / f"{name}.yaml", content))]
        if more is not None:
            files += ["--config", str(written(tmp_path / f"{name}-more.yaml", more))]
        return main(["fit", *files, *options])

    return train


@pytest.mark.parametrize("name", [*TYPOS, *WRONG])
def test_a_mistake_is_named_in_one_line(fit: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, named = (TYPOS | WRONG)[name]
    assert fit("run", more=change, logger=False, enable_checkpointing=False) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("speechattn: ")
    assert named in last
    assert len(last) < 300


def test_a_typo_in_an_option_is_named(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--model.init_args.encoder.init_args.dimm=3", "--trainer.max_stepz=3", "--resum"):
        assert fit("run", option) == 2
        assert option.partition("=")[0].rpartition(".")[2].lstrip("-") in capsys.readouterr().err.splitlines()[-1]


def test_overlays_and_options_lie_over_the_recipe(fit: Any, tmp_path: Path) -> None:
    overlay = {"model": {"init_args": {"encoder": {"init_args": {"span": {"init_args": {"chunk": 4}}}}}}}
    assert fit("run", "--model.init_args.encoder.init_args.span.init_args.left=12", more=overlay, steps=1) == 0
    said = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["init_args"]
    assert {"left": 12, "chunk": 4}.items() <= said["encoder"]["init_args"]["span"]["init_args"].items()
    found = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["speechattn"]
    assert found["config"]["encoder"]["init_args"]["span"]["init_args"]["left"] == 12


def test_a_run_leaves_its_files_and_is_not_overwritten(fit: Any, tmp_path: Path, capsys: Any) -> None:
    assert fit("run", steps=4, logger=True, val_check_interval=2) == 0
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"step=2.ckpt", "step=4.ckpt", "last.ckpt"} < names
    assert any(name.startswith("best-step=2-wer=") for name in names)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve().name == "step=4.ckpt"
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    assert fit("run", steps=5) == 2
    assert "--resume" in capsys.readouterr().err


def same(a: Path, b: Path, *, twice: int = 0) -> None:
    """Each batch once, but for `twice` that were lost with a kill; the same utterances and losses."""
    whole, parts = losses(a), losses(b)
    assert [row["batch"] for row in whole] == [*range(1, len(whole) + 1)]
    assert sorted({row["batch"] for row in parts}) == [row["batch"] for row in whole]
    assert len(parts) == len(whole) + twice
    for row in parts:
        other = whole[row["batch"] - 1]
        assert (row["ids"], row["step"]) == (other["ids"], other["step"])
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-6)


VARIANTS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "averaged": {"callbacks": [part("lightning.pytorch.callbacks.EMAWeightAveraging", decay=0.9)]},
    "half": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("kind", ["plain", *(pytest.param(k, marks=pytest.mark.slow) for k in [*VARIANTS][1:])])
def test_a_run_in_two_parts_is_one_run(fit: Any, tmp_path: Path, kind: str) -> None:
    assert fit("whole", steps=7, val_check_interval=3, **VARIANTS[kind]) == 0
    assert fit("parts", steps=3, val_check_interval=3, **VARIANTS[kind]) == 0
    assert fit("parts", "--resume", steps=7, val_check_interval=3, **VARIANTS[kind]) == 0
    same(tmp_path / "whole.jsonl", tmp_path / "parts.jsonl")


@pytest.mark.slow
def test_a_run_that_was_killed_in_mid_epoch_goes_on_as_if_not(fit: Any, tmp_path: Path) -> None:
    assert fit("whole", steps=12) == 0
    assert fit("killed", steps=1) == 0  # writes the recipe; its run is thrown away
    for path in sorted((tmp_path / "killed").rglob("*"), reverse=True):
        path.unlink() if not path.is_dir() else path.rmdir()
    (tmp_path / "killed.jsonl").unlink()
    content = yaml.safe_load((tmp_path / "killed.yaml").read_text())
    content["trainer"]["max_steps"] = 12
    content["trainer"]["callbacks"][0]["init_args"]["kill_before"] = 5
    killed = written(tmp_path / "killed.yaml", content)
    done = subprocess.run(
        [sys.executable, "-m", "speechattn", "fit", "--config", str(killed)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(losses(tmp_path / "killed.jsonl")) == 5
    assert fit("killed", "--resume", steps=12) == 0
    same(tmp_path / "whole.jsonl", tmp_path / "killed.jsonl", twice=1)


def test_two_processes_do_what_one_does(fit: Any, tmp_path: Path) -> None:
    dry = {"model": {"init_args": {
        "augment": None, "encoder": {"init_args": {"dropout": 0.0}},
        "heads": {"ctc": part("speechattn.decoder.ctc.CTC", dim=16, vocab=39)},
        "objectives": [part("speechattn.task.objectives.CTCObjective")],
        "optimizer": part("torch.optim.SGD", lr=0.01),  # Adam makes rounding large where there is no gradient
    }}, "data": {"init_args": {"shares": 2}}}  # fmt: skip
    assert fit("one", steps=6, more=dry, val_check_interval=3) == 0
    assert fit("two", steps=6, more=dry, val_check_interval=3, devices=2, strategy="ddp_fork") == 0
    one, two, other = (losses(tmp_path / name) for name in ("one.jsonl", "two.jsonl", "two.jsonl.1"))
    for a, b, c in zip(one, two, other, strict=True):
        assert sorted(a["ids"]) == sorted(b["ids"] + c["ids"])
        assert b["loss"] == c["loss"] == pytest.approx(a["loss"], rel=1e-5)
    scores = [read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two")]
    assert scores[0]["speechattn"]["score"] == pytest.approx(scores[1]["speechattn"]["score"])
    for name, tensor in scores[0]["state_dict"].items():
        assert torch.allclose(tensor, scores[1]["state_dict"][name], atol=1e-4), name


def test_mixed_precision_trains_with_features_in_float32(fit: Any, tmp_path: Path) -> None:
    assert fit("exact", steps=3) == 0
    assert fit("mixed", steps=3, precision="bf16-mixed") == 0
    exact, mixed = (losses(tmp_path / f"{name}.jsonl") for name in ("exact", "mixed"))
    assert [row["loss"] for row in mixed] != [row["loss"] for row in exact]
    for a, b in zip(exact, mixed, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)


@pytest.mark.slow
def test_a_compiled_encoder_says_the_same(fit: Any, tmp_path: Path) -> None:
    dry = {"model": {"init_args": {"augment": None, "encoder": {"init_args": {"dropout": 0.0}}}}}
    assert fit("plain", steps=3, more=dry, val_check_interval=3) == 0
    assert fit("compiled", "--model.init_args.compile=eager", steps=3, more=dry, val_check_interval=3) == 0
    plain, compiled = (losses(tmp_path / f"{name}.jsonl") for name in ("plain", "compiled"))
    for a, b in zip(plain, compiled, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


def test_one_batch_of_everything(fit: Any, tmp_path: Path) -> None:
    assert fit("run", fast_dev_run=True, logger=True) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_learning_rate_is_found_and_used(fit: Any, tmp_path: Path) -> None:
    finder = part("lightning.pytorch.callbacks.LearningRateFinder", num_training_steps=20, early_stop_threshold=None)
    assert fit("run", steps=2, callbacks=[finder]) == 0
    group = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"][0]
    assert group["lr"] not in (0.003, None)


def test_fine_tuning_needs_no_recipe(
    sound: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = [
        "--train", str(sound[0]), "--valid", str(sound[1]), "--trainer.max_steps=2", "--trainer.accelerator=cpu",
        "--data.init_args.workers=0", "--data.init_args.max_seconds=20", "--trainer.logger=false",
        "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0", "--trainer.val_check_interval=1",
    ]  # fmt: skip
    assert main(["fit", "--init-from", str(DIGITS), *usual]) == 0
    run = tmp_path / "runs" / "digits"
    about = read_checkpoint(run / "checkpoints" / "last.ckpt")["speechattn"]
    assert about["score"] == 0  # as it was before
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), "mine"]) == 0
    capsys.readouterr()
    assert main(["transcribe", "--model", "mine", str(DIGITS / "00.flac")]) == 0
    assert capsys.readouterr().out.strip() == "one two three four five six"


def test_heads_of_another_vocabulary_start_anew_and_are_named(
    sound: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pieces = [line.split()[0] for line in (DIGITS / "tokens.txt").read_text().splitlines()]
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokens.txt").write_text("\n".join([*pieces[:-1], "x1", pieces[-1]]) + "\n")
    with pytest.warns(UserWarning, match=r"trained from the beginning: heads.ctc, heads.attention, heads.transducer"):
        assert main([
            "fit", "--init-from", str(DIGITS), "--tokenizer", "tokens", "--train", str(sound[0]),
            "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--data.init_args.workers=0",
            "--data.init_args.max_seconds=20", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
        ]) == 0  # fmt: skip


def test_help_is_short_and_says_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 40
    assert all(option in said for option in ("--config", "--init-from", "--resume", "--trainer.precision"))
