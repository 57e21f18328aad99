"""Normalisation over a corpus, and masks in training."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from speechattn.audio.augment import SpecAugment
from speechattn.audio.normal import GlobalCMVN
from speechattn.frames import Frames
from speechattn.testing import check_stream


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
    check_stream(cmvn, batches[0])
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
