"""Frames of an encoder that is not trained: computed once, and then what the model says."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from training import DIGITS, LINES, corpus, part, recipe, written

pytest.importorskip("lhotse")

from speechattn.attention import Span
from speechattn.attention.self_attention import set_span
from speechattn.data import loader
from speechattn.data.batch import Batch, collate
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.model import Recognizer, load_model
from speechattn.task.checkpoint import read_checkpoint
from speechattn.task.checkpoint import recipe as further
from speechattn.task.command import Fit
from speechattn.task.kept import Kept, named


def batch(*names: str, seconds: tuple[float, ...] = (0.9, 0.5)) -> Batch:
    """Noise, another for each name."""
    sounds = [
        (0.1 * np.random.default_rng(ord(name[0])).standard_normal(round(16000 * s))).astype(np.float32)
        for name, s in zip(names, seconds, strict=False)
    ]
    none = [None] * len(names)
    return collate(sounds, texts=["one"] * len(names), translations=none, ids=list(names))


@pytest.fixture
def model() -> Recognizer:
    """The model of the tests, and how often it was asked."""
    found = load_model(DIGITS)
    assert isinstance(found, Recognizer)
    return found


def test_frames_are_those_of_a_listener_and_are_asked_for_once(
    tmp_path: Path, model: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()
    forward = type(model.listening).forward

    def counted(self: Any, x: Any) -> Any:
        asked.append(len(x.mask))
        return forward(self, x)

    monkeypatch.setattr(type(model.listening), "forward", counted)
    kept, both = Kept(tmp_path / "frames", model), batch("a", "b")
    first = kept(both).frames
    right = forward(model.listening, both.sound)
    for row in range(2):
        mine, theirs = (frames.values[row, frames.mask[row]] for frames in (first, right))
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)
        assert len(mine) > 8
    assert not first.values[1, int(first.mask[1].sum()) :].any()
    times = len(asked)
    again = Kept(tmp_path / "frames", model)(batch("b#2", "a", seconds=(0.5, 0.9))).frames
    assert len(asked) == times, "another order, and the second time in an epoch, are the same utterances"
    assert (again.values[1] == first.values[0]).all()
    assert (again.mask.sum(1) == first.mask.sum(1).flip(0)).all()
    kept(batch("c", "a", seconds=(0.7, 0.9)))
    assert len(asked) > times


def test_frames_of_another_encoder_are_refused(tmp_path: Path, model: Recognizer) -> None:
    Kept(tmp_path, model)(batch("a"))
    assert not list(tmp_path.glob("*.part"))
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(1.01)
    with pytest.raises(InputError, match="another encoder"):
        Kept(tmp_path, model)(batch("a"))


def test_what_changes_from_epoch_to_epoch_is_refused(tmp_path: Path, model: Recognizer) -> None:
    kept = Kept(tmp_path, model)
    kept.fit(SimpleNamespace(augment=(), join=None))
    kept.fit(None)
    for data in (SimpleNamespace(augment=("speed",), join=None), SimpleNamespace(augment=(), join="some")):
        with pytest.raises(InputError, match=r"data\.augment or data\.join"):
            kept.fit(data)


def test_another_span_makes_another_encoder(tmp_path: Path, model: Recognizer) -> None:
    Kept(tmp_path / "frames", model)(batch("a"))
    Kept(tmp_path / "frames", model)(batch("b"))
    set_span(model.encoder, Span(8, 4))
    with pytest.raises(InputError, match="frames of another encoder"):
        Kept(tmp_path / "frames", model)(batch("c"))


def frozen(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A recipe whose encoder and CTC stay as they are."""
    more = {"frozen": ["encoder", "ctc"], "keep": str(tmp_path / "frames"), "spans": None, "augment": None}
    return recipe(corpus(tmp_path / "train.jsonl.gz", first=6), None, **(more | changes))


def fit(tmp_path: Path, content: dict[str, Any]) -> Path:
    """The checkpoint of a training of three steps."""
    content["trainer"] |= {"max_steps": 3, "default_root_dir": str(tmp_path / "run")}
    Fit.run(["--config", str(written(tmp_path / "recipe.yaml", content))])
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


@pytest.mark.filterwarnings("ignore:no objective trains the head transducer")
def test_a_training_leaves_frozen_parts_as_they_are(tmp_path: Path) -> None:
    content = frozen(tmp_path)
    content["init_from"] = str(DIGITS)
    start = dict(load_model(DIGITS).state_dict())
    content["model"]["init_args"] |= read(DIGITS)
    after = read_checkpoint(fit(tmp_path, content))["state_dict"]
    assert len(list((tmp_path / "frames").glob("*.npy"))) == 6
    moved = {name.removeprefix("model.") for name, x in after.items() if not same(start, name, x)}
    assert moved
    assert all(name.startswith("heads.attention.") for name in moved)


@pytest.mark.filterwarnings("ignore:no objective trains the head transducer")
def test_what_is_frozen_does_nothing_at_random(tmp_path: Path) -> None:
    content = frozen(tmp_path)
    content["init_from"] = str(DIGITS)
    parts = read(DIGITS)
    parts["encoder"]["init_args"]["dropout"] = 0.5
    content["model"]["init_args"] |= parts
    fit(tmp_path, content)
    model, line = load_model(DIGITS), LINES[0]
    samples, _ = soundfile.read(DIGITS / line["file"], dtype="float32")
    with torch.no_grad():
        x = model.listening(Frames(torch.from_numpy(samples)[None], torch.ones(1, len(samples), dtype=torch.bool)))
    kept = torch.from_numpy(np.load(tmp_path / "frames" / named(f"{line['file'][:2]}-0", False))).float()
    assert torch.allclose(kept, x.values[0, x.mask[0]], atol=0.02)


@pytest.mark.filterwarnings("ignore:no objective trains the head transducer")
def test_a_sound_whose_frames_are_kept_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = frozen(tmp_path)
    content["init_from"] = str(DIGITS)
    content["model"]["init_args"] |= read(DIGITS)
    content["data"]["init_args"] |= {"workers": 0}
    read_files: list[str] = []
    load = loader.load_sound

    def watched(utterance: Any, rate: int) -> Any:
        read_files.append(utterance.id)
        return load(utterance, rate)

    monkeypatch.setattr(loader, "load_sound", watched)
    first = read_checkpoint(fit(tmp_path, content))["state_dict"]
    assert len({*read_files}) == len(read_files) == 6
    before = {path: path.read_bytes() for path in (tmp_path / "frames").glob("*.npy")}
    one = tmp_path / "frames" / named(read_files[0], False)
    one.unlink()
    del read_files[1:]
    rmtree(tmp_path / "run")
    second = read_checkpoint(fit(tmp_path, content))["state_dict"]
    assert read_files[1:] == read_files[:1]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {path: path.read_bytes() for path in before if path != one} == {p: b for p, b in before.items() if p != one}
    found, wanted = (torch.from_numpy(np.load(BytesIO(x))).float() for x in (one.read_bytes(), before[one]))
    assert torch.allclose(found, wanted, atol=5e-3)


def read(folder: Path) -> dict[str, Any]:
    """The parts of a model folder, as a recipe says them."""
    model = further(folder)["model"]["init_args"]
    return {name: model[name] for name in ("front_end", "encoder", "heads", "sample_rate") if name in model}


def same(start: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> bool:
    """The tensor did not change."""
    return bool((start[name.removeprefix("model.")] == x).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen": ["ctc"]}, r"keep: not with an encoder that is trained"),
        ({"spans": part("speechattn.task.chunks.DynamicChunks")}, "keep: not with spans"),
        ({"augment": part("speechattn.audio.augment.SpecAugment")}, "keep: not with augment"),
        ({"frozen": ["encoder", "heart"]}, "frozen heart: there are encoder, ctc, attention"),
    ],
)
def test_a_recipe_that_cannot_be_kept_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(tmp_path, frozen(tmp_path, **changes))
