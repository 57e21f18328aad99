"""Sessions, pools and alignment on a model that really recognises (synthetic speech)."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from speechattn import tree
from speechattn.attention import Span, set_span
from speechattn.audio.read import open_recording
from speechattn.audio.vad import AlwaysSpeech
from speechattn.cli import main
from speechattn.errors import InputError
from speechattn.live import Event, Pool, Session, Settings, StreamSettings
from speechattn.model import Recognizer, load_model
from speechattn.model.align import align
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.score.wer import word_errors

FOLDER = Path(__file__).parent / "digits"
LINES: list[dict[str, Any]] = json.loads((FOLDER / "transcripts.json").read_text(encoding="utf-8"))
USUAL = [line for line in LINES if not line["rare"]]
RATE = 16000
KINDS = ["ctc", "transducer", "joint", "rescored"]


@pytest.fixture(scope="module")
def model() -> Recognizer:
    made = load_model(FOLDER)
    assert isinstance(made, Recognizer)
    return made


@pytest.fixture(scope="module")
def exact() -> Recognizer:
    made = load_model(FOLDER, dtype="float64")
    assert isinstance(made, Recognizer)
    return made


def samples(line: dict[str, Any]) -> np.ndarray:
    return soundfile.read(FOLDER / line["file"], dtype="float32")[0]


def joined(lines: list[dict[str, Any]], gap_s: float) -> np.ndarray:
    gap = np.zeros(round(gap_s * RATE), np.float32)
    return np.concatenate([part for line in lines for part in (samples(line), gap)])


def text(events: list[Event]) -> str:
    return "".join(event.committed for event in events).strip()


@pytest.mark.parametrize("kind", [*KINDS, "triggered"])
def test_words_come_live_with_times_and_confidence(model: Recognizer, kind: str) -> None:
    said, off = [], []
    for line in USUAL:
        found = model.transcribe(FOLDER / line["file"], search=model.search(kind, beam_size=4))
        said.append(found.text)
        if found.text == line["text"]:
            pairs = list(zip(found.words, line["words"], strict=True))
            off += [abs(word.start - true["start"]) for word, true in pairs]
            off += [abs(word.end - true["end"]) for word, true in pairs]
            assert all(0 < word.confidence <= 1 for word in found.words)
            assert [word.start for word in found.words] == sorted(word.start for word in found.words)
    errors = word_errors([line["text"] for line in USUAL], said, normalise="none")
    assert errors.rate <= 0.06, list(zip(said, USUAL, strict=True))
    assert np.median(off) <= 0.12
    assert np.percentile(off, 95) <= 0.35


@pytest.mark.parametrize("kind", KINDS)
def test_events_do_not_depend_on_the_cuts(exact: Recognizer, kind: str) -> None:
    sound = joined(USUAL[2:5], 0.8)
    chance = random.Random(3)
    runs = []
    for _ in range(2):
        session = Session(exact, search=exact.search(kind, beam_size=3))
        cuts = sorted(chance.randrange(len(sound)) for _ in range(9))
        events = [event for part in np.split(sound, cuts) for event in session.feed(part, RATE)]
        runs.append(events + session.finish())
    assert runs[0] == runs[1]
    assert sum(event.final for event in runs[0]) == 3


def alike(mine: list[Event], theirs: list[Event]) -> bool:
    """Equal, but for the rounding of confidences."""

    def plain(event: Event) -> Event:
        return replace(event, words=tuple(replace(word, confidence=round(word.confidence, 9)) for word in event.words))

    return [*map(plain, mine)] == [*map(plain, theirs)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_says_what_each_session_says_alone(exact: Recognizer, kind: str) -> None:
    chance = random.Random(5)
    sounds = [joined(USUAL[i : i + 1 + i % 2], 0.7) for i in range(5)]
    alone = []
    for sound in sounds:
        session = Session(exact, search=exact.search(kind, beam_size=3))
        alone.append(session.feed(sound, RATE) + session.finish())
    pool, slots, heard = (
        Pool(exact, 3, search=exact.search(kind, beam_size=3)),
        dict[int, int](),
        dict[int, list[Event]](),
    )
    left, waiting = dict[int, np.ndarray](), list(range(len(sounds)))
    while waiting or left or pool.busy:
        if waiting and len(pool.sessions) < 3 and chance.random() < 0.4:
            slot = pool.open()
            slots[slot], heard[slot] = waiting.pop(), []
            left[slot] = sounds[slots[slot]]
        for slot in list(left):
            if chance.random() < 0.3:
                continue
            n = chance.randrange(1, 12000)
            pool.feed(slot, left[slot][:n], RATE)
            left[slot] = left[slot][n:]
            if not len(left[slot]):
                del left[slot]
                pool.close(slot)
        for slot, events in pool.step().items():
            heard[slot] += events
    assert len(heard) == len(sounds)
    for slot, events in heard.items():
        assert alike(events, alone[slots[slot]]), (text(events), text(alone[slots[slot]]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_stream_costs_what_a_short_one_costs(model: Recognizer, kind: str) -> None:
    sound = joined(USUAL, 0.8)
    session = Session(model, search=model.search(kind, beam_size=2))
    rounds, sizes = [], []
    for _ in range(4):
        rounds.append(session.feed(sound, RATE))
        sizes.append(sum(leaf.numel() for leaf in tree.leaves(session.listener.place.row)))  # type: ignore[union-attr]
    reference = [" ".join(line["text"] for line in USUAL)]
    rates = [word_errors(reference, [text(events)], normalise="none").rate for events in rounds]
    assert max(rates) <= 0.06, rates
    assert sum(event.final for events in rounds for event in events) in (4 * len(USUAL) - 1, 4 * len(USUAL))
    assert max(sizes) <= sizes[0] + 64 * 25 * 10  # ten seconds of frames, of the two minutes that were heard


@pytest.mark.parametrize("kind", KINDS[:3])  # in a second pass attention decides, and knows no phrases
def test_rare_names_need_their_phrases(model: Recognizer, kind: str) -> None:
    for line, name in (("call jon please", "jon"), ("please call marc", "marc")):
        one = next(one for one in LINES if one["text"] == line)
        session = Session(model, search=model.search(kind, beam_size=8, phrases=[]))
        assert text(session.feed(samples(one), RATE)) != line
        session = Session(model, search=model.search(kind, beam_size=8, phrases=[]))
        session.prefer([name, "erin"])
        assert text(session.feed(samples(one), RATE) + session.finish()) == line
        found = {hit.text: hit.spans for hit in session.hits()}
        assert found["erin"] == ()
        true = next(word for word in one["words"] if word["word"] == name)
        assert len(found[name]) == 1
        assert abs(found[name][0][0] - true["start"]) < 0.3


def test_nothing_is_lost_where_a_decoder_runs_out_of_room(model: Recognizer) -> None:
    assert model.heads["attention"].context == 128
    parts = [samples(line) for line in USUAL]
    loud = [np.flatnonzero(np.abs(x) > 0.01) for x in parts]
    gap = np.zeros(5600, np.float32)  # 0.35 s: no utterance ends here by itself
    sound = np.concatenate([y for x, at in zip(parts, loud, strict=True) for y in (x[at[0] : at[-1] + 1], gap)])
    for kind in ("joint", "rescored"):
        session = Session(model, search=model.search(kind, beam_size=4))
        said = text(session.feed(sound, RATE) + session.finish())
        reference = " ".join(line["text"] for line in USUAL)
        errors = word_errors([reference], [said], normalise="none")
        assert errors.rate <= 0.2, said  # the pauses that it was trained with are missing
        assert errors.deletions <= 1, said


@pytest.mark.parametrize("kind", KINDS)
def test_silence_is_forgotten(model: Recognizer, kind: str) -> None:
    session, sizes = Session(model, search=model.search(kind, beam_size=2)), []
    for _ in range(6):
        session.feed(np.zeros(5 * RATE, np.float32), RATE)
        sizes.append(sum(leaf.numel() for leaf in tree.leaves(session.listener.place.row)))  # type: ignore[union-attr]
    assert max(sizes) - min(sizes) <= 64 * 30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [17820, 20000])
def test_words_lie_one_behind_the_other_inside_the_sound(model: Recognizer, kind: str, cut: int) -> None:
    sound = np.concatenate([samples(LINES[10]), samples(LINES[7])])[:cut]
    settings = StreamSettings(silence_s=0.3, pause_s=0.1)
    for phrases in (None, ["call erin", "go on"]):
        search = model.search(kind, beam_size=1, phrases=phrases)
        session = Session(model, settings=settings, search=search)
        words = [word for event in session.feed(sound, RATE) + session.finish() for word in event.words]
        assert words
        times = [time for word in words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert times[-1] <= len(sound) / RATE


def test_one_listener_that_fails_does_not_silence_the_others(model: Recognizer) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("mine")

    pool, got = Pool(model, 2, search=model.search("ctc", beam_size=2)), list[Event]()
    for handler in (fail, got.append):
        slot = pool.open(on_event=handler)
        pool.feed(slot, samples(LINES[0]), RATE)
        pool.close(slot)
    failed = 0
    while pool.busy:
        try:
            pool.step()
        except RuntimeError:
            failed += 1
    assert failed
    assert text(got) == LINES[0]["text"]


def test_what_cannot_be_sound_is_refused(model: Recognizer) -> None:
    with pytest.raises(InputError, match="between -1 and 1"):
        Session(model).feed(np.full(20000, 1e25, np.float32), RATE)
    with pytest.raises(InputError, match="lags"):
        Session(model, search=model.search("joint"), policy=LocalAgreement())
    with pytest.raises(InputError, match="not one text"):
        Session(model, search=model.search("ctc", phrases=[])).prefer("stop")
    session = Session(model, search=model.search("ctc", phrases=["seven eight"]))
    session.feed(samples(LINES[1]), RATE)
    session.finish()
    assert [len(hit.spans) for hit in session.hits()] == [1]
    with pytest.raises(InputError, match="finished"):
        session.prefer(["stop"])
    for bonus in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="finite"):
            model.search("ctc", phrases=["stop"], bonus=bonus)
    with pytest.raises(InputError, match="at most"):
        StreamSettings(silence_s=float("inf"))
    with pytest.raises(InputError, match="StreamSettings"):
        Pool(model, 1, settings=Settings())  # type: ignore[arg-type]


def test_silence_and_noise_say_nothing(model: Recognizer) -> None:
    noise = np.random.default_rng(0).normal(0, 1e-3, 5 * RATE).astype(np.float32)
    for sound in (np.zeros(5 * RATE, np.float32), noise, np.zeros(0, np.float32), noise[:100]):
        session = Session(model)
        assert text(session.feed(sound, RATE) + session.finish()) == ""


def test_a_text_is_found_in_its_recording(model: Recognizer, tmp_path: Path) -> None:
    lines = USUAL[:6]
    before = 1.0
    soundfile.write(tmp_path / "talk.flac", np.concatenate([np.zeros(RATE, np.float32), joined(lines, 0.6)]), RATE)
    texts = [line["text"].capitalize() + "." for line in lines]
    heard: list[float] = []
    found = align(model, open_recording(tmp_path / "talk.flac"), texts, on_sound=heard.append)
    assert sum(heard) == pytest.approx(open_recording(tmp_path / "talk.flac").duration_s)
    at = before
    for one, line, written in zip(found, lines, texts, strict=True):
        assert one.text == written
        assert [word.text for word in one.words] == written.split()
        for word, true in zip(one.words, line["words"], strict=True):
            assert abs(word.start - at - true["start"]) < 0.3
            assert abs(word.end - at - true["end"]) < 0.25
        assert one.start <= one.words[0].start
        assert one.end >= one.words[-1].end
        at += len(samples(line)) / RATE + 0.6
    wrong = [*texts[:3], "Call hannah two zero left.", *texts[3:]]
    unsure = align(model, open_recording(tmp_path / "talk.flac"), wrong)
    assert min(unsure, key=lambda one: one.confidence).text == wrong[3]
    with pytest.raises(InputError, match="spell"):
        align(model, open_recording(tmp_path / "talk.flac"), ["42"])
    with pytest.raises(InputError, match="no text"):
        align(model, open_recording(tmp_path / "talk.flac"), [" "])
    with pytest.raises(InputError, match="too short"):
        align(model, open_recording(FOLDER / "12.flac"), texts * 5)


def test_the_align_command_writes_what_players_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "talk.wav", joined(USUAL[:2], 0.5), RATE)
    (tmp_path / "talk.txt").write_text("one two three four five six\n\nseven eight nine zero\n")
    command = ["align", str(tmp_path / "talk.wav"), str(tmp_path / "talk.txt"), "--model", str(FOLDER)]
    assert main(command) == 0
    srt = capsys.readouterr().out
    assert srt.startswith("1\n00:00:00,")
    assert "\n2\n" in srt
    assert main([*command, "--format", "json", "--output", str(tmp_path / "talk.json")]) == 0
    said = json.loads((tmp_path / "talk.json").read_text())
    assert [word["text"] for word in said[1]["words"]] == ["seven", "eight", "nine", "zero"]
    assert main([*command, "--format", "textgrid"]) == 0
    grid = capsys.readouterr().out
    marks = [float(line.split("=")[1]) for line in grid.splitlines() if "xmin" in line or "xmax" in line]
    assert marks == [mark for mark in marks if mark >= 0]
    assert grid.count("intervals [") == sum(
        int(line.split("=")[1]) for line in grid.splitlines() if "intervals: size" in line
    )
    assert main([*command[:3], "--model", "tiny.en"]) == 2
    assert main(["align", str(tmp_path / "talk.wav"), str(tmp_path / "none.txt"), "--model", str(FOLDER)]) == 2


def test_an_encoder_of_whole_utterances_listens_in_windows() -> None:
    whole = load_model(FOLDER)
    assert isinstance(whole, Recognizer)
    set_span(whole.encoder, Span.full())
    line = LINES[9]  # six one eight; the model was trained for chunks, and hears little more
    session = Session(whole, vad=AlwaysSpeech())
    events = session.feed(samples(line), RATE) + session.finish()
    assert text(events) == line["text"]
    assert [word.text.strip() for event in events for word in event.words] == line["text"].split()
    assert whole.transcribe(FOLDER / line["file"], vad=AlwaysSpeech()).text == line["text"]
    with pytest.raises(InputError, match="takes Settings"):
        Session(whole, settings=StreamSettings())
    del whole.heads["attention"]
    with pytest.raises(InputError, match="whole utterance"):
        Session(whole)


def test_a_transducer_alone_hears_where_nobody_speaks() -> None:
    alone = load_model(FOLDER)
    assert isinstance(alone, Recognizer)
    del alone.heads["ctc"], alone.heads["attention"]
    session = Session(alone)
    events = session.feed(joined(USUAL[:4], 0.8), RATE)
    assert sum(event.final for event in events) == 4
    assert text(events) == " ".join(line["text"] for line in USUAL[:4])


def test_half_a_float_is_enough(model: Recognizer) -> None:
    half = load_model(FOLDER, dtype="bfloat16")
    assert isinstance(half, Recognizer)
    assert next(half.encoder.parameters()).dtype == torch.bfloat16
    said = [half.transcribe(FOLDER / line["file"], search=half.search("ctc", beam_size=4)).text for line in USUAL[:4]]
    assert word_errors([line["text"] for line in USUAL[:4]], said, normalise="none").rate <= 0.15
