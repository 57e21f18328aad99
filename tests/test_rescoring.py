"""A second pass over N-best lists, and decoders that read from both ends."""

from __future__ import annotations

import pytest
import torch
from test_decoder import DIM, memory, usual
from test_joint import END, Head, attention, fed, parts, same, texts, utterances

from speechattn import tree
from speechattn.decoder.two_way import TwoWay, turned
from speechattn.frames import Frames
from speechattn.search.ctc_prefix import CTCPrefixScorer
from speechattn.search.joint import JointBeam
from speechattn.search.rescoring import Rescored


def first(head: Head, size: int = 5, block: int | None = 4) -> JointBeam:
    return JointBeam([(1.0, CTCPrefixScorer(head, END))], size, eos=END, block=block, repeat=None)


@pytest.mark.usefixtures("precise")
def test_hypotheses_are_in_the_order_of_both_passes() -> None:
    changed = 0
    for seed in range(6):
        torch.manual_seed(seed)
        decoder, head = parts()
        x = utterances([15, 9], holes=True)
        search = first(head)
        found = Rescored(search, decoder, sos=END, eos=END, weight=0.4).decode(x)
        for row, (new, old) in enumerate(zip(found, search.decode(x), strict=True)):
            assert sorted(texts(new)) == sorted(texts(old))
            changed += texts(new) != texts(old)
            alone = Frames(x.values[row : row + 1, x.mask[row]], x.mask[row : row + 1, x.mask[row]])
            scores = {h.tokens: 0.4 * h.score + attention(decoder, alone, h.tokens) for h in old}
            assert [h.score for h in new] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-9)
            assert {h.tokens: h.score for h in new} == pytest.approx(scores, abs=1e-9)
    assert changed


@pytest.mark.usefixtures("precise")
def test_pieces_and_rows_change_nothing() -> None:
    decoder, head = parts()
    x = utterances([15, 0, 9], holes=True)
    search = Rescored(first(head), decoder, sos=END, eos=END)
    whole = search.decode(x)
    same(fed(search, x, [2, 7, 7, 11]), whole)  # type: ignore[arg-type]
    for row in range(3):
        same(search.decode(Frames(x.values[row : row + 1], x.mask[row : row + 1])), whole[row : row + 1])
    beam = search.step(x[:8], search.start(x))
    rows = [search.step(Frames(x.values[i : i + 1, 8:], x.mask[i : i + 1, 8:]), row)
            for i, row in enumerate(tree.split(beam))]  # fmt: skip
    same(search.hypotheses(search.finish(tree.concat(rows))), whole)


@pytest.mark.usefixtures("precise")
def test_what_was_committed_is_judged_with_the_rest() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        decoder, head = parts()
        x = utterances([20])
        search = Rescored(first(head, 3), decoder, sos=END, eos=END)
        beam = search.step(x, search.start(x))
        if beam.agreed()[0] >= 2:
            break
    assert beam.agreed()[0] >= 2
    whole = search.hypotheses(search.finish(beam))[0]
    cut = search.commit(search.commit(beam, torch.tensor([1])), torch.tensor([1]))
    rest = search.hypotheses(search.finish(cut))[0]
    best = search.hypotheses(beam)[0][0].tokens[:2]
    expected = {h.tokens[2:]: h.score for h in whole if h.tokens[:2] == best}
    assert {h.tokens: h.score for h in rest if h.tokens in expected} == pytest.approx(expected, abs=1e-9)


def test_texts_are_turned_as_far_as_they_go() -> None:
    targets = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [7, 8, 9, 5], [0, 0, 0, 0]])
    assert turned(targets, torch.tensor([3, 1, 4, 0])).tolist() == [
        [3, 2, 1, 0], [4, 0, 0, 0], [5, 9, 8, 7], [0, 0, 0, 0],
    ]  # fmt: skip


def test_two_ways_are_weighted() -> None:
    forth, back = usual(), usual()
    heard, targets, lengths = memory([6, 4]), torch.randint(18, (2, 5)), torch.tensor([5, 2])
    both = TwoWay(forth, back, reverse=0.25)
    mirrored = torch.stack([targets[0].flip(0), torch.cat([targets[1, :2].flip(0), targets[1, 2:]])])
    for name in ("loss", "losses", "log_prob"):
        found = getattr(both, name)(heard, targets, lengths, sos=18, eos=19)
        left = getattr(forth, name)(heard, targets, lengths, sos=18, eos=19)
        right = getattr(back, name)(heard, mirrored, lengths, sos=18, eos=19)
        torch.testing.assert_close(found, 0.75 * left + 0.25 * right)
    plain = forth.losses(heard, targets, lengths, sos=18, eos=19, smoothing=0.0)
    torch.testing.assert_close(-plain, forth.log_prob(heard, targets, lengths, sos=18, eos=19))
    with pytest.raises(ValueError, match="a weight of 2"):
        TwoWay(forth, back, reverse=2)
    assert forth.dim == DIM


def test_many_texts_of_one_memory_are_judged_at_once() -> None:
    net, heard = usual(), memory([6, 4])
    targets, lengths = torch.randint(18, (6, 5)), torch.tensor([5, 0, 3, 4, 2, 5])
    found = net.log_prob(heard, targets, lengths, sos=18, eos=19)
    for i, n in enumerate(lengths.tolist()):
        row = slice(i // 3, i // 3 + 1)
        x = Frames(heard.frames.values[row], heard.frames.mask[row])
        alone = net.start(type(heard).of(x))
        hidden, _, _ = net.step(torch.tensor([[18, *targets[i, :n].tolist()]]), alone)
        scores = net.logits(hidden[0]).log_softmax(-1)
        wanted = torch.tensor([*targets[i, :n].tolist(), 19])
        assert found[i].item() == pytest.approx(scores.gather(1, wanted[:, None]).sum().item())
