"""`speechattn sinks`: what it prints and writes, and what it refuses before the work."""

from __future__ import annotations

import gzip
import json
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from test_sinks import PLACE, kinds_of, planted
from test_vision import film, numbered
from torch import Tensor, nn
from toy_corpus import write_corpus
from training import DIGITS, LINES, corpus, part, recipe

from speechattn.audio.clip import AudioVisual, Clip
from speechattn.audio.spectrum import LogMel
from speechattn.cli import main
from speechattn.cli import sinks as command
from speechattn.cli.main import parser
from speechattn.encoder.layers import Stack
from speechattn.frames import Frames
from speechattn.model import Recognizer, save_model
from speechattn.model.folder import from_config
from speechattn.multimodal.causal import Inspected
from speechattn.multimodal.sinks import Thresholds
from speechattn.stream import Serial
from speechattn.task.checkpoint import packed
from speechattn.text.pieces import BLANK, UNKNOWN, Pieces


@dataclass
class Planted:
    """A head that says nothing, with a sink at one place; it remembers what it was asked."""

    asked: list[tuple[Frames, Tensor, Tensor]] = field(default_factory=list)

    def inspect(self, x: Frames, tokens: Tensor, lengths: Tensor) -> tuple[Inspected, Tensor]:
        self.asked.append((x, tokens, lengths))
        kinds = kinds_of(*[30] * len(tokens))
        return planted(len(self.asked), kinds), kinds


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Planted:
    """Of a model that hears its samples."""
    head = Planted()
    model: Any = SimpleNamespace(
        heads={"llm": head}, listening=lambda sound: sound, tokenizer=Pieces.load(DIGITS), sample_rate=16000,
        front_end=nn.Identity(),
    )  # fmt: skip
    monkeypatch.setattr(command, "model_of", lambda options: model)
    return head


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("data") / "digits_cuts_test.jsonl.gz", first=5)


def listening() -> Recognizer:
    """A speech language model of a few thousand weights, all by chance."""
    made = recipe(DIGITS, None)["model"]["init_args"]
    lm = part("speechattn.multimodal.llama.Llama", vocab=39, dim=16, heads=2, depth=3)
    side = part("speechattn.multimodal.speech_llm.Stacked", width=16, dim=16, every=2, inner=8)
    llm = part("speechattn.multimodal.speech_llm.SpeechLLM", lm=lm, sound=side, prompt=[3, 4])
    config = {"format": 1, "front_end": plainly(made["front_end"]), "encoder": made["encoder"], "heads": {"llm": llm}}
    return from_config(config, Pieces.load(DIGITS)).eval()


def plainly(spec: dict[str, Any]) -> dict[str, Any]:
    """A `Serial` as a configuration of a model has it."""
    return {"class_path": "speechattn.stream.Serial", "init_args": spec["init_args"]["members"]}


def test_it_finds_what_was_planted_and_writes_it(
    head: Planted, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, picture = tmp_path / "report.json", tmp_path / "sinks.svg"
    arguments = [str(tmp_path), str(manifest), "--output", str(output), "--picture", str(picture)]
    assert main(["sinks", *arguments, "--batch-seconds", "6"]) == 0
    said = capsys.readouterr()
    assert "5 sequences; places in each: BOS 1, mark 4, sound 12, lips 6, prompt 2, text 5" in said.out
    _, attention, states, alike, summary = said.out.split("\n\n")
    rows = [line.split() for line in attention.splitlines()]
    assert " ".join(rows[0]) == "sinks in a sequence BOS mark sound lips prompt text % on BOS % on sinks between"
    assert [row[2:8] for row in rows[1:]] == [["1", "0", "1", "0", "0", "0"]] * 4
    report = json.loads(output.read_text(encoding="utf-8"))
    shares = [layer["share"] for layer in report["layers"]]
    assert [row[8:] for row in rows[1:]] == [[f"{100 * x['BOS']:.1f}", f"{100 * x['sound']:.1f}"] for x in shares]
    assert all(30 < float(share) < 70 for row in rows[1:] for share in row[8:])
    rows = [line.split() for line in states.splitlines()]
    assert " ".join(rows[0]) == "largest activation / median BOS sinks others massive in a sequence"
    assert [row[-1] for row in rows[1:]] == ["0", "4", "4", "4", "4"]
    assert [row[-4] for row in rows[1:]] == [f"{state['ratio']['BOS']:.1f}" for state in report["states"]]
    rows = [line.split() for line in alike.splitlines()]
    assert " ".join(rows[0]) == "cos² to BOS mark sound lips prompt text sinks between"
    assert [row[-1] for row in rows[2:]] == ["1.000"] * 4
    assert [row[-5] for row in rows[1:]] == [f"{state['cosine2']['sound']:.3f}" for state in report["states"]]
    assert "BOS is a sink in 100 % of 5 sequences; intermediate sinks: sound, at most 1.00 a sequence" in summary
    assert "BOS and intermediate sinks share feature indices there (5, 19, " in summary
    assert said.err == ""
    assert report["sequences"] == 5
    assert report["sink_places"] == {str(PLACE): 5}
    svg = picture.read_text(encoding="utf-8")
    assert f"Attention sinks of {tmp_path.name} on {manifest.name}: 5 sequences" in svg
    assert len(head.asked) > 1  # batches
    texts = [Pieces.load(DIGITS).decode(row[:n].tolist()) for _, tokens, lengths in head.asked
             for row, n in zip(tokens, lengths, strict=True)]  # fmt: skip
    assert sorted(texts) == sorted(line["text"] for line in LINES[:5])
    longest = [max(x.lengths.tolist()) for x, _, _ in head.asked]
    assert longest == sorted(longest, reverse=True)


def test_limit_and_thresholds(head: Planted, manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    arguments = ["--limit", "2", "--received", "0.6", "--even", "1", "--queries", "4", "--absolute", "2000",
                 "--relative", "10", "--alike", "0.5", "--top", "2"]  # fmt: skip
    assert main(["sinks", str(tmp_path), str(manifest), "-o", str(output), *arguments]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["sequences"] == 2
    assert report["thresholds"] == {
        "received": 0.6, "even": 1, "queries": 4, "absolute": 2000, "relative": 10, "alike": 0.5, "top": 2,
    }  # fmt: skip
    assert not report["sink_places"]
    assert report["states"][1]["massive_features"] == {"5": 4}


def test_a_real_model_as_folder_and_as_checkpoint(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = listening()
    save_model(model, tmp_path / "model")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    about = packed(model.config, model.tokenizer)
    torch.save({"speechattn": about, "state_dict": state}, tmp_path / "step=1.ckpt")
    before = {*Path(gettempdir()).iterdir()}
    reports = []
    for name in ("model", "step=1.ckpt"):
        output = tmp_path / f"{name}.json"
        assert main(["sinks", str(tmp_path / name), str(manifest), "--limit", "3", "-o", str(output)]) == 0
        reports.append(output.read_text(encoding="utf-8"))
    assert reports[0] == reports[1]
    assert capsys.readouterr().out.count("3 sequences; places in each: BOS 1, mark 2, sound ") == 2
    report = json.loads(reports[0])
    assert len(report["layers"]) == 3
    assert report["places"]["prompt"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"model", "step=1.ckpt", "model.json", "step=1.ckpt.json"}
    left = [path.name for path in {*Path(gettempdir()).iterdir()} - before]
    assert all(name.startswith("speechattn-tokens-") for name in left)  # until the program ends


def test_pictures_are_looked_at_where_the_model_has_eyes(tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", numbered(40, 16))
    path = write_corpus(tmp_path, [1.5, 1.0], video="a.mkv")
    model = listening()
    model.tokenizer = Pieces([BLANK, UNKNOWN])
    options = Namespace(manifest=str(path), limit=None, normalise="lower", batch_seconds=60.0, device="cpu")
    (batch,) = command.batches(options, model)
    assert not isinstance(batch.sound, Clip)
    assert batch.texts == ("number 0!", "number 1!")
    model.front_end = AudioVisual(Serial(LogMel(mels=40), Stack(4, 4)), size=16)
    (batch,) = command.batches(options, model)
    assert isinstance(batch.sound, Clip)
    assert batch.sound.lips.values.shape == (2, 38, 16, 16)
    assert batch.sound.lips.lengths.tolist() == [38, 25]


def test_utterances_that_cannot_be_read_are_named(
    head: Planted, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = gzip.decompress(manifest.read_bytes()).decode().splitlines()
    lines[1] = lines[1].replace("01.flac", "nowhere.flac")
    lines[2] = lines[2].replace(LINES[2]["text"], "ΨΩ 123")
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["sinks", str(tmp_path), str(path)]) == 0
    said = capsys.readouterr()
    assert "speechattn: skipped 01-0: " in said.err
    assert said.err.count("skipped") == 2
    assert "3 sequences;" in said.out
    path.write_text(lines[1] + "\n", encoding="utf-8")
    assert main(["sinks", str(tmp_path), str(path)]) == 2
    assert "odd.jsonl: no utterance of it could be heard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such model: wanted a model folder, or a checkpoint"),
        ([str(DIGITS), "--picture", "a.gif"], "--picture a.gif: a picture ends in .png, .svg, .pdf"),
        ([str(DIGITS), "--picture", "nowhere/a.svg"], "nowhere/a.svg: No such file or directory"),
        ([str(DIGITS), "--output", "nowhere/a.json"], "nowhere/a.json: No such file or directory"),
        ([str(DIGITS), "--output", "a.svg", "--picture", "a.svg"], "the same file as --output"),
        ([str(DIGITS), "--limit", "0"], "--limit 0: at least 1"),
        ([str(DIGITS), "--batch-seconds", "0"], "--batch-seconds 0.0: at least 0.001"),
        ([str(DIGITS), "--received", "2"], "--received 2.0: at most 1"),
        ([str(DIGITS), "--queries", "0"], "--queries 0: at least 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_the_work(
    arguments: list[str], message: str, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "looked", lambda *_: pytest.fail("the work began"))
    model, *options = arguments
    assert main(["sinks", model, str(manifest), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_models_and_manifests_that_are_none(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sinks", str(DIGITS), str(manifest)]) == 2
    heads = ", ".join(yaml.safe_load((DIGITS / "config.yaml").read_text(encoding="utf-8"))["heads"])
    assert f"no speech language model: it has the heads {heads}, and sinks are looked for in a head llm" in (
        capsys.readouterr().err
    )
    assert main(["sinks", str(DIGITS), "nowhere.jsonl.gz"]) == 2
    assert "nowhere.jsonl.gz: no such manifest" in capsys.readouterr().err
    (tmp_path / "none.ckpt").write_bytes(b"nothing")
    assert main(["sinks", str(tmp_path / "none.ckpt"), str(manifest)]) == 2
    assert "not a checkpoint that can be read" in capsys.readouterr().err
    model = listening()
    torch.save({"speechattn": packed(model.config, model.tokenizer), "state_dict": {}}, tmp_path / "empty.ckpt")
    assert main(["sinks", str(tmp_path / "empty.ckpt"), str(manifest)]) == 2
    assert "empty.ckpt: " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["sinks", "nowhere", str(manifest), "--picture", "a.png"]) == 2
    assert "a picture needs matplotlib" in capsys.readouterr().err


def test_the_commands_of_the_page_parse() -> None:
    page = (Path(__file__).parents[1] / "docs" / "attention-sinks.md").read_text(encoding="utf-8")
    lines = [line.split() for line in page.split("```sh\n")[1].split("```")[0].splitlines()]
    assert len(lines) == 2
    for _, *arguments in lines:
        assert parser().parse_args(arguments).run is command.run
    for option in ("received", "even", "queries", "absolute", "relative", "top"):
        assert f"`--{option}` ({getattr(Thresholds, option):g})" in page
