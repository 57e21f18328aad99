"""Lips live: pictures in time, too late, missing, in a pool; and in videos that commands are given."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fake import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from lipreader import RATE, SIZE, lip_reader, movie, pictures, voice
from spelling import Speller

from speechattn.audio.clip import EVERY, Clip
from speechattn.audio.read import open_recording
from speechattn.audio.resample import Samples
from speechattn.audio.vision import Image
from speechattn.cli import main
from speechattn.cli.main import parser
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.live.endings import StreamSettings
from speechattn.live.events import Event
from speechattn.live.pool import Pool
from speechattn.live.session import Session
from speechattn.live.transcript import transcribe
from speechattn.model import save_model
from speechattn.task.tally import streamed

MODEL = lip_reader()
SEARCH = MODEL.search("ctc", beam_size=1)
PLAIN = ["--silence", "100", "--beam-size", "1"]
PATIENT = StreamSettings(silence_s=100)
SOUND, LIPS = voice(2.01), pictures(50)
BLOCK = 4  # pictures


def said(events: Sequence[Event]) -> str:
    return "".join(event.committed for event in events).strip()


def timeless(events: Sequence[Event]) -> list[object]:
    words = [[(w.text, w.start, w.end, round(w.confidence, 4)) for w in event.words] for event in events]
    return [(e.committed, e.unstable, e.audio_s, e.final, said) for e, said in zip(events, words, strict=True)]


def clip(x: Samples, lips: Image, *, hears: Sequence[bool] = (), sees: Sequence[bool] = ()) -> Clip:
    """Both, where they are there."""
    heard = torch.tensor(hears or [True] * len(x), dtype=torch.bool)[None]
    seen = torch.tensor(sees or [True] * len(lips))[None]
    return Clip.together(
        Frames.of(torch.from_numpy(x)[None], heard), Frames.of(torch.from_numpy(lips.copy())[None], seen)
    )


def offline(x: Frames) -> str:
    with torch.no_grad():
        return MODEL.tokenizer.decode(streamed(MODEL.listening, SEARCH, x)[0][0].tokens)


def live(*pieces: tuple[Samples | None, Image | None], rate: int = RATE) -> list[Event]:
    session = Session(MODEL, settings=PATIENT, search=SEARCH)
    return [event for x, lips in pieces for event in session.feed(x, rate, lips)] + session.finish()


WHOLE = offline(clip(SOUND, LIPS))
BLIND = offline(Frames(torch.from_numpy(SOUND)[None], torch.ones(1, len(SOUND), dtype=torch.bool)))
DEAF = offline(clip(0 * SOUND, LIPS, hears=[False] * len(SOUND)))


def test_the_model_hears_and_sees() -> None:
    assert len({WHOLE, BLIND, DEAF, offline(clip(SOUND, pictures(50, seed=1)))}) == 4
    assert min(map(len, (WHOLE, BLIND, DEAF))) > 10


@settings(deadline=None, max_examples=8)
@given(cuts=st.lists(st.integers(0, len(SOUND)), max_size=6), ahead=st.lists(st.integers(0, 30), max_size=7))
def test_pictures_in_time_are_those_of_the_whole_clip(cuts: list[int], ahead: list[int]) -> None:
    edges, seen, pieces = [0, *sorted(cuts), len(SOUND)], 0, []
    for i, (a, b) in enumerate(pairwise(edges)):
        until = max(seen, -(-b // EVERY) + (ahead[i] if i < len(ahead) else 0))
        pieces.append((SOUND[a:b], LIPS[seen:until]))
        seen = until
    events = live(*pieces)
    assert said(events) == WHOLE
    assert timeless(events) == timeless(live((SOUND, LIPS)))


def test_other_rates_and_the_call_for_a_whole_recording() -> None:
    x = np.repeat(SOUND, 3)  # at 48 kHz
    size = 4801
    pieces = [
        (x[a : a + size], LIPS[-(-a // (3 * EVERY)) : -(-(a + size) // (3 * EVERY))]) for a in range(0, len(x), size)
    ]
    assert said(live(*pieces, rate=48000)) == said(live((x, LIPS), rate=48000))
    assert transcribe(MODEL, SOUND, lips=LIPS, settings=PATIENT, search=SEARCH).text == WHOLE
    assert transcribe(MODEL, SOUND, settings=PATIENT, search=SEARCH).text == BLIND


def test_without_pictures_it_is_sound_alone_and_without_sound_lips() -> None:
    assert said(live((SOUND, None))) == BLIND
    events = live((None, LIPS[:10]), (None, LIPS[10:]))
    assert said(events) == offline(clip(np.zeros(50 * EVERY, np.float32), LIPS, hears=[False] * 50 * EVERY))
    assert events[-1].audio_s == pytest.approx(2.0)
    x, gone = SOUND[: 50 * EVERY], range(20 * EVERY, 35 * EVERY)
    heard = [i not in gone for i in range(len(x))]
    found = live((x[: gone.start], LIPS[:20]), (None, LIPS[20:35]), (x[gone.stop :], LIPS[35:]))
    assert said(found) == offline(clip(x, LIPS, hears=heard))


def test_late_pictures_are_dropped_and_counted() -> None:
    session = Session(MODEL, settings=PATIENT, search=SEARCH)
    at = 3 * BLOCK * EVERY
    events = session.feed(SOUND[: at + 100], RATE, LIPS[:BLOCK])  # three blocks are heard, one of them is seen
    events += session.feed(SOUND[at + 100 : at + 200], RATE, LIPS[BLOCK : 3 * BLOCK + 1])
    assert session.late == 2 * BLOCK
    events += session.feed(SOUND[at + 200 :], RATE, LIPS[3 * BLOCK + 1 :]) + session.finish()
    assert session.late == 2 * BLOCK
    sees = [not BLOCK <= i < 3 * BLOCK for i in range(50)]
    assert said(events) == offline(clip(SOUND, LIPS, sees=sees)) != WHOLE


def test_the_shorter_side_ends_in_missing_frames() -> None:
    for n, pics in ((20000, 50), (3000, 50), (len(SOUND), 20), (0, 20)):
        events = live((SOUND[:n], LIPS[:pics]))
        assert said(events) == offline(clip(SOUND[:n], LIPS[:pics]))
        assert events[-1].audio_s == pytest.approx(max(n, pics * EVERY) / RATE)


def test_a_pool_gives_each_row_what_it_gives_alone() -> None:
    pool = Pool(MODEL, 4, settings=PATIENT, search=SEARCH)
    inputs = [(SOUND, LIPS), (voice(2.0, 1), None), (voice(2.5, 2), pictures(40, 2)), (None, pictures(50, 3))]
    events: dict[int, list[Event]] = {}

    def step() -> None:
        for slot, new in pool.step().items():
            events.setdefault(slot, []).extend(new)

    slots = []
    for x, lips in inputs:
        slots.append(pool.open())
        pool.feed(slots[-1], x, RATE, lips)
        step()  # the later ones are behind
    for slot in slots:
        pool.close(slot)
    while pool.sessions:
        step()
    for slot, (x, lips) in zip(slots, inputs, strict=True):
        assert timeless(events[slot]) == timeless(live((x, lips)))
        assert said(events[slot])


def test_what_is_no_picture_and_who_sees_none() -> None:
    session = Session(MODEL)
    for wrong in (LIPS[:, :9], LIPS.astype(np.float32), LIPS[0], np.zeros((1, SIZE, SIZE, 3), np.uint8)):
        with pytest.raises(InputError, match=r"wanted bytes \[n, 32, 32\]"):
            session.feed(SOUND, RATE, wrong)
    with pytest.raises(InputError, match="neither samples nor pictures"):
        session.feed(None, RATE)
    many = np.repeat(LIPS, 31, 0)  # 62 s
    session.feed(SOUND[:0], RATE, many)
    with pytest.raises(InputError, match="more than 60 s of pictures wait for their sound"):
        session.feed(SOUND[:0], RATE, LIPS)
    session.closed = True
    with pytest.raises(InputError, match="finished"):
        session.feed(SOUND, RATE, LIPS)
    for blind in (Session(Speller()), Session(FakeModel([0.5]))):
        with pytest.raises(InputError, match=r"sees no lips|reads windows"):
            blind.feed(SOUND, RATE, LIPS)
        assert blind.late == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    save_model(MODEL, path)
    return str(path)


def transcribed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says with a patient model."""
    assert main(["transcribe", *map(str, arguments), *PLAIN]) == 0
    return capsys.readouterr().out.strip()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What it says where it cannot."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    return capsys.readouterr().err


def test_transcribe_a_video(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    both = movie(tmp_path / "both.mkv", LIPS, SOUND)
    soundfile.write(tmp_path / "sound.wav", SOUND, RATE, subtype="FLOAT")
    seen = movie(tmp_path / "seen.mkv", LIPS, None)
    assert transcribed(capsys, both, "--model", model) == WHOLE
    assert transcribed(capsys, tmp_path / "sound.wav", "--model", model) == BLIND
    assert transcribed(capsys, tmp_path / "sound.wav", "--video", seen, "--model", model) == WHOLE
    wide = np.full((50, 40, 64), 7, np.uint8)
    wide[:, 4 : 4 + SIZE, 20 : 20 + SIZE] = LIPS
    large = movie(tmp_path / "wide.mkv", wide, SOUND)
    assert transcribed(capsys, large, "--box", f"20,4,{SIZE},{SIZE}", "--model", model) == WHOLE
    assert "64 x 40 pixels, not 32 x 32: say in which box" in refused(capsys, "transcribe", large, "--model", model)
    assert main(["stream", str(both), "--fast", "--model", model, *PLAIN, "--format", "jsonl"]) == 0
    assert "".join(json.loads(row)["committed"] for row in capsys.readouterr().out.splitlines()).strip() == WHOLE


def test_a_video_for_a_model_that_hears_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    both = movie(tmp_path / "both.mkv", LIPS, SOUND)
    digits = ["--model", Path(__file__).parent / "digits"]
    alone = transcribed(capsys, both, *digits)
    soundfile.write(tmp_path / "sound.wav", SOUND, RATE, subtype="FLOAT")
    assert alone == transcribed(capsys, tmp_path / "sound.wav", *digits)
    for option in (["--video", both], ["--box", "1,2,3,4"]):
        assert f"{option[0]} does nothing with" in refused(capsys, "transcribe", both, *option, *digits)
        assert "which sees no lips" in refused(capsys, "stream", both, *option, *digits)


def test_videos_that_are_not_as_they_should_be(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    soundfile.write(tmp_path / "sound.wav", SOUND, RATE, subtype="FLOAT")
    both = movie(tmp_path / "both.mkv", LIPS, SOUND)
    deaf, blind = movie(tmp_path / "deaf.mkv", LIPS, None), movie(tmp_path / "blind.mkv", None, SOUND)

    def why(*arguments: object) -> str:
        return refused(capsys, "transcribe", *arguments, "--model", model)

    assert transcribed(capsys, blind, "--model", model) == BLIND  # nothing to be seen
    assert "deaf.mkv: no sound in it; it has video" in why(deaf)
    assert "blind.mkv: no video in it; it has audio" in why(blind, "--video", blind)
    assert "--box: no pictures in" in why(blind, "--box", "1,2,3,4")
    assert "--box 1,2,3: wanted LEFT,TOP,WIDTH,HEIGHT" in why(both, "--box", "1,2,3")
    assert "does not lie inside" in why(both, "--box", "1,2,90,90") or "pixels" in why(both, "--box", "1,2,90,90")
    assert "belongs to one recording, and 2 are named" in why(both, blind, "--video", both)
    assert "does not go with -" in refused(capsys, "stream", "-", "--video", both, "--model", model)
    whole = both.read_bytes()
    (tmp_path / "short.mkv").write_bytes(whole[: len(whole) // 2])
    assert "short.mkv: " in why(tmp_path / "short.mkv")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    assert "noise.mp4: not audio that can be read" in why(tmp_path / "noise.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    assert "not audio that can be read" in why(both)
    assert "pip install speechattn[video]" in why(both)


@pytest.mark.parametrize("rate", [24, Fraction(30000, 1001), 50])
def test_videos_of_other_rates_last_as_long(
    rate: int, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    n = round(2 * rate)
    images = np.repeat(LIPS, -(-n // len(LIPS)), 0)[:n]
    both = movie(tmp_path / "both.mkv", images, SOUND, rate=rate)
    stamps = 1000  # Matroska counts milliseconds
    times = [Fraction(round(i * stamps / Fraction(rate)), stamps) for i in range(n)]
    chosen = [min(range(n), key=lambda i, k=k: (abs(times[i] - Fraction(k, 25)), i)) for k in range(50)]
    assert transcribed(capsys, both, "--model", model) == offline(clip(SOUND, images[chosen]))


@pytest.mark.parametrize(("samples", "shown"), [(len(SOUND), 30), (20000, 50)])
def test_a_side_that_is_shorter(
    samples: int, shown: int, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    both = movie(tmp_path / "both.mkv", LIPS[:shown], SOUND[:samples])
    assert transcribed(capsys, both, "--model", model) == offline(clip(SOUND[:samples], LIPS[:shown]))


def test_sound_that_begins_late_has_silence_before_it(tmp_path: Path) -> None:
    pytest.importorskip("av")
    recording = open_recording(movie(tmp_path / "late.mkv", LIPS, SOUND, late_s=0.5))
    assert (recording.rate, recording.channels) == (RATE, 1)
    x = np.concatenate(list(recording.blocks()))
    assert not x[: RATE // 2].any()
    assert np.array_equal(x[RATE // 2 :], SOUND)


def manifest(folder: Path) -> Path:
    """Lines of sound and video; the last has none."""
    soundfile.write(folder / "a.wav", SOUND, RATE, subtype="FLOAT")
    movie(folder / "a.mkv", LIPS, None)
    rows = [
        {"id": "a", "audio": "a.wav", "text": WHOLE, "video": "a.mkv"},
        {"id": "b", "audio": "a.wav", "text": BLIND},
    ]
    path = folder / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_evaluate_sees_and_can_do_without(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    path = manifest(tmp_path)

    def texts(*options: str) -> list[tuple[str, str]]:
        place = tmp_path / "-".join(["out", *options])
        common = ["--normaliser", "none", *PLAIN, "--output-dir", str(place)]
        assert main(["evaluate", model, str(path), *options, *common]) == 0
        capsys.readouterr()
        rows = [json.loads(line) for line in (place / "utterances.jsonl").read_text().splitlines()]
        return [
            (row["offline"], row["streamed"]) for row in sorted(rows, key=lambda row: row["id"]) if not row["failed"]
        ]

    assert texts() == [(WHOLE, WHOLE), (BLIND, BLIND)]
    assert texts("--without", "lips") == [(BLIND, BLIND)] * 2
    assert texts("--without", "sound") == [(DEAF, DEAF)]
    digits = Path(__file__).parent / "digits"
    assert "--without does nothing with" in refused(capsys, "evaluate", digits, path, "--without", "lips")


def test_the_page_says_what_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    text = (Path(__file__).parents[1] / "docs" / "audio-visual.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    reader = lip_reader(88)
    save_model(reader, tmp_path / "reader")
    lips = pictures(50, size=88)
    movie(tmp_path / "talk.mkv", lips, SOUND)
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Session" in code]
    exec(compile(example, "docs/audio-visual.md", "exec"), {})
    assert capsys.readouterr().out == f" {transcribe(reader, SOUND, lips=lips).text}\n0 pictures came too late\n"
    commands = [row for row in text.splitlines() if row.startswith("speechattn ")]
    assert len(commands) >= 4
    for command in commands:
        assert parser().parse_args(shlex.split(command)[1:]).run
