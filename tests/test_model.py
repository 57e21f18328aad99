"""A model is a folder; what it says is what is built, and nothing else is run."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

from speechattn.cli import main
from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames
from speechattn.live import Session, StreamSettings
from speechattn.model import Recognizer, from_config, load_model, save_model
from speechattn.text.pieces import Pieces

PIECES = Pieces(["<blank>", "▁", *"abcdefgh", "<sos/eos>"])
SPAN = {"class_path": "speechattn.attention.Span", "init_args": {"left": 8, "chunk": 4}}
CONFIG: dict[str, Any] = {
    "format": 1, "sample_rate": 8000, "language": "en",
    "front_end": {
        "class_path": "speechattn.stream.Serial",
        "init_args": {
            "spectrum": {
                "class_path": "speechattn.audio.spectrum.LogMel",
                "init_args": {"mels": 12, "rate": 8000, "window": 200, "hop": 80},
            },
            "normal": {"class_path": "speechattn.audio.normal.GlobalCMVN.unknown", "init_args": {"dim": 12}},
        },
    },
    "encoder": {
        "class_path": "speechattn.encoder.Conformer",
        "init_args": {
            "mels": 12, "dim": 16, "depth": 2, "heads": 2, "inner": 24, "kernel": 5, "span": SPAN,
            "position": "speechattn.attention.position.Relative",
        },
    },
    "heads": {
        "ctc": {"class_path": "speechattn.decoder.ctc.CTC", "init_args": {"dim": 16, "vocab": 11}},
        "transducer": {
            "class_path": "speechattn.decoder.transducer.Transducer",
            "init_args": {
                "predictor": {
                    "class_path": "speechattn.decoder.predictor.LSTMPredictor",
                    "init_args": {"vocab": 11, "dim": 8},
                },
                "joint": {
                    "class_path": "speechattn.decoder.transducer.Joint",
                    "init_args": {"frames": 16, "labels": 8, "inner": 12, "vocab": 11},
                },
            },
        },
    },
}  # fmt: skip


def made() -> Recognizer:
    model = from_config(CONFIG, PIECES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("model")
    save_model(made(), path)
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "noise.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 24000), 8000)
    return path


def changed(**parts: Any) -> dict[str, Any]:
    return deepcopy(CONFIG) | parts


def test_a_folder_holds_the_model(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "model.safetensors", "tokens.txt"]
    torch.manual_seed(1)
    first, second = made(), load_model(folder)
    assert isinstance(second, Recognizer)
    assert not second.training
    x = Frames(torch.randn(2, 8000), torch.ones(2, 8000, dtype=torch.bool))
    torch.testing.assert_close(first.listening(x).values, second.listening(x).values)
    assert second.language == "en"
    assert second.frame_s == pytest.approx(0.04)
    assert all(name.split(".")[0] in ("front_end", "encoder", "heads") for name in second.state_dict())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(heads=None), "heads"),
        (changed(extra=1), "unknown: extra"),
        (changed(format=2), "format 2"),
        ({key: value for key, value in CONFIG.items() if key != "encoder"}, "encoder missing"),
        (changed(encoder={"class_path": "os.system", "init_args": {"command": "true"}}), r"os\.system is no module"),
        (changed(encoder={"class_path": "speechattn.cli.main", "init_args": {}}), "is no module"),
        (
            changed(encoder={"class_path": "speechattn.model.config.import_module", "init_args": {"name": "os"}}),
            "is no module",
        ),
        (
            changed(encoder={"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}}),
            "not a stream",
        ),
        (
            changed(
                encoder={
                    "class_path": "speechattn.encoder.Conformer",
                    "init_args": {"mels": 12, "span": SPAN, "sapn": 1},
                }
            ),
            "sapn",
        ),
        (
            changed(encoder={"class_path": "speechattn.encoder.Conformer", "init_arg": {}}),
            "init_arg: a part has a class_path",
        ),
        (changed(heads={"crc": CONFIG["heads"]["ctc"]}), "crc"),
        (changed(heads={"ctc": "hello"}), "heads"),
        (changed(heads={1: CONFIG["heads"]["ctc"]}), "1"),
        (
            changed(heads={"ctc": {"class_path": "speechattn.decoder.ctc.CTC", "init_args": {"dim": 16, "vocab": 12}}}),
            "12 tokens",
        ),
        (changed(encoder={"class_path": "speechattn", "init_args": {}}), "is no module"),
        (changed(encoder={"class_path": "speechattn.encoder", "init_args": {}}), "is no module"),
        (changed(sample_rate=0), "sample_rate 0"),
        (changed(sample_rate="x"), "sample_rate x"),
        (changed(spaceless="no"), "spaceless no"),
        (changed(language=5), "language 5"),
        (
            changed(front_end=CONFIG["front_end"]["init_args"]["spectrum"] | {"init_args": {"mels": 80, "rate": 8000}}),
            "fit together",
        ),
        (changed(encoder=[CONFIG["encoder"]] * 900), "too large"),
    ],
)
def test_what_cannot_be_built_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_config(config, PIECES)


def test_a_bomb_is_no_configuration() -> None:
    bomb: Any = "a"
    for _ in range(60):
        bomb = [bomb] * 9
    with pytest.raises(ModelError, match="too"):
        from_config(changed(front_end=bomb), PIECES)


def test_weights_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["encoder"]["init_args"]["depth"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(ModelError, match=r"missing \(encoder\.layers"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="not safetensors"):
        load_model(tmp_path)
    (tmp_path / "config.yaml").write_text(": {")
    with pytest.raises(ModelError, match="not YAML"):
        load_model(tmp_path)


def test_settings_of_others_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="task translate"):
        load_model(folder, task="translate")
    with pytest.raises(ModelError, match="pad_s"):
        load_model(folder, pad_s=1.0)
    with pytest.raises(ModelError, match="knows en, not de"):
        load_model(folder, language="de")
    model = load_model(folder)
    assert isinstance(model, Recognizer)
    with pytest.raises(InputError, match="transducer, ctc"):
        model.search("joint")
    with pytest.raises(InputError, match="beam size"):
        model.search(beam_size=0)
    with pytest.raises(InputError, match="spell"):
        model.search(phrases=["xyz"])


@pytest.mark.parametrize("kind", ["ctc", "transducer"])
@pytest.mark.parametrize("size", [1, 3])
def test_live_is_offline(folder: Path, recording: Path, kind: str, size: int) -> None:
    model = load_model(folder, dtype="float64")
    assert isinstance(model, Recognizer)
    samples = soundfile.read(recording, dtype="float32")[0]
    x = Frames(torch.from_numpy(samples)[None].double(), torch.ones(1, len(samples), dtype=torch.bool))
    search = model.search(kind, beam_size=size)
    whole = search.decode(model.listening(x))[0][0]
    expected = PIECES.decode(whole.tokens)
    assert expected
    never = 1e6
    settings = StreamSettings(never, never, never, never, never, certainty=1.0)
    session = Session(model, search=search, settings=settings)
    events = [event for part in np.array_split(samples, 7) for event in session.feed(part, 8000)] + session.finish()
    assert " ".join("".join(event.committed for event in events).split()) == expected
    words = [word for event in events for word in event.words]
    starts = [start * model.frame_s for start, _ in whole.spans]
    assert {word.start for word in words} <= set(starts)


def test_the_commands_take_a_folder(folder: Path, recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(folder)]
    assert main(["transcribe", *words, "--search", "ctc", "--beam-size", "4", str(recording)]) == 0
    heard = capsys.readouterr().out
    assert heard.strip()
    assert main(["stream", *words, "--search", "ctc", "--beam-size", "4", "--fast", str(recording)]) == 0
    said = capsys.readouterr()
    assert "".join(said.out.split()) == "".join(heard.split())
    assert "steps of 160 ms" in said.err
    for wrong in (["--frame-threshold", "3"], ["--policy", "alignatt"], ["--offline"], ["--search", "joint"]):
        assert main(["transcribe", *words, *wrong, str(recording)]) == 2
    assert main(["transcribe", "--beam-size", "4", "--model", "tiny.en", str(recording)]) == 2
    errors = capsys.readouterr().err
    assert "--beam-size does nothing with tiny.en" in errors
    assert "--frame-threshold does nothing with" in errors
