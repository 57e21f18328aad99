"""Searches for labels and their segments."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_segmental import BOUNDARIES, END, VOCAB, D, block, head_of, holed, means
from torch import Tensor, nn

from speechattn import tree
from speechattn.cross.segmental import Within
from speechattn.cross.soft import Soft
from speechattn.decoder.segmental import Segmental
from speechattn.frames import Frames
from speechattn.search.beam import Beam, Hypothesis
from speechattn.search.segmental import SegmentalBeam, SegmentalSearch, TimeSynchronousBeam
from speechattn.testing import random_frames

pytestmark = pytest.mark.usefixtures("precise")
BOUNDED = ["hard", "window", "clamped", "clamped and wide"]
Answer = tuple[tuple[int, ...], tuple[int, ...]]  # labels and their ends


def every(head: Segmental, name: str, x: Tensor, scale: float = 1.0, label: float = 1.0) -> dict[Answer, float]:
    """The score of every text with every segmentation of one row [T, D], without any search."""
    full, layer = Soft(D, 2).requires_grad_(False), head.decoder.layers[0]
    full.load_state_dict(head.cross.state_dict())
    mine, layer.cross = layer.cross, full
    labels: dict[tuple[tuple[int, ...], int, int], Tensor] = {}
    lengths: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def said(history: tuple[int, ...], start: int, end: int) -> Tensor:
        key = history[-head.history :], start, end
        if key not in labels:
            state = head.decoder.start(block(x, means(name, start, end)))
            hidden, _, _ = head.decoder.step(torch.tensor([key[0]]), state)
            labels[key] = label * head.decoder.logits(hidden[0, -1]).log_softmax(-1)
        return labels[key]

    def length(last: int, t: int, start: int) -> tuple[Tensor, Tensor]:
        key = last, t, start
        if key not in lengths:
            wait, end = head.length(x[t], torch.tensor(last), torch.tensor(t - start + 1))
            lengths[key] = scale * wait, scale * end.expand(VOCAB)
        return lengths[key]

    found: dict[Answer, float] = {}

    def grow(history: tuple[int, ...], ends: tuple[int, ...], score: float) -> None:
        start = ends[-1] if ends else 0
        waited = score
        for t in range(start, len(x)):
            wait, end = length(history[-1], t, start)
            each = waited + end + said(history, start, t + 1)
            for v in range(VOCAB - 1):
                grow((*history, v), (*ends, t + 1), float(each[v]))
            waited += float(wait)
        found[history[1:], ends] = waited + float(said(history, start, len(x))[END])

    grow((END,), (), 0.0)
    layer.cross = mine
    return found


def spans(ends: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(pairwise((0, *ends)))


@settings(deadline=None, max_examples=5)
@given(name=st.sampled_from(BOUNDED), length=st.sampled_from(["neural", "static", "none"]), seed=st.integers(0, 999),
       frames=st.integers(0, 4), scale=st.sampled_from([0.5, 1.0]), label=st.sampled_from([0.7, 1.0]))  # fmt: skip
def test_a_wide_beam_finds_what_is_best_of_all(
    name: str, length: str, seed: int, frames: int, scale: float, label: float
) -> None:
    torch.manual_seed(seed)
    head, x = head_of(BOUNDARIES[name], length, history=2), holed([frames, 3], seed)
    wide = SegmentalBeam(head, 90, sos=END, eos=END, length=scale, label=label, margin=math.inf)
    slow = TimeSynchronousBeam(head, 260, sos=END, eos=END, length=scale, label=label, threshold=0.0)
    known = [every(head, name, x.values[b][x.mask[b]], scale, label) for b in range(2)]
    for search in (wide, slow):
        for row, scores in zip(search.decode(x), known, strict=True):
            best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
            for (text, ends), score in scores.items():
                if text not in best or score > best[text][0]:
                    best[text] = score, ends
            ranked = sorted(best, key=lambda text: -best[text][0])
            assert len(row) == min(len(best), search.size)
            for h, text in zip(row[:20], ranked, strict=False):
                assert h.score == pytest.approx(best[text][0], abs=1e-9)
                assert h.tokens == text
                assert scores[h.tokens, tuple(end for _, end in h.spans)] == pytest.approx(h.score, abs=1e-9)


def searches(name: str, length: str, **changes: int) -> list[SegmentalSearch]:
    head = head_of(BOUNDARIES[name], length, history=changes.pop("history", 3), std=1.0)
    return [
        SegmentalBeam(head, 3, sos=END, eos=END, never=(0,), margin=6.0),
        TimeSynchronousBeam(head, 4, sos=END, eos=END, never=(0,), threshold=0.1),
    ]


def same(mine: list[Hypothesis], theirs: list[Hypothesis]) -> None:
    assert [(h.tokens, h.spans) for h in mine] == [(h.tokens, h.spans) for h in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-9)
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-9)


def pieces(search: SegmentalSearch, x: Frames, cuts: list[int]) -> Beam:
    beam = search.start(x)
    for a, b in pairwise([0, *sorted(c % (x.mask.shape[1] + 1) for c in cuts), x.mask.shape[1]]):
        beam = search.step(x[a:b], beam)
    return beam


@settings(deadline=None, max_examples=4)
@given(name=st.sampled_from(BOUNDED), length=st.sampled_from(["neural", "static"]), seed=st.integers(0, 999),
       cuts=st.lists(st.integers(0, 30), max_size=5),
       lengths=st.lists(st.integers(0, 14), min_size=1, max_size=3))  # fmt: skip
def test_pieces_and_rows(name: str, length: str, seed: int, cuts: list[int], lengths: list[int]) -> None:
    torch.manual_seed(seed)
    x = holed(lengths, seed)
    for search in searches(name, length):
        together = search.hypotheses(search.finish(pieces(search, x, cuts)))
        for row, found in enumerate(together):
            assert found
            same(found, search.decode(Frames(x.values[row : row + 1], x.mask[row : row + 1]).front())[0])


def test_rows_that_join_and_part() -> None:
    x = random_frames([17, 17], D)
    for search in searches("clamped and wide", "neural"):
        wanted = search.decode(x)
        first, second = tree.split(search.step(x[:9], search.start(x)))
        first = search.step(Frames(x.values[:1, 9:12], x.mask[:1, 9:12]), first)
        young = tree.select(search.start(x[:0]), [1])
        both = tree.concat([first, young, second])
        parts = [x.values[0, 12:], x.values[1, :0], x.values[1, 9:]]
        rest = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        both = search.step(Frames.from_lengths(rest, torch.tensor([len(part) for part in parts])), both)
        found = search.hypotheses(search.finish(both))
        same(found[0], wanted[0])
        same(found[2], wanted[1])
        same(found[1], search.decode(x[:0])[1])


def test_what_is_committed_is_forgotten_and_remembered() -> None:
    torch.manual_seed(1)
    x = random_frames([30, 30], D)
    for search in searches("clamped", "neural"):
        beam = pieces(search, x[:20], [7])
        n = beam.agreed(0.5) * torch.tensor([1, 0])
        assert int(n[0]) >= 2
        loose = search.hypotheses(search.finish(search.step(x[20:], tree.clone(beam))))
        kept = search.hypotheses(search.finish(search.step(x[20:], search.commit(tree.clone(beam), n))))
        same(kept[1], loose[1])
        best = loose[0][0]
        wanted = Hypothesis(best.tokens[n[0] :], best.score, best.log_probs[n[0] :], best.spans[n[0] :])
        same(kept[0][:1], [wanted])
        heard = search.hypotheses(search.finish(search.step(x, search.start_at(x[:0], torch.tensor([100, 0])))))
        still = search.decode(x)
        same(heard[1], still[1])
        assert [(a - 100, b - 100) for a, b in heard[0][0].spans] == list(still[0][0].spans)


def test_memory_and_hypotheses_are_bounded() -> None:
    x = random_frames([60], D)
    for search in searches("clamped and wide", "neural"):
        sizes = set()
        beam = search.start(x)
        for t in range(0, 60, 2):
            beam = search.step(x[t : t + 2], beam)
            best = beam.said.length[:, 0].minimum(beam.agreed(0.3))
            beam = search.commit(beam, best)
            sizes.add(sum(leaf.numel() for leaf in tree.leaves(beam.state)))
        assert max(sizes) <= min(sizes) + 2 * D + 2  # the frames that wait


def test_where_nothing_ends_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = head_of(Within(4), "neural"), random_frames([20], D)
    head.length.out.bias.fill_(-60.0)  # type: ignore[union-attr]
    head.length.out.weight.zero_()  # type: ignore[union-attr]
    for search in (SegmentalBeam(head, 3, sos=END, eos=END), TimeSynchronousBeam(head, 3, sos=END, eos=END)):
        asked: list[int] = []
        listened = search._log_probs
        monkeypatch.setattr(search, "_log_probs", lambda *args, f=listened, a=asked: a.append(1) or f(*args))
        assert [h.tokens for h in search.decode(x)[0]] == [()]
        assert len(asked) == 1  # the end


def test_what_is_refused() -> None:
    head = head_of(Within(4))
    for wrong in ({"size": 0}, {"size": 1, "label": 0.0}, {"size": 1, "margin": 0.0}):
        with pytest.raises(ValueError, match=r"beam of|margin"):
            SegmentalBeam(head, **wrong, sos=END, eos=END)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold"):
        TimeSynchronousBeam(head, 1, sos=END, eos=END, threshold=1.0)
    with pytest.raises(ValueError, match="give Within its longest"):
        SegmentalBeam(head_of(Within()), 1, sos=END, eos=END)
    nobody = Frames(torch.zeros(0, 5, D), torch.zeros(0, 5, dtype=torch.bool))
    assert SegmentalBeam(head, 2, sos=END, eos=END).decode(nobody) == []
