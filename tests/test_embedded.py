"""Whisper's encoder as streams, and the distillation that makes it good at it."""

from __future__ import annotations

import sys
from importlib import import_module
from math import pi
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_whisper
from torch import Tensor

from speechattn.attention import Span, set_span
from speechattn.decoder.letters import Letters
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.pretrained.whisper import WhisperModel
from speechattn.pretrained.whisper.features import SILENCE, FrontEnd, scaled
from speechattn.pretrained.whisper.streaming import (
    Convolution,
    Floored,
    Flow,
    StreamingEncoder,
    Turning,
    front_end,
    streaming,
    turn,
)  # fmt: skip
from speechattn.stream import Delay, Pointwise, Serial, Stream
from speechattn.testing import check_export, check_stream, oracle, random_frames, stepped

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "embedded" / "encoder" / "distil.yaml"


@oracle.register
def turned(stream: Turning, x: Frames) -> Frames:
    """Row by row, the table again and again."""
    values = x.values.clone()
    for row, length in enumerate(x.lengths.tolist()):
        for t in range(length):
            values[row, t] += stream.table[(stream.first + t) % len(stream.table)]
    return Frames.of(values, x.mask)


@oracle.register
def floored(stream: Floored, x: Frames) -> Frames:
    low = x.values < 4 * stream.floor - 4
    return Frames.of(torch.where(low, stream.floor, x.values / 4 + 1), x.mask)


@oracle.register
def lettered(stream: Letters, x: Frames) -> Frames:
    scores = (torch.einsum("btd,vd->btv", x.values, stream.head.weight) + stream.head.bias).exp()
    return Frames.of((scores / scores.sum(-1, keepdim=True)).log(), x.mask)


@oracle.register
def flowed(stream: Flow, x: Frames) -> Frames:
    """The second sees as many frames that are not there as the first is late."""
    y, late = oracle(stream.first, x), stream.first.plan().delay
    front = Frames(y.values.new_zeros(len(y.mask), late, y.values.shape[2]), y.mask.new_zeros(len(y.mask), late))
    return oracle(stream.second, Frames.cat([front, y]))[late:]


def lively(stream: Stream) -> Stream:
    """All parameters random, norms about 1."""
    for name, parameter in stream.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.4)
    return stream.eval()


def small(span: Span, *, period: int = 7) -> StreamingEncoder:
    encoder = StreamingEncoder(5, 8, 2, 2, span=span, period=period)
    lively(encoder)
    return encoder


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Convolution(8, 6),
        lambda: Convolution(8, 8, stride=2),
        lambda: Turning(8, period=5),
        lambda: Floored(-1.0),
        lambda: Letters(8),
        lambda: StreamingEncoder(8, 8, 2, 2, span=Span.chunked(3, 2), period=7),
        lambda: StreamingEncoder(8, 8, 1, 2, span=Span.full(), period=7),
        lambda: Flow(Delay(3), StreamingEncoder(8, 8, 2, 2, span=Span.chunked(3, 4)).layers),
        lambda: Flow(Serial(Delay(1), Convolution(8, 8, 2)), small(Span.chunked(2, 3, right=1)).layers),
        lambda: StreamingEncoder(8, 8, 2, 2, span=Span.chunked(4, 3), period=7).listening(Delay(1)),
        lambda: StreamingEncoder(8, 8, 1, 2, span=Span.full()).listening(Pointwise(torch.nn.Tanh())),
    ],
)  # fmt: skip
def test_laws(make: Any) -> None:
    stream = lively(make())
    check_stream(stream, random_frames([26, 0, 19], 8), seed=1)
    block = stream.plan().block or 9
    check_export(stream, random_frames([3 * block, 2 * block], 8))


@pytest.mark.usefixtures("precise")
def test_sound_becomes_frames_that_wait_for_their_own_chunk_alone() -> None:
    encoder = StreamingEncoder(20, 8, 2, 2, span=Span.chunked(8, 4))
    listening = lively(encoder).listening(front_end(20))  # type: ignore[attr-defined]
    plan = listening.plan()
    assert (plan.block, plan.latency, plan.delay, plan.ratio.denominator) == (4 * 320, 320, 1, 320)
    assert encoder.plan().latency == 8, "in a series a whole chunk is waited for"
    sound = random_frames([9000, 5000])
    whole = listening(sound)
    assert torch.allclose(stepped(listening, sound, [1280] * 8).values, whole.values, atol=1e-9)
    changed = sound.values.clone()
    changed[0, 1280:] = 0  # chunk 0 holds 3 frames, of which the last sees up to 31 ms behind its middle
    other = listening(Frames(changed, sound.mask))
    assert torch.equal(other.values[0, :3], whole.values[0, :3])
    assert not torch.allclose(other.values[0, 3:7], whole.values[0, 3:7])


def test_the_first_of_a_flow_comes_late_and_the_second_keeps_the_rate() -> None:
    with pytest.raises(ValueError, match="ratio 1/2"):
        Flow(Delay(1), Convolution(8, 8, 2))


@pytest.mark.parametrize("frames", [3000, 1230])
def test_with_everything_in_sight_it_is_whisper(tiny: WhisperModel, frames: int) -> None:
    x = scaled(torch.randn(1, frames, 80).cumsum(2) / 4)
    features = Frames(x, torch.ones(x.shape[:2], dtype=torch.bool))
    with torch.no_grad():
        expected, found = tiny.network.encoder(features), streaming(tiny.network)(features)
    assert torch.equal(found.mask, expected.mask)
    assert torch.allclose(found.values, expected.values, atol=1e-4)


def test_it_has_a_copy_of_the_weights_and_whispers_own_positions(tiny: WhisperModel) -> None:
    encoder = streaming(tiny.network, Span.chunked(8, 4))
    assert encoder.subsample.positions.table.data_ptr() != tiny.network.encoder.positions.data_ptr()
    assert torch.allclose(Turning(384).table, tiny.network.encoder.positions, atol=2e-3)
    fewer = random_whisper(audio_context=40, encoder_layers=1)
    assert len(streaming(fewer).subsample.positions.table) == 40


@pytest.mark.usefixtures("precise")
def test_a_span_that_is_set_is_the_span_that_it_has() -> None:
    x, encoder = random_frames([40, 31], 5), small(Span.chunked(3, 2))
    other = StreamingEncoder(5, 8, 2, 2, span=Span.chunked(6, 4), period=7)
    other.load_state_dict(encoder.state_dict())
    before = encoder(x).values
    set_span(encoder, Span.chunked(6, 4))
    assert torch.equal(encoder(x).values, other.eval()(x).values)
    assert not torch.allclose(encoder(x).values, before)


@pytest.mark.usefixtures("precise")
def test_later_is_like_sooner() -> None:
    """What comes again after a whole number of turns is heard as before, however long it has lasted."""
    encoder = small(Span.chunked(6, 2), period=10)
    turns = 300
    once = torch.randn(1, 20, 5)
    x = once.repeat(1, turns, 1)
    y = encoder(Frames(x, torch.ones(x.shape[:2], dtype=torch.bool))).values.view(turns, 10, 8)
    assert torch.allclose(y[2], y[turns - 2], atol=1e-9)
    assert not torch.allclose(y[0], y[2]), "the first turn has no history"


@pytest.mark.usefixtures("precise")
def test_positions_begin_where_they_are_told() -> None:
    encoder, x = small(Span.chunked(6, 2), period=7), random_frames([8, 8], 5)
    before = encoder(x).values
    turn(encoder, 7)
    assert torch.equal(encoder(x).values, before)
    turn(encoder, 3)
    assert encoder.subsample.positions.first == 3
    assert not torch.allclose(encoder(x).values, before)
    with pytest.raises(ValueError, match="no positions"):
        turn(Delay(1), 3)


def test_the_floor_is_that_of_usual_speech_and_asks_nobody() -> None:
    log = torch.empty(1, 6, 80).uniform_(SILENCE, 1.0)
    log[0, 2, 5] = 1.6  # the peak: 8 decades above the floor
    x = Frames(log, torch.ones(1, 6, dtype=torch.bool))
    assert torch.allclose(Floored()(x).values, scaled(log), atol=1e-6)
    assert torch.equal(Floored()(x[3:]).values, Floored()(x).values[:, 3:])


# The distillation


Task = Any


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the task with a small random Whisper as its teacher, of so many frames."""
    pytest.importorskip("lightning")
    from speechattn.task import distillation

    def make(context: int = 50, **options: Any) -> Task:
        teacher = random_whisper(audio_context=context)
        teacher.encoder.positions.copy_(Turning(16, context).table)
        monkeypatch.setattr(distillation, "load", lambda name: SimpleNamespace(network=teacher))
        return distillation.EncoderDistillation(**options)

    return make


def hum(samples: int, rows: int = 1) -> Frames:
    """Tones that change, between two silences; the peak is 8 decades above the fixed floor."""
    at = torch.arange(samples) / 16000
    tones = torch.stack([(2 * pi * (200 + 60 * row + 900 * at) * at).sin() for row in range(rows)])
    tones[:, :2400] = 0
    tones[:, -2400:] = 0
    sound = Frames(tones, torch.ones_like(tones, dtype=torch.bool))
    peak = FrontEnd()(sound).values.max()
    return Frames(tones * 10 ** ((1.6 - peak) / 2), sound.mask)


def test_apartness_is_a_share_of_the_variance() -> None:
    from speechattn.task.distillation import apartness

    theirs, mask = torch.randn(2, 30, 4), torch.rand(2, 30) > 0.3
    mean = theirs[mask].mean(0).expand_as(theirs)
    assert apartness(theirs, theirs.where(mask[..., None], torch.nan), mask) == 0
    assert apartness(theirs, mean, mask) == pytest.approx(1, abs=1e-5)
    assert apartness(5 * theirs + 3, 5 * mean + 3, mask) == pytest.approx(1, abs=1e-5)


def test_who_hears_everything_is_the_teacher_wherever_it_begins(task: Any) -> None:
    one = task(span=Span.full())
    for stem in (one.whispers[0].encoder, one.model.subsample):
        for name, weight in stem.named_parameters():
            if "conv" in name and weight.dim() == 3:
                weight.data[..., [0, 2]] = 0  # at the edges of a circle a convolution would see its other end
    sound = hum(16000)
    for first in (0, 7, 30):
        turn(one.model, first)
        assert one.figures(sound, first)["loss"].item() < 1e-6
    assert one.figures(sound, 12)["loss"].item() > 0.01, "at other positions it is not"


def test_a_mask_keeps_it_from_being_the_teacher_and_gradients_reach_all(task: Any) -> None:
    one = task(span=Span.chunked(10, 5), layer_weight=0.5)
    found = one.figures(hum(16000, rows=2))
    assert found["loss"] > 0.01
    assert found["loss"].item() == pytest.approx(found["output"].item() + 0.5 * found["layers"].item())
    found["loss"].backward()
    none = [name for name, p in one.model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not none
    assert all(not p.requires_grad for p in one.whispers[0].parameters())
    assert not any("whisper" in name for name in one.state_dict())


def test_each_step_draws_its_span_and_its_first_position_from_its_number(task: Any) -> None:
    from speechattn.task.chunks import DynamicChunks

    one, drawn = task(spans=DynamicChunks((8, 16), (20, 40), 0.2)), []
    for begun in (*range(40), 3):
        one.begun = begun
        one.on_train_batch_start(None, 0)
        span = one.model.layers.members[0].attention.first.span
        drawn.append((span.left, span.chunk, one.model.subsample.positions.first))
    assert drawn[40] == drawn[3]
    assert {pair[:2] for pair in drawn} == {(None, None), (20, 8), (20, 16), (40, 8), (40, 16)}
    assert len({first for _, _, first in drawn}) > 20
    assert all(0 <= first < 50 for _, _, first in drawn)
    one.on_validation_epoch_start()
    assert one.model.layers.members[0].attention.first.span == one.own
    assert one.model.subsample.positions.first == 0


def test_a_circle_is_as_long_as_the_window(task: Any) -> None:
    one = task()
    circle = one.circle(hum(9000))
    assert circle.mask.shape == (1, 16000)
    assert circle.mask.all()
    assert torch.equal(circle.values[:, :9000], hum(9000).values)
    assert not circle.values[:, 9000:].any()
    with pytest.raises(InputError, match="16001 samples: at most 16000"):
        one.circle(hum(16001))


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import corpus

    from speechattn.task.checkpoint import weights_of
    from speechattn.task.command import Fit

    task(500)
    manifests = corpus(tmp_path / "train.jsonl.gz", times=2), corpus(tmp_path / "valid.jsonl.gz", first=2)
    monkeypatch.chdir(tmp_path)

    def fit(name: str, steps: int, *more: str) -> dict[str, Tensor]:
        Fit.run([
            "--config", str(RECIPE), "--trainer.max_steps", str(steps),
            f"--data.init_args.train={[str(manifests[0])]}".replace("'", '"'),
            f'--data.init_args.valid={{"dev": "{manifests[1]}"}}', "--data.init_args.workers", "0",
            "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false",
            "--trainer.val_check_interval", "1", "--checkpoint.every_n_steps", "1",
            "--data.init_args.join.init_args.most_s", "10", "--trainer.default_root_dir", str(tmp_path / name), *more,
        ])  # fmt: skip
        return weights_of(tmp_path / name / "checkpoints" / "last.ckpt")

    begun, whole = fit("cut", 1), fit("whole", 2)
    after = fit("cut", 2, "--resume")
    assert all(torch.equal(after[name], whole[name]) for name in whole)
    assert any(not torch.equal(begun[name], whole[name]) for name in whole)
    streaming(random_whisper(audio_context=500)).load_state_dict(whole)
    assert list((tmp_path / "whole" / "checkpoints").glob("best-step=*-loss=*.ckpt"))


# The recipe


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lhotse")
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "embedded"))
    for name in ("evaluate", "unlabelled"):
        sys.modules.pop(name, None)


def test_only_the_voice_of_the_hero_is_heard_without_a_text(recipes: None) -> None:
    names = ["JOE0017", "020006J1", "020006P1", "C103L011", "CINTR_01", "COMIC_01", "030001J2"]
    game = SimpleNamespace(
        files={f"{name}.SB": (0, 0) for name in names} | {"TAM1.DOG": (0, 0)},
        clips=lambda: [SimpleNamespace(name="030001J2")],
    )
    found = [*import_module("unlabelled").clips(game)]
    assert [clip.name for clip in found] == ["020006J1", "JOE0017"]
    assert {clip.split for clip in found} == {"train"}


@torch.no_grad()
def test_the_evaluation_hears_in_steps_what_the_stream_says_of_the_whole(recipes: None) -> None:
    evaluate = import_module("evaluate")
    listening = streaming(random_whisper(), Span.chunked(8, 4)).listening(front_end())
    sound = hum(7001)
    found, whole = evaluate.streamed(listening, sound), listening(sound)
    assert torch.equal(found.mask, whole.mask)
    assert found.mask.shape == (1, 22)
    assert torch.allclose(found.values, whole.values, atol=1e-5)


def test_a_row_for_each_encoder(
    recipes: None, tiny: WhisperModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    evaluate = import_module("evaluate")
    sounds = sorted((ROOT / "tests" / "digits").rglob("*.flac")) or sorted((ROOT / "tests" / "digits").rglob("*.wav"))
    lines = [SimpleNamespace(name=path.stem, path=path, text="one") for path in sounds[:2]]
    monkeypatch.setattr(evaluate, "read_split", lambda folder, split: lines)
    monkeypatch.setattr(evaluate, "load", lambda name: tiny)
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "nowhere", "--clips", "1", "--texts", str(tmp_path / "said.jsonl")]
    )
    evaluate.main()
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["teacher", "mask 32"]
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 2
