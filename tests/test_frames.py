"""Frames, memory and the growing buffer."""

import torch

from speechattn import tree
from speechattn.frames import Frames, Memory
from speechattn.stream import Buffer


def test_values_are_zero_where_the_mask_is_false_even_if_they_were_nan() -> None:
    values = torch.full((2, 3, 4), float("nan"))
    values[0, :2] = 1.0
    x = Frames.of(values, torch.tensor([[True, True, False], [False, False, False]]))
    assert x.values.sum() == 8
    assert x.lengths.tolist() == [2, 0]


def test_from_lengths_slice_and_pad() -> None:
    x = Frames.from_lengths(torch.ones(2, 4), torch.tensor([4, 1]))
    assert x.values.sum(1).tolist() == [4, 1]
    y = x[1:3].pad(2)
    assert y.mask.tolist() == [[True, True, False, False], [False] * 4]
    assert y.values.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_memory_forgets_the_front() -> None:
    memory = Memory.of(Frames(torch.arange(5.0)[None, :, None], torch.ones(1, 5, dtype=torch.bool)), start=7, stable=2)
    later = memory.drop(3)
    assert later.frames.values.flatten().tolist() == [3, 4]
    assert (later.start.item(), later.stable.item(), later.finished.item()) == (10, 0, False)


def test_buffer_appends_behind_each_rows_own_end() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    empty = Buffer.empty(torch.zeros(1, 0, 1))
    older = empty.append(torch.tensor([[[3.0], [4.0]]]), one.expand(1, 2))
    buffer = tree.concat([empty, older])
    grown = buffer.append(torch.tensor([[[1.0]], [[2.0]]]), one.expand(2, 1))
    assert grown.length.tolist() == [1, 3]
    assert grown.values[..., 0].tolist() == [[0, 0, 1], [3, 4, 2]]
    cut = grown.truncate(2)
    assert cut.length.tolist() == [1, 2]
    assert torch.where(cut.mask, cut.values[..., 0], 0.0).tolist() == [[0, 0, 1], [0, 3, 4]]
    assert grown.truncate(1).values.shape[1] == 3  # the first row stays as it is, at the end
    assert older.truncate(1).values.shape[1] == 1
