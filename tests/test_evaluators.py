"""Our sessions inside SimulEval and simulstream, against doubles that hold their contracts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from evaluator_doubles import evaluate, install, merged, parser, process
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.cli.options import build_live_model
from speechattn.errors import InputError, SpeechAttnError
from speechattn.evaluators import voice as voices
from speechattn.evaluators.shown import MARK, Output, Shown, string_of
from speechattn.evaluators.talk import Talk, add_talk_options
from speechattn.evaluators.voice import Strict, Voice, add_voice_options, options_of
from speechattn.live.events import Event
from speechattn.live.session import Session
from speechattn.model import Recognizer, load_model
from speechattn.score.latency.simulstream import Chunk, Recording

FOLDER = Path(__file__).parent / "digits"
GIVEN = {"model": str(FOLDER), "search": "ctc", "beam_size": 1}
TYPE = "speechattn.evaluators.simulstream.SpeechAttnProcessor"


def sound(*numbers: int) -> Any:
    """Clips one after the other."""
    return np.concatenate([soundfile.read(FOLDER / f"{n:02d}.flac", dtype="float32")[0] for n in numbers])


SOUNDS = [sound(4, 10, 13), sound(12, 10), sound(13, 4)]


@cache
def model() -> Recognizer:
    found = load_model(FOLDER)
    assert isinstance(found, Recognizer)
    return found


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        patch.setattr(voices, "build_live_model", lambda options: model())
        yield


def agent(*words: str) -> Any:
    from speechattn.evaluators.simuleval import SpeechAttnAgent

    options = parser()
    SpeechAttnAgent.add_args(options)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in GIVEN.items()]
    return SpeechAttnAgent(options.parse_args([*given, *words]))


def talk(**given: Any) -> Talk:
    options = Strict(allow_abbrev=False, add_help=False)
    add_voice_options(options)
    add_talk_options(options)
    return Talk(Voice(options_of({**GIVEN, **given}, options)))


def committed(samples: Any, cuts: list[int]) -> list[tuple[str, float]]:
    """What a session says of the same sound: each word with the ms of sound that it had been given."""
    session, words, at = Session(model(), search=model().search("ctc", beam_size=1)), list[tuple[str, float]](), 0
    for end in cuts:
        events = session.feed(samples[at:end], 16000) + (session.finish() if end == len(samples) else [])
        words += [(word, end / 16) for event in events for word in event.committed.split()]
        at = end
    return words


def test_the_agent_writes_words_when_they_are_committed() -> None:
    found = evaluate(agent(), [(x, 16000) for x in SOUNDS], 250)
    for x, said in zip(SOUNDS, found, strict=True):
        expected = committed(x, [*range(4000, len(x), 4000), len(x)])
        assert [word for word, _ in said] == [word for word, _ in expected]
        assert [delay for _, delay in said] == pytest.approx([delay for _, delay in expected])
        assert len({delay for _, delay in said}) > 1
    whole = evaluate(agent(), [(SOUNDS[0], 16000)], 1e6)[0]
    assert [(word, round(delay)) for word, delay in whole] == [(word, len(SOUNDS[0]) // 16) for word, _ in found[0]]


def test_the_agent_forgets_what_it_heard_and_keeps_no_samples() -> None:
    one = agent()
    twice = evaluate(one, [(SOUNDS[0], 16000)] * 2, 1)  # SimulEval's own segments: 1 ms
    assert twice[0] == twice[1]
    assert " ".join(word for word, _ in twice[0]) == " ".join(
        word for word, _ in committed(SOUNDS[0], [len(SOUNDS[0])])
    )
    assert one.states.source == []
    assert evaluate(one, [(np.zeros(0), 16000), (np.zeros((100, 2)), 8000)], 10) == [[], []]


def test_states_of_several_recordings_do_not_mix() -> None:
    """As SimulEval's pipelines have them."""
    from evaluator_doubles import Segment

    one = agent()
    states, said = [one.build_states() for _ in SOUNDS], ["" for _ in SOUNDS]
    for at in range(0, max(map(len, SOUNDS)), 4000):
        for i, x in enumerate(SOUNDS):
            if at < len(x):
                piece = Segment(x[at : at + 4000].tolist(), at + 4000 >= len(x), 16000)
                said[i] += one.pushpop(piece, states[i])[0]
    assert [text.split() for text in said] == [[word for word, _ in committed(x, [len(x)])] for x in SOUNDS]


def test_options_of_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agent("--dtype", "fp16").voice.options.dtype == agent("--fp16").voice.options.dtype == "float16"
    one = agent()
    assert one.voice.options.dtype == "float32"
    one.to("cpu", fp16=False)
    for device, half in (("cuda", False), ("cpu", True)):
        with pytest.raises(InputError, match="give --device and --dtype"):
            one.to(device, fp16=half)
    with pytest.raises(InputError, match="--no-vad does nothing"):
        agent("--no-vad")
    monkeypatch.undo()
    install(monkeypatch)
    monkeypatch.setattr(voices, "build_live_model", build_live_model)
    with pytest.raises(SpeechAttnError, match="does not translate, not to de"):
        agent("--target-language=de")


def test_the_agent_refuses_a_language_that_it_does_not_write() -> None:
    from evaluator_doubles import Segment

    one = agent()
    one.pushpop(Segment([0.0], False, 16000, "en"))
    with pytest.raises(InputError, match="writes en, not de"):
        one.pushpop(Segment([0.0], False, 16000, "de"))


@pytest.mark.parametrize("unit", ["spm", "word", "char"])
@pytest.mark.parametrize("unstable", [False, True])
def test_the_log_of_a_processor_is_the_text_of_its_session(unit: Any, unstable: bool) -> None:
    from speechattn.evaluators.simulstream import SpeechAttnProcessor

    config = SimpleNamespace(
        **GIVEN, type=TYPE, detokenizer_type="simuleval", latency_unit=unit, speech_chunk_size=0.25, unstable=unstable
    )
    SpeechAttnProcessor.load_model(config)
    processor = SpeechAttnProcessor(config)
    for x in SOUNDS[: 1 + (unit == "spm")]:
        processor.set_source_language("en")
        processor.set_target_language("en")
        said, shown, erased = process(processor, x), "", 0
        for _, output in said:
            assert shown.endswith(output.deleted_string)
            shown = shown.removesuffix(output.deleted_string) + output.new_string
            erased += len(output.deleted_tokens)
        steps = [Chunk(1000 * at, 0.0, tuple(one.new_tokens), tuple(one.deleted_tokens)) for at, one in said]
        log = Recording("x", steps).said(tokens=unit, unit="word")
        expected = committed(x, [*range(4000, len(x) + 1, 4000), len(x)])
        delays = [delay for _, delay in expected]
        assert shown == log.text == " ".join(word for word, _ in expected)
        if unstable:
            assert np.mean(log.delays) < np.mean(delays) - 100
        else:
            assert log.delays == pytest.approx(delays)
            assert erased <= (unit == "word")  # what simulstream's merge needs


def test_what_is_deleted_at_the_end_is_not_lost() -> None:
    """Where the last chunk says nothing new, simulstream's merge would lose it."""
    shown = Shown("spm", unstable=True)
    first = shown.show([event(" one", " two three")])
    quiet = shown.again(shown.show([]))
    end = shown.show([event(" too", "")])
    assert merged([first], None).new_tokens == ["▁one".removeprefix(MARK), "▁two", "▁three"]
    both = merged([quiet, end], "".join)
    assert (both.deleted_tokens, both.new_tokens) == (["▁two", "▁three"], ["▁too"])


def test_a_last_chunk_without_news_brings_its_last_token_again() -> None:
    one, said = talk(unstable=True), iter([[event(" one", " two")], [], []])
    one.session = SimpleNamespace(feed=lambda *_: next(said), finish=lambda: [event(" too")])  # type: ignore[assignment]
    outputs = [one.hear(np.zeros(n, np.float32)) for n in (8000, 8000, 100)]
    assert [output.new_tokens for output in outputs] == [["one", "▁two"], [], ["▁two"]]
    assert outputs[1].deleted_tokens == []
    assert vars(merged([outputs[2], one.end()], one.text)) == {
        "deleted_tokens": ["▁two"], "deleted_string": " two", "new_tokens": ["▁too"], "new_string": " too",
    }  # fmt: skip


def event(text: str, unstable: str = "") -> Event:
    return Event("text", text, unstable, (), 0.0)


def test_a_mark_that_comes_late_belongs_to_its_word() -> None:
    for unit, tokens in (("spm", [["yes"], [","], ["▁no"]]), ("word", [["yes"], ["yes,"], ["no"]])):
        shown = Shown(unit)  # type: ignore[arg-type]
        said = [shown.show([event(text)]) for text in (" yes", ",", " no")]
        assert [output.new_tokens for output in said] == tokens
        assert [output.deleted_tokens for output in said] == [[], ["yes"] if unit == "word" else [], []]
    assert said[1].new_string == "yes,"
    assert said[2].new_string == " no"


PIECES = st.lists(
    st.tuples(st.sampled_from(["", " a", " bc", " a  d", ".", "x"]), st.sampled_from(["", " a", " e f", "y"]))
)


@settings(deadline=None, max_examples=150)
@given(said=PIECES, unit=st.sampled_from(["spm", "word", "char"]), unstable=st.booleans())
def test_tokens_and_strings_always_make_the_text(said: list[tuple[str, str]], unit: Any, unstable: bool) -> None:
    shown, tokens, text, committed = Shown(unit, unstable=unstable), list[str](), "", ""
    for more, rest in said:
        output = shown.show([event(more, rest)])
        for there, gone in ((tokens, output.deleted_tokens), (text, output.deleted_string)):
            assert not gone or there[-len(gone) :] == gone
        tokens = tokens[: len(tokens) - len(output.deleted_tokens)] + output.new_tokens
        text = text[: len(text) - len(output.deleted_string)] + output.new_string
        committed += more
        assert text.split() == (committed + rest * unstable).split()
        assert string_of(tokens, unit, begun=False) == text
        assert len(shown.loose) <= len(rest) + 1
        if unit != "word" and not unstable:
            assert output.deleted_tokens == []


def test_languages_and_settings_that_cannot_be_honoured() -> None:
    from speechattn.evaluators.simulstream import SpeechAttnProcessor

    one = talk()
    one.speak(source="en")
    for wanted, words in (({"source": "de"}, "knows en, not de"), ({"target": "fr"}, "writes en, not fr")):
        with pytest.raises(InputError, match=words):
            one.speak(**wanted)
    one.hear(SOUNDS[0])
    one.speak(source="en")
    with pytest.raises(InputError, match="cannot change once it has begun"):
        one.speak(target="en")
    one.end()
    with pytest.raises(InputError, match="finished"):
        one.hear(SOUNDS[0])
    one.clear()
    assert one.source is None
    base = {**GIVEN, "type": TYPE, "detokenizer_type": "simuleval", "latency_unit": "spm"}
    for change, words in (
        ({"beam_sise": 4}, "beam_sise: no such setting"), ({"detokenizer_type": "hf"}, "scoring needs"),
        ({"no_vad": True}, "--no-vad does nothing"), ({"beam_size": True}, "expected one argument"),
        ({"unstable": 3}, "ignored explicit argument"), ({"latency_unit": "words"}, "invalid choice"),
        ({"speech_chunk_size": 0}, "0.01 to 60 s"), ({"model": {"a": 1}}, "model: wanted a text"),
        ({"beam_size": "x"}, "invalid int"),
    ):  # fmt: skip
        config = SimpleNamespace(**{**base, **change})
        with pytest.raises(SpeechAttnError, match=words):
            SpeechAttnProcessor(config)


def test_processors_of_one_configuration_share_the_model() -> None:
    from speechattn.evaluators.simulstream import SpeechAttnProcessor

    base = {**GIVEN, "type": TYPE, "detokenizer_type": "simuleval", "latency_unit": "spm", "hotwords_file": None}
    first, second = (SpeechAttnProcessor(SimpleNamespace(**base)) for _ in range(2))
    other = SpeechAttnProcessor(SimpleNamespace(**{**base, "beam_size": 2}))
    assert first.talk.voice is second.talk.voice
    assert other.talk.voice is not first.talk.voice
    assert (first.speech_chunk_size, other.talk.session.listener.search.size) == (0.5, 2)
    outputs = [[], []]  # type: ignore[var-annotated]
    for at in range(0, len(SOUNDS[1]), 8000):
        for processor, x, said in ((first, SOUNDS[1], outputs[0]), (second, SOUNDS[2], outputs[1])):
            said.append(processor.process_chunk(x[at : at + 8000]))
    for processor, x, said in ((first, SOUNDS[1], outputs[0]), (second, SOUNDS[2], outputs[1])):
        said.append(processor.end_of_stream())
        text = "".join(output.new_string for output in said)
        assert text == " ".join(word for word, _ in committed(x, [len(x)]))


def test_settings_of_a_file_are_options() -> None:
    options = Strict(allow_abbrev=False, add_help=False)
    options.add_argument("--plugin", action="append", default=[])
    options.add_argument("--no-vad", action="store_true", default=None)
    options.add_argument("--silence", type=float)
    given = {"plugin": ["a", "b"], "no_vad": True, "silence": -1}
    assert vars(options_of(given, options)) == {"plugin": ["a", "b"], "no_vad": True, "silence": -1.0}
    assert options_of({"no_vad": False, "silence": None}, options).no_vad is None


def test_a_multilingual_whisper_is_one_for_each_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_whisper import multilingual

    whisper = multilingual()
    monkeypatch.setattr(voices, "build_live_model", lambda options: whisper)
    options = argparse.ArgumentParser()
    add_voice_options(options)
    one = Voice(options.parse_args(["--no-vad"]))
    first, second = one.hearing(None), one.hearing("de")
    assert first is not whisper
    assert first.network is second.network is whisper.network  # type: ignore[union-attr]
    assert (first.language, second.language) == (None, "de")
    assert one.session("de", "de").model.language == "de"  # type: ignore[union-attr]
    for source, target, words in (("fr", None, "does not know the language fr"), (None, "de", "does not name, not de")):
        with pytest.raises(SpeechAttnError, match=words):
            one.session(source, target)
    english = multilingual("de", "translate")
    monkeypatch.setattr(voices, "build_live_model", lambda options: english)
    one = Voice(options.parse_args(["--no-vad", "--task", "translate"]))
    one.session("de", "en")
    with pytest.raises(InputError, match="writes en, not de"):
        one.session("de", "de")


def test_outputs_have_lists_of_their_own() -> None:
    """simulstream adds to them."""
    shown = Shown("spm", unstable=True)
    shown.show([event("", " one")]).new_tokens.append("more")
    assert shown.show([event("", "")]) == Output([], "", ["one"], "one")
