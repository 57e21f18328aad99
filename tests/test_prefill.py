"""SampleAttention and FlexPrefill: what they read of a whole utterance, and the shares that they promise."""

from __future__ import annotations

from math import log, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn.attention import Relative, Rotary, SelfAttention, Span, set_span
from speechattn.attention.prefill import (
    FlexPrefill,
    Prefill,
    SampleAttention,
    columns,
    covering,
    divergence,
    pairs,
    weights,
)  # fmt: skip
from speechattn.frames import Frames
from speechattn.testing import check_export, check_stream, oracle, random_frames

pytestmark = pytest.mark.usefixtures("precise")
D = 8
SPANS = pytest.mark.parametrize("span", [Span.full(), Span.causal()], ids=["full", "causal"])
MAKERS = {
    "sample": lambda span, **o: SampleAttention(D, 2, span, **{"target": 0.7, "sample": 0.2, "sinks": 1, **o}),
    "lines": lambda span, **o: FlexPrefill(D, 2, span, **{"size": 4, "gamma": 0.6, "tau": 0.0, **o}),
    "guess": lambda span, **o: FlexPrefill(D, 2, span, **{"size": 3, "gamma": 0.6, "tau": 9.0, **o}),
}
KINDS = pytest.mark.parametrize("kind", MAKERS)
ALL = {"sample": "target", "lines": "gamma", "guess": "gamma"}


def made(kind: str, span: Span, **options: object) -> Prefill:
    layer: Prefill = MAKERS[kind](span, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.8)
    return layer.eval()


def softmax(q: Tensor, k: Tensor, i: int, causal: bool) -> list[float]:
    """Weights of query i over all keys, which it may see or not."""
    scores = [float(q[i] @ k[j]) / sqrt(q.shape[1]) for j in range(i + 1 if causal else len(k))]
    top = [2.718281828459045**s for s in scores] + [0.0] * (len(k) - len(scores))
    return [s / sum(top) for s in top]


def fewest(mass: dict[object, float], share: float) -> set[object]:
    """Of the largest, as many as it takes."""
    found: set[object] = set()
    total = sum(mass.values())
    for key in sorted(mass, key=lambda key: -mass[key]):
        if sum(mass[key] for key in found) >= share * total:
            break
        found.add(key)
    return found


def sample_reads(layer: SampleAttention, q: Tensor, k: Tensor, causal: bool) -> list[set[int]]:
    n = len(k)
    reach = -int(-n * layer.window // 1)
    free = [{j for j in range(n) if j < layer.sinks or abs(i - j) <= reach} for i in range(n)]
    asked = range(n - 1, -1, -layer.stride)
    rows = {i: softmax(q, k, i, causal) for i in asked}
    missed = {j: sum(rows[i][j] for i in asked if j not in free[i]) for j in range(n)}
    taken: set[int] = set()
    for j in sorted(missed, key=lambda j: -missed[j]):
        if all(sum(w for o, w in enumerate(rows[i]) if o in free[i] | taken) >= layer.target for i in asked):
            break
        taken.add(j)
    return [{j for j in free[i] | taken if not causal or j <= i} for i in range(n)]


def flex_reads(layer: FlexPrefill, q: Tensor, k: Tensor, causal: bool) -> list[set[int]]:
    n, size = len(k), layer.size
    blocks = range(-(-n // size))
    inside = {b: range(b * size, min(n, (b + 1) * size)) for b in blocks}
    mean = {b: k[inside[b]].mean(0) for b in blocks}
    groups = [range(max(0, n - size), n), *([] if causal else [range(min(size, n))])]
    gaps, column, slash = [], dict.fromkeys(range(n), 0.0), dict.fromkeys(range(1 - n, n), 0.0)
    for group in groups:
        rows = {i: softmax(q, k, i, causal) for i in group}
        true = [sum(rows[i][j] for i in group for j in inside[b]) / len(group) for b in blocks]
        guess = torch.stack([q[group].mean(0) @ mean[b] / sqrt(q.shape[1]) for b in blocks]).softmax(0).tolist()
        halves = [(p + r) / 2 for p, r in zip(true, guess, strict=True)]
        gaps.append(sum((p * log(p / m) if p else 0) + (r * log(r / m) if r else 0)
                        for p, r, m in zip(true, guess, halves, strict=True)) / 2)  # fmt: skip
        for i in group:
            for j in range(n):
                column[j] += rows[i][j]
                slash[i - j] += rows[i][j]
    see = {(a, b) for a in blocks for b in blocks if not causal or b <= a}
    if sqrt(sum(gaps) / len(gaps)) < layer.tau:
        guesses = {}
        for a in blocks:
            seen = [b for b in blocks if (a, b) in see]
            some = torch.stack([q[inside[a]].mean(0) @ mean[b] / sqrt(q.shape[1]) for b in seen]).softmax(0).tolist()
            guesses |= {(a, b): w for b, w in zip(seen, some, strict=True)}
        kept = fewest(guesses, layer.gamma)
    else:
        tall = {j // size for j in fewest(column, layer.gamma)}  # type: ignore[operator]
        long = fewest(slash, layer.gamma)
        apart = {m for o in long for m in (o // size, -(-o // size))}  # type: ignore[operator]
        kept = {(a, b) for a, b in see if b in tall or a - b in apart}
    kept = (kept | {(a, b) for a, b in see if b in (0, a)}) & see
    return [{j for a, b in kept if a == i // size for j in inside[b] if not causal or j <= i} for i in range(n)]


@oracle.register
def by_definition(layer: Prefill, x: Frames) -> Frames:
    """Row by row and head by head, over the valid frames; positions only where they are turned by `Rotary`."""
    reads = sample_reads if isinstance(layer, SampleAttention) else flex_reads
    out, width, causal = torch.zeros_like(x.values), D // layer.heads, layer.span == Span.causal()
    for row, (values, mask) in enumerate(zip(x.values, x.mask, strict=True)):
        if not mask.any():
            continue
        y = values[mask] if layer.norm is None else layer.norm(values[mask])
        y = y @ layer.qkv.weight.T + layer.qkv.bias
        heads = []
        for h in range(layer.heads):
            key = D + h * layer.key_heads // layer.heads * width
            value = key + layer.key_heads * width
            q, k, v = (y[:, at : at + width] for at in (h * width, key, value))
            if layer.position is not None:
                assert isinstance(layer.position, Rotary)
                q, k = layer.position.turn(q, k, range(len(q)), range(len(k)))
            found = reads(layer, q.detach(), k.detach(), causal)  # type: ignore[arg-type]
            some = [sorted(keys) for keys in found]
            heads.append(torch.stack([
                (q[i] @ k[keys].T / sqrt(width)).softmax(0) @ v[keys] for i, keys in enumerate(some)
            ]))  # fmt: skip
        out[row, mask] = layer.out(torch.cat(heads, -1))
    return Frames.of(out, x.mask)


@KINDS
@SPANS
def test_laws(kind: str, span: Span) -> None:
    layer = made(kind, span, position=Rotary(D, 2), key_heads=1, norm=nn.LayerNorm(D))
    check_stream(layer, random_frames([23, 0, 10], D))


@KINDS
@SPANS
def test_everything_is_dense_attention(kind: str, span: Span) -> None:
    layer = made(kind, span, **{ALL[kind]: 1.0})
    dense = SelfAttention(D, 2, span)
    dense.load_state_dict(layer.state_dict())
    x = random_frames([41, 13], D)
    leaf = x.values.requires_grad_()
    y, z = layer(x).values, dense(x).values
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(a.square().sum(), leaf)[0] for a in (y, z)), rtol=0, atol=1e-9)
    less = made(kind, span)
    less.load_state_dict(layer.state_dict())
    assert (less(x).values - z).abs().max() > 1e-4


@KINDS
def test_every_step_is_exported(kind: str) -> None:
    check_export(made(kind, Span.causal()), random_frames([9, 7], D))


@KINDS
@SPANS
def test_holes_do_not_count(kind: str, span: Span) -> None:
    layer, x = made(kind, span, position=Rotary(D, 2)), random_frames([30], D)
    mask = torch.rand(1, 45).argsort() < 30
    values = torch.zeros(1, 45, D)
    values[mask] = x.values[0]
    torch.testing.assert_close(layer(Frames(values, mask)).values[mask], layer(x).values[0], rtol=0, atol=1e-12)


def test_in_the_causal_pattern_the_choice_is_all_that_the_future_changes() -> None:
    for kind in MAKERS:
        layer = made(kind, Span.causal())
        x, y = random_frames([40], D), random_frames([40], D, seed=1)
        later = Frames(torch.cat([x.values[:, :24], y.values[:, 24:]], 1), x.mask)
        assert (layer(x).values - layer(later).values)[:, :24].abs().max() > 1e-9  # columns are chosen by the last
        for name in ("target", "gamma"):
            if hasattr(layer, name):
                setattr(layer, name, 1)
        assert (layer(x).values - layer(later).values)[:, :24].abs().max() < 1e-12


def peaked(frames: int) -> tuple[Tensor, Tensor]:
    """Queries that want three keys, and a little of everything: [1, 2, T, 4] each."""
    q, k = torch.randn(1, 2, frames, 4) * 0.3, torch.randn(1, 2, frames, 4) * 0.3
    q[..., 0] += 4
    k[:, :, [0, frames // 3, frames // 2], 0] += 6
    return q, k


def kept_mass(q: Tensor, k: Tensor, causal: bool, layer: SampleAttention) -> tuple[Tensor, Tensor]:
    """The share of its weight that each query keeps [1, H, T], and the columns read [1, H]."""
    frames = q.shape[2]
    count, at = torch.tensor([frames]), torch.arange(frames)
    rank, many = layer.chosen(q, k, count, causal)
    read = torch.zeros(1, 2, frames).scatter(2, rank, (at < many[..., None]).double()).bool()
    free = (at < layer.sinks) | ((at[:, None] - at).abs() <= layer.reach(count))
    mass = weights(q, k, at[None], count, causal)
    return (mass * (read[:, :, None] | free)).sum(-1), many


@SPANS
@pytest.mark.parametrize("shape", ["random", "peaked"])
def test_the_recall_is_what_was_asked(span: Span, shape: str) -> None:
    causal, frames = span == Span.causal(), 300
    q, k = peaked(frames) if shape == "peaked" else (torch.randn(1, 2, frames, 4), torch.randn(1, 2, frames, 4))
    for target in (0.5, 0.95):
        everyone = SampleAttention(D, 2, span, target=target, sample=1.0)
        mass, many = kept_mass(q, k, causal, everyone)
        assert mass.min() >= target - 1e-12
        some = SampleAttention(D, 2, span, target=target, sample=0.05)
        sampled, fewer = kept_mass(q, k, causal, some)
        assert sampled[..., range(frames - 1, -1, -20)].min() >= target - 1e-12
        assert sampled.mean() >= target - 0.01  # what holds for a twentieth holds nearly for all
        assert (fewer <= many).all()
        if shape == "peaked":
            assert sampled.min() >= target  # the others want the same
            assert many.max() <= 30 * (1 + (target > 0.9))
        elif target == 0.95:
            assert many.min() > 100


def test_no_column_could_be_left_out() -> None:
    q, k = torch.randn(1, 2, 60, 4), torch.randn(1, 2, 60, 4)
    count, reach = torch.tensor([60]), torch.tensor([3])
    rank, many = columns(q, k, count, True, reach, stride=7, sinks=2, target=0.8)
    at = torch.arange(59, -1, -7)
    mass = weights(q[:, :, at], k, at[None], count, True)
    key = torch.arange(60)
    for head in range(2):
        for less, enough in ((0, True), (1, False)):
            read = torch.isin(key, rank[0, head, : many[0, head] - less])
            kept = (mass[0, head] * (read | (key < 2) | ((at[:, None] - key).abs() <= 3))).sum(-1)
            assert bool((kept >= 0.8).all()) is enough


@SPANS
def test_lines_hold_the_share_of_the_queries_that_were_asked(span: Span) -> None:
    causal, frames, size = span == Span.causal(), 96, 8
    count, at = torch.tensor([frames]), torch.arange(frames)
    asked = [*range(frames - size, frames), *([] if causal else range(size))]
    share = {}
    for shape, (q, k) in {"random": (torch.randn(1, 2, frames, 4) * 2, torch.randn(1, 2, frames, 4)),
                          "peaked": peaked(frames)}.items():  # fmt: skip
        kept = pairs(q, k, count, causal, size=size, gamma=0.9, tau=0.0)
        read = kept[:, :, at[:, None] // size, at // size]
        mass = (weights(q, k, at[None], count, causal) * read).sum(-1)
        assert mass[..., asked].mean(-1).min() >= 0.9
        share[shape] = kept.double().mean()
        assert not causal or not kept.triu(1).any()
        assert kept.diagonal(dim1=2, dim2=3).all()
        assert kept[..., 0].all()
    assert share["peaked"] < share["random"]


def test_a_diagonal_is_followed() -> None:
    frames, back = 64, 24
    q = torch.randn(1, 1, frames, 16)
    q = 6 * q / q.norm(dim=-1, keepdim=True)
    k = torch.roll(q, -back, 2)  # key j is query j + 24
    kept = pairs(q, k, torch.tensor([frames]), True, size=8, gamma=0.9, tau=0.0)[0, 0]
    offset = torch.arange(8)[:, None] - torch.arange(8)
    assert kept[(offset == 3)].all()
    assert not kept[(offset == 2)][1:4].any()  # as far as no column was chosen


def test_a_good_guess_decides_by_itself() -> None:
    block = torch.randn(1, 2, 8, 1, 4)
    k = block.expand(-1, -1, -1, 8, -1).reshape(1, 2, 64, 4)  # all keys of a block alike: the mean tells everything
    q = torch.randn(1, 2, 8, 1, 4).expand(-1, -1, -1, 8, -1).reshape(1, 2, 64, 4)
    options = {"size": 8, "gamma": 0.7}
    free = pairs(q, k, torch.tensor([64]), False, tau=9.0, **options)  # type: ignore[arg-type]
    lines = pairs(q, k, torch.tensor([64]), False, tau=0.0, **options)  # type: ignore[arg-type]
    assert not torch.equal(free, lines)
    assert torch.equal(pairs(q, k, torch.tensor([64]), False, tau=0.1, **options), free)  # type: ignore[arg-type]
    q = q + 3 * torch.randn(1, 2, 64, 4)
    bad = pairs(q, k + torch.randn(1, 2, 64, 4) * 4, torch.tensor([64]), False, tau=0.1, **options)  # type: ignore[arg-type]
    assert not torch.equal(bad, free)


def test_tau_is_the_root_of_the_divergence_at_which_a_head_changes_its_way() -> None:
    q, k, count = torch.randn(1, 1, 64, 4), torch.randn(1, 1, 64, 4), torch.tensor([64])
    true = weights(q[:, :, 56:], k, torch.arange(56, 64)[None], count, True).mean(2).view(1, 1, 8, 8).sum(-1)
    guess = (q[:, :, 56:].mean(2, keepdim=True) @ k.view(1, 1, 8, 8, 4).mean(3).mT / 2).softmax(-1)[:, :, 0]
    gap = float(divergence(guess, true).sqrt())
    lines, below, above, free = (
        pairs(q, k, count, True, size=8, gamma=0.5, tau=tau) for tau in (0.0, gap * 0.999, gap * 1.001, 9.0)
    )
    assert torch.equal(below, lines)
    assert torch.equal(above, free)
    assert not torch.equal(free, lines)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 1))
@settings(deadline=None, max_examples=80)
def test_covering_takes_the_fewest(values: list[float], share: float) -> None:
    mass = torch.tensor(values, dtype=torch.float64)
    kept = covering(mass, share)
    if share == 1:
        assert kept.all()
        return
    assert mass[kept].sum() >= share * mass.sum() - 1e-9
    if kept.any():
        assert mass[kept].sum() - mass[kept].min() < share * mass.sum() + 1e-9
        assert mass[kept].min() >= mass[~kept].max() if (~kept).any() else True


def test_a_share_of_one_takes_what_weighs_nothing_too() -> None:
    assert covering(torch.tensor([0.0, 1.0, 0.0]), 1.0).all()
    assert covering(torch.tensor([0.0, 1.0, 0.0]), 0.999).tolist() == [False, True, False]
    q, k = torch.zeros(1, 1, 30, 4), torch.zeros(1, 1, 30, 4)
    q[..., 0], k[:, :, 3, 0] = 1e4, 1e4
    for target, least in ((1.0, 30), (0.999, 1)):
        _, many = columns(q, k, torch.tensor([30]), False, torch.tensor([2]), stride=3, sinks=1, target=target)
        assert many.tolist() == [[least]]


def test_the_divergence_has_its_known_values() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    q = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    expected = [log(2), 0.0, (log(4 / 3) + 0.5 * log(2 / 3) + 0.5 * log(2)) / 2]
    assert divergence(p, q).tolist() == pytest.approx(expected, abs=1e-12)


@KINDS
def test_what_cannot_be_honoured_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"its span is Span.full\(\) or Span.causal\(\)"):
        made(kind, Span.chunked(4, 2))
    with pytest.raises(ValueError, match="use Rotary, or no position"):
        made(kind, Span.full(), position=Relative(D, 2))
    with pytest.raises(ValueError, match="wanted"):
        made(kind, Span.full(), **{ALL[kind]: 1.5})
    layer = made(kind, Span.full())
    with pytest.raises(ValueError, match="reads whole utterances"):
        set_span(layer, Span.sliding(3))
    set_span(layer, Span.causal())
    assert layer.plan().block is None
