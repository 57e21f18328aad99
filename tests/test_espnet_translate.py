"""Translators of ESPnet's ST task, used: live, by the command, written as ours, trained further."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch
from torch import nn

from speechattn.attention import Span
from speechattn.audio.vad import AlwaysSpeech
from speechattn.cli import main
from speechattn.data.batch import collate
from speechattn.errors import InputError, ModelError
from speechattn.live import Event, Session, Settings, StreamSettings
from speechattn.model import Recognizer, load_model, save_model
from speechattn.model.config import build
from speechattn.pretrained.espnet import is_espnet, load_espnet
from speechattn.task.checkpoint import plain
from speechattn.task.objectives import AttentionObjective, CTCObjective, Objective
from speechattn.task.translator import Translator

pytest.importorskip("espnet2.tasks.st")

from test_espnet_model import made as recogniser
from test_espnet_st import HEARD, LETTERS, TEXTS, listened, sound, taught

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught(tmp_path_factory.mktemp("st"))


@pytest.fixture(scope="module")
def streaming(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as one of ours, which does not wait for the end."""
    folder = tmp_path_factory.mktemp("streams") / "ours"
    save_model(load_espnet(trained, span=Span(16, 4)), folder)
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech") / "talk.wav"
    soundfile.write(path, sound(), 16000)
    return path


def test_live_it_translates_as_offline(trained: Path) -> None:
    """With a span, by the searches of a stream; without, in windows of sound, which a policy asks again and again."""
    model, x = load_espnet(trained, span=Span(16, 4)), sound()
    for kind in ("ctc", "joint", "aligned"):
        expected = model.search(kind).decode(listened(model, x))[0][0]
        settings = StreamSettings(silence_s=60, patience_s=60, certainty=1)
        session = Session(model, search=model.search(kind), settings=settings)
        events = [event for at in range(0, len(x), 1700) for event in session.feed(x[at : at + 1700], 16000)]
        said = "".join(event.committed for event in [*events, *session.finish()])
        assert " ".join(said.split()) == model.tokenizer.decode(expected.tokens)
        assert len(expected.tokens) > 3
    whole, once = load_espnet(trained), Settings(min_chunk_s=60, pause_s=60, max_window_s=28)
    assert whole.listening.plan().block is None
    found = [whole.transcribe(sound(i), settings=once, vad=AlwaysSpeech()).text for i in range(len(TEXTS))]
    assert found == TEXTS


def test_it_stays_a_translator_as_one_of_ours(trained: Path, tmp_path: Path) -> None:
    model = load_espnet(trained, span=Span(16, 4), language="it", target_language="de")
    save_model(model, tmp_path / "ours")
    again = load_model(tmp_path / "ours", task="translate", language="it", target_language="de")
    assert isinstance(again, Recognizer)
    assert not is_espnet(tmp_path / "ours")
    assert (again.language, again.target_language, again.translates) == ("it", "de", True)
    assert again.counter is not None
    assert again.counter.pieces.pieces == model.heads["source"].pieces.pieces
    y = listened(model, sound())
    torch.testing.assert_close(listened(again, sound()).values, y.values, rtol=0, atol=0)
    for name, head in model.heads.items():
        if name != "attention":
            torch.testing.assert_close(again.heads[name](y).values, head(y).values, rtol=0, atol=0)
    assert again.search("joint").decode(y) == model.search("joint").decode(y)


def test_languages_are_those_that_are_given(trained: Path, tmp_path: Path) -> None:
    """ESPnet's config names none. Who recognises says no other language."""
    assert load_espnet(trained).target_language == "und"
    model = load_model(trained, task="translate", language="it", target_language="de")
    assert (model.language, model.target_language) == ("it", "de")
    _, asr = recogniser(tmp_path, double=False)
    assert load_model(asr, language="it").language == "it"
    with pytest.raises(ModelError, match=r"config\.yaml: target_language de: this model does not translate"):
        load_model(asr, target_language="de")
    with pytest.raises(ModelError, match="task translate: this model cannot"):
        load_model(asr, task="translate")
    with pytest.raises(ModelError, match="say `speechattn translate`"):
        load_model(trained, task="transcribe")


def test_training_goes_on_in_the_tokens_of_each_language(trained: Path, tmp_path: Path) -> None:
    model = load_espnet(trained)
    model.tokenizer.save(tmp_path)
    objectives: list[Objective] = [CTCObjective(0.3, "source"), CTCObjective(), AttentionObjective()]
    task = Translator(model.front_end, model.encoder, dict(model.heads), str(tmp_path), objectives)  # type: ignore[arg-type]
    batch = collate([sound()], texts=["pq s"], translations=["ab c"], ids=["u"])
    said = task.said(batch)
    assert said.source is not None
    assert said.source.tokens.tolist() == [[HEARD.index(piece) for piece in ("p", "q", "<space>", "s")]]
    assert said.tokens.tolist() == [[LETTERS.index(piece) for piece in ("a", "b", "<space>", "c")]]
    check = task.spells()
    check("pq s", "ab c")
    with pytest.raises(InputError, match="has no translation"):
        check("pq s", None)
    activation = plain(nn.SiLU)
    assert isinstance(activation, str)  # which a checkpoint may hold
    assert build(activation, "encoder") is nn.SiLU


def test_the_command_translates(trained: Path, speech: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(speech), "--model", str(trained), "--no-vad"]
    for command in (
        ["translate", *given, "--offline"], ["translate", *given, "--policy", "local-agreement"],
        ["translate", *given, "--offline", "--source-language", "it", "--target-language", "de"],
        ["transcribe", *given, "--offline", "--task", "translate"],
    ):  # fmt: skip
        assert main(command) == 0
        assert capsys.readouterr().out.strip() == TEXTS[0]
    assert main(["transcribe", *given]) == 2
    assert "this model translates" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["alignatt", "edatt", "local-agreement", "hold-n", "wait-k", "wait-k-ctc"])
def test_policies_decide(
    policy: str, trained: Path, streaming: Path, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In windows, and with a model that streams."""
    for folder, more in ((trained, ["--no-vad", "--min-chunk-size", "0.4"]), (streaming, ["--search", "aligned"])):
        given = ["translate", str(speech), "--model", str(folder), "--policy", policy, "--format", "jsonl", "--trace"]
        assert main([*given, *more]) == 0
        events = [Event.from_json(line) for line in capsys.readouterr().out.splitlines()]
        assert len(events) > 1
        assert "".join(event.committed for event in events).strip()
        assert any(event.trace for event in events)
