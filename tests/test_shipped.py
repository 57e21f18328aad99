"""Weights in few bytes, chunks by name of their length, and the model that is in the package."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_model import CONFIG, made

from speechattn import Session, load_model
from speechattn.audio.read import open_recording
from speechattn.cli import main
from speechattn.cli.main import parser
from speechattn.data.fotaq import read_split
from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames
from speechattn.model import Recognizer, from_config, save_model
from speechattn.model.chunks import set_chunk
from speechattn.model.folder import load_folder
from speechattn.model.load import DEFAULT, located, shipped
from speechattn.model.stored import KINDS, Unfilled, compact, read_weights
from speechattn.score.wer import word_errors

ROOT = Path(__file__).parents[1]
LARGEST_MB = 40


@pytest.fixture(scope="module")
def ours() -> Recognizer:
    model = load_model()
    assert isinstance(model, Recognizer)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("model")
    save_model(made(), path, weights="int8")
    return path


shapes = st.lists(st.integers(0, 5), min_size=2, max_size=4)


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(-40, 30), st.integers(0, 2**31))
def test_in_int8_no_weight_is_off_by_more_than_half_a_step(shape: list[int], power: int, seed: int) -> None:
    """Rows of very different sizes, down to those that float32 can hardly say."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.linspace(power, power - 6, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    w = torch.randn(shape, generator=generator) * sizes
    stored = compact({"w": w}, "int8")
    assert stored["w"].dtype == torch.int8
    assert stored["w"].shape == w.shape
    scale = stored["w.scale"]
    assert scale.dtype == torch.float32
    assert scale.shape == (shape[0],)
    if not w.numel():
        return
    most = w.flatten(1).abs().amax(1)
    torch.testing.assert_close(scale, (most / 127).clamp(min=torch.finfo(torch.float32).tiny), atol=1e-38, rtol=1e-5)
    back = stored["w"].double() * scale.double().reshape(sizes.shape)
    off = (back - w.double()).flatten(1).abs().amax(1)
    assert (off <= scale.double() / 2 * (1 + 1e-5)).all()
    assert (stored["w"].flatten(1).abs().amax(1) == 127)[most > 1e-35].all()  # all of int8 is used
    assert (back[w == 0] == 0).all()


@settings(deadline=None, max_examples=30)
@given(shapes, st.integers(0, 2**31))
def test_in_bfloat16_weights_keep_eight_bits(shape: list[int], seed: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    stored = compact({"w": w}, "bfloat16")
    assert stored.keys() == {"w"}
    assert stored["w"].dtype == torch.bfloat16
    assert ((stored["w"].float() - w).abs() <= w.abs() / 256).all()


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_whole_numbers_stay_as_they_are(kind: str) -> None:
    given = {"bias": torch.randn(7), "seen": torch.arange(6).reshape(2, 3), "mask": torch.ones(2, 2, dtype=torch.bool)}
    stored = compact(given, kind)
    assert stored.keys() == given.keys()
    assert all(torch.equal(stored[name], given[name]) and stored[name].dtype == given[name].dtype for name in given)
    assert compact({"bias": torch.randn(3).double()}, kind)["bias"].dtype == torch.float32


@pytest.mark.parametrize(("kind", "each", "row"), [("float32", 4, 0), ("bfloat16", 2, 0), ("int8", 1, 4)])
def test_a_folder_in_few_bytes_is_the_model_but_for_rounding(kind: str, each: int, row: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = made()
    save_model(model, tmp_path / kind, weights=kind)
    stored = load_file(tmp_path / kind / "model.safetensors")
    wanted = sum(each * w.numel() + row * len(w) if w.dim() > 1 else 4 * w.numel() for w in model.state_dict().values())
    assert sum(x.nbytes for x in stored.values()) == wanted
    back = load_folder(tmp_path / kind)
    off = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127}[kind]
    theirs = back.state_dict()
    for name, w in model.state_dict().items():
        assert theirs[name].dtype == w.dtype
        if w.dim() < 2:
            assert torch.equal(theirs[name], w), name
        else:
            largest = w.flatten(1).abs().amax(1).reshape(-1, *[1] * (w.dim() - 1))
            assert ((theirs[name] - w).abs() <= off * largest * (1 + 1e-5)).all(), name
    x = Frames(torch.randn(1, 8000), torch.ones(1, 8000, dtype=torch.bool))
    a, b = model.listening(x).values, back.listening(x).values
    assert (a - b).abs().mean() <= {"float32": 1e-6, "bfloat16": 0.05, "int8": 0.1}[kind] * a.abs().mean()
    save_model(back, tmp_path / "again", weights=kind)  # which changes no more
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all((again[name].float() - stored[name].float()).abs().max() <= 1e-6 for name in stored)


def test_other_weights_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weights int4: wanted float32, bfloat16, int8"):
        save_model(made(), tmp_path / "new", weights="int4")
    assert not (tmp_path / "new").exists()


def some_matrix(tensors: dict[str, torch.Tensor]) -> str:
    return max((name for name, t in tensors.items() if t.dtype == torch.int8), key=lambda name: tensors[name].numel())


def nan(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[-1] = float("nan")
    return x


SPOILED = {
    "no scale": (lambda t, n: t.pop(f"{n}.scale"), "in int8 without"),
    "no tensor": (lambda t, n: t.pop(n), "scale: the scale of no tensor in int8"),
    "tensor in float": (lambda t, n: t.update({n: t[n].float()}), "scale: the scale of no tensor in int8"),
    "short scale": (lambda t, n: t.update({f"{n}.scale": t[f"{n}.scale"][:-1].clone()}), "a float32 for each row"),
    "square scale": (lambda t, n: t.update({f"{n}.scale": t[f"{n}.scale"][:, None].clone()}), "float32 for each row"),
    "whole scale": (lambda t, n: t.update({f"{n}.scale": t[f"{n}.scale"].long()}), "in int64 for"),
    "NaN in scale": (lambda t, n: t.update({f"{n}.scale": nan(t[f"{n}.scale"])}), "scale: not finite"),
    "negative scale": (lambda t, n: t.update({f"{n}.scale": -t[f"{n}.scale"]}), "not finite numbers of 0 or more"),
    "infinite scale": (lambda t, n: t.update({f"{n}.scale": t[f"{n}.scale"] / 0}), "scale: not finite"),
    "NaN": (lambda t, n: t.update({"heads.ctc.head.bias": nan(t["heads.ctc.head.bias"])}), "head.bias: holds NaN"),
    "wrong shape": (lambda t, n: t.update({n: t[n][:, :-1].clone()}), "do not fit"),
    "more": (lambda t, n: t.update({"more": t[n].clone(), "more.scale": t[f"{n}.scale"].clone()}), r"unknown \(more\)"),
    "int8 vector": (
        lambda t, n: t.update({"heads.ctc.head.bias": torch.ones(11, dtype=torch.int8)}),
        "heads.ctc.head.bias: in int8 without",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_malformed_is_said_with_the_name_of_the_file(what: str, folder: Path, tmp_path: Path) -> None:
    change, said = SPOILED[what]
    shutil.copytree(folder, tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    change(tensors, some_matrix(tensors))
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(ModelError, match=said) as caught:
        load_folder(tmp_path / "bad")
    assert str(caught.value).startswith(f"{tmp_path / 'bad' / 'model.safetensors'}: ")
    assert "\n" not in str(caught.value)


def test_weights_that_diverged_are_not_written_as_a_model(tmp_path: Path) -> None:
    for kind in KINDS:
        for value in (float("nan"), float("inf")):
            model = made()
            with torch.no_grad():
                model.ctc.head.weight[3, 1] = value
            if kind != "int8" and value == float("inf"):
                continue
            with pytest.raises(ModelError, match=r"heads\.ctc\.head\.weight"):
                save_model(model, tmp_path / "bad", weights=kind)


def test_a_parameter_may_be_called_scale(tmp_path: Path) -> None:
    """Such a name is one of the model's own tensors, not a note on another."""
    wanted = {"gain.scale": torch.ones(3), "gain.scales": torch.ones(3, 2)}
    save_file(compact(wanted, "int8"), tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == {"gain.scale", "gain.scales", "gain.scales.scale"}
    found = read_weights(tmp_path / "x.safetensors", wanted)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ModelError, match="not safetensors"):
        read_weights(Path(__file__), {})


def test_nothing_is_drawn_for_weights_that_a_file_replaces(folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_folder(folder)
    assert torch.equal(torch.rand(3), expected)
    with Unfilled():
        layer = torch.nn.Linear(3, 2)
        assert not layer.weight.any()
        assert torch.ones(2).sum() == 2
    assert torch.nn.Linear(3, 2).weight.any()


def with_chunk(frames: int) -> dict[str, Any]:
    config = deepcopy(CONFIG)
    config["encoder"]["init_args"]["span"]["init_args"]["chunk"] = frames
    return config


@pytest.mark.parametrize("frames", [1, 2, 8])
def test_a_model_set_to_a_chunk_is_the_model_of_this_chunk(frames: int) -> None:
    """Whole and step by step; frames are of 40 ms."""
    model = made()
    other = from_config(with_chunk(frames), model.tokenizer).eval()
    other.load_state_dict(model.state_dict())
    set_chunk(model, 40 * frames)
    assert model.listening.plan() == other.listening.plan()
    sound = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    x = Frames(torch.from_numpy(sound)[None], torch.ones(1, 16000, dtype=torch.bool))
    torch.testing.assert_close(model.listening(x).values, other.listening(x).values)
    said = []
    for one in (model, other):
        session = Session(one, search=one.search("ctc", beam_size=1))
        events = session.feed(sound, 8000) + session.finish()
        said.append([(event.committed, event.audio_s) for event in events])
    assert said[0] == said[1]
    assert said[0]


@pytest.mark.parametrize(
    ("ms", "said"), [(0, "multiple of 40 ms"), (-40, "multiple"), (100, "of 40 ms"), (10040, "at most 10000 ms")]
)
def test_what_is_no_chunk_is_refused_and_nothing_changes(ms: int, said: str) -> None:
    model = made()
    before = model.listening.plan()
    with pytest.raises(InputError, match=rf"a chunk of {ms} ms: .*{said}"):
        set_chunk(model, ms)
    assert model.listening.plan() == before


def test_an_encoder_that_hears_everything_has_no_chunk() -> None:
    config = deepcopy(CONFIG)
    config["encoder"]["init_args"]["span"] = {"class_path": "speechattn.attention.Span.full"}
    with pytest.raises(InputError, match="does not hear chunks"):
        set_chunk(from_config(config, made().tokenizer), 640)


def test_the_name_of_the_model_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = shipped()
    assert DEFAULT in there
    place = there[DEFAULT]
    assert place == ROOT / "speechattn" / "models" / "en-tiny-stream"
    assert located(DEFAULT) == located(place) == place
    assert located("tiny.en") == Path("tiny.en")
    with pytest.raises(ModelError, match=f"speechattn/nobody: no such model in this package, which has {DEFAULT}"):
        load_model("speechattn/nobody")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speechattn" / "mine").mkdir(parents=True)
    assert located("speechattn/mine") == Path("speechattn/mine")  # a folder of one's own
    with pytest.raises(ModelError, match=f"{DEFAULT}: pad_s 1.0 belongs to Whisper"):
        load_model(pad_s=1.0)
    assert load_model(language="en").language == "en"


def test_every_command_with_a_model_takes_it() -> None:
    for command in (["transcribe", "a"], ["stream"], ["align", "a", "b"], ["attention", "a"], ["evaluate", "cuts"]):
        assert parser().parse_args(command).model == DEFAULT
    assert parser().parse_args(["evaluate", "tiny.en", "cuts"]).model == "tiny.en"


def test_the_package_has_all_of_it(ours: Recognizer) -> None:
    place = located(DEFAULT)
    names = {path.name for path in place.iterdir()}
    assert names >= {"config.yaml", "model.safetensors", "tokens.txt", "README.md", "LICENCES.md"}
    files = {path for path in place.rglob("*") if path.is_file()}
    assert {path.name for path in files if path.parent.name == "terms"} == {"config.yaml", "model.safetensors"}
    assert sum(path.stat().st_size for path in files) <= LARGEST_MB * 1e6
    assert "(c) 2022 OpenAI" in (place / "LICENCES.md").read_text()
    card = (place / "README.md").read_text()
    for section in ("What it is", "trained on", "test split", "Figures", "bad at", "Licences"):
        assert section in card
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["speechattn"]
    assert {path for glob in data for path in (ROOT / "speechattn").glob(glob)} >= files
    assert ours.language == "en"
    assert ours.frame_s == pytest.approx(0.02)
    assert ours.listening.plan().block == 10240  # 640 ms
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_it_needs_no_network(monkeypatch: pytest.MonkeyPatch, ours: Recognizer) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert load_model(DEFAULT).state_dict().keys() == ours.state_dict().keys()


HARDER = [pytest.param(ms, marks=pytest.mark.slow) for ms in (160, 320, 1280)]


@pytest.mark.parametrize("chunk_ms", [640, *HARDER])
def test_it_hears_an_actor(chunk_ms: int, fotaq: Path) -> None:
    """Four clips of the test split, by every chunk that it was made for; the bound is generous."""
    model = load_model()
    assert isinstance(model, Recognizer)
    set_chunk(model, chunk_ms)
    lines = [line for line in read_split(fotaq, "test") if line.dialogue == "FAYE2"][:4]
    heard = []
    for line in lines:
        session, recording = Session(model), open_recording(Path(line.path))
        events = [event for block in recording.blocks() for event in session.feed(block, recording.rate)]
        heard.append("".join(event.committed for event in events + session.finish()))
    errors = word_errors([line.text for line in lines], heard)
    assert errors.n > 30
    assert errors.substitutions + errors.deletions < 0.3 * errors.n, heard
    assert errors.insertions < 0.2 * errors.n, heard


def test_doctor_says_where_files_are_not_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "en-tiny-stream"
    shutil.copytree(located(DEFAULT), copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    monkeypatch.setattr("speechattn.model.load.shipped", lambda: {DEFAULT: copy})
    assert main(["doctor"]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if DEFAULT in line)
    assert said.startswith(f"model        {DEFAULT}: broken, install speechattn again: {weights}: not safetensors")
    monkeypatch.setattr("speechattn.model.load.shipped", dict)
    assert main(["doctor"]) == 0
    assert f"{DEFAULT}: broken, install speechattn again" in capsys.readouterr().out


def test_nothing_heavy_is_loaded_to_begin(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.zeros(16000), 16000)
    heavy = {"numba", "lhotse", "lightning", "matplotlib", "scipy", "silero_vad", "transformers", "triton", "espnet2",
             "onnxruntime", "huggingface_hub", "tokenizers", "sacrebleu", "requests", "pandas", "whisper_normalizer",
             "sympy", "speechattn.pretrained.espnet"}  # fmt: skip
    code = (
        "import sys; from speechattn.cli import main;"
        f"code = main(['stream', {str(tmp_path / 'x.wav')!r}, '--fast', '--format', 'text']);"
        f"print(code, sorted({heavy!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
