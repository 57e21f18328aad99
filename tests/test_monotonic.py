"""Monotonic attention: golden values, forms against each other, draws and plain loops; decisions, latency, training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objectives import DIM, END, PIECES, VOCAB, heard_by, model_of, said_in
from torch import Tensor

from speechattn import tree
from speechattn.cross import Attended
from speechattn.cross.expected import (
    Form,
    chunkwise,
    doubling,
    fused,
    hard,
    infinite,
    matrix,
    preserved,
    ratio,
    recurrence,
    scan,
    sequential,
)  # fmt: skip
from speechattn.cross.latency import AverageLagging, ExpectedDelay, HeadVariance, Latency, Quantity, delays, lagging
from speechattn.cross.monotonic import Additive, DotProduct, HardMonotonic, InfiniteLookback, MoChA, Monotonic, Place
from speechattn.cross.soft import Soft
from speechattn.decoder.attention import AttentionDecoder
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer
from speechattn.task.monotonic import ConstrainedObjective, MonotonicObjective

pytestmark = pytest.mark.usefixtures("precise")
EXACT: list[Form] = [sequential, matrix, doubling]
P = [[0.2, 0.5, 0.9, 0.4], [0.6, 0.3, 0.8, 0.5], [0.1, 0.7, 0.2, 0.9]]
ENERGY = [[0.1, 0.4, -0.2, 0.3], [0, 0.5, 1, -0.5], [0.2, 0.2, 0.2, 0.2]]
ALPHA = [[0.2, 0.4, 0.36, 0.016], [0.12, 0.144, 0.5568, 0.0776], [0.012, 0.1764, 0.12648, 0.525168]]
MOCHA = [[0.370223, 0.462213, 0.133604, 0.009959], [0.174366, 0.299849, 0.410029, 0.014156],
         [0.1002, 0.15144, 0.325824, 0.262584]]  # fmt: skip
MILK = [[0.490413, 0.392016, 0.089039, 0.004532], [0.291102, 0.282099, 0.31732, 0.007879],
        [0.273652, 0.261652, 0.173452, 0.131292]]  # fmt: skip
KINDS: dict[str, Callable[..., Monotonic]] = {
    "hard": HardMonotonic,
    "additive": partial(HardMonotonic, energy=Additive),
    "mocha": partial(MoChA, window=3),
    "wide": partial(MoChA, window=2, chunk_heads=2, energy=Additive),
    "milk": InfiniteLookback,
    "together": partial(MoChA, window=3, wait=2),
    "preserving": partial(InfiniteLookback, preserve=True),
}


def near(a: Tensor, b: Tensor | list[list[float]], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=tolerance)


def whole(x: Tensor) -> Tensor:
    """Every frame of `x` [B, H, U, T] is there."""
    return torch.ones(len(x), x.shape[-1], dtype=torch.bool)


@pytest.mark.parametrize("form", [*EXACT, ratio])
def test_golden_values(form: Form) -> None:
    alpha = form(torch.tensor(P))
    near(alpha, ALPHA, 1e-12)
    alpha, energy = alpha[None, None], torch.tensor(ENERGY)[None, None]
    near(chunkwise(alpha, energy, whole(alpha), 2)[0, 0], MOCHA, 1e-6)
    near(infinite(alpha, energy, whole(alpha))[0, 0], MILK, 1e-6)
    stopped = (alpha * torch.arange(1, 5)).sum(-1)
    near(stopped[0, 0], torch.tensor([2.144, 2.3888, 2.844912]))
    lost = 1 - alpha.sum(-1)
    near(delays(alpha, whole(alpha)), stopped + 4 * lost)


@pytest.mark.parametrize("low", [-13.8, -3.0, 2.0])
def test_forms_agree_over_many_frames(low: float) -> None:
    p = torch.empty(2, 1, 2, 500).uniform_(low, 13.8).sigmoid()
    p[0] = torch.empty_like(p[0]).uniform_(-13.8, -4).sigmoid()
    p[1, 0, 1, ::2] = 0.0
    p[1, 0, :, 7] = 1.0
    start = torch.rand(2, 1, 500).softmax(-1)
    for first in (None, start):
        expected = sequential(p, first)
        near(matrix(p, first), expected, 1e-8)
        near(scan(p, first), expected, 1e-12)
        rough = ratio(p, first)
        assert rough.isfinite().all()
        assert ((rough >= 0) & (rough <= 1)).all()
        near(scan(p.float(), None if first is None else first.float()), expected.float(), 1e-5)
        near(matrix(p.float(), None if first is None else first.float()), expected.float(), 1e-5)


@pytest.mark.parametrize("form", [*EXACT, ratio])
def test_forms_of_little(form: Form) -> None:
    for shape in ((1, 1, 0, 5), (1, 1, 3, 0), (1, 1, 2, 1), (0, 2, 3, 4)):
        p = torch.full(shape, 0.25)
        alpha = form(p)
        assert alpha.shape == p.shape
        assert chunkwise(alpha, p, whole(p), 2).shape == infinite(alpha, p, whole(p)).shape == p.shape
    near(form(torch.full((2, 1), 0.25)), [[0.25], [0.0625]])


@pytest.mark.parametrize("form", EXACT)
def test_gradients_of_forms(form: Form) -> None:
    p = torch.empty(1, 2, 3, 5).uniform_(0.05, 0.95).requires_grad_()
    start = torch.rand(1, 2, 5).softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(form, (p, start))
    p = torch.empty(2, 1, 4, 40).uniform_(0.01, 0.9).requires_grad_()
    weight = torch.randn(p.shape)
    a, b = (torch.autograd.grad((f(p) * weight).sum(), p)[0] for f in (form, sequential))
    near(a, b, 1e-10)


def test_gradients_of_what_is_looked_at() -> None:
    alpha = torch.rand(1, 2, 2, 6).requires_grad_()
    energy = torch.randn(1, 2, 2, 6).requires_grad_()
    valid = torch.tensor([[True] * 5 + [False]])
    assert torch.autograd.gradcheck(lambda a, e: chunkwise(a, e, valid, 3), (alpha, energy))
    assert torch.autograd.gradcheck(lambda a, e: infinite(a, e, valid), (alpha, energy))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), frames=st.integers(1, 12), window=st.integers(1, 14),
       size=st.sampled_from([1.0, 30.0, 400.0]))  # fmt: skip
def test_what_is_looked_at_is_what_the_definition_says(seed: int, frames: int, window: int, size: float) -> None:
    torch.manual_seed(seed)
    alpha = scan(torch.rand(2, 1, 3, frames))
    energy = size * torch.randn(alpha.shape)
    for function, reach in ((partial(chunkwise, window=window), window), (infinite, frames)):
        found = function(alpha, energy, whole(alpha))
        expected = torch.zeros_like(alpha)
        for k in range(frames):
            a = max(0, k - reach + 1)
            expected[..., a : k + 1] += alpha[..., k : k + 1] * energy[..., a : k + 1].softmax(-1)
        near(found, expected)
        near(found.sum(-1), alpha.sum(-1))
    near(chunkwise(alpha, energy, whole(alpha), 1), alpha)


def test_draws_agree_with_what_is_expected() -> None:
    """The process itself, 1e5 times: a head walks, stops by chance, and stands there for the next token."""
    p, n = torch.tensor(P), 100_000
    at = torch.zeros(n, dtype=torch.long)
    for i, row in enumerate(ALPHA):
        moving = torch.ones(n, dtype=torch.bool)
        for j in range(4):
            here = moving & (at <= j)
            stops = here & (torch.rand(n) < p[i, j])
            at[stops] = j
            moving &= ~stops
        at[moving] = 4
        share = torch.stack([(at == j).double().mean() for j in range(4)])
        expected = torch.tensor(row)
        assert ((share - expected).abs() < 3 * (expected * (1 - expected) / n).sqrt()).all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), frames=st.integers(1, 15), stops=st.floats(0.05, 0.9))
def test_expected_is_decided_where_nothing_is_left_to_chance(seed: int, frames: int, stops: float) -> None:
    torch.manual_seed(seed)
    p = (torch.where(torch.rand(2, 3, 4, frames) < stops, 50.0, -50.0)).sigmoid()
    valid = torch.rand(2, frames) < 0.8
    p = p.masked_fill(~valid[:, None, None], 0.0)
    decided = hard(p, torch.zeros(2, 3, dtype=torch.long), valid, torch.tensor([True, False]))
    rank = valid.cumsum(1) - 1
    alpha = (decided.found[..., None] & valid[:, None, None] & (rank[:, None, None] == decided.at[..., None])).double()
    for form in EXACT:
        near(form(p), alpha, 1e-12)
    ends = preserved(p, valid, torch.tensor([True, True]))
    near(scan(ends).sum(-1), valid.any(1)[:, None, None].expand(2, 3, 4).double(), 1e-12)


def test_mass_is_preserved_on_the_last_frame() -> None:
    p = torch.rand(2, 1, 3, 6)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    p = p.masked_fill(~valid[:, None, None], 0.0)
    kept = scan(preserved(p, valid, torch.tensor([True, True])))
    start = torch.eye(6)[0].expand(2, 1, 6)
    for i in range(3):
        expected = sequential(p[:, :, i : i + 1], start)[:, :, 0]
        for b, last in enumerate([5, 3]):
            expected[b, :, last] = 1 - expected[b, :, :last].sum(-1)
        near(kept[:, :, i], expected)
        start = kept[:, :, i]
    near(scan(preserved(p, valid, torch.tensor([False, False]))), scan(p))


def test_what_is_not_there_is_passed_by() -> None:
    p, energy = torch.rand(1, 2, 3, 6), torch.randn(1, 2, 3, 6)
    at = [2, 3, 4, 5, 6, 7]
    big = torch.zeros(1, 2, 3, 10).index_copy(3, torch.tensor(at), p)
    loud = torch.full((1, 2, 3, 10), 90.0).index_copy(3, torch.tensor(at), energy)
    valid = torch.tensor([[2 <= j <= 7 for j in range(10)]])
    for form in EXACT:
        near(form(big)[..., at], form(p))
        alpha, wide = form(p), form(big)
        near(chunkwise(wide, loud, valid, 2)[..., at], chunkwise(alpha, energy, whole(alpha), 2))
        near(infinite(wide, loud, valid)[..., at], infinite(alpha, energy, whole(alpha)))
        assert not infinite(wide, loud, valid)[..., 8:].any()
    both = torch.cat([big, torch.rand(1, 2, 3, 10)])
    near(scan(both)[:1], scan(big))


def test_the_kernel_is_asked_for_or_taken_where_it_can_run() -> None:
    """What it computes is tested where it runs, in kernels/tests."""
    p = torch.rand(2, 3, 4)
    assert torch.equal(scan(p), doubling(p))
    with pytest.raises(ValueError, match="float64; another form"):
        fused(p.double())
    if "TRITON_INTERPRET" not in os.environ:
        with pytest.raises(ValueError, match=r"CUDA.*another form, such as doubling, runs everywhere"):
            fused(p.float())


def test_recurrence() -> None:
    a, b = torch.rand(2, 13), torch.randn(2, 13)
    y, found = torch.zeros(2), recurrence(a, b)
    for j in range(13):
        y = a[:, j] * y + b[:, j]
        near(found[:, j], y)


def lively(kind: str, heads: int = 2, **options: object) -> Monotonic:
    cross = KINDS[kind](8, heads, offset=-0.5, **options).eval()
    for parameter in cross.parameters():
        if parameter is not cross.offset:
            torch.nn.init.normal_(parameter, std=0.8)
    if isinstance(cross.energy, Additive):
        torch.nn.init.constant_(cross.energy.scale, 4.0)
        torch.nn.init.constant_(cross.offset, -1.5)
    return cross


def memory(lengths: list[int], *, finished: bool = True, holes: bool = False, seed: int = 0) -> Memory:
    torch.manual_seed(seed)
    x = Frames.from_lengths(torch.randn(len(lengths), max(lengths), 8), torch.tensor(lengths))
    x = Frames.of(x.values, x.mask & (torch.rand(x.mask.shape) < 0.7)) if holes else x
    return Memory.of(x, finished=finished)


def seen_by(cross: Monotonic, query: Tensor, heard: Memory) -> Attended:
    read = cross.read(heard)
    return cross.attend(query, read, cross.place(query))[0]


def cut(x: Memory, n: int, m: int, *, finished: bool) -> Memory:
    return Memory.of(x.frames[n:m], finished=finished)


def naive(cross: Monotonic, query: Tensor, heard: Memory) -> Tensor:
    """Contexts [B, U, D] in plain loops."""
    rows = []
    for b, x in enumerate(heard.frames.values):
        x = x[heard.frames.mask[b]]
        key, count = cross.energy.keys(x[None]), len(x)
        p = (cross.energy(query[b : b + 1], key) + cross.offset).sigmoid()[0]
        look = None if cross.behind is None else cross.behind(query[b : b + 1], cross.behind.keys(x[None]))[0]
        value = cross.value(x).view(count, cross.heads, cross.width, -1)
        at, contexts = [0] * cross.heads, []
        for i in range(query.shape[1]):
            fires = [next((j for j in range(at[h], count) if p[h, i, j] >= 0.5), count) for h in range(cross.heads)]
            first = min(fires)
            if cross.wait is not None and first < count:
                latest = [max(min(first + cross.wait, count - 1), a) for a in at]
                fires = [min(f, a) for f, a in zip(fires, latest, strict=True)]
            if cross.preserve:
                fires = [min(f, count - 1) for f in fires]
            at, parts = fires, []
            for h, end in enumerate(fires):
                for w in range(cross.width):
                    begin = 0 if cross.reach is None else max(0, end - cross.reach)
                    if not 0 <= end < count:
                        parts.append(torch.zeros(value.shape[-1]))
                    elif look is None:
                        parts.append(value[end, h, w])
                    else:
                        share = look[h * cross.width + w, i, begin : end + 1].softmax(-1)
                        parts.append(share @ value[begin : end + 1, h, w])
            contexts.append(cross.out(torch.cat(parts)))
        rows.append(torch.stack(contexts))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("holes", [False, True])
def test_eval_is_a_plain_loop(kind: str, holes: bool) -> None:
    cross, heard, query = lively(kind), memory([14, 6, 1], holes=holes), 2 * torch.randn(3, 7, 8)
    seen = seen_by(cross, query, heard)
    assert (cross.behind is None) == (type(cross) is HardMonotonic)
    near(seen.context, naive(cross, query, heard))
    assert not seen.waiting.any()
    near(seen.weights.sum(-1).view(3, 2, cross.width, 7).mean(2), seen.alignment.sum(-1))
    assert len(seen.alignment.argmax(-1).unique()) > 1


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_by_one_equals_at_once_and_hypotheses_share_what_was_read(kind: str) -> None:
    cross, heard, query = lively(kind), memory([14, 6], finished=False), torch.randn(6, 5, 8)
    read = cross.read(heard)
    together, last = cross.attend(query, read, cross.place(query))
    place, parts = cross.place(query), []
    for i in range(5):
        part, place = cross.attend(query[:, i : i + 1], read, place)
        parts.append(part)
    near(torch.cat([part.context for part in parts], 1), together.context)
    near(torch.cat([part.alignment for part in parts], 2), together.alignment)
    assert torch.equal(torch.cat([part.waiting for part in parts], 2), together.waiting)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(place), tree.leaves(last), strict=True))
    own = tree.select(read, [0, 0, 0, 1, 1, 1])
    for training in (False, True):
        cross.train(training).noise = 0.0
        alone, shared = (cross.attend(query, x, cross.place(query))[0] for x in (own, read))
        near(shared.context, alone.context)
        near(shared.weights, alone.weights)


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_does_not_look_behind_its_stops_and_goes_on_when_there_is_more(kind: str) -> None:
    cross, heard = lively(kind), memory([14, 14, 9], finished=False)
    query = 1.5 * torch.randn(3, 6, 8)
    expected = seen_by(cross, query, cut(heard, 0, 14, finished=True))
    read, place, i = cross.read(cut(heard, 0, 2, finished=False)), cross.place(query), 0
    waited = 0
    for n in range(2, 15):
        while i < 6:  # each token as soon as no head of any row waits for it
            part, after = cross.attend(query[:, i : i + 1], read, place)
            assert torch.equal(after.waiting, part.waiting[..., 0])
            if part.waiting.any():
                waited += 1
                break
            near(part.context[:, 0], expected.context[:, i])
            place, i = after, i + 1
        more = cut(heard, n, n + 1, finished=n == 14)
        read = read.then(cross.read(more), 0)
        if cross.reach is not None:
            read = read.forget(place.at.amin(1) - cross.reach)
    assert waited
    while i < 6:
        part, place = cross.attend(query[:, i : i + 1], read, place)
        assert not part.waiting.any()
        near(part.context[:, 0], expected.context[:, i])
        i += 1


@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_do_not_know_their_batch(kind: str) -> None:
    cross, heard, query = lively(kind), memory([12, 5, 8]), torch.randn(3, 4, 8)
    for training in (False, True):
        cross.train(training).noise = 0.0
        seen = seen_by(cross, query, heard)
        for b, n in enumerate([12, 5, 8]):
            row = Memory.of(Frames(heard.frames.values[b : b + 1, :n], heard.frames.mask[b : b + 1, :n]), finished=True)
            alone = seen_by(cross, query[b : b + 1], row)
            near(seen.context[b : b + 1], alone.context)
            near(seen.alignment[b : b + 1, ..., :n], alone.alignment)
            assert not seen.alignment[b, ..., n:].any()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "together"])
def test_training_agrees_with_eval_when_heads_are_sure(kind: str) -> None:
    cross, heard, query = lively(kind, noise=0.0), memory([14, 6, 9]), torch.randn(3, 7, 8)
    with torch.no_grad():
        cross.energy.query.weight.mul_(1e5)
        cross.energy.query.bias.mul_(1e5)
        if isinstance(cross.energy, Additive):
            cross.energy.scale.mul_(1e5)
    decided, expected = (seen_by(cross.train(training), query, heard) for training in (False, True))
    near(expected.alignment, decided.alignment, 1e-9)
    near(expected.weights, decided.weights, 1e-9)
    near(expected.context, decided.context, 1e-9)


def test_states_are_trees() -> None:
    cross, query = lively("mocha"), torch.randn(2, 3, 8)
    short, long = (cross.read(memory([n], seed=n)) for n in (5, 9))
    both = tree.concat([short, long])
    assert both.mask.tolist()[0] == [False] * 4 + [True] * 5
    seen, place = cross.attend(query, both, cross.place(query))
    for b, read in enumerate((short, long)):
        alone, at = cross.attend(query[b : b + 1], read, cross.place(query[:1]))
        near(seen.context[b : b + 1], alone.context)
        assert torch.equal(place.at[b : b + 1], at.at)
    assert tree.select(both, [0]).trimmed().mask.all()
    kept = both.forget(torch.tensor([2, 6]))
    assert kept.mask.sum(1).tolist() == [3, 3]
    assert kept.mask.shape[1] == 3
    assert kept.gone.tolist() == [2, 6]
    assert both.forget(torch.tensor([0, -1])).gone.tolist() == [0, 0]
    assert both.forget(torch.tensor([50, 50])).mask.shape[1] == 0
    nobody = memory([3])
    none = Memory.of(Frames(nobody.frames.values[:0], nobody.frames.mask[:0]))
    for training in (False, True):
        assert seen_by(cross.train(training), query[:0], none).context.shape == (0, 3, 8)
        empty = Memory.of(nobody.frames[:0], finished=True)
        near(seen_by(cross, query[:1], empty).context, cross.out.bias.expand(1, 3, 8))


def test_energies() -> None:
    x, query = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    additive, dot = Additive(8, 2), DotProduct(8, 2)
    for energy in (additive, dot):
        for parameter in energy.parameters():
            torch.nn.init.normal_(parameter)
        found = energy(query, energy.keys(x))
        for h in range(2):
            own = slice(4 * h, 4 * h + 4)
            q, k = energy.query(query)[..., own], (x @ energy.key.weight.T)[..., own]
            if isinstance(energy, Additive):
                v = energy.direction[h]
                expected = ((q[:, :, None] + k[:, None]).tanh() @ v) * energy.scale[h] / v.norm()
            else:
                expected = torch.einsum("bue,bte->but", q, k) / 2
            near(found[:, h], expected)
    assert float(Additive(16, 2).scale[0, 0].detach()) == pytest.approx(1 / math.sqrt(8))
    assert float(HardMonotonic(8, 2).offset[0].detach()) == -4
    with pytest.raises(ValueError, match="8 features do not divide by 3"):
        DotProduct(8, 3)
    with pytest.raises(ValueError, match="2 heads of 3"):
        MoChA(8, 2, chunk_heads=3)
    with pytest.raises(ValueError, match="window of 0"):
        MoChA(8, 2, window=0)
    with pytest.raises(ValueError, match="head_drop 1"):
        HardMonotonic(8, 2, head_drop=1.0)


def test_noise_head_drop_and_stable_emit_act_in_training_alone() -> None:
    heard, query = memory([9, 5]), torch.randn(2, 4, 8)
    plain = lively("mocha", noise=0.0)
    for option in ({"noise": 1.0}, {"head_drop": 0.5, "noise": 0.0}, {"stable_emit": 0.5, "noise": 0.0}):
        cross = KINDS["mocha"](8, 2, **option).eval()
        cross.load_state_dict(plain.state_dict())
        near(seen_by(cross, query, heard).context, seen_by(plain.eval(), query, heard).context)
        contexts = torch.stack([seen_by(cross.train(), query, heard).context for _ in range(12)])
        assert not torch.allclose(contexts, seen_by(plain.train(), query, heard).context)
        assert ("stable_emit" in option) == bool((contexts == contexts[:1]).all())
    whole_head = seen_by(plain, query, heard)
    drop = KINDS["mocha"](8, 2, head_drop=0.5, noise=0.0).train()
    drop.load_state_dict(plain.state_dict())
    kinds = set()
    for _ in range(40):
        seen = seen_by(drop, query, heard)
        near(seen.alignment, whole_head.alignment)
        scale = [float((seen.weights[:, h].sum() / whole_head.weights[:, h].sum()).detach()) for h in range(2)]
        kinds.add(tuple(round(s, 9) for s in scale))
    assert kinds == {(0, 0), (0, 2), (2, 0), (1, 1)}
    stable = KINDS["mocha"](8, 2, stable_emit=0.25, noise=0.0).train()
    stable.load_state_dict(plain.state_dict())
    p = (plain.energy(query, plain.energy.keys(heard.frames.values)) + plain.offset).sigmoid()
    p = 0.75 * p.masked_fill(~heard.frames.mask[:, None, None], 0)
    near(seen_by(stable, query, heard).alignment, sequential(p))


def test_tokens_have_limits_in_training() -> None:
    cross, heard, query = lively("hard", noise=0.0).train(), memory([9, 5]), torch.randn(2, 3, 8)
    limit = torch.tensor([[2, 4, 8], [0, 2, 3]])
    place = replace(cross.place(query), limit=limit)
    found = cross.attend(query, cross.read(heard), place)[0].alignment
    p = (cross.energy(query, cross.energy.keys(heard.frames.values)) + cross.offset).sigmoid()
    for b, n in enumerate([9, 5]):
        start = torch.eye(9)[0].expand(2, 9)
        for i in range(3):
            row = sequential(p[b, :, i : i + 1].masked_fill(torch.arange(9) >= n, 0), start)[:, 0]
            start = row.masked_fill(torch.arange(9) > limit[b, i], 0)
            near(found[b, :, i], start)
    cross.eval()
    near(cross.attend(query, cross.read(heard), place)[0].context, seen_by(cross, query, heard).context)


def test_heads_wait_for_each_other() -> None:
    p = torch.tensor([[[0, 1, 0, 0, 0, 0, 1, 0.0]], [[0, 0, 0, 0, 0, 0, 0, 1.0]], [[0.0] * 8]])[None]
    start, valid = torch.tensor([[0, 0, 5]]), torch.ones(1, 8, dtype=torch.bool)
    yes, no = torch.tensor([True]), torch.tensor([False])
    for wait, expected in ((0, [1, 1, 5]), (2, [1, 3, 5]), (5, [1, 6, 6])):
        for finished in (yes, no):
            stops = hard(p, start, valid, finished, wait=wait)
            assert stops.at[0, :, 0].tolist() == expected
            assert stops.found.all()
    assert hard(p, start, valid, no, wait=7).at[0, :, 0].tolist() == [1, 7, 8]
    assert hard(p, start, valid, no, wait=7).found[0, :, 0].tolist() == [True, True, False]
    assert hard(p, start, valid, yes, wait=9).at[0, :, 0].tolist() == [1, 7, 7]
    assert hard(p[:, 2:], start[:, 2:], valid, yes, wait=1).found.tolist() == [[[False]]]
    assert hard(p, start, valid, yes).at[0, :, 0].tolist() == [1, 7, 8]


def test_latency_losses() -> None:
    alignment = torch.zeros(2, 2, 3, 6)
    stops = [[[0, 2, 5], [1, 2, 3]], [[0, 3, 0], [0, 1, 0]]]
    for b, row in enumerate(stops):
        for n, head in enumerate(row):
            for i, j in enumerate(head):
                alignment[b, n, i, j] = 1.0
    alignment[1, 0, 1] = 0  # a head that does not stop has heard everything
    counts = torch.tensor([[True] * 3, [True, True, False]])
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    late = delays(alignment, valid)
    near(late[0], torch.tensor([[1.0, 3, 6], [2, 3, 4]]))
    near(late[1, :, :2], torch.tensor([[1.0, 4], [1, 2]]))
    near(ExpectedDelay()(alignment, counts, valid), torch.tensor([1.5 + 3 + 5, 1 + 3.0]))
    near(HeadVariance()(alignment, counts, valid), torch.tensor([0.25 + 0 + 1, 0 + 1.0]))
    near(Quantity()(alignment, counts, valid), torch.tensor([0.0, 0.5]))
    near(Quantity()(0.5 * alignment, counts, valid), torch.tensor([1.5, (1.5 + 1) / 2]))

    def soft(*x: float) -> float:
        weight = [math.exp(y) for y in x]
        return sum(w * y for w, y in zip(weight, x, strict=True)) / sum(weight)

    g = [soft(1, 2), soft(3, 3), soft(6, 4)]
    pace, lags, last = 2.0, [], -math.inf
    for i, delay in enumerate(g):
        last = max(delay, last + pace)
        lags.append(last - i * pace)
    near(AverageLagging()(alignment, counts, valid)[0], torch.tensor(sum(lags)))
    near(lagging(torch.tensor([[1.0, 3, 5]]), counts[:1], torch.tensor([6])), torch.tensor([1.0]))
    near(lagging(torch.tensor([[6.0, 6, 6]]), counts[:1], torch.tensor([6])), torch.tensor([6.0]))
    with pytest.raises(ValueError, match="weight -1"):
        Quantity(-1.0)


def decoder(cross: Callable[..., Monotonic] = KINDS["mocha"], depth: int = 2) -> AttentionDecoder:
    return AttentionDecoder.usual(VOCAB, DIM, 2, depth, 24, context=40, cross=cross, dropout=0.0)


def model_with(head: torch.nn.Module) -> Recognizer:
    model = model_of("ctc")
    model.heads["monotonic"] = head
    return model


TERMS: list[Latency] = [ExpectedDelay(0.1), AverageLagging(0.2), HeadVariance(0.3), Quantity(0.4)]


def test_the_objective_is_cross_entropy_and_latency() -> None:
    model = model_with(decoder(partial(MoChA, window=3, noise=0.0, offset=-1.0, preserve=True)))
    heard, said = heard_by(model), said_in("abba", "", "fade", "c")
    head = model.heads["monotonic"]
    plain, full = MonotonicObjective(smoothing=0.1), MonotonicObjective(smoothing=0.1, latency=TERMS)
    for objective in (plain, full):
        objective.fit(model)
    losses = plain.losses(model, heard, said)
    heard_all = Memory.of(heard.frames, finished=True)
    near(losses, head.losses(heard_all, said.tokens, said.lengths, sos=END, eos=END, smoothing=0.1))
    heads = [(i, h) for i in range(2) for h in range(2)]
    forced = head.forced(head.start(heard_all), said.tokens, said.lengths, sos=END, eos=END, heads=heads)
    assert forced.alignment.shape[1] == 4
    extra = sum(term.weight * term(forced.alignment, forced.counts, heard.frames.mask) for term in TERMS)
    assert isinstance(extra, Tensor)
    assert (extra > 0.01).all()
    near(full.losses(model, heard, said), losses + extra)
    full.losses(model, heard, said).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name.endswith("behind.query.bias"), name


def test_what_an_objective_waits_for() -> None:
    model = model_with(decoder(partial(HardMonotonic, noise=0.0, stable_emit=0.5, offset=-1.0)))
    heard, said, layers = heard_by(model), said_in("ab", "c", "", "a"), model.heads["monotonic"].layers
    late = MonotonicObjective(latency=TERMS, warmup=2)
    late.fit(model)
    first = late.losses(model, heard, said)
    assert [layer.cross.stable_emit for layer in layers] == [0.0, 0.0]
    late.losses(model, heard, said)
    third = late.losses(model, heard, said)
    assert [layer.cross.stable_emit for layer in layers] == [0.5, 0.5]
    assert int(late.seen) == 3
    assert (third > first).all()
    late.eval().losses(model, heard, said)
    assert int(late.seen) == 3
    with pytest.raises(ValueError, match="warmup -1"):
        MonotonicObjective(warmup=-1)
    with pytest.raises(ModelError, match="none of the decoder's layers"):
        MonotonicObjective().fit(model_with(AttentionDecoder.usual(VOCAB, DIM, 2, 1, 24, context=40, cross=Soft)))
    with pytest.raises(ModelError, match="needs the head monotonic"):
        MonotonicObjective().fit(model_of("ctc"))


def test_tokens_are_said_in_time() -> None:
    """With the limits of a CTC head that is sure of where tokens end."""
    model = model_with(decoder(partial(HardMonotonic, noise=0.0, offset=-1.0)))
    heard, said = heard_by(model), said_in("ab", "a", "", "abababababababababababababababab")
    frames = heard.frames.mask.shape[1]
    tokens = torch.tensor([PIECES.encode("ab")])[0]
    ctc = model.heads["ctc"]
    logs = -9 + torch.rand(4, frames, VOCAB)
    logs[..., 0] = 0
    first = int(tokens[0])
    logs[:2, 3:5, first] = 5
    logs[0, 9, int(tokens[-1])] = 5
    logs = logs.log_softmax(-1)

    class Sure(type(ctc)):  # type: ignore[misc]
        def step(self, x: Frames, state: object) -> tuple[Frames, object]:
            return Frames.of(logs, x.mask), state

    sure = Sure(DIM, VOCAB)
    objective = ConstrainedObjective(delay=2, warmup=1)
    objective.fit(model)
    limit = objective.limits(sure, heard, said)
    assert limit[0, len(tokens) :].tolist() == [frames] * (limit.shape[1] - len(tokens))
    assert limit[0, 0] == 4 + 2
    assert limit[0, len(tokens) - 1] == 9 + 2
    assert limit[2].tolist() == limit[3].tolist() == [frames] * limit.shape[1]
    assert objective.begin(model, heard, said).place[0].limit.shape[1] == 0
    free = objective.losses(model, heard, said)
    bound = objective.losses(model, heard, said)
    places = objective.begin(model, heard, said).place
    assert all(isinstance(place, Place) and place.limit.shape == limit.shape for place in places)
    near(free[2:3], bound[2:3])
    assert not torch.allclose(free[:2], bound[:2])
    bound.sum().backward()
    with pytest.raises(ValueError, match="delay -1"):
        ConstrainedObjective(delay=-1)
