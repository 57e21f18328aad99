"""Commands as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from speechattn.attention import BACKENDS, SelfAttention
from speechattn.audio.read import Recording
from speechattn.cli import main
from speechattn.cli.main import parser
from speechattn.cli.options import build_live_model
from speechattn.data.fotaq import read_split
from speechattn.live.events import Event

DIGITS = Path(__file__).parent / "digits"


@pytest.fixture(scope="module")
def speech(fotaq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real clips with a pause, as an 11.025 kHz stereo file."""
    clips = [line for line in read_split(fotaq, "test") if line.dialogue == "TAM1"][1:3]
    pieces = [np.concatenate([soundfile.read(clip.path)[0], np.zeros(11200)]) for clip in clips]
    path = tmp_path_factory.mktemp("speech") / "talk.wav"
    x = np.concatenate(pieces)[:: 16000 // 8000]
    soundfile.write(path, np.stack([x, x], 1), 8000)
    return path


def words(text: str) -> list[str]:
    return text.lower().replace(".", "").replace(",", "").split()


@pytest.mark.parametrize("kind", ["srt", "json"])
def test_transcribe_writes_every_format(kind: str, speech: Path, tmp_path: Path) -> None:
    assert main(["transcribe", str(speech), "--format", kind, "--output-dir", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / f"talk.{kind}").read_text()
    assert "mission" in text
    if kind == "json":
        assert "mission" in json.loads(text)["text"]


def test_transcribe_offline_says_the_same_words(speech: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whisper = ["transcribe", str(speech), "--model", "tiny.en"]
    assert main(whisper) == 0
    live = words(capsys.readouterr().out)
    assert main([*whisper, "--offline"]) == 0
    offline = words(capsys.readouterr().out)
    said = {"my", "husband", "and", "i", "run", "this", "mission"}
    assert said <= set(live)
    assert said <= set(offline)


def test_stream_and_score_and_log(speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", str(speech), "--fast", "--format", "jsonl"]) == 0
    log = capsys.readouterr().out
    events = [Event.from_json(line) for line in log.splitlines()]
    assert "mission" in "".join(event.committed for event in events)
    (tmp_path / "log.jsonl").write_text(log)
    (tmp_path / "ref.txt").write_text("I'm Mary-Lou Cook.\nMy husband Jimmy and I run this mission.\n")
    assert main(["score", "wer", str(tmp_path / "ref.txt"), str(tmp_path / "log.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] > 9
    assert main(["score", "latency", str(tmp_path / "log.jsonl"), "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["mean_s"] < 3


def test_stream_reads_raw_samples_from_a_pipe(speech: Path) -> None:
    x, rate = soundfile.read(speech, dtype="int16")
    done = subprocess.run(
        [sys.executable, "-m", "speechattn", "stream", "-", "--rate", str(rate), "--channels", "2"],
        input=x.astype("<i2").tobytes(), capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert b"mission" in done.stdout


WHISPER = ["transcribe", "ok.wav", "--model", "tiny.en"]
OURS = "speechattn/en-tiny-stream"
BAD = [
    (["transcribe", "nothing.wav"], "nothing.wav: No such file"),
    (["transcribe", "empty.wav"], "the file is empty"),
    (["transcribe", "text.wav"], "not audio that can be read"),
    (["transcribe", "zero.wav"], "holds no samples"),
    (["transcribe", "nan.wav"], "not a finite number"),
    (["transcribe", "ok.wav", "ok.wav", "--output-dir", "o"], "overwrite"),
    (["transcribe", "ok.wav", "--model", "."], "no model.bin"),
    (["transcribe", "ok.wav", "--model", "tini"], "not one of tiny"),
    ([*WHISPER, "--language", "de"], "English only"),
    ([*WHISPER, "--task", "translate"], "English only"),
    (["transcribe", "ok.wav", "--device", "cuda:7"], "cannot be used"),
    (["transcribe", "ok.wav", "--device", "toaster"], "cannot be used"),
    ([*WHISPER, "--policy", "local-agreement", "--frame-threshold", "3"], "belongs to alignatt"),
    ([*WHISPER, "--attn-layer", "1"], "belongs to alignatt-fbk"),
    ([*WHISPER, "--policy", "alignatt-fbk", "--attn-layer", "9"], "layers 0 to 3"),
    ([*WHISPER, "--frame-threshold", "-1"], "0 or more"),
    ([*WHISPER, "--policy", "edatt", "--attn-threshold", "0"], "--policy edatt: alpha 0.0"),
    ([*WHISPER, "--attn-threshold", "0.2"], "belongs to edatt; alignatt has no such setting"),
    ([*WHISPER, "--policy", "hold-n", "--hold-n", "-1"], "0 or more tokens"),
    (["transcribe", "ok.wav", "--policy", "wait-k", "--hold-n", "2"], "belongs to hold-n; wait-k has no such setting"),
    (["transcribe", "ok.wav", "--policy", "local-agreement", "--agreement", "0"], "at least 1 draft"),
    ([*WHISPER, "--min-chunk-size", "0"], "min_chunk_s"),
    ([*WHISPER, "--audio-max-len", "40"], "max_window_s"),
    ([*WHISPER, "--offline", "--min-chunk-size", "2"], "nothing with --offline"),
    (["transcribe", "ok.wav", "--threads", "0"], "at least 1"),
    (["transcribe", "ok.wav", "ok.wav", "--backend", "triton"], "cannot run with the backend triton: it needs CUDA"),
    (["transcribe", "ok.wav", "--backend", "window"], "run with the backend window: the pattern is not bounded"),
    (["stream", "ok.wav", "--fast", "--backend", "flex"], "run with the backend flex: it needs CUDA"),
    ([*WHISPER, "--chunk-ms", "320"], "--chunk-ms does nothing with tiny.en, which reads windows"),
    (["transcribe", "ok.wav", "--model", "speechattn/nobody"], f"no such model in this package, which has {OURS}"),
    (["transcribe", "ok.wav", "--language", "de"], f"{OURS}: this model knows en, not de"),
    (["transcribe", "ok.wav", "--task", "translate"], f"{OURS}: task translate: this model cannot"),
    (["transcribe", "ok.wav", "--policy", "alignatt-fbk"], "for models that read windows"),
    (["transcribe", "ok.wav", "--attn-layer", "1"], f"--attn-layer does nothing with {OURS}"),
    (["transcribe", "ok.wav", "--min-chunk-size", "2"], f"--min-chunk-size does nothing with {OURS}"),
    (["transcribe", "ok.wav", "--audio-max-len", "20"], f"--audio-max-len does nothing with {OURS}"),
    (["stream", "ok.wav", "--fast", "--no-vad"], f"--no-vad does nothing with {OURS}"),
    (["transcribe", "ok.wav", "--offline"], "--offline changes nothing for a model that streams"),
    (["transcribe", "ok.wav", "--beam-size", "4"], "--beam-size 4: the search of this model has one hypothesis"),
    (["transcribe", "ok.wav", "--chunk-ms", "330"], "a chunk of 330 ms: wanted a multiple of 20 ms"),
    (["transcribe", "ok.wav", "--chunk-ms", "0"], "a chunk of 0 ms: wanted a multiple of 20 ms"),
    (["stream", "ok.wav", "--fast", "--chunk-ms", "-640"], "a chunk of -640 ms: wanted a multiple"),
    (["stream", "ok.wav", "--fast", "--chunk-ms", "12000"], "a chunk of 12000 ms: at most 10000 ms"),
    (["attention", "ok.wav", "--task", "translate"], f"{OURS}: task translate: this model cannot"),
    (["align", "ok.wav", "line.txt", "--model", "tiny.en"], "tiny.en has no CTC head, which alignment needs"),
    (["stream", "ok.wav", "--rate", "8000"], "does not go with a file"),
    (["stream", "-", "--rate", "0"], "--rate 0"),
    (["stream", "-", "--channels", "0"], "--channels 0"),
    (["stream", "-", "--fast"], "does not go with -"),
    (["score", "wer", "ok.wav", "ok.wav"], "not UTF-8"),
    (["score", "latency", "text.wav"], "line 1: not an event"),
    (["demo", "--clips", "0"], "at least 1"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: str(value)[:60])
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.wav").touch()
    Path("text.wav").write_text("hello\n" * 100)
    Path("line.txt").write_text("hello\n")
    soundfile.write("zero.wav", np.zeros(0), 16000)
    soundfile.write("nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    soundfile.write("ok.wav", np.random.default_rng(0).standard_normal(16000) * 0.01, 16000)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("speechattn: ")
    assert words in said[0]


@pytest.mark.parametrize(
    "arguments",
    [["transcribe", "a.wav", "--mdoel", "x"], ["stream", "--backend", "f"], ["strem"], ["transcribe"], ["score"], []],
)
def test_unknown_words_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_broken_file_does_not_lose_the_others(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.flac"
    x, rate = soundfile.read(speech)
    soundfile.write(cut, np.concatenate([x, x]), rate)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    assert main(["transcribe", "no.wav", str(cut), str(speech), "-o", str(tmp_path)]) == 2
    assert "mission" in (tmp_path / "talk.txt").read_text()
    assert "mission" in (tmp_path / "cut.txt").read_text()
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_a_full_disk_prints_the_transcript_instead(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talk.txt").symlink_to("/dev/full")
    other = tmp_path / "other.wav"
    other.write_bytes(speech.read_bytes())
    assert main(["transcribe", str(speech), str(other), "-o", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "mission" in said.out
    assert "No space left" in said.err
    assert "mission" in (tmp_path / "other.txt").read_text()


def test_a_full_disk_under_a_stream(speech: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "speechattn", "stream", str(speech), "--fast", "--format", "jsonl"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupt_keeps_what_was_committed(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Recording.blocks

    def interrupted(recording: Recording) -> Iterator[np.ndarray]:
        yield from list(whole(recording))[:-1]
        raise KeyboardInterrupt

    monkeypatch.setattr(Recording, "blocks", interrupted)
    assert main(["transcribe", str(speech), str(speech.with_name("other.wav")), "-o", str(tmp_path)]) == 2
    assert "interrupted; what was committed until then is written" in capsys.readouterr().err
    assert "mission" in (tmp_path / "talk.txt").read_text()
    assert main(["stream", str(speech), "--fast", "--format", "text"]) == 2
    said = capsys.readouterr()
    assert "mission" in said.out
    assert "interrupted after" in said.err


def test_a_closed_pipe_is_no_accident(speech: Path) -> None:
    command = f"{sys.executable} -m speechattn stream {speech} --fast --format jsonl | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_doctor_tells_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    models = f"model        {OURS} (default): whole, ", "model        tiny.en"
    for word in ("torch", "cuda", *models, "microphone", "lightning", "attention    window: yes"):
        assert word in said
    found = [line.split()[1] for line in said.splitlines() if line.startswith("attention ")]
    assert found == [f"{name}:" for name in BACKENDS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_doctor_tells_why_kernels_do_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for there, reason in ((True, "no: it needs CUDA, the tensors are on cpu"), (False, "no: triton is not installed")):
        monkeypatch.setattr("speechattn.attention.triton.installed", lambda found=there: found)
        assert main(["doctor"]) == 0
        said = capsys.readouterr().out
        assert f"attention    triton: {reason} (" in said
        assert f"kernels      {reason} (" in said
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["doctor"]) == 0
    assert "kernels      yes, in Triton's interpreter" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["stream", "transcribe"])
def test_attention_is_computed_by_the_backend_that_is_asked_for(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a real model that streams; the words are the same."""
    said = {}
    for name in (None, "auto", "reference"):
        given = [command, str(DIGITS / "00.flac"), "--model", str(DIGITS)]
        given += [] if name is None else ["--backend", name]
        assert main([*given, "--fast"] if command == "stream" else given) == 0
        said[name] = capsys.readouterr().out
        model = build_live_model(parser().parse_args(given))
        layers = [layer for layer in model.modules() if isinstance(layer, SelfAttention)]  # type: ignore[union-attr]
        assert {layer.backend for layer in layers} == {name or "auto"}
    assert said[None]
    assert len({*said.values()}) == 1
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"--backend {{auto,{','.join(BACKENDS)}}}" in capsys.readouterr().out


def test_demo_prints_the_numbers(fotaq: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--fast", "--clips", "6"]) == 0
    said = capsys.readouterr().out
    for word in (
        f"{OURS}, chunks of 640 ms",
        "reason",
        "WER",
        "words against the script",
        "mean",
        "p95",
        "real-time factor",
    ):
        assert word in said


def test_live_view_shows_both_kinds_of_text(speech: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "speechattn", "stream", str(speech), "--fast", "--format", "live"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mission" in done.stdout
    assert "real-time factor" in done.stdout
