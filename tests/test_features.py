"""Front-ends as streams."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechattn.audio.hearing import Hearing, hear
from speechattn.audio.normal import GlobalCMVN
from speechattn.audio.spectrum import CentredLogMel, KaldiFbank, LogMel
from speechattn.frames import Frames
from speechattn.pretrained.whisper.features import FrontEnd
from speechattn.stream import Serial, Sliding, Stream, flush
from speechattn.testing import check_export, check_stream

KINDS: dict[str, Callable[[], Sliding]] = {
    "mel": lambda: LogMel(20, window=100, hop=40, rate=4000),
    "mel_padded": lambda: LogMel(20, window=80, hop=40, rate=4000, transform=128, scale="slaney", base=10.0),
    "centred": lambda: CentredLogMel(20, window=100, hop=40, rate=4000),
    "centred_odd": lambda: CentredLogMel(20, window=99, hop=64, rate=4000, transform=128),
    "kaldi": lambda: KaldiFbank(20, window=100, hop=40, rate=4000),
    "kaldi_apart": lambda: KaldiFbank(20, window=100, hop=160, rate=4000),
}


def sound(*lengths: int, scale: float = 0.1) -> Frames:
    values = torch.randn(len(lengths), max(lengths), dtype=torch.float64) * scale
    return Frames.from_lengths(values, torch.tensor(lengths))


def in_steps(stream: Stream, x: Frames, blocks: list[int]) -> Frames:
    """The outputs of steps of so many blocks each, and one for the rest, without the delay."""
    block = stream.block or 1
    z, state, at, outputs = flush(x, stream), stream.init_state(x), 0, []
    for n in [*(b * block for b in blocks), x.mask.shape[1] + 100 * block]:
        y, state = stream.step(z[at : at + n], state)
        outputs.append(y)
        at += n
    return Frames.cat(outputs)[stream.delay :]


def same(a: Frames, b: Frames, atol: float = 1e-9) -> None:
    assert torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.values, b.values, rtol=0, atol=atol)


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize(("rate", "window", "hop", "mels"), [(16000, 400, 160, 80), (8000, 256, 64, 23)])
def test_log_mel_is_torchaudios(scale: str, rate: int, window: int, hop: int, mels: int) -> None:
    import torchaudio

    x = sound(5 * rate // 4)
    theirs = torchaudio.transforms.MelSpectrogram(
        rate, window, hop_length=hop, n_mels=mels, center=False, mel_scale=scale, f_min=60.0, f_max=rate / 2 - 300,
        norm="slaney" if scale == "slaney" else None,
    ).double()  # fmt: skip
    expected = theirs(x.values).clamp(min=1e-10).log().transpose(1, 2)
    mine = LogMel(mels, rate=rate, window=window, hop=hop, low=60.0, high=rate / 2 - 300, scale=scale).double()
    y = mine(x)
    assert int(y.lengths[0]) == expected.shape[1]
    torch.testing.assert_close(y.values[:, : expected.shape[1]], expected, rtol=0, atol=1e-8)
    ten = LogMel(mels, rate=rate, window=window, hop=hop, low=60.0, high=rate / 2 - 300, scale=scale, base=10.0)
    torch.testing.assert_close(ten.double()(x).values[:, : expected.shape[1]], expected / np.log(10), rtol=0, atol=1e-8)


def test_a_longer_transform_and_centred_windows_are_torchaudios() -> None:
    import torchaudio

    x = sound(16000)
    theirs = torchaudio.transforms.MelSpectrogram(
        16000, 512, win_length=400, hop_length=160, n_mels=80, center=False
    ).double()  # fmt: skip
    expected = theirs(x.values).clamp(min=1e-10).log().transpose(1, 2)  # their windows begin (512 - 400) / 2 later
    y = LogMel(80, transform=512).double()(Frames(x.values[:, 56:], x.mask[:, 56:]))
    torch.testing.assert_close(y.values[:, : expected.shape[1]], expected, rtol=0, atol=1e-8)
    theirs = torchaudio.transforms.MelSpectrogram(16000, 512, win_length=400, hop_length=160, n_mels=80).double()
    expected = theirs(torch.nn.functional.pad(x.values, [0, 1600])).clamp(min=1e-10).log().transpose(1, 2)
    torch.testing.assert_close(
        CentredLogMel(80, transform=512).double()(x).values, expected[:, :100], rtol=0, atol=1e-8
    )


@pytest.mark.parametrize(("rate", "window", "hop", "mels", "low", "high"), [
    (16000, 400, 160, 80, 20.0, None), (8000, 200, 80, 23, 64.0, 3800.0), (16000, 512, 128, 40, 0.0, 7600.0),
])  # fmt: skip
def test_filterbank_is_kaldis(rate: int, window: int, hop: int, mels: int, low: float, high: float | None) -> None:
    import torchaudio

    x = sound(rate)
    x = Frames(x.values + 0.05, x.mask)  # an offset, which is removed
    expected = torchaudio.compliance.kaldi.fbank(
        x.values * 32768, num_mel_bins=mels, sample_frequency=rate, frame_length=1000 * window / rate,
        frame_shift=1000 * hop / rate, low_freq=low, high_freq=high or 0.0, dither=0.0, window_type="povey",
        remove_dc_offset=True, preemphasis_coefficient=0.97, snip_edges=True, use_energy=False,
    )  # fmt: skip
    y = KaldiFbank(mels, rate=rate, window=window, hop=hop, low=low, high=high).double()(x)
    assert int(y.lengths[0]) == len(expected)
    torch.testing.assert_close(y.values[0, : len(expected)], expected, rtol=0, atol=1e-6)
    quiet = KaldiFbank(mels, rate=rate, window=window, hop=hop, low=low, high=high, gain=1.0).double()(x)
    assert float((y.values - quiet.values)[0, : len(expected)].median()) == pytest.approx(2 * np.log(32768), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_gives_the_whole(kind: str) -> None:
    stream = KINDS[kind]().double()

    @settings(max_examples=20, deadline=None)
    @given(length=st.integers(0, 700), blocks=st.lists(st.integers(0, 4), max_size=12))
    def law(length: int, blocks: list[int]) -> None:
        x = sound(length)
        whole, pieces = stream(x), in_steps(stream, x, blocks)
        assert pieces[whole.mask.shape[1] :].mask.sum() == 0
        same(pieces[: whole.mask.shape[1]], whole)

    law()


@pytest.mark.parametrize("kind", KINDS)
def test_every_law_of_streams_holds(kind: str) -> None:
    stream = KINDS[kind]().double()
    centred = isinstance(stream, CentredLogMel)  # compared with torchaudio above
    check_stream(stream, sound(500, 333, 90), reference=(lambda _, x: stream(x)) if centred else None)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_the_split(kind: str) -> None:
    stream, x = KINDS[kind]().double(), sound(600)
    found = []
    for f in (lambda x: stream(x), lambda x: in_steps(stream, x, [1, 0, 3, 2])):
        values = x.values.clone().requires_grad_()
        y = f(Frames(values, x.mask))
        y.values.sum().backward()
        assert values.grad is not None
        found.append(values.grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other_nor_padding(kind: str) -> None:
    stream, lengths = KINDS[kind]().double(), (640, 0, 333, 99, 100)
    x = sound(*lengths)
    y = stream(x)
    for row, length in enumerate(lengths):
        alone = stream(Frames(x.values[row : row + 1, :length], x.mask[row : row + 1, :length]))
        n = alone.mask.shape[1]
        same(Frames(y.values[row : row + 1, :n], y.mask[row : row + 1, :n]), alone)
        assert not y.mask[row, n:].any()
    if stream.whole:  # a window with padding in it is no output; others are zero where they are not valid
        dirty = Frames(x.values.masked_fill(~x.mask, torch.nan), x.mask)
        same(stream(dirty), y)
        assert y.lengths.tolist() == [max(0, (n - stream.kernel) // (stream.block or 1) + 1) for n in lengths]
    else:
        assert y.lengths.tolist() == [-(-n // (stream.block or 1)) for n in lengths]
    assert (y.values[~y.mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_joins_later_hears_the_same(kind: str) -> None:
    stream = KINDS[kind]().double()
    hop, x = stream.block or 1, sound(640)
    late = Frames(torch.nn.functional.pad(x.values, [3 * hop, 0]), torch.nn.functional.pad(x.mask, [3 * hop, 0]))
    y = in_steps(stream, late, [1, 2, 1, 4])
    same(y[3 : 3 + stream(x).mask.shape[1]], stream(x))
    assert not y.mask[:, :3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_sees_its_window_and_comes_as_soon_as_announced(kind: str) -> None:
    stream, t = KINDS[kind]().double(), 4
    hop, x = stream.block or 1, sound(1200)
    values = x.values.clone().requires_grad_()
    y = stream(Frames(values, x.mask))
    y.values[0, t].sum().backward()
    assert values.grad is not None
    seen = values.grad[0].nonzero().flatten()
    begin = t * hop - stream.kernel + 1 + stream.right
    slack = 1  # a periodic window begins with a zero, a symmetric one ends with one too
    assert begin <= int(seen[0]) <= begin + slack
    assert begin + stream.kernel - 1 - slack <= int(seen[-1]) <= begin + stream.kernel - 1
    assert int(seen[-1]) < (t + 1) * hop + stream.latency
    assert begin + stream.kernel > (t + 1) * hop + stream.latency - hop or not stream.latency
    z, state = flush(x, stream), stream.init_state(x)
    early, _ = stream.step(z[: (t + 1) * hop + stream.latency], state)
    torch.testing.assert_close(early.values[:, stream.delay :][:, : t + 1], y.values[:, : t + 1], rtol=0, atol=1e-9)
    assert early.mask.shape[1] == t + 1 + stream.delay


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_can_be_exported(kind: str) -> None:
    stream = KINDS[kind]().double()
    check_export(stream, sound(1600, 333))
    assert stream.plan().block


@pytest.mark.parametrize("kind", KINDS)
def test_silence_and_loud_sound_stay_finite_and_bring_gradients(kind: str) -> None:
    stream = KINDS[kind]()
    for values in (torch.zeros(1, 400), torch.full((1, 400), 1e4), torch.full((1, 400), 1e-20)):
        values = values.requires_grad_()
        y = stream(Frames(values, torch.ones(1, 400, dtype=torch.bool)))
        y.values.sum().backward()
        assert y.values.isfinite().all()
        assert values.grad is not None
        assert values.grad.isfinite().all()


def test_filterbanks_are_not_saved() -> None:
    assert not LogMel().state_dict()
    assert not KaldiFbank().state_dict()


def test_a_transform_shorter_than_its_window_is_refused() -> None:
    with pytest.raises(ValueError, match="256 samples is shorter than the window of 400"):
        LogMel(transform=256)


PIECES = st.lists(st.integers(1, 3000), max_size=12)


def whispers(samples: np.ndarray, mels: int = 80) -> Tensor:
    """log10 mel power of the sound and 30 s of silence as OpenAI's code computes it, before the floor."""
    from torchaudio.functional import melscale_fbanks

    x = torch.nn.functional.pad(torch.from_numpy(samples), [0, 480000])
    power = torch.stft(x, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1].abs().square()
    bank = melscale_fbanks(201, 0.0, 8000.0, mels, 16000, norm="slaney", mel_scale="slaney")
    return (power.T @ bank).clamp(min=1e-10).log10()


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 9000), cuts=PIECES, looks=st.sets(st.integers(0, 12)))
def test_hearing_in_pieces_is_whispers_features_of_the_whole(length: int, cuts: list[int], looks: set[int]) -> None:
    x = torch.randn(length).numpy() * 0.1
    hearing = Hearing(FrontEnd())
    edges = [0, *itertools.takewhile(lambda at: at < length, itertools.accumulate(cuts)), length]
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        hearing.add(x[a:b])
        if i in looks:
            hearing.read()
    found = hearing.read()[0]
    assert len(found) >= -(-length // 160) + (length % 160 > 40 or length % 160 == 0)  # all that see sound
    expected = whispers(x)
    torch.testing.assert_close(found, expected[: len(found)], rtol=0, atol=1e-4)
    assert (expected[len(found) :] == -10).all()
    torch.testing.assert_close(found, hear(FrontEnd(), x)[0], rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(before=st.integers(1, 4000), frames=st.integers(0, 30), after=st.integers(0, 4000))
def test_what_is_cut_changes_nothing_that_remains(before: int, frames: int, after: int) -> None:
    x = torch.randn(before + after).numpy()
    frames = min(frames, before // 160)
    hearing = Hearing(FrontEnd())
    hearing.add(x[:before])
    hearing.cut(160 * frames)
    hearing.add(x[before:])
    torch.testing.assert_close(hearing.read(), hear(FrontEnd(), x)[:, frames:], rtol=0, atol=1e-5)


def test_only_whole_frames_are_cut_and_only_bounded_streams_hear() -> None:
    with pytest.raises(ValueError, match=r"100 samples are 0\.625 frames"):
        Hearing(FrontEnd()).cut(100)

    class Whole(Stream):
        block = None

    with pytest.raises(ValueError, match="Whole is no front-end"):
        Hearing(Whole())


def test_any_front_end_can_hear() -> None:
    x = torch.randn(3000).numpy()
    chain = Serial(KaldiFbank(), GlobalCMVN(torch.full((80,), 9.0), torch.full((80,), 2.0)))
    hearing = Hearing(chain)
    for piece in np.split(x, [100, 1000, 1001]):
        hearing.add(piece)
        hearing.read()
    values = torch.nn.functional.pad(torch.from_numpy(x)[None], [0, 1000])
    expected = chain(Frames(values, torch.ones(values.shape, dtype=torch.bool))).values
    found = hearing.read()
    assert found.shape[1] == 19
    torch.testing.assert_close(found, expected[:, :19], rtol=0, atol=1e-4)
