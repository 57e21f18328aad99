"""`speechattn translate`: who may translate, what it is told, and what comes out."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from test_whisper import multilingual

from speechattn.cli import main
from speechattn.cli.main import parser
from speechattn.cli.options import build_session
from speechattn.errors import ModelError
from speechattn.live import Event, Session
from speechattn.live.windowed import Windowed
from speechattn.model import Recognizer, load_model
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.stream_att import Characters, Punctuation, Words
from speechattn.pretrained.whisper import WhisperModel
from speechattn.search.greedy import Greedy

DIGITS = Path(__file__).parent / "digits"
OURS = "speechattn/en-tiny-stream"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recogniser of the digits, which from now on is said to translate English to German."""
    path = tmp_path_factory.mktemp("models") / "en-de"
    shutil.copytree(DIGITS, path)
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump({**config, "target_language": "de"}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two utterances with a pause."""
    x, rate = soundfile.read(DIGITS / "00.flac")
    y, _ = soundfile.read(DIGITS / "12.flac")
    path = tmp_path_factory.mktemp("speech") / "talk.wav"
    soundfile.write(path, np.concatenate([x, np.zeros(rate), y]), rate)
    return path


def text(events: Sequence[Event]) -> str:
    return "".join(event.committed for event in events)


def test_all_formats_say_the_same(
    folder: Path, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, rate = soundfile.read(speech)
    model = load_model(folder, task="translate")
    assert isinstance(model, Recognizer)
    session = Session(model, search=model.search("aligned"))
    expected = text(session.feed(x, rate) + session.finish()).split()
    assert len(expected) > 6
    given = ["translate", str(speech), "--model", str(folder)]
    said = {}
    for kind in (None, "text", "jsonl"):
        assert main([*given, *(["--format", kind] if kind else [])]) == 0
        said[kind] = capsys.readouterr().out
    assert said[None].split() == said["text"].split() == expected
    events = [Event.from_json(line) for line in said["jsonl"].splitlines()]
    assert text(events).split() == expected
    assert main([*given, "--format", "srt", "-o", str(tmp_path)]) == 0
    lines = (tmp_path / "talk.srt").read_text().splitlines()
    assert " ".join(line for line in lines if line and "-->" not in line and not line.isdecimal()).split() == expected
    for other in (
        ["--source-language", "en", "--target-language", "de"],
        ["--language", "en", "--frame-threshold", "4"],
    ):
        assert main([*given, *other]) == 0
        assert capsys.readouterr().out.split() == expected


def test_standard_input_is_a_source(
    folder: Path, speech: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    x, rate = soundfile.read(speech, dtype="int16")
    said = []
    for kind in ("text", "txt"):
        pipe = io.TextIOWrapper(io.BytesIO(x.astype("<i2").tobytes()))
        monkeypatch.setattr("sys.stdin", pipe)
        assert main(["translate", "-", "--rate", str(rate), "--model", str(folder), "--format", kind]) == 0
        said.append(capsys.readouterr().out.split())
    assert main(["translate", str(speech), "--model", str(folder)]) == 0
    assert said[0] == said[1] == capsys.readouterr().out.split()


def test_a_beam_is_that_of_the_usual_search(folder: Path, speech: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The search that asks a policy has none."""
    model, given = load_model(folder, task="translate"), ["translate", str(speech), "--model", str(folder)]
    assert isinstance(model, Recognizer)
    session = Session(model, search=model.search(beam_size=2))
    assert main([*given, "--beam-size", "2"]) == 0
    assert capsys.readouterr().out.split() == text(session.feed(*soundfile.read(speech)) + session.finish()).split()
    assert main([*given, "--beam-size", "2", "--search", "aligned"]) == 2
    assert "--beam-size 2" in capsys.readouterr().err


REFUSED = [
    (["translate", "ok.wav"], f"{OURS}: task translate: this model cannot"),
    (["translate", "ok.wav", "--model", "tiny.en"], "tiny.en knows English only: it cannot translate"),
    (["translate", "ok.wav", "--model", "FOLDER", "--target-language", "fr"], "translates to de, not to fr"),
    (["translate", "ok.wav", "--model", "FOLDER", "--source-language", "es"], "this model knows en, not es"),
    (["translate", "ok.wav", "--model", "FOLDER", "--offline"], "--search attention commits whole utterances"),
    (["translate", "ok.wav", "--model", "FOLDER", "--history", "words=5"], "--history does nothing with"),
    (["translate", "ok.wav", "--model", "tiny.en", "--target-language", "de"], "to English (en), not to de"),
    (["transcribe", "ok.wav", "--model", "FOLDER"], "this model translates to de; say `speechattn translate`"),
    (["stream", "ok.wav", "--fast", "--model", "FOLDER"], "say `speechattn translate`"),
    (["transcribe", "ok.wav", "--model", "tiny.en", "--target-language", "en"], "goes with task translate"),
    (["transcribe", "ok.wav", "--target-language", "de"], f"{OURS}: this model does not translate, not to de"),
    (["translate", "ok.wav", "mic"], "mic is a source of its own"),
    (["translate", "ok.wav", "ok.wav", "--format", "text"], "several sources does not go with --format text"),
    (["translate", "ok.wav", "--format", "jsonl", "-o", "out"], "--output-dir does not go with --format jsonl"),
    (["translate", "ok.wav", "--paced"], "--paced does not go with --format txt"),
    (["translate", "-", "--paced", "--format", "text"], "--paced does not go with --format text of -"),
    (["translate", "ok.wav", "--model", "FOLDER", "--rate", "8000"], "--rate does not go with a file"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_refused(
    arguments: list[str], words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    soundfile.write("ok.wav", np.random.default_rng(0).standard_normal(8000) * 0.01, 16000)
    assert main([str(folder) if part == "FOLDER" else part for part in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]


def test_who_says_so_may_translate_where_others_transcribe(
    folder: Path, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transcribe", str(speech), "--model", str(folder), "--task", "translate", "--search", "aligned"]) == 0
    assert len(capsys.readouterr().out.split()) > 6
    assert load_model(folder).translates
    assert not load_model(DIGITS).translates
    bad = folder.parent / "bad"
    shutil.copytree(folder, bad)
    config = (bad / "config.yaml").read_text().replace("target_language: de", "target_language: 3")
    (bad / "config.yaml").write_text(config)
    with pytest.raises(ModelError, match="target_language 3"):
        load_model(bad)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that decoders get."""
    prompts: list[list[int]] = []
    whole = Greedy.draft

    def draft(self: Greedy, memory: Any, prompt: Sequence[int], *rest: Any, **more: Any) -> Any:
        prompts.append(list(prompt))
        return whole(self, memory, prompt, *rest, **{**more, "max_tokens": 4})

    monkeypatch.setattr(Greedy, "draft", draft)
    return prompts


def test_whisper_is_told_to_translate(
    speech: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random multilingual one: start of transcript, language, task, no timestamps; its words may look back."""
    made: dict[str, Any] = {}

    def load(name: str, **options: Any) -> WhisperModel:
        made.update(options, model=multilingual(options["language"], options["task"]))
        return made["model"]  # type: ignore[no-any-return]

    monkeypatch.setattr("speechattn.model.load.load", load)
    prompts = spied(monkeypatch)
    given = ["translate", str(speech), "--model", "some.pt", "--min-chunk-size", "3", "--no-vad"]
    assert main([*given, "--source-language", "de", "--target-language", "en"]) == 0
    capsys.readouterr()
    special = made["model"].tokenizer.special
    wanted = [special[f"<|{name}|>"] for name in ("startoftranscript", "de", "translate", "notimestamps")]
    assert prompts
    assert all(prompt == wanted for prompt in prompts)
    assert made["model"].translates
    policy = made["model"].policy()
    assert policy == AlignAtt(made["model"].alignment_heads, 20, rewind_threshold=None)
    listener = Session(made["model"]).listener
    assert isinstance(listener, Windowed)
    prompts.clear()
    assert main(["transcribe", *given[1:], "--language", "de"]) == 0
    assert prompts[0][2] == special["<|transcribe|>"]
    assert not made["model"].translates
    assert made["model"].policy().rewind_threshold == 200
    assert main([*given, "--target-language", "de"]) == 2
    assert "to English (en), not to de" in capsys.readouterr().err
    assert main([*given, "--offline"]) == 2
    assert "--min-chunk-size does nothing with --offline" in capsys.readouterr().err


def test_the_page_of_translation_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    page = (root / "docs" / "translation.md").read_text(encoding="utf-8")
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(example, "docs/translation.md", "exec"), {})
    assert " tokens" in capsys.readouterr().out
    lines = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[0].splitlines()
    commands = [line.split("#")[0].split("|")[-1] for line in lines]
    for command in commands:
        assert parser().parse_args(shlex.split(command)[1:]).run
    assert len(commands) == 5


def test_the_history_of_the_options() -> None:
    for more, history, longest in (
        (["--history", "words"], Words(20), 28.0), (["--history", "words=7", "--audio-max-len", "9"], Words(7), 9.0),
        (["--history", "chars=30"], Characters(30), 28.0), (["--history", "punctuation"], Punctuation(), 28.0),
        ([], None, 12.0),
    ):  # fmt: skip
        options = parser().parse_args(["translate", "x.wav", "--model", "m", "--no-vad", *more])
        listener = build_session(options, multilingual("de", "translate")).listener
        assert isinstance(listener, Windowed)
        assert (listener.settings.history, listener.settings.max_window_s) == (history, longest)
        assert listener.reader == listener.policy
