"""The attention family in recipes: trained a step or two, exported, loaded, and listened to live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from training import DIGITS, corpus, part, recipe, written

from speechattn import Session, load_model
from speechattn.cli import main
from speechattn.model import Recognizer

DECODER = "speechattn.decoder.attention.AttentionDecoder.usual"
SMALL: dict[str, Any] = {"vocab": 39, "dim": 16, "heads": 2, "depth": 1, "inner": 32}
MONOTONIC = part(DECODER, **SMALL, cross=part("speechattn.cross.monotonic.MoChA", window=3, head_drop=0.5))
SEGMENTAL = part(
    "speechattn.decoder.segmental.Segmental",
    decoder=part(DECODER, **SMALL, cross=part(
        "speechattn.cross.segmental.SegmentAttention", boundary=part("speechattn.cross.segmental.Within", longest=8),
    )),
    length=part("speechattn.decoder.segmental.NeuralLength", dim=16, vocab=39, inner=8),
)  # fmt: skip
CTC = part("speechattn.decoder.ctc.CTC", dim=16, vocab=39)
ALIGNED = part(
    "speechattn.task.segmental.OwnAlignment", first=part("speechattn.task.segmental.CTCAlignment"), after=1
)  # fmt: skip
LATENCY = [part(f"speechattn.cross.latency.{name}", weight=0.1) for name in ("AverageLagging", "HeadVariance")]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("data") / "train.jsonl.gz", first=6)


def trained(folder: Path, manifest: Path, *options: str, **changes: Any) -> Recognizer:
    """The model of the folder that two steps of training, exported, give."""
    content = recipe(manifest, manifest, **changes)
    content["trainer"] |= {
        "max_steps": 2,
        "limit_val_batches": 1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    }
    path = written(folder / "recipe.yaml", content)
    assert main(["fit", "--config", str(path), f"--trainer.default_root_dir={folder / 'run'}"]) == 0
    assert main(["export", str(folder / "run/checkpoints/last.ckpt"), str(folder / "model"), *options]) == 0
    model = load_model(folder / "model")
    assert isinstance(model, Recognizer)
    return model


def heard(model: Recognizer, search: str) -> str:
    """What a live session says of a recording, in pieces of 100 ms."""
    samples, _ = soundfile.read(DIGITS / "00.flac", dtype="float32")
    session = Session(model, search=model.search(search, beam_size=2))
    events = [event for piece in np.array_split(samples, len(samples) // 1600) for event in session.feed(piece, 16000)]
    return " ".join(event.committed for event in [*events, *session.finish()] if event.committed)


@pytest.mark.parametrize("kind", ["monotonic", "segmental"])
def test_a_head_from_recipe_to_live(kind: str, tmp_path: Path, manifest: Path) -> None:
    objective = {
        "monotonic": part("speechattn.task.monotonic.MonotonicObjective", latency=LATENCY),
        "segmental": part("speechattn.task.segmental.SegmentalObjective", alignment=ALIGNED),
    }[kind]
    head = {"monotonic": MONOTONIC, "segmental": SEGMENTAL}[kind]
    objectives = [part("speechattn.task.objectives.CTCObjective", weight=0.3), objective]
    model = trained(tmp_path, manifest, heads={"ctc": CTC, kind: head}, objectives=objectives)
    search = model.search(beam_size=2)
    assert type(search).__name__ == {"monotonic": "MonotonicBeam", "segmental": "SegmentalBeam"}[kind]
    heard(model, kind)
    if kind == "segmental":
        heard(model, "time_synchronous")


def conformer(**changes: Any) -> dict[str, Any]:
    """Of the recipe."""
    encoder: dict[str, Any] = recipe(Path("x"), None)["model"]["init_args"]["encoder"]
    return part(encoder["class_path"], **(encoder["init_args"] | changes))


CAUSAL = part("speechattn.attention.Span.causal")
ALONE = part("speechattn.attention.Span", left=0, chunk=4)
ATTENTIONS = {
    "lightning": ("linear.LightningAttention", {}, {"span": CAUSAL, "position": None}),
    "based": ("based.Based", {"window": 8, "features": 4}, {"span": CAUSAL, "position": None}),
    "mega": (
        "mega.Mega",
        {},
        {"span": ALONE, "position": None, "heads": 1},
    ),
    "moba": ("moba.MoBA", {"size": 4, "blocks": 2}, {"span": CAUSAL, "position": None}),
    "quest": ("quest.Quest", {"size": 4, "blocks": 2}, {"span": CAUSAL, "position": None}),
    "sparse": ("sparse.SparseSelfAttention", {}, {}),
    "echo": ("echo.EchoAttention", {}, {}),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_from_recipe_to_live(name: str, tmp_path: Path, manifest: Path) -> None:
    kind, own, changes = ATTENTIONS[name]
    encoder = conformer(attention=part(f"speechattn.attention.{kind}", **own), **changes)
    objectives = [part("speechattn.task.objectives.CTCObjective")]
    model = trained(tmp_path, manifest, encoder=encoder, heads={"ctc": CTC}, objectives=objectives, spans=None)
    assert kind.split(".")[1] in {type(module).__name__ for module in model.modules()}
    heard(model, "ctc")


def test_gates_are_pruned_and_heads_split_at_export(tmp_path: Path, manifest: Path, capsys: Any) -> None:
    duo = conformer(
        span=part("speechattn.attention.Span", left=None, chunk=4),
        attention=part("speechattn.attention.duo.DuoAttention", left=4, sinks=1),
    )
    one = {"heads": {"ctc": CTC}, "objectives": [part("speechattn.task.objectives.CTCObjective")], "spans": None}
    (tmp_path / "duo").mkdir()
    model = trained(tmp_path / "duo", manifest, "--split", "0.5", encoder=duo, **one)
    assert type(model.encoder).__name__ == "SplitEncoder"
    heard(model, "ctc")
    gated = part("speechattn.model.pruning.GatedEncoder", encoder=conformer())
    told = [*one["objectives"], part("speechattn.task.pruning.SparsityObjective", target=0.5)]
    (tmp_path / "gated").mkdir()
    model = trained(tmp_path / "gated", manifest, encoder=gated, **(one | {"objectives": told}))
    for parameter in [p for name, p in model.named_parameters() if name.endswith("gates.logits")]:
        torch.nn.init.constant_(parameter.data[: len(parameter) // 2], -9.0)
    from speechattn.model.pruning import smaller

    small = smaller(model.eval())
    x = torch.randn(1, 3200)
    from speechattn.frames import Frames

    sound = Frames(x, torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(small.listening(sound).values, model.listening(sound).values, rtol=0, atol=1e-5)
    capsys.readouterr()
    last = str(tmp_path / "gated/run/checkpoints/last.ckpt")
    assert main(["export", last, str(tmp_path / "small"), "--prune"]) == 0
    kept = load_model(tmp_path / "small")
    assert isinstance(kept, Recognizer)
    assert type(kept.encoder).__name__ == "PrunedEncoder"
    assert not [name for name, _ in kept.named_parameters() if "gates" in name]
    capsys.readouterr()
    last = str(tmp_path / "duo/run/checkpoints/last.ckpt")
    assert main(["export", last, str(tmp_path / "other"), "--prune"]) == 2
    assert "no gates" in capsys.readouterr().err


def test_what_an_attention_does_not_take_is_said(tmp_path: Path, manifest: Path, capsys: Any) -> None:
    encoder = conformer(attention=part("speechattn.attention.linear.LightningAttention"), span=CAUSAL)
    path = written(tmp_path / "recipe.yaml", recipe(manifest, None, encoder=encoder))
    assert main(["fit", "--config", str(path), f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 2
    assert "position" in capsys.readouterr().err
    kind, own, changes = ATTENTIONS["moba"]
    encoder = conformer(attention=part(f"speechattn.attention.{kind}", **own), **changes)
    path = written(tmp_path / "drawn.yaml", recipe(manifest, None, encoder=encoder))
    assert main(["fit", "--config", str(path), f"--trainer.default_root_dir={tmp_path / 'other'}"]) == 2
    assert "Span" in capsys.readouterr().err  # before the step that would draw it
