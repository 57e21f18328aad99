"""Front-ends as streams, normalisation, masks in training."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn.audio.augment import SpecAugment
from speechattn.audio.hearing import Hearing, hear
from speechattn.audio.normal import GlobalCMVN
from speechattn.audio.spectrum import CentredLogMel, KaldiFbank, LogMel
from speechattn.frames import Frames
from speechattn.pretrained.whisper.features import FrontEnd
from speechattn.stream import Serial, Sliding, Stream, flush
from speechattn.testing import check_stream

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


@pytest.mark.parametrize("kind", [*KINDS, "cmvn"])
def test_every_law_of_streams_holds(kind: str) -> None:
    if kind == "cmvn":
        stream: Stream = GlobalCMVN(torch.randn(6).double(), torch.rand(6).double() + 0.5)
        check_stream(stream, features(9, 5, 0), reference=lambda _, x: Frames.of((x.values - stream.mean) / stream.std,
                                                                               x.mask))  # fmt: skip
        return
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


class Step(nn.Module):
    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, x: Frames, state: object) -> tuple[Frames, object]:
        return self.stream.step(x, state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_can_be_exported(kind: str) -> None:
    stream = KINDS[kind]()
    x = Frames(torch.randn(2, 4 * (stream.block or 1)), torch.ones(2, 4 * (stream.block or 1), dtype=torch.bool))
    _, state = stream.step(x, stream.init_state(x))
    exported = torch.export.export(Step(stream), (x, state)).module()
    for _ in range(2):
        x = Frames(torch.randn_like(x.values), x.mask)
        (mine, after), (theirs, other) = stream.step(x, state), exported(x, state)
        same(theirs, mine, 1e-5)
        same(Frames(other.values, other.mask), Frames(after.values, after.mask), 1e-6)
        state = after


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


def features(*lengths: int, dim: int = 6) -> Frames:
    values = torch.randn(len(lengths), max(lengths), dim, dtype=torch.float64) * 3 + 1000
    return Frames.from_lengths(values, torch.tensor(lengths))


def test_statistics_are_those_of_the_valid_frames() -> None:
    batches = [features(7, 3), features(1), features(5, 0, 9)]
    with_nan = [Frames(x.values.masked_fill(~x.mask[..., None], torch.nan), x.mask) for x in batches]
    every = np.concatenate([x.values[x.mask].numpy() for x in batches])
    for corpus in (batches, with_nan, [features(1)[:0], *batches]):
        cmvn = GlobalCMVN.estimate(iter(corpus))
        np.testing.assert_allclose(cmvn.mean.numpy(), every.mean(0), rtol=1e-13)
        np.testing.assert_allclose(cmvn.std.numpy(), every.std(0), rtol=1e-9)
    y = cmvn(with_nan[0])
    assert (y.values[~y.mask] == 0).all()
    valid = batches[0].values[batches[0].mask].numpy()
    np.testing.assert_allclose(y.values[y.mask].numpy(), (valid - every.mean(0)) / every.std(0), atol=1e-9)
    same(in_steps(cmvn, batches[0], [2, 0, 1])[:7], cmvn(batches[0]))
    assert GlobalCMVN.estimate(Frames(x.values.float(), x.mask) for x in batches).mean.dtype == torch.float32
    with pytest.raises(ValueError, match="no valid frame"):
        GlobalCMVN.estimate([features(1)[:0]])
    with pytest.raises(ValueError, match="one number a feature"):
        GlobalCMVN(torch.zeros(3), torch.ones(4))


def test_a_feature_that_never_varied_becomes_zero() -> None:
    batches = [features(50), features(13), features(7)]
    for x in batches:
        x.values[..., 2] = 1000.1  # a number whose sums are rounded
    cmvn = GlobalCMVN.estimate(batches)
    assert 0 < cmvn.std[2] < 1e-9
    x = batches[0]
    x.values[..., 2] += 1e-3
    y = torch.cat([cmvn(x).values[0] for x in batches])
    assert (y[:, 2] == 0).all()
    assert float(y[:, 1].std(correction=0)) == pytest.approx(1)
    small = Frames(torch.randn(1, 99, 2) * 1e-3, torch.ones(1, 99, dtype=torch.bool))
    assert float(GlobalCMVN.estimate([small])(small).values.std()) == pytest.approx(1, abs=0.05)


def test_statistics_are_saved_with_the_weights_and_read_from_espnet(tmp_path: Path) -> None:
    x = features(400).values[0].numpy()
    count, total, squares = np.array(len(x)), x.sum(0), np.square(x).sum(0)
    np.savez(tmp_path / "feats_stats.npz", count=count, sum=total, sum_square=squares)
    np.save(tmp_path / "kaldi.npy", np.stack([np.append(total, count), np.append(squares, 0)]))
    for name in ("feats_stats.npz", "kaldi.npy"):
        cmvn = GlobalCMVN.read(tmp_path / name)
        np.testing.assert_allclose(cmvn.mean.numpy(), x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(cmvn.std.numpy(), x.std(0), rtol=1e-3)
        again = GlobalCMVN(torch.zeros(6), torch.ones(6))
        again.load_state_dict(cmvn.state_dict())
        assert torch.equal(again.mean, cmvn.mean)
        assert torch.equal(again.std, cmvn.std)


def masked(x: Frames, y: Frames) -> tuple[Tensor, Tensor]:
    """Frames [B, T] and features [B, D] that are masked altogether; frames only where they are valid."""
    gone = y.values == 0
    return gone.all(2) & x.mask, (gone | ~x.mask[..., None]).all(1)


def runs(row: Tensor) -> list[int]:
    return [len(list(group)) for kept, group in itertools.groupby(row.tolist()) if kept]


def test_time_masks_follow_the_length_of_the_row() -> None:
    augment = SpecAugment(time_masks=1, time_share=0.25, frequency_masks=0)
    generator = torch.Generator().manual_seed(1)
    x = Frames.from_lengths(torch.ones(3, 80, 4), torch.tensor([80, 40, 3]))
    widths: list[list[int]] = [[], [], []]
    ends = [0, 0, 0]
    starts = set()
    for _ in range(600):
        times, bins = masked(x, augment(x, generator=generator))
        assert not bins.any()
        for row in range(3):
            found = runs(times[row])
            assert len(found) <= 1
            widths[row].append(sum(found))
            ends[row] += int(times[row, int(x.lengths[row]) - 1])
        if times[1].any():
            starts.add(int(times[1].int().argmax()))
    assert (min(widths[0]), max(widths[0])) == (0, 20)
    assert (min(widths[1]), max(widths[1])) == (0, 10)
    assert max(widths[2]) == 0
    assert np.mean(widths[0]) == pytest.approx(10, abs=0.8)  # uniform: the error of the mean is 0.25
    assert np.bincount(widths[1], minlength=11).min() > 25  # of 54 each
    assert ends[0] > 3
    assert ends[1] > 3
    assert min(starts) == 0
    assert max(starts) == 39


def test_frequency_masks_are_bounded_and_padding_is_not_touched() -> None:
    augment = SpecAugment(time_masks=0, frequency_masks=2, frequency_width=5)
    x = Frames.from_lengths(torch.ones(2, 9, 30), torch.tensor([9, 4]))
    generator, widths, edges = torch.Generator().manual_seed(2), [], torch.zeros(30)
    for _ in range(400):
        y = augment(x, generator=generator)
        assert torch.equal(y.mask, x.mask)
        times, bins = masked(x, y)
        assert not times.any()
        widths += [int(row.sum()) for row in bins]
        edges += bins.float().sum(0)
    assert max(widths) == 10
    assert min(widths) == 0
    assert edges.min() > 5
    many = SpecAugment(frequency_masks=3, frequency_width=99)(Frames(torch.ones(1, 4, 3), torch.ones(1, 4) > 0))
    assert many.values.shape == (1, 4, 3)


def test_masks_are_for_training_and_repeat_with_their_seed() -> None:
    x = features(40, 25)
    augment = SpecAugment(time_masks=2, time_share=0.2, frequency_masks=1, frequency_width=2)
    first, second = (augment(x, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.values, augment(x, generator=torch.Generator().manual_seed(8)).values)
    assert augment.eval()(x) is x
    with pytest.raises(ValueError, match="wanted no negative number"):
        SpecAugment(time_share=1.5)


def test_masks_may_be_filled_with_the_mean_of_the_row() -> None:
    x = features(40, 25)
    augment = SpecAugment(time_masks=2, time_share=0.5, frequency_masks=2, frequency_width=3, mean=True)
    y = augment(x, generator=torch.Generator().manual_seed(3))
    for row in range(2):
        changed = y.values[row] != x.values[row]
        assert changed.any()
        assert not changed[int(x.lengths[row]) :].any()
        mean = float(x.values[row][x.mask[row]].mean())
        assert y.values[row][changed].tolist() == pytest.approx([mean] * int(changed.sum()))


def test_a_mask_belongs_to_its_row_not_to_the_batch() -> None:
    """A row of a batch may be masked nowhere but in its own frames, wherever these stand."""
    x = Frames.from_lengths(torch.ones(1, 20, 4), torch.tensor([20]))
    late = Frames(torch.nn.functional.pad(x.values, [0, 0, 15, 0]), torch.nn.functional.pad(x.mask, [15, 0]))
    augment = SpecAugment(time_masks=3, time_share=0.3, frequency_masks=0)
    here, there = (augment(part, generator=torch.Generator().manual_seed(5)) for part in (x, late))
    assert torch.equal(here.values, there.values[:, 15:])
    assert not there.values[:, :15].any()
    nothing = augment(features(3)[:0])
    assert nothing.values.shape == (1, 0, 6)
