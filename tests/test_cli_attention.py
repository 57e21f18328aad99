"""`speechattn attention`: what the picture shows, and what it refuses."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from matplotlib.patches import Rectangle
from safetensors.torch import load_file, save_file

from speechattn.analysis import view as views
from speechattn.analysis.picture import draw, placed, save
from speechattn.analysis.saliency import Reading
from speechattn.analysis.view import Map, Spoken, View, listen, view
from speechattn.attention import Span
from speechattn.attention.based import Based, TaylorAttention
from speechattn.attention.echo import EchoAttention
from speechattn.attention.linear import LightningAttention
from speechattn.attention.mega import Mega
from speechattn.attention.moba import MoBA
from speechattn.attention.quest import Quest
from speechattn.audio.read import Recording, open_recording
from speechattn.cli import attention
from speechattn.cli.main import complain
from speechattn.encoder import Conformer
from speechattn.errors import InputError, SpeechAttnError
from speechattn.model import Recognizer, load_model
from speechattn.pretrained.whisper import WhisperModel

DIGITS = Path(__file__).parent / "digits"
CLIP = DIGITS / "00.flac"
WORDS = ["one", "two", "three", "four", "five", "six"]


def command(*arguments: object) -> int:
    """As `main` runs it."""
    top = argparse.ArgumentParser()
    attention.add_parser(top.add_subparsers(required=True))
    options = top.parse_args(["attention", *map(str, arguments)])
    try:
        return int(options.run(options))
    except SpeechAttnError as error:
        return complain(str(error))


def samples() -> np.ndarray[Any, np.dtype[np.float32]]:
    return soundfile.read(CLIP, dtype="float32")[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def digits() -> Recognizer:
    model = load_model(DIGITS)
    assert isinstance(model, Recognizer)
    return model


@pytest.fixture(scope="module")
def seen(digits: Recognizer) -> View:
    return view(digits, samples(), name="digits")


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the same model without its attention decoder."""
    folders = {}
    for kind in ("ctc", "transducer"):
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        config = yaml.safe_load((DIGITS / "config.yaml").read_text(encoding="utf-8"))
        config["heads"] = {kind: config["heads"][kind]}
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        shutil.copy(DIGITS / "tokens.txt", folder)
        tensors = load_file(DIGITS / "model.safetensors")
        kept = {name: t for name, t in tensors.items() if not name.startswith("heads.") or f"heads.{kind}." in name}
        save_file(kept, folder / "model.safetensors")
    return folders


def test_a_view_is_what_the_model_does(digits: Recognizer, seen: View) -> None:
    assert [word.text.strip() for word in seen.words] == WORDS
    assert all(word.start < word.end <= word.committed + 1e-6 for word in seen.words)
    committed = [word.committed for word in seen.words]
    assert committed == sorted(committed)
    assert len({*committed}) > 2  # as it was heard, not at the end
    (only,) = seen.maps
    reading = Reading.of(digits, samples(), " ".join(WORDS))
    expected = reading.cross_weights().mean((0, 1))[:, : reading.frames]
    assert np.allclose(only.values, expected.numpy(), atol=1e-6)
    text = "".join(only.labels).replace("␣", " ").split()
    assert text == WORDS
    assert ["".join(only.labels[a:b]).strip("␣") for a, b in only.words] == WORDS
    assert seen.title == "digits: cross-attention, mean of all 2 layers and all 4 heads"
    assert seen.spectrum.max() == 0


def test_one_head_is_that_head(digits: Recognizer) -> None:
    one = view(digits, samples(), name="digits", layers=[1], heads=[2])
    reading = Reading.of(digits, samples(), " ".join(WORDS))
    assert np.allclose(one.maps[0].values, reading.cross_weights()[1, 2, :, : reading.frames].numpy(), atol=1e-6)
    assert one.title == "digits: cross-attention, mean of layer 1 and head 2"
    assert np.shape(one.statistics["entropy"]) == (1, 1)


def test_the_picture_has_it_all(seen: View) -> None:
    figure = draw(seen)
    strip, sound, heat = figure.axes[:3]
    words = {text.get_text(): text.get_position()[0] for text in strip.texts if text.get_gid() == "word"}
    assert list(words) == WORDS
    for word in seen.words:
        assert words[word.text.strip()] == pytest.approx((word.start + word.end) / 2)
    assert np.array_equal(sound.images[0].get_array(), seen.spectrum.T)
    image = heat.images[0]
    assert np.array_equal(image.get_array(), seen.maps[0].values)
    rows, frames = seen.maps[0].values.shape
    assert image.get_extent() == [0, pytest.approx(frames * 0.04), rows, 0]
    assert [label.get_text() for label in heat.get_yticklabels()] == list(seen.maps[0].labels)
    boxes = [patch for patch in heat.patches if isinstance(patch, Rectangle)]
    found = [(box.get_x(), box.get_x() + box.get_width(), box.get_y()) for box in boxes]
    wanted = zip(seen.words, seen.maps[0].words, strict=True)
    assert found == [(w.start, pytest.approx(w.end), first) for w, (first, _) in wanted]
    marks = [line for line in heat.lines if line.get_gid() == "committed"]
    assert [line.get_xdata()[0] for line in marks] == [word.committed for word in seen.words]
    assert strip.get_xlim() == sound.get_xlim() == heat.get_xlim()
    assert figure.legends


def small() -> View:
    """Two words, made by hand, with signs that matplotlib would take for formulas."""
    words = (Spoken(" $5", 0.1, 0.4, 0.5), Spoken(" 日本_x^2$", 0.3, 0.8, 0.9))
    one = Map("cross-attention", 0.1, np.eye(2, 10, dtype=np.float32), ("␣$5", "日$"), ((0, 1), (1, 2)))
    return View("$a$: b", 1.0, 8000, np.zeros((100, 80), np.float32), words, (one,), {})


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_files_are_the_same_for_the_same_numbers(ending: str, tmp_path: Path) -> None:
    first, second = (tmp_path / f"{name}.{ending}" for name in ("a", "b"))
    save(draw(small()), first)
    save(draw(small()), second)
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) > 5_000
    if ending == "svg":
        text = first.read_text(encoding="utf-8")
        assert "$a$: b" in text
        assert "日本_x^2$" in text


def test_words_that_would_cover_each_other_stand_higher() -> None:
    words = [Spoken(text, i / 10, i / 10 + 0.1, 1) for i, text in enumerate(["aaaa", "bbbb", "cccc"])]
    assert placed(words, 0.039) == [0, 1, 0]
    assert placed(words, 0.01) == [0, 0, 0]


def test_the_command_writes_picture_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, numbers = tmp_path / "a.PNG", tmp_path / "a.json"
    assert command(CLIP, "--model", DIGITS, "-o", picture, "--json", numbers, "--layers", "0,1", "--heads", "3") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = json.loads(numbers.read_text(encoding="utf-8"))
    assert [word["text"] for word in said["words"]] == WORDS
    (only,) = said["maps"]
    assert len(only["values"]) == len(only["labels"])
    statistics = said["statistics"]
    assert (statistics["layers"], statistics["heads"]) == ([0, 1], [3])
    assert np.shape(statistics["monotonicity"]) == (2, 1)
    assert said["title"] == "digits: cross-attention, mean of layers 0, 1 and head 3"
    assert capsys.readouterr().out.split() == [str(numbers), str(picture)]


def test_a_stretch_of_a_recording_and_the_usual_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = samples()
    soundfile.write(tmp_path / "long.wav", np.concatenate([np.zeros(40 * 16000, np.float32), x]), 16000)
    monkeypatch.chdir(tmp_path)
    assert command("long.wav", "--model", DIGITS) == 2
    assert "42.2 s are too long for one picture: choose 30 s with --start and --end" in capsys.readouterr().err
    assert command("long.wav", "--model", DIGITS, "--start", "40") == 0
    assert capsys.readouterr().out == "long.attention.png\n"
    assert (tmp_path / "long.attention.png").exists()
    assert command("long.wav", "--start", "50") == 2
    assert "no sound between them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "names"),
    [("ctc", ["CTC posterior", "attention rollout"]), ("transducer", ["attention rollout"])],
)
def test_models_without_an_attention_decoder(kind: str, names: list[str], poor: dict[str, Path]) -> None:
    model = load_model(poor[kind])
    seen = view(model, samples(), name="poor", layers=[0, 3])
    assert [one.name for one in seen.maps] == names
    assert seen.title == f"poor: {' and '.join(names)} (no attention decoder), mean of layers 0, 3 and all 4 heads"
    rolled = seen.maps[-1].values
    assert rolled.shape == (55, 55)
    assert np.allclose(rolled.sum(1), 1, atol=1e-5)
    assert not np.triu(rolled, 8).any()  # the chunk is 8 frames
    assert np.shape(seen.statistics["entropy"]) == (2, 4)
    figure = draw(seen)
    assert len([axes for axes in figure.axes if axes.images]) == 1 + len(names)
    if kind == "ctc":
        labels, values = seen.maps[0].labels, seen.maps[0].values
        assert len({*labels}) == len(labels)
        peak = values[labels.index("th")].argmax() * 0.04  # of three
        assert 0.66 < peak < 1.1
    with pytest.raises(InputError, match="layer 4: this model has layers 0 to 3"):
        view(model, samples(), name="poor", layers=[4])


def heard_by(digits: Recognizer, kind: Any) -> Recognizer:
    """The digits' front-end and CTC head around an encoder with another attention, of weights by chance."""
    heads, span = (1, Span.full()) if kind is Mega else (4, Span.causal())
    encoder = Conformer(40, 64, 2, heads, 64, span=span, kernel=3, position=None, attention=kind)
    return Recognizer(digits.front_end, encoder, {"ctc": digits.ctc}, digits.tokenizer).eval()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        *((kind, f"{kind.__name__} does not say where it looks: it needs a method weights(x)")
          for kind in (MoBA, Quest)),
        *((kind, "no self-attention whose weights could be shown")
          for kind in (LightningAttention, TaylorAttention, Based, Mega)),
        (EchoAttention, "no rollout: block layers.0 has several attentions side by side"),
    ],
)  # fmt: skip
def test_encoders_without_weights_or_rollout(
    kind: Any, reason: str, digits: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "listen", lambda *_: (Spoken(" one", 0.1, 0.4, 0.5),))
    model = heard_by(digits, kind)
    seen = view(model, samples(), name="m")
    assert [one.name for one in seen.maps] == ["CTC posterior"]
    assert seen.title.startswith("m: CTC posterior (no attention decoder; ")
    assert reason in seen.title
    assert ("entropy" in seen.statistics) == (kind is EchoAttention)
    if kind is not EchoAttention:
        with pytest.raises(InputError, match="no layers and heads to choose from"):
            view(model, samples(), name="m", layers=[0])
    bare = Recognizer(model.front_end, model.encoder, {"transducer": digits.heads["transducer"]}, digits.tokenizer)
    with pytest.raises(InputError, match="there is nothing to show: no attention decoder, no CTC head, and"):
        view(bare, samples(), name="m")


def test_files_that_are_one_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sound = tmp_path / "a.png"
    sound.write_bytes(CLIP.read_bytes())
    (tmp_path / "b.png").hardlink_to(sound)
    before = sound.read_bytes()
    for arguments, names in (
        (["a.png", "--json", "new.png", "--output", "./new.png"], "--json new.png: the same file as --output"),
        (["a.png", "--output", sound], "the same file as AUDIO"),
        (["a.png", "--json", "b.png"], "--json b.png: the same file as AUDIO"),
    ):
        assert command(*arguments, "--model", "nowhere") == 2
        assert names in capsys.readouterr().err
    assert sound.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_only_the_stretch_is_kept_and_nothing_behind_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.arange(80_000, dtype=np.float32) / 80_000
    soundfile.write(tmp_path / "long.wav", x, 8000, subtype="FLOAT")
    recording, read, blocks = open_recording(tmp_path / "long.wav"), [0], Recording.blocks

    def counted(self: Recording) -> Any:
        for block in blocks(self):
            read[0] += len(block)
            yield block

    monkeypatch.setattr(Recording, "blocks", counted)
    assert np.array_equal(attention.between(recording, 1.234, 2.5), x[9872:20000])
    assert read[0] == 20_000
    assert np.array_equal(attention.between(recording, 0, 10), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "2"], "layer 2: this model has layers 0 to 1"),
        (["--heads", "0,4,7"], "head 4, 7: this model has heads 0 to 3"),
        (["--layers", "one"], "--layers one: wanted numbers from 0 with commas between"),
        (["--layers", "9" * 5000], "--layers: a number of 5000 digits"),
        (["--output", "a.gif"], "--output a.gif: a picture ends in .png, .svg, .pdf"),
        (["--output", "nowhere/a.png"], "nowhere/a.png: No such file or directory"),
        (["--json", "nowhere/a.json"], "nowhere/a.json: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command(CLIP, "--model", DIGITS, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_silence_and_missing_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "quiet.wav", np.zeros(16000, np.float32), 16000)
    monkeypatch.chdir(tmp_path)
    assert command("quiet.wav", "--model", DIGITS) == 2
    assert "nothing is said here" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command("nobody.wav") == 2  # before anything is read
    assert "a picture needs matplotlib: pip install" in capsys.readouterr().err
    assert command(CLIP, "--model", DIGITS, "--json", "numbers.json") == 0


def test_whisper(tiny: WhisperModel) -> None:
    seen = view(tiny, samples(), name="tiny.en")
    assert len(seen.words) == 6
    (only,) = seen.maps
    assert only.values.shape == (6, 110)
    assert (np.diff(only.values.argmax(1)) >= 0).mean() > 0.7
    assert seen.statistics["mean"]["monotonicity"] >= 0.8
    assert np.array(seen.statistics["share_of_sound"]).max() < 1  # the rest lies on the silence behind
    assert listen(tiny, samples()) == seen.words
    assert draw(seen).axes[2].images[0].get_array().shape == (6, 110)
    assert not torch.is_inference_mode_enabled()
