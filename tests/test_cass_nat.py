"""CASS-NAT: spans, what each token sees, rows and pieces, sampled alignments, and a task that it learns."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_joint import same, texts
from torch import Tensor, nn

from speechattn import tree
from speechattn.decoder.attention import AttentionDecoder, sinusoids
from speechattn.decoder.cass_nat import Aligned, CassNatDecoder, Spans, spans_of
from speechattn.decoder.ctc import CTC
from speechattn.frames import Frames, Memory
from speechattn.search import Hypothesis
from speechattn.search.cass_nat import CassNat, distinct, sampled, spans_in
from speechattn.search.ctc import CTCGreedy
from speechattn.search.headed import Headed
from speechattn.search.rescoring import Rescored

pytestmark = pytest.mark.usefixtures("precise")
DIM, HEADS, VOCAB, END = 8, 2, 7, 6


def decoder(**options: Any) -> CassNatDecoder:
    made = CassNatDecoder(VOCAB, DIM, HEADS, **{"alone": 1, "both": 1, **options}).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.requires_grad_(False)


def head(blank: int = 0) -> CTC:
    """Unsure almost everywhere."""
    made = CTC(DIM, VOCAB - 1, blank=blank)
    nn.init.normal_(made.head.weight, std=0.6)
    return made.requires_grad_(False)


def sounds(lengths: list[int], *, holes: bool = False) -> Frames:
    """Frames among which everything that is not valid is NaN, which the invariant of `Frames` would not allow."""
    x = torch.randn(len(lengths), max(lengths, default=0), DIM)
    mask = torch.arange(x.shape[1]) < torch.tensor(lengths, dtype=torch.long)[:, None]
    mask = mask & (torch.rand(mask.shape) < 0.7) if holes else mask
    return Frames(x.masked_fill(~mask[..., None], torch.nan), mask)


def alone(x: Frames, row: int) -> Frames:
    return Frames(x.values[row : row + 1, x.mask[row]], x.mask[row : row + 1, x.mask[row]])


def spans(*texts: list[tuple[int, int]]) -> Spans:
    most = max(len(text) for text in texts)
    edges = torch.tensor([[*text, *[(0, 0)] * (most - len(text))] for text in texts], dtype=torch.long)
    first, last = edges.view(len(texts), most, 2).unbind(2)
    return Spans(first, last, torch.tensor([len(text) for text in texts]))


def fed(search: Any, x: Frames, cuts: list[int]) -> list[list[Hypothesis]]:
    beam = search.start(x)
    for a, b in itertools.pairwise([0, *sorted(cuts), x.mask.shape[1]]):
        beam = search.step(x[a:b], beam)
    return search.hypotheses(search.finish(beam))  # type: ignore[no-any-return]


def log_prob(net: CassNatDecoder, x: Frames, found: Hypothesis) -> tuple[list[float], float]:
    """Of the tokens and of the end, one frame row alone, from the spans of the answer."""
    said = net(Memory.of(x), spans(list(found.spans)))[0]
    return [said[i, token].item() for i, token in enumerate(found.tokens)], said[len(found.tokens), END].item()


def test_parts_are_those_of_the_drawing() -> None:
    path = torch.tensor([[[0, 0, 1, 1, 0, 2, 0, 2, 0]]])
    found = spans_in(path)
    assert (found.first.tolist(), found.last.tolist(), found.length.tolist()) == ([[2, 5, 7]], [[4, 6, 8]], [3])
    begin, end = found.bounds(torch.tensor([9]))
    assert list(zip(begin[0].tolist(), end[0].tolist(), strict=True)) == [(0, 5), (5, 7), (7, 9), (9, 9)]


@settings(deadline=None, max_examples=40)
@given(paths=st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=4))
def test_runs_are_those_of_a_loop_and_their_parts_a_partition(paths: list[list[int]]) -> None:
    frames = max(map(len, paths))
    found = spans_in(torch.tensor([[path + [0] * (frames - len(path))] for path in paths], dtype=torch.long))
    begin, end = found.bounds(torch.tensor([len(path) for path in paths]))
    for row, path in enumerate(paths):
        runs, at = [], 0
        for token, run in itertools.groupby(path):
            size = len(list(run))
            runs += [(at, at + size)] if token else []
            at += size
        n = int(found.length[row])
        assert list(zip(found.first[row, :n].tolist(), found.last[row, :n].tolist(), strict=True)) == runs
        parts = list(zip(begin[row].tolist(), end[row].tolist(), strict=True))
        assert [frame for a, b in parts for frame in range(a, b)] == list(range(len(path)))
        assert all(a <= first < last <= b for (a, b), (first, last) in zip(parts, runs, strict=False))
        assert all(a >= b for a, b in parts[n:]) or not n


def test_alignments_are_found_in_every_row() -> None:
    paths = [[0, 1, 1, 0, 2, 2, 0, 2], [3, 0, 0, 4, 0, 0, 0, 0], [0] * 8, [1, 0, 0, 0, 0, 0, 0, 0]]
    log_probs = (9 * nn.functional.one_hot(torch.tensor(paths), 5).double()).log_softmax(-1)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[1, 1] = mask[1, 5:] = mask[3, 1:] = False
    x = Frames(log_probs.masked_fill(~mask[..., None], torch.nan), mask)
    targets = torch.tensor([[1, 2, 2], [3, 4, 9], [9, 9, 9], [1, 1, 9]])
    found = spans_of(x, targets, torch.tensor([3, 2, 0, 2]))
    assert found.length.tolist() == [3, 2, 0, 0]  # no room for the last one
    assert found.first.tolist() == [[1, 4, 7], [0, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert found.last.tolist() == [[3, 6, 8], [1, 3, 0], [0, 0, 0], [0, 0, 0]]
    twice = spans_of(x, targets.repeat_interleave(2, 0), torch.tensor([3, 1, 2, 0, 0, 0, 1, 0]))
    assert twice.length.tolist() == [3, 1, 2, 0, 0, 0, 1, 0]
    assert twice.first[[0, 2, 6]].tolist() == [[1, 4, 7], [0, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("expand", [0, 1, 2])
def test_a_token_sees_its_own_frames_and_no_others(expand: int) -> None:
    extractor = decoder(expand=expand).extractor
    where = spans([(1, 2), (4, 6), (7, 8)], [(3, 4)], [])
    parts = [[(0, 4), (4, 7), (7, 10), (10, 10)], [(0, 8), (8, 8)], [(0, 5)]]
    x = sounds([10, 8, 5])
    values = x.values.nan_to_num().requires_grad_()
    told = extractor(Memory.of(Frames(values, x.mask)), where)
    for row, cells in enumerate(parts):
        frames = int(x.mask[row].sum())
        for u, (begin, end) in enumerate(cells):
            (slope,) = torch.autograd.grad(told.values[row, u].square().sum(), values, retain_graph=True)
            expected = set(range(max(begin - expand, 0), min(end + expand, frames)))
            assert {(b, t) for b, t in slope.abs().sum(2).nonzero().tolist()} == {(row, t) for t in expected}
    assert told.mask.sum(1).tolist() == [4, 2, 1]


def test_an_extracted_vector_is_attention_from_its_position() -> None:
    extractor = decoder(expand=1).extractor
    cross = extractor.cross
    oracle = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat([cross.query.weight, cross.key.weight, cross.value.weight]))
        oracle.in_proj_bias.copy_(torch.cat([cross.query.bias, cross.key.bias, cross.value.bias]))
        oracle.out_proj.load_state_dict(cross.out.state_dict())
    x = sounds([10])
    told = extractor(Memory.of(x), spans([(1, 2), (4, 6), (7, 8)])).values[0]
    for u, (begin, end) in enumerate([(0, 5), (3, 8), (6, 10), (9, 10)]):
        place, seen = sinusoids(4, DIM)[u].view(1, 1, DIM), x.values[:, begin:end]
        y = place + oracle(extractor.norm(place), seen, seen)[0]
        y = extractor.ff(Frames(y, torch.ones(1, 1, dtype=torch.bool))).values
        torch.testing.assert_close(told[u], y[0, 0], rtol=0, atol=1e-12)


def test_a_row_and_its_alignments_do_not_know_the_batch() -> None:
    net, x = decoder(both=2, alone=2), sounds([10, 6, 0, 7], holes=True)
    where = spans([(0, 1), (2, 4)], [(1, 3)], [(0, 1), (2, 3), (4, 5)], [], [], [], [(1, 2)], [(0, 1)])
    found = net(Memory.of(x), where)
    assert found.shape == (8, 4, VOCAB)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(8, 4))
    for i, n in enumerate(where.length.tolist()):
        single = Spans(where.first[i : i + 1, :n], where.last[i : i + 1, :n], where.length[i : i + 1])
        said = net(Memory.of(alone(x, i // 2)), single)
        torch.testing.assert_close(said[0], found[i, : n + 1], rtol=0, atol=1e-12)


def test_losses_are_cross_entropies_and_log_probabilities() -> None:
    net, x = decoder(), sounds([10, 6, 3])
    targets, lengths = torch.tensor([[1, 2, 2], [3, 9, 9], [1, 1, 1]]), torch.tensor([3, 1, 3])
    where = spans([(1, 2), (4, 6), (7, 8)], [(1, 3)], [])  # the last text has no room
    said = net(Memory.of(x), where)
    first = said[0, 0, 1] + said[0, 1, 2] + said[0, 2, 2] + said[0, 3, END]
    expected = [first.item(), (said[1, 0, 3] + said[1, 1, END]).item()]
    found = net.losses(Memory.of(x), targets, lengths, where, eos=END, smoothing=0.0)
    assert (-found).tolist() == pytest.approx([*expected, 0.0])
    score = net.log_prob(Memory.of(x), targets, lengths, where, eos=END)
    assert score.tolist() == pytest.approx([*expected, float("-inf")])
    smooth = net.losses(Memory.of(x), targets, lengths, where, eos=END, smoothing=0.2)
    uniform = -said.mean(2)
    assert smooth[1].item() == pytest.approx(-0.8 * expected[1] + 0.2 * (uniform[1, 0] + uniform[1, 1]).item())
    assert net.loss(Memory.of(x), targets, lengths, where, eos=END, smoothing=0.0).item() == pytest.approx(
        -sum(expected) / 3
    )
    with pytest.raises(ValueError, match=r"spans of \[3, 1, 0\] tokens for texts of \[2, 1, 3\]"):
        net.losses(Memory.of(x), targets, torch.tensor([2, 1, 3]), where, eos=END)


def test_gradients_reach_every_weight_and_the_valid_frames() -> None:
    net, ctc, x = decoder(dropout=0.1).train().requires_grad_(True), head(), sounds([9, 5, 1])
    values = x.values.clone().requires_grad_()
    targets, lengths = torch.tensor([[1, 2, 2], [3, 9, 9], [1, 1, 1]]), torch.tensor([3, 1, 3])
    Aligned(net, ctc).loss(Memory.of(Frames(values, x.mask)), targets, lengths, sos=END, eos=END).backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    moved = values.grad.abs().sum(2)
    assert bool(((moved > 0) == (x.mask & torch.tensor([[True], [True], [False]]))).all())  # the last one has no room
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.abs().sum() > 0, name


def test_one_sample_is_the_best_path() -> None:
    changed = 0
    for seed in range(5):
        torch.manual_seed(seed)
        blank = seed % 2 * 3
        net, ctc, x = decoder(), head(blank), sounds([12, 9, 0], holes=True)
        net.output.bias[[blank, END][seed % 2]] += 3.0
        (found,) = zip(*CassNat(ctc, net, eos=END, samples=1, blank=blank).decode(x), strict=True)
        (greedy,) = zip(*Headed(ctc, CTCGreedy(blank=blank)).decode(Frames.of(x.values, x.mask)), strict=True)
        for row, (mine, ctcs) in enumerate(zip(found, greedy, strict=True)):
            assert mine.spans == ctcs.spans
            assert len(mine.tokens) == len(ctcs.tokens)
            assert {blank, END}.isdisjoint(mine.tokens)
            each, end = log_prob(net, alone(x, row), mine)
            assert list(mine.log_probs) == pytest.approx(each, abs=1e-9)
            assert mine.score == pytest.approx(sum(each) + end, abs=1e-9)
        many = CassNat(ctc, net, eos=END, samples=20, threshold=0.0, blank=blank).decode(x)
        same(many, [[mine] for mine in found])
        many = CassNat(ctc, net, eos=END, samples=20, blank=blank).decode(x)
        assert all(best[0].score >= mine.score - 1e-9 for best, mine in zip(many, found, strict=True))
        changed += any(texts(best) != [mine.tokens] for best, mine in zip(many, found, strict=True))
    assert changed


def test_sampled_paths_take_one_of_the_two_best_where_ctc_is_unsure() -> None:
    probs = torch.tensor([[0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.2, 0.31, 0.49], [0.0, 0.3, 0.7]])
    x = Frames(probs.log()[None], torch.tensor([[True, True, True, True]]))
    paths = sampled(x, 4000)[0]
    assert paths[0].tolist() == [1, 0, 2, 2]
    assert set(paths[:, 0].tolist()) == {1}
    assert set(paths[:, 3].tolist()) == {2}  # not below the threshold
    assert set(paths[:, 1].tolist()) == {0, 1}
    assert set(paths[:, 2].tolist()) == {1, 2}
    shares = (paths[1:, 1] == 1).double().mean().item(), (paths[1:, 2] == 1).double().mean().item()
    assert shares == pytest.approx((0.375, 0.3875), abs=0.03)
    both = ((paths[1:, 1] == 1) & (paths[1:, 2] == 1)).double().mean().item()
    assert both == pytest.approx(0.375 * 0.3875, abs=0.03)  # each frame has a draw of its own
    assert sampled(x, 9, seed=1)[0].tolist() != sampled(x, 9)[0].tolist()
    longer = Frames(torch.cat([x.values, x.values], 1), torch.ones(1, 8, dtype=torch.bool))
    assert sampled(longer, 4000)[0, :, :4].equal(paths)


def test_alignments_are_read_once() -> None:
    other = [[(1, 2), (4, 5)], [(1, 2), (4, 5)], [(0, 3), (4, 7)], [(1, 2), (3, 5)], [(1, 2)], [], [(0, 1)]]
    same_ones = [[(1, 2), (4, 5)], *[[(1, 3), (4, 5)]] * 5, [(1, 2), (6, 7)]]
    found = distinct(spans(*other, *same_ones), 2)
    assert found.length.tolist() == [2, 2, 1, 0, 2, 2, 2, 2]
    assert found.first.tolist() == [[1, 4], [1, 3], [1, 0], [0, 0], [1, 4], [1, 6], [1, 4], [1, 4]]
    assert found.last.tolist() == [[2, 5], [2, 5], [2, 0], [0, 0], [2, 5], [2, 7], [2, 5], [2, 5]]


def test_a_text_of_token_0_is_not_the_empty_text() -> None:
    net, ctc = decoder(), CTC(DIM, VOCAB - 1, blank=3).requires_grad_(False)
    nn.init.zeros_(ctc.head.weight)
    nn.init.zeros_(ctc.head.bias)
    ctc.head.bias[torch.tensor([0, 3])] += 4.0
    net.output.bias[0] += 20.0
    found = CassNat(ctc, net, 9, eos=END, samples=9, blank=3).decode(sounds([1]))
    assert {h.tokens for h in found[0]} == {(), (0,)}


def test_answers_are_those_of_their_alignments() -> None:
    counted = set()
    for seed in range(4):
        torch.manual_seed(seed)
        net, ctc, x = decoder(), head(), sounds([12])
        found = CassNat(ctc, net, 30, eos=END, samples=30, never=[3]).decode(x)[0]
        every = spans_in(sampled(ctc(x), 30))
        expected: dict[tuple[int, ...], float] = {}
        for i, n in enumerate(every.length.tolist()):
            edges = [x[i : i + 1, :n] for x in (every.first, every.last)]
            said = net(Memory.of(x), Spans(*edges, every.length[i : i + 1]))
            score, tokens = said[0, :n].index_fill(1, torch.tensor([0, 3, END]), -torch.inf).max(1)
            text = tuple(tokens.tolist())
            expected[text] = max(expected.get(text, -torch.inf), (score.sum() + said[0, n, END]).item())
        assert {h.tokens: h.score for h in found} == pytest.approx(expected, abs=1e-9)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        assert len({h.tokens for h in found}) == len(found) > 1
        lengths = set(every.length.tolist())
        assert {len(h.tokens) for h in found} == lengths
        counted |= lengths
        few = CassNat(ctc, net, 2, eos=END, samples=30, never=[3]).decode(x)[0]
        same([few], [found[:2]])
    assert len(counted) > 2


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_pieces_and_rows_change_nothing(seed: int, cuts: list[int]) -> None:
    torch.manual_seed(seed)
    x, search = sounds([12, 0, 7], holes=True), CassNat(head(), decoder(), 4, eos=END, samples=12)
    whole = search.decode(x)
    same(fed(search, x, cuts), whole)
    for row in range(3):
        same(search.decode(alone(x, row)), whole[row : row + 1])
    beam = search.step(x[:5], search.start(x))
    rows = [
        search.step(Frames(x.values[i : i + 1, 5:], x.mask[i : i + 1, 5:]), row)
        for i, row in enumerate(tree.split(beam))
    ]
    rows = [rows[2], rows[0], rows[1]]
    same(search.hypotheses(search.finish(tree.concat(rows))), [whole[2], whole[0], whole[1]])


def test_nothing_gives_an_empty_text_and_nobody_no_texts() -> None:
    net, x = decoder(), sounds([0, 0])
    search = CassNat(head(), net, 3, eos=END, samples=5)
    end = net(Memory.of(x), spans([], []))[0, 0, END].item()
    for found in (search.decode(x), search.hypotheses(search.finish(search.start(sounds([4, 2]))))):
        assert [(h.tokens, h.spans) for row in found for h in row] == 2 * [((), ())]
        assert found[0][0].score == pytest.approx(end)
    assert search.decode(sounds([])) == []
    assert [[h.tokens for h in row] for row in search.hypotheses(search.start(x))] == [[()], [()]]


def test_times_count_from_the_beginning_of_the_stream_and_answers_are_committed() -> None:
    torch.manual_seed(3)
    x, search = sounds([12, 9]), CassNat(head(), decoder(), 4, eos=END, samples=12)
    whole = search.decode(x)
    later = search.step(x, search.start_at(x, torch.tensor([100, 7])))
    beam = search.finish(later)
    for row, moved, by in zip(whole, search.hypotheses(beam), (100, 7), strict=True):
        assert [[(a + by, b + by) for a, b in h.spans] for h in row] == [[*h.spans] for h in moved]
    rest = search.hypotheses(search.commit(beam, torch.tensor([2, 1])))
    for row, left, n in zip(whole, rest, (2, 1), strict=True):
        agree = [h.tokens[n:] for h in row if h.tokens[:n] == row[0].tokens[:n]]
        assert texts(left) == agree


def test_other_decoders_judge_its_texts() -> None:
    changed = 0
    for seed in range(4):
        torch.manual_seed(seed)
        x, ctc, net = sounds([12, 9]), head(), decoder()
        x = Frames.of(x.values, x.mask)
        search = CassNat(ctc, net, 20, eos=END, samples=20)
        judge = AttentionDecoder.usual(VOCAB, DIM, 2, 1, 12, context=50).eval().requires_grad_(False)
        found = Rescored(search, judge, sos=END, eos=END, weight=0.5).decode(x)
        for row, (new, old) in enumerate(zip(found, search.decode(x), strict=True)):
            expected = {}
            for h in old:
                tokens, n = torch.tensor([h.tokens], dtype=torch.long).view(1, -1), torch.tensor([len(h.tokens)])
                score = judge.log_prob(Memory.of(alone(x, row)), tokens, n, sos=END, eos=END).item()
                expected[h.tokens] = score + 0.5 * h.score
            assert {h.tokens: h.score for h in new} == pytest.approx(expected, abs=1e-9)
            changed += texts(new) != texts(old)
        # and its own decoder, along the best path of each text, judges what CTC says
        own = Rescored(Headed(ctc, CTCGreedy()), Aligned(net, ctc), sos=END, eos=END, weight=0.0).decode(x)
        for row, (h,) in enumerate(own):
            tokens, n = torch.tensor([h.tokens], dtype=torch.long).view(1, -1), torch.tensor([len(h.tokens)])
            where = spans_of(ctc(alone(x, row)), tokens, n)
            assert h.score == pytest.approx(
                net.log_prob(Memory.of(alone(x, row)), tokens, n, where, eos=END).item(), abs=1e-9
            )
    assert changed


def task(batch: int) -> tuple[Frames, Tensor, Tensor]:
    """Texts of tokens 1 to 5 and frames from which they can be read: each is seen for 2 or 3 frames, behind silence."""
    codes = torch.eye(6, DIM)
    rows, said = [], []
    for _ in range(batch):
        text = torch.randint(1, 6, (int(torch.randint(5, ())),)).tolist()
        path = [0]
        for token in text:
            path += [token] * int(torch.randint(2, 4, ())) + [0]
        rows.append(codes[path])
        said.append(torch.tensor(text, dtype=torch.long))
    lengths = torch.tensor([len(row) for row in rows])
    values = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    values = values + 0.1 * torch.randn_like(values)
    targets = nn.utils.rnn.pad_sequence(said, batch_first=True)
    return Frames.from_lengths(values, lengths), targets, torch.tensor([len(text) for text in said])


def test_it_learns_to_recognise() -> None:
    encoder, ctc = nn.Linear(DIM, 16), CTC(16, VOCAB - 1)
    net = CassNatDecoder(VOCAB, 16, 2, alone=1, both=1, inner=32)
    aligned = Aligned(net, ctc)
    optimizer = torch.optim.Adam([*encoder.parameters(), *ctc.parameters(), *net.parameters()], 2e-2)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 150)
    known, losses = [task(24) for _ in range(5)], []
    for i in range(150):
        x, targets, lengths = known[i % len(known)]
        x = Frames.of(encoder(x.values), x.mask)
        loss = aligned.loss(Memory.of(x), targets, lengths, sos=END, eos=END, smoothing=0.1)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + ctc.loss(x, targets, lengths)).backward()
        optimizer.step()
        slower.step()
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    net.eval()
    for (x, targets, lengths), least in ((known[0], 24), (known[1], 24), (task(40), 36)):
        expected = [tuple(row[:n]) for row, n in zip(targets.tolist(), lengths.tolist(), strict=True)]
        with torch.no_grad():
            x = Frames.of(encoder(x.values), x.mask)
        for samples in (1, 10):
            found = CassNat(ctc, net, eos=END, samples=samples).decode(x)
            right = [row[0].tokens == text for row, text in zip(found, expected, strict=True)]
            assert sum(right) >= least


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "a beam of 1 from 0 samples"),
        ({"size": 3, "samples": 2}, "a beam of 3 from 2 samples"),
        ({"threshold": 1.5}, "a threshold of 1.5"),
        ({"blank": END}, "the end of the text and the blank are both 6"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CassNat(head(), decoder(), eos=END, **options)
    with pytest.raises(ValueError, match="wider by -1 frames"):
        CassNatDecoder(VOCAB, DIM, HEADS, expand=-1)
