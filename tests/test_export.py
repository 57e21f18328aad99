"""Checkpoints: written, averaged, exported; models of one's own classes."""

from __future__ import annotations

import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from training import DIGITS, LINES, corpus, part, recipe, written

from speechattn.cli import main
from speechattn.errors import InputError
from speechattn.model import load_model
from speechattn.task.callbacks import AtomicIO, newest
from speechattn.task.checkpoint import average, notation, read_checkpoint, resized, several

DOCS = Path(__file__).parents[1] / "docs" / "plugins.md"


def test_an_average_is_the_mean_and_whole_numbers_are_the_last() -> None:
    first = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    second = {"w": torch.tensor([3.0, 2.5]), "n": torch.tensor(5)}
    third = {"w": torch.tensor([5.0, 1.5]), "n": torch.tensor(4)}
    found = average([first, second, third])
    assert found["w"].tolist() == [3.0, 2.0]
    assert found["n"].item() == 4
    with pytest.raises(InputError, match="not of one model"):
        average([first, {"w": torch.zeros(3), "n": torch.tensor(0)}])
    with pytest.raises(InputError, match="not of one model"):
        average([first, {"w": torch.zeros(2)}])


def test_a_mean_of_many_does_not_lose_small_changes() -> None:
    big = {"w": torch.tensor([2.0**24])}
    found = average([big, {"w": torch.tensor([1.0])}, {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}])
    assert found["w"].item() == 2.0**22 + 1


def checkpoint(path: Path, **about: Any) -> Path:
    """One with nothing but what it says of itself."""
    torch.save({"speechattn": {"format": 1, "config": None, "mode": "min", **about}, "state_dict": {}}, path)
    return path


def test_the_last_and_the_best_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (900, 1000, 20):
        checkpoint(folder / f"step={step}.ckpt")
    for step, score in ((900, 0.3), (1000, 0.1), (20, 0.2)):
        checkpoint(folder / f"best-step={step}-wer={score}.ckpt", score=score)
    assert [path.stem for path in several(tmp_path, "last:2")] == ["step=900", "step=1000"]
    assert [path.stem[:14] for path in several(folder, "best:2")] == ["best-step=20-w", "best-step=1000"]
    for wrong, said in (("best:4", "3 checkpoints"), ("best", "last:N"), ("worst:1", "last:N"), ("last:0", "last:N")):
        with pytest.raises(InputError, match=said):
            several(tmp_path, wrong)
    for path in folder.glob("best*"):  # where more is better
        checkpoint(path, score=read_checkpoint(path)["speechattn"]["score"], mode="max")
    assert "step=900" in several(folder, "best:1")[0].stem


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "step=1.ckpt"
    AtomicIO().save_checkpoint({"x": torch.ones(3)}, place)

    def killed(content: object, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        AtomicIO().save_checkpoint({"x": torch.zeros(3)}, place)
    assert torch.load(place, weights_only=True)["x"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=1.ckpt"]


def test_there_is_always_a_newest(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert newest(tmp_path) is None
    folder.mkdir()
    checkpoint(folder / "step=9.ckpt")
    checkpoint(folder / "step=10.ckpt")
    (folder / "last.ckpt").symlink_to("step=8.ckpt")  # was removed; the link is about to be
    assert newest(tmp_path) == folder / "step=10.ckpt"
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").symlink_to("step=9.ckpt")
    assert newest(tmp_path) == folder / "last.ckpt"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.ckpt").write_text("no")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save({"code": Path("runs code")}, tmp_path / "code.ckpt")
    for name in ("text", "other", "code", "missing"):
        assert main(["export", str(tmp_path / f"{name}.ckpt"), str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert name in said
        assert len(said.splitlines()) == 1
    assert main(["export", str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]) == 2
    assert "folder to write" in capsys.readouterr().err
    assert main(["export", str(checkpoint(tmp_path / "c.ckpt")), str(tmp_path / "out")]) == 2
    assert "Python objects" in capsys.readouterr().err
    other = str(checkpoint(tmp_path / "d.ckpt", config={"network": {}}))
    assert main(["export", "--weights", "int8", other, str(tmp_path / "out")]) == 2
    assert "--weights: for recognisers" in capsys.readouterr().err


def test_a_folder_is_said_as_a_recipe_says_it() -> None:
    spec = {
        "class_path": "speechattn.stream.Serial",
        "init_args": {"a": {"class_path": "X", "init_args": {"vocab": 3}}},
    }
    assert notation(spec)["class_path"] == "speechattn.stream.Serial.of"
    assert notation(spec)["init_args"] == {"members": spec["init_args"]}
    assert resized([spec], 3, 5)[0]["init_args"]["a"]["init_args"] == {"vocab": 5}
    assert resized(spec, 4, 5) == spec


def run(folder: Path, content: dict[str, Any], *options: str) -> Path:
    """Train; the last checkpoint."""
    path = written(folder / "recipe.yaml", content)
    assert main(["fit", "--config", str(path), f"--trainer.default_root_dir={folder / 'run'}", *options]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


def test_averaged_weights_are_exported_unless_the_last_are_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(corpus(tmp_path / "train.jsonl.gz"), None)
    ema = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    content["trainer"] |= {"max_steps": 3, "callbacks": [ema]}
    last = run(tmp_path, content)
    for option, key in (("--ema", "state_dict"), ("--no-ema", "current_model_state")):
        assert main(["export", option, str(last), str(tmp_path / option)]) == 0
        want = read_checkpoint(last)[key]["model.heads.ctc.head.weight"]
        assert torch.equal(load_model(tmp_path / option).heads["ctc"].head.weight, want)
    capsys.readouterr()
    assert main(["export", "--weights", "int8", str(last), str(tmp_path / "small")]) == 0
    assert "heads ctc" in capsys.readouterr().out
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("--ema", "small")]
    assert sizes[1] < 0.6 * sizes[0]  # tensors are few and small: half of it are names
    whole, small = (load_model(tmp_path / name).heads["ctc"].head.weight for name in ("--ema", "small"))
    assert 0 < (whole - small).abs().max() <= whole.abs().max() / 254 * 1.001
    states = read_checkpoint(last)
    name = "model.heads.ctc.head.weight"
    assert not torch.equal(states["state_dict"][name], states["current_model_state"][name])
    normal = "model.front_end.normal.mean"
    assert torch.equal(states["state_dict"][normal], states["current_model_state"][normal])
    assert states["state_dict"][normal].abs().sum() > 1


TRANSDUCER = part(
    "speechattn.decoder.transducer.Transducer",
    predictor=part("speechattn.decoder.predictor.LSTMPredictor", vocab=39, dim=48),
    joint=part("speechattn.decoder.transducer.Joint", frames=64, labels=48, inner=64, vocab=39),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["joint", "transducer"])
def test_a_toy_is_learned_by_heart_and_heard_live_as_offline(tmp_path: Path, kind: str) -> None:
    manifest = corpus(tmp_path / "train.jsonl.gz", first=1 if kind == "transducer" else 2)
    content = deepcopy(recipe(manifest, manifest, spans=None, augment=None))
    made = content["model"]["init_args"]
    sizes = {"dim": 64, "inner": 128, "heads": 4, "dropout": 0.0}
    made["encoder"]["init_args"] |= sizes
    made["encoder"]["init_args"]["subsample"]["init_args"] |= {"dim": 64, "channels": 16}
    made["optimizer"]["init_args"]["lr"] = 0.003
    if kind == "transducer":
        made["heads"] = {"transducer": TRANSDUCER}
        made["objectives"] = [{"class_path": "speechattn.task.objectives.TransducerObjective"}]
    else:
        made["heads"]["ctc"]["init_args"]["dim"] = 64
        made["heads"]["attention"]["init_args"] |= {"dim": 64, "inner": 128, "heads": 4, "dropout": 0.0}
    content["trainer"] |= {
        "max_epochs": 500, "check_val_every_n_epoch": 25, "gradient_clip_val": 1.0,
        "callbacks": [{
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": "valid/wer_streamed", "stopping_threshold": 0.001, "patience": 100},
        }],
    }  # fmt: skip
    last = run(tmp_path, content)
    found = torch.load(last, weights_only=True)
    assert found["speechattn"]["score"] == 0
    assert main(["export", str(last), str(tmp_path / "out")]) == 0
    model = load_model(tmp_path / "out")
    for line in LINES[: 1 if kind == "transducer" else 2]:
        x, _ = soundfile.read(DIGITS / line["file"], dtype="float32")
        assert model.transcribe(x, search=model.search(beam_size=1)).text.strip() == line["text"]


def test_a_class_of_ones_own_is_checked_trained_exported_and_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = DOCS.read_text(encoding="utf-8")
    source, check, listen = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (overlay,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_encoder.py").write_text(source)
    sys.path.append(str(tmp_path))
    exec(compile(check, "docs/plugins.md", "exec"), {})
    content = recipe(corpus(tmp_path / "train.jsonl.gz"), None)
    content["trainer"]["max_steps"] = 1
    encoder = content["model"]["init_args"]["encoder"]
    del encoder["init_args"]
    encoder["class_path"] = "my_encoder.MyEncoder"
    content["model"]["init_args"]["encoder"] |= yaml.safe_load(overlay)["model"]["init_args"]["encoder"]
    written(tmp_path / "recipe.yaml", content)
    (tmp_path / "my_encoder.yaml").write_text(overlay)
    (tmp_path / "talk.flac").write_bytes((DIGITS / "00.flac").read_bytes())
    for line in commands.splitlines():
        assert main(line.split()[1:]) == 0
    assert main(["export", "runs/mine/checkpoints/last.ckpt", "other"]) == 2
    assert "my_encoder.MyEncoder is no module of speechattn" in capsys.readouterr().err
    exec(compile(listen, "docs/plugins.md", "exec"), {})
    sys.modules.pop("my_encoder")
