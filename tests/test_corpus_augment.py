"""Changes to the sound: what they promise, measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_corpus import write_corpus

from speechattn.data.augment import (
    Augmentation,
    ColouredNoise,
    Level,
    Noise,
    Reverberation,
    Speed,
    Telephone,
    augmented,
    lots,
    mu_law,
)  # fmt: skip
from speechattn.data.cuts import Utterance
from speechattn.data.join import Join
from speechattn.errors import InputError

RATE = 16000


def tone(n: int = RATE, hertz: float = 440) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz / RATE * np.arange(n))).astype(np.float32)


def db(x: np.ndarray, y: np.ndarray) -> float:
    return 10 * np.log10(np.square(x, dtype=float).mean() / np.square(y, dtype=float).mean())


@pytest.fixture(scope="module")
def noises(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("noise"), [0.3, 2.0, 5.0], rate=8000)


def every(noises: Path) -> list[Augmentation]:
    return [Speed(), Level(), ColouredNoise(), Noise(noises.parent), Noise(noises), Reverberation(), Telephone(p=0.5)]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 99), name=st.text(), n=st.integers(1, 3000))
def test_a_change_is_a_function_of_seed_epoch_and_id(
    noises: Path, seed: int, epoch: int, name: str, n: int
) -> None:  # fmt: skip
    x = tone(n)
    kept = x.copy()
    for change in every(noises):
        y = change(x, RATE, lots(seed, epoch, name))
        assert np.array_equal(y, change(x, RATE, lots(seed, epoch, name)))
        assert y.dtype == np.float32
        assert np.isfinite(y).all()
        assert 1 <= len(y) <= len(x) * change.stretch
    together = augmented(x, RATE, every(noises), key=(seed, epoch, name))
    assert np.array_equal(together, augmented(x, RATE, every(noises), key=(seed, epoch, name)))
    assert np.array_equal(x, kept)  # what was given is not touched


def test_lots_differ_and_p_is_the_share() -> None:
    x = tone(800)
    for kind in (Level, ColouredNoise, Reverberation, Telephone):
        changed = [not np.array_equal(kind(p=0.3)(x, RATE, lots(0, 1, str(i))), x) for i in range(400)]
        assert 0.22 < np.mean(changed) < 0.38
    one = [ColouredNoise(p=1)(x, RATE, lots(*key)) for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))]
    assert all(not np.array_equal(one[0], other) for other in one[1:])


def test_speed_changes_pitch_and_length() -> None:
    for factor in (0.8, 1.25):
        y = Speed(factors=[factor])(tone(), RATE, lots(0, 0, ""))
        assert len(y) == int(RATE / factor)
        spectrum = np.abs(np.fft.rfft(y * np.hanning(len(y)), 8 * RATE))
        assert spectrum.argmax() / 8 == pytest.approx(440 * factor, abs=0.5)
    assert Speed().stretch == pytest.approx(1 / 0.9)
    heard = {len(Speed()(tone(900), RATE, lots(0, 0, str(i)))) for i in range(50)}
    assert heard == {818, 900, 1000}
    with pytest.raises(ValueError, match="wanted positive"):
        Speed(factors=[0.0])


def test_noise_is_as_loud_as_was_said(noises: Path) -> None:
    x = tone(2 * RATE)
    for source in (noises, noises.parent):
        y = Noise(source, lowest_db=12, highest_db=12, p=1)(x, RATE, lots(0, 0, ""))
        assert db(x, y - x) == pytest.approx(12, abs=0.01)
    ratios = [db(x, ColouredNoise(lowest_db=5, highest_db=9, p=1)(x, RATE, lots(0, 0, str(i))) - x) for i in range(60)]
    assert 5 <= min(ratios) < 5.5
    assert 8.5 < max(ratios) <= 9.001
    slopes = []
    for i in range(60):
        noise = ColouredNoise(lowest_db=0, highest_db=0, p=1)(x, RATE, lots(0, 0, str(i))) - x
        power = np.square(np.abs(np.fft.rfft(noise)))
        octaves = [np.log2(power[2**i : 2 ** (i + 1)].mean()) for i in range(6, 13)]
        slopes.append(-np.polyfit(np.arange(7), octaves, 1)[0])
    assert min(slopes) < 0.2
    assert max(slopes) > 1.7
    silent = np.zeros(100, np.float32)
    assert not ColouredNoise(p=1)(silent, RATE, lots(0, 0, "")).any()


def test_noise_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Noise(tmp_path / "none")
    with pytest.raises(InputError, match="no recordings of noise"):
        Noise(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"the noise .*a\.wav cannot be read"):
        Noise(tmp_path, p=1)(tone(), RATE, lots(0, 0, ""))
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
    with pytest.raises(InputError, match="holds no samples"):
        Noise(tmp_path, p=1)(tone(), RATE, lots(0, 0, ""))


def test_a_room_rings_as_long_as_was_said_and_keeps_the_power() -> None:
    click = np.zeros(RATE, np.float32)
    click[100] = 0.5
    room = Reverberation(shortest_s=0.5, longest_s=0.5, lowest_db=3, highest_db=3, p=1)(click, RATE, lots(0, 0, ""))
    assert not np.abs(room[:100]).max() > 1e-6
    assert np.abs(room).argmax() == 100
    assert db(room, click) == pytest.approx(0, abs=0.01)
    direct, tail = room[100] ** 2, np.square(room[101:8100], dtype=float)
    assert 10 * np.log10(direct / tail.sum()) == pytest.approx(3, abs=0.3)
    left = 10 * np.log10(tail[::-1].cumsum()[::-1])  # Schroeder's backward integral
    slope = np.polyfit(np.arange(4000) / RATE, left[:4000], 1)[0]
    assert -60 / slope == pytest.approx(0.5, rel=0.1)


def test_a_telephone_passes_its_band_alone() -> None:
    change = Telephone(p=1)
    for hertz, least, most in ((100, -200, -25), (200, -200, -25), (320, -1, 1), (1000, -1, 1), (3300, -1, 1),
                               (3600, -6, -3), (3950, -200, -25), (6000, -200, -25)):  # fmt: skip
        x = tone(hertz=hertz)
        y = change(x, RATE, lots(0, 0, "a"))
        assert len(y) == len(x)
        assert least < db(y[2000:-2000] + 1e-9, x[2000:-2000]) < most, hertz
    x = tone(hertz=1000)
    error = change(x, RATE, lots(0, 0, "a")) - x
    assert 30 < db(x[2000:-2000], error[2000:-2000]) < 45  # 8 bits of mu-law: about 38 dB, not less for soft sound
    error = change(x / 10, RATE, lots(0, 0, "a")) - x / 10
    assert 28 < db(x[2000:-2000] / 10, error[2000:-2000]) < 45
    with pytest.raises(ValueError, match="a band of 300 to 5000 Hz"):
        Telephone(high_hz=5000)


def test_mu_law_by_hand() -> None:
    assert np.allclose(mu_law(np.array([0.0, 1.0, -1.0])), [0, 1, -1])
    assert len(np.unique(mu_law(np.linspace(-1, 1, 9999)))) == 255
    step = 2 ** (8 * 64 / 127)  # of level 64 of 127: (256^(64/127) - 1) / 255
    assert mu_law(np.array([(step - 1) / 255]))[0] == pytest.approx((step - 1) / 255)


def test_level_does_not_clip() -> None:
    ratios = [db(Level()(0.1 * tone(), RATE, lots(0, 0, str(i))), 0.1 * tone()) for i in range(60)]
    assert min(ratios) < -14
    assert 9 < max(ratios) <= 10.01
    loud = Level(lowest_db=20, highest_db=20)(tone(), RATE, lots(0, 0, ""))
    assert np.abs(loud).max() == pytest.approx(1, abs=1e-5)
    over = Level(lowest_db=3, highest_db=3)(4 * tone(), RATE, lots(0, 0, ""))
    assert np.array_equal(over, 4 * tone())


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=30), spare=st.floats(0, 0.5), seed=st.integers(0, 999),
    most=st.floats(0.01, 1),
)  # fmt: skip
def test_joined_utterances_are_all_there_and_fit(sizes: list[int], spare: float, seed: int, most: float) -> None:
    texts = [f"t{i}" if i % 3 else "" for i in range(len(sizes))]
    heard = [(np.full(n, i + 1, np.float32), Utterance(f"u{i}", texts[i], None, n, None)) for i, n in enumerate(sizes)]
    limit = int(len(sizes) * max(sizes) * (1 + spare))
    join = Join(most_s=most, p=1, longest_gap_s=0.02)
    rows = join(heard, 1000, limit=limit, generator=lots(seed, 0, ""))
    assert sorted(name for _, said in rows for name in said.id.split("+")) == sorted(said.id for _, said in heard)
    assert len(rows) * max(len(x) for x, _ in rows) <= limit
    for x, said in rows:
        parts = [int(name[1:]) for name in said.id.split("+")]
        assert said.text == " ".join(texts[i] for i in parts if texts[i])
        assert len(parts) == 1 or len(x) <= 1000 * most
        kept = x[x > 0]
        assert np.array_equal(kept, np.concatenate([heard[i][0] for i in parts]))
        assert len(x) - len(kept) <= 20 * (len(parts) - 1)
        assert x[-1] > 0


def test_joining_makes_long_ones() -> None:
    heard = [(np.ones(100, np.float32), Utterance(f"u{i}", "", "t", 0.1, None)) for i in range(20)]
    rows = Join(most_s=0.5, p=1, longest_gap_s=0)(heard, 1000, limit=2000, generator=lots(0, 0, ""))
    assert [len(x) for x, _ in rows] == [500] * 4
    assert {said.translation for _, said in rows} == {"t t t t t"}
    assert {said.duration_s for _, said in rows} == {0.5}
    assert len(Join(p=0)(heard, 1000, limit=2000, generator=lots(0, 0, ""))) == 20
