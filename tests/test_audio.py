"""Resampling, reading, voice activity, the microphone."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.audio.read import open_recording, read_pcm
from speechattn.audio.resample import Resampler, to_mono
from speechattn.audio.vad import FRAME, Endpointer, SileroVAD
from speechattn.errors import InputError


@settings(max_examples=25, deadline=None)
@given(rate=st.sampled_from([8000, 11025, 22050, 44100, 48000]), cuts=st.lists(st.integers(0, 20000), max_size=30))
def test_any_split_resamples_to_exactly_the_same_samples(rate: int, cuts: list[int]) -> None:
    x = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    whole = Resampler(rate, 16000).feed(x, last=True)
    stream, edges = Resampler(rate, 16000), [0, *sorted(cuts), 20000]
    parts = [stream.feed(x[a:b]) for a, b in itertools.pairwise(edges)] + [stream.feed(x[:0], last=True)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(whole) == pytest.approx(20000 * 16000 / rate, abs=1)


def test_a_tone_keeps_its_pitch_and_level() -> None:
    t = np.arange(48000) / 48000
    y = Resampler(48000, 16000).feed(np.sin(2 * np.pi * 1000 * t).astype(np.float32), last=True)
    expected = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(y - expected)[500:-500].max() < 1e-3


def test_kinds_of_samples() -> None:
    for kind, full in ((np.int16, 2**15), (np.int32, 2**31), (np.int8, 2**7)):
        x = to_mono(np.array([-full, 0, full // 2], kind))
        np.testing.assert_allclose(x, [-1, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(to_mono(np.array([0, 128, 192], np.uint8)), [-1, 0, 0.5])
    np.testing.assert_allclose(to_mono([[1.0, 0.0], [0.5, 0.5]]), [0.5, 0.5])
    assert to_mono([]).shape == (0,)
    assert to_mono(np.zeros((0, 2))).shape == (0,)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_files_are_read_block_by_block(kind: str, rate: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(path, np.stack([tone, tone], 1), rate)
    recording = open_recording(path)
    blocks = list(recording.blocks())
    assert (recording.rate, recording.channels) == (rate, 2)
    assert max(map(len, blocks)) <= rate // 10 + 1
    x = np.concatenate(blocks)
    assert len(x) == pytest.approx(rate, rel=0.12)
    np.testing.assert_allclose(x, to_mono(soundfile.read(path, dtype="float32")[0])[: len(x)], atol=1e-6)
    assert np.sqrt(np.mean(x**2)) == pytest.approx(0.354, abs=0.03)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_a_file_that_was_cut_off_gives_what_is_there_or_says_why_not(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    noise = np.random.default_rng(0).standard_normal(5 * 16000) * 0.1
    soundfile.write(path, noise, 16000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    heard, said = 0, ""
    try:
        for block in open_recording(path).blocks():
            heard += len(block)
    except InputError as error:
        said = str(error)
    assert said.count("\n") == 0
    assert str(path) in said or heard > 16000  # where the format does not tell, what is there was read
    path.write_bytes(whole[:20])
    with pytest.raises(InputError, match=r"a\."):
        list(open_recording(path).blocks())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_text("hello" * 99), "not audio"),
        (lambda p: p.mkdir(), "a folder"),
        (lambda p: soundfile.write(p, np.zeros(0), 16000), "no samples"),
        (lambda p: soundfile.write(p, np.array([0.0, np.nan] * 4000), 16000, subtype="FLOAT"), "not a finite number"),
    ],
)
def test_what_is_no_recording_is_refused_in_one_line(make, words: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.wav"
    make(path)
    with pytest.raises(InputError, match=words) as caught:
        list(open_recording(path).blocks())
    assert "a.wav" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_pcm_is_the_same_however_the_pipe_cuts_it(cuts: list[int]) -> None:
    samples = np.arange(-300, 300, dtype="<i2").reshape(-1, 2)

    class Pipe(io.BytesIO):
        turn = 0

        def read1(self, size: int | None = -1) -> bytes:
            self.turn += 1
            return self.read(cuts[self.turn % len(cuts)])

    x = np.concatenate(list(read_pcm(Pipe(samples.tobytes()), 16000, 2)))
    np.testing.assert_allclose(x, samples.mean(1) / 32768, atol=1e-7)


def test_a_pipe_that_ends_inside_a_sample_says_so() -> None:
    with pytest.raises(InputError, match="1 bytes are left of 2"):
        list(read_pcm(io.BytesIO(b"\0\0\0"), 16000))


def test_voice_activity_is_silero_vad() -> None:
    """Their TorchScript network and ours, with the same weights (its release and the safetensors one differ)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from silero_vad import load_silero_vad

        theirs = load_silero_vad()
    mine, weights = SileroVAD(), theirs._model.state_dict()
    renamed = {"stft_conv.weight": weights["stft.forward_basis_buffer"]}
    for i in range(4):
        for kind in ("weight", "bias"):
            renamed[f"conv{i + 1}.{kind}"] = weights[f"encoder.{i}.reparam_conv.{kind}"]
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        renamed[f"lstm_cell.{name}"] = weights[f"decoder.rnn.{name}"]
    for kind in ("weight", "bias"):
        renamed[f"final_conv.{kind}"] = weights[f"decoder.decoder.2.{kind}"]
    mine.network.load_state_dict(renamed)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(40 * FRAME) * np.repeat(rng.uniform(0, 0.5, 40), FRAME)
    for frame in x.astype(np.float32).reshape(-1, FRAME):
        assert mine(frame) == pytest.approx(float(theirs(torch.from_numpy(frame), 16000).detach()), abs=1e-4)


def test_speech_begins_at_the_threshold_and_ends_after_the_silence() -> None:
    chances = iter([0.1, 0.6, 0.4, 0.4, 0.2, 0.2, 0.5, 0.2, 0.2, 0.2, 0.2])
    ears = Endpointer(lambda frame: next(chances), threshold=0.5, silence_s=3 * FRAME / 16000)
    heard = [ears.feed(np.zeros(FRAME, np.float32)) for _ in range(11)]
    assert heard == [False, True, True, True, True, True, True, True, True, False, False]


def test_microphone_through_alsa(tmp_path: Path) -> None:
    """A real capture device: ALSA's file plugin plays a recording into PortAudio."""
    try:
        import sounddevice  # noqa: F401
    except OSError:
        pytest.skip("PortAudio is not installed (apt-get install libportaudio2)")
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000) * 32767).astype("<i2")
    (tmp_path / "in.raw").write_bytes(tone.tobytes() * 20)
    (tmp_path / "asoundrc").write_text(
        'pcm.!default { type plug slave { pcm "recording" format S16_LE rate 16000 channels 1 } }\n'
        f'pcm.recording {{ type file slave.pcm "null" file "/dev/null" infile "{tmp_path / "in.raw"}" format "raw" }}\n'
        "pcm.null { type null }\n"
    )
    code = (
        "from itertools import islice; import numpy as np; from speechattn.audio.microphone import listen;"
        "x = np.concatenate(list(islice(listen(16000), 10)));"
        "print(len(x), float(np.sqrt(np.mean(x**2))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "ALSA_CONFIG_PATH": str(tmp_path / "asoundrc")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    length, level = done.stdout.split()
    assert int(length) == 16000
    assert float(level) == pytest.approx(0.354, abs=0.05)
