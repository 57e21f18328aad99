"""The small model that really recognises: digits, commands and names in synthetic speech."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer, load_model
from speechattn.score.wer import word_errors

FOLDER = Path(__file__).parent / "digits"
LINES: list[dict[str, Any]] = json.loads((FOLDER / "transcripts.json").read_text(encoding="utf-8"))
USUAL = [line for line in LINES if not line["rare"]]
RARE = [line for line in LINES if line["rare"]]


@pytest.fixture(scope="module")
def model() -> Recognizer:
    model = load_model(FOLDER)
    assert isinstance(model, Recognizer)
    return model


def sound(line: dict[str, Any]) -> Tensor:
    """Samples [N]."""
    samples, rate = soundfile.read(FOLDER / line["file"], dtype="float32")
    assert (samples.ndim, rate) == (1, 16000)
    return torch.from_numpy(samples)


@torch.inference_mode()
def heard(model: Recognizer, lines: list[dict[str, Any]]) -> Frames:
    """What the encoder says of all of them in one batch."""
    sounds = [sound(line) for line in lines]
    lengths = torch.tensor([len(samples) for samples in sounds])
    x = Frames.from_lengths(torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True), lengths)
    y: Frames = model.listening(x)
    return y


def rate(lines: list[dict[str, Any]], said: list[str]) -> float:
    return word_errors([line["text"] for line in lines], said, normalise="none").rate


def test_the_files_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sizes["model.safetensors"] <= 2_000_000
    assert sum(size for name, size in sizes.items() if name.endswith(".flac")) <= 600_000
    assert sum(name.endswith(".flac") for name in sizes) == len(LINES)


def test_words_and_their_times_fit_the_recordings(model: Recognizer) -> None:
    for line in LINES:
        samples = sound(line)
        assert " ".join(word["word"] for word in line["words"]) == line["text"]
        times = np.array([(word["start"], word["end"]) for word in line["words"]])
        assert (np.diff(times.flatten()) >= 0).all()
        assert (times[:, 1] - times[:, 0] > 0.1).all()
        assert times[-1, 1] < len(samples) / 16000
        loud = samples.abs() > 0.02
        assert abs(float(loud.float().argmax()) / 16000 - times[0, 0]) < 0.15, line["file"]  # silence before the words
        assert model.tokenizer.decode(model.tokenizer.encode(line["text"])) == line["text"]


@pytest.mark.parametrize(("kind", "size"), [("ctc", 1), ("transducer", 1), ("joint", 4)])
def test_every_head_recognises(model: Recognizer, kind: str, size: int) -> None:
    found = model.search(kind, beam_size=size).decode(heard(model, USUAL))
    assert rate(USUAL, [model.tokenizer.decode(row[0].tokens) for row in found]) <= 0.05


@torch.inference_mode()
def test_the_attention_head_recognises_alone(model: Recognizer) -> None:
    decoder, end = model.heads["attention"], model.tokenizer.end
    y = heard(model, USUAL)
    state, last = decoder.start(Memory.of(y)), torch.full((len(y.mask), 1), end)
    rows: list[list[int]] = [[] for _ in USUAL]
    for _ in range(40):
        hidden, _, state = decoder.step(last, state)
        last = decoder.logits(hidden).argmax(-1)
        for row, token in zip(rows, last[:, 0].tolist(), strict=True):
            row.append(token)
    texts = [model.tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]
    assert rate(USUAL, texts) <= 0.1  # it skips and repeats digits now and then


def test_words_end_about_when_ctc_says_so(model: Recognizer) -> None:
    late = []
    for line, row in zip(USUAL, model.search("ctc", beam_size=1).decode(heard(model, USUAL)), strict=True):
        if model.tokenizer.decode(row[0].tokens) != line["text"]:
            continue
        at = 0
        for word, size in zip(line["words"], model.tokenizer.words(row[0].tokens), strict=True):
            at += size
            late.append(row[0].spans[at - 1][1] * model.frame_s - word["end"])
    assert len(late) > 30
    assert abs(float(np.median(late))) < 0.15
    assert max(map(abs, late)) < 0.5


def test_streaming_is_offline(model: Recognizer, precise: None) -> None:
    model = load_model(FOLDER, dtype="float64")  # type: ignore[assignment]
    listening, chance = model.listening, random.Random(0)
    x = sound(LINES[0]).double()[None]
    whole = Frames(x, torch.ones_like(x, dtype=torch.bool))
    offline = listening(whole)
    block, plan = listening.block, listening.plan()
    assert block is not None
    fed = whole.pad(-(x.shape[1] + plan.latency) % block + plan.latency)
    state, parts, at = listening.init_state(whole), [], 0
    while at < fed.mask.shape[1]:
        n = block * chance.randint(1, 3)
        y, state = listening.step(fed[at : at + n], state)
        parts.append(y)
        at += n
    online = Frames.cat(parts)[plan.delay :][: offline.mask.shape[1]]
    assert torch.equal(online.mask, offline.mask)
    assert float((online.values - offline.values).abs().max()) < 1e-9


def test_a_rare_name_needs_its_phrase(model: Recognizer) -> None:
    y = heard(model, RARE)
    frequent = [line["text"].replace("jon", "john").replace("marc", "mark") for line in RARE]
    wanted = [line["text"] for line in RARE]
    for phrases, texts in ((None, frequent), (wanted, wanted)):
        found = model.search("transducer", beam_size=10, phrases=phrases, bonus=1.0).decode(y)
        assert [model.tokenizer.decode(row[0].tokens) for row in found] == texts
