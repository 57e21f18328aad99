"""Linear attention: its three forms agree, its layers are streams whose state does not grow."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, factorial, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn import tree
from speechattn.attention import Alibi, Position, Rotary, SelfAttention, Span, set_span
from speechattn.attention.based import Based, TaylorAttention, taylor, weighed
from speechattn.attention.linear import LightningAttention, blocked, quadratic, recurrent
from speechattn.attention.position import slopes
from speechattn.encoder import Conformer
from speechattn.frames import Frames
from speechattn.stream import Stream
from speechattn.testing import check_export, check_stream, measure, oracle, random_frames
from speechattn.testing.attention import score

D = 8
CAUSAL = Span.causal()
MAKERS: list[Callable[[], Stream]] = [
    lambda: LightningAttention(D, 2, CAUSAL, norm=nn.LayerNorm(D)),
    lambda: LightningAttention(D, 4, CAUSAL, fading=0.0),
    lambda: TaylorAttention(D, 2, CAUSAL, norm=nn.LayerNorm(D), features=3),
    lambda: Based(D, 2, CAUSAL, norm=nn.LayerNorm(D), position=Rotary(D, 2), features=3, window=4),
    lambda: Based(D, 4, CAUSAL, position=Alibi(D, 4), features=2, window=1, kernel=1),
]
Made = Callable[[], Stream]
every = pytest.mark.parametrize("make", MAKERS, ids=lambda make: f"{type(make()).__name__}-{MAKERS.index(make)}")


def lively(stream: Stream) -> Stream:
    """No parameter stays at a value that hides something."""
    for name, parameter in stream.named_parameters():
        nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.4)
    return stream.eval()


# By definition: the valid frames of one row as a list, and sums over all that came before.


def rows(stream: Stream, x: Frames, row: Callable[[Tensor], Tensor]) -> Frames:
    """`row` of the valid frames of each row, behind the norm; the others stay zero."""
    norm, y = stream.norm, torch.zeros_like(x.values)
    for b, mask in enumerate(x.mask):
        if mask.any():
            values = x.values[b, mask]
            y[b, mask] = row(values if norm is None else norm(values))
    return Frames(y, x.mask)


@oracle.register
def _(stream: LightningAttention, x: Frames) -> Frames:
    d, h = stream.dim, stream.heads

    def row(x: Tensor) -> Tensor:
        q, k, v, u = (x @ stream.parts.weight[i * d : (i + 1) * d].T + stream.parts.bias[i * d : (i + 1) * d]
                      for i in range(4))  # fmt: skip
        q, k = q * q.sigmoid(), k * k.sigmoid()
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for head in range(h):
                own = slice(head * d // h, (head + 1) * d // h)
                decay = exp(-stream.fading * 2 ** (-8 * (head + 1) / h))
                for s in range(t + 1):
                    out[t, own] = out[t, own] + decay ** (t - s) * (q[t, own] @ k[s, own]) * v[s, own]
        size = (out.pow(2).sum(1, keepdim=True) / d + 1e-6) ** 0.5
        return stream.out(out / size * u)  # type: ignore[no-any-return]

    return rows(stream, x, row)


def series(q: Tensor, k: Tensor) -> Tensor:
    """The first three terms of exp(q . k / sqrt(F))."""
    u = q @ k / sqrt(len(q))
    return sum(u**n / factorial(n) for n in range(3))  # type: ignore[return-value]


def recalled(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Queries and keys [T, H * F], values [T, D] -> the mean of all values so far, weighed by the series."""
    out = torch.zeros_like(v)
    q, k, v = (part.unflatten(1, (heads, -1)) for part in (q, k, v))
    for t in range(len(v)):
        for h in range(heads):
            weights = torch.stack([series(q[t, h], k[s, h]) for s in range(t + 1)])
            out.view_as(v)[t, h] = weights / weights.sum() @ v[: t + 1, h]
    return out


@oracle.register
def _(stream: TaylorAttention, x: Frames) -> Frames:
    def row(x: Tensor) -> Tensor:
        n = stream.heads * stream.features
        q, k, v = stream.parts(x).split([n, n, stream.dim], 1)
        return stream.out(recalled(q, k, v, stream.heads))  # type: ignore[no-any-return]

    return rows(stream, x, row)


@oracle.register
def _(stream: Based, x: Frames) -> Frames:
    def row(x: Tensor) -> Tensor:
        n, d, h = stream.heads * stream.features, stream.dim, stream.heads
        past = torch.cat([x.new_zeros(stream.kernel - 1, d), x])
        taps = stream.filter.weight[:, 0]
        x = x + stream.filter.bias + sum(past[i : i + len(x)] * taps[:, i] for i in range(stream.kernel))
        q, k, query, key, v = stream.parts(x).split([n, n, d, d, d], 1)
        out = recalled(q, k, v, h)
        query, key, v = (part.unflatten(1, (h, -1)) for part in (query, key, v))
        for t in range(len(x)):
            near = range(max(0, t + 1 - stream.window), t + 1)
            for head in range(h):
                scores = [score(stream.position, query[t, head], key[s, head], head, t - s) for s in near]
                own = slice(head * d // h, (head + 1) * d // h)
                out[t, own] = out[t, own] + torch.stack(scores).softmax(0) @ v[near.start : t + 1, head]
        return stream.out(out)  # type: ignore[no-any-return]

    return rows(stream, x, row)


# The core.


def parts(seed: int, rows: int, heads: int, frames: int, features: int = 3, width: int = 2) -> tuple[Tensor, ...]:
    """Queries, keys, values and a mask with holes."""
    maker = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, frames, n) for n in (features, features, width)]
    q, k, v = (torch.randn(shape, generator=maker, dtype=torch.float64) for shape in shapes)
    return q, k, v, torch.rand(rows, frames, generator=maker) < 0.7


def test_golden_values() -> None:
    q, k = torch.tensor([[[[1.0, 2.0], [3.0, 1.0]]]]), torch.tensor([[[[1.0, 1.0], [2.0, 0.0]]]])
    v, mask = torch.tensor([[[[1.0], [10.0]]]]), torch.ones(1, 2, dtype=torch.bool)
    half = torch.tensor([0.5]).log().neg()
    for y in (quadratic(q, k, v, mask, half), recurrent(q, k, v, mask, half)[0], blocked(q, k, v, mask, half)[0]):
        torch.testing.assert_close(y.flatten(), torch.tensor([3.0, 0.5 * 4 * 1 + 6 * 10]))
    decay = (-slopes(8, torch.device("cpu"))).exp()
    torch.testing.assert_close(decay[[0, 7]], torch.tensor([0.6065306597, 0.9961013694], dtype=torch.float64))
    assert taylor(torch.tensor([1.0, 2.0])) @ taylor(torch.tensor([3.0, -1.0])) == pytest.approx(1 + 1 + 0.5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.01, 4))
def test_the_feature_map_is_the_series(seed: int, features: int, scale: float) -> None:
    maker = torch.Generator().manual_seed(seed)
    q, k = scale * torch.randn(2, 5, features, generator=maker, dtype=torch.float64)
    product = (q * k).sum(-1)
    torch.testing.assert_close((taylor(q) * taylor(k)).sum(-1), 1 + product + product**2 / 2)
    assert taylor(q).shape[-1] == 1 + features + features * (features + 1) // 2


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 17), st.booleans(), st.booleans(), st.booleans())
def test_three_forms_agree(seed: int, frames: int, block: int, fades: bool, rich: bool, holes: bool) -> None:
    q, k, v, mask = parts(seed, 2, 2, frames)
    mask = mask if holes else torch.ones_like(mask)
    slope = torch.tensor([0.01, 1.5], dtype=torch.float64) if fades else None
    features = taylor if rich else torch.nn.Identity()
    expected = quadratic(q, k, v, mask, slope, features=features)
    one, memory = recurrent(q, k, v, mask, slope, features=features)
    many, last = blocked(q, k, v, mask, slope, features=features, block=block)
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(many, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(last, memory, rtol=0, atol=1e-9)
    first, middle = blocked(q[:, :, :7], k[:, :, :7], v[:, :, :7], mask[:, :7], slope, features=features)
    rest, last = blocked(
        q[:, :, 7:], k[:, :, 7:], v[:, :, 7:], mask[:, 7:], slope, features=features, memory=middle, block=block
    )
    torch.testing.assert_close(torch.cat([first, rest], 2), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(last, memory, rtol=0, atol=1e-9)


@pytest.mark.parametrize("slope", [None, torch.tensor([0.3, 2.0], dtype=torch.float64)])
def test_gradients_of_the_core(slope: Tensor | None) -> None:
    q, k, v, mask = parts(1, 1, 2, 7)
    leaves = [part.requires_grad_() for part in (q, k, v, torch.randn(1, 2, 3, 2, dtype=torch.float64))]
    assert torch.autograd.gradcheck(
        lambda q, k, v, memory: blocked(q, k, v, mask, slope, memory=memory, block=3), leaves
    )
    if slope is None:
        assert torch.autograd.gradcheck(lambda q, k, v: weighed(q, k, v, torch.ones_like(mask)), leaves[:3])


def test_long_rows_in_float32() -> None:
    """5000 frames: no power of a decay overflows, and the sums keep their digits."""
    q, k, v, _ = parts(2, 1, 8, 5000, 4, 4)
    mask, slope = torch.ones(1, 5000, dtype=torch.bool), slopes(8, q.device)
    strong = torch.cat([slope[:6], torch.tensor([20.0, 200.0], dtype=torch.float64)])
    for how in (slope, strong):
        exact, _ = blocked(q, k, v, mask, how, block=100)
        for block in (64, 1000):
            y, memory = blocked(q.float(), k.float(), v.float(), mask, how.float(), block=block)
            assert y.isfinite().all()
            assert memory.isfinite().all()
            assert (y - exact).abs().max() < 1e-5 * exact.abs().max()
    exact, _ = weighed(q, k, v, mask)
    y, _ = weighed(q.float(), k.float(), v.float(), mask)
    assert (y - exact).abs().max() < 1e-5 * exact.abs().max()


# The layers.


@every
@pytest.mark.usefixtures("precise")
def test_laws(make: Made) -> None:
    check_stream(lively(make()), random_frames([26, 0, 19], D), seed=1)


@every
@pytest.mark.usefixtures("precise")
def test_plan_and_export(make: Made) -> None:
    stream = lively(make())
    assert measure(stream, random_frames([120], D)) == stream.plan()
    check_export(stream, random_frames([3, 2], D))


@every
@pytest.mark.usefixtures("precise")
def test_what_is_not_valid_is_as_if_it_were_not_there(make: Made) -> None:
    """Rows with holes, in steps of 5 frames, against the oracle, which reads the valid frames alone."""
    stream, x = lively(make()), random_frames([40, 40, 40], D)
    mask = torch.rand(3, 40) < torch.tensor([0.8, 0.4, 0.0])[:, None]
    x = Frames.of(x.values, mask)
    expected = oracle(stream, x)
    state, outputs = stream.init_state(x), []
    for at in range(0, 40, 5):
        y, state = stream.step(x[at : at + 5], state)
        outputs.append(y)
    for y in (Frames.cat(outputs), stream(x)):
        assert torch.equal(y.mask, mask)
        torch.testing.assert_close(y.values, expected.values, rtol=0, atol=1e-9)
    before = tree.leaves(tree.clone(state))
    _, after = stream.step(Frames(torch.zeros(3, 4, D), torch.zeros(3, 4, dtype=torch.bool)), state)
    for a, b in zip(before, tree.leaves(after), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("make", [MAKERS[0], MAKERS[2], MAKERS[3]], ids=["lightning", "taylor", "based"])
def test_state_does_not_grow(make: Made) -> None:
    stream = lively(make())
    x, sizes, held = random_frames([1, 1], D), [], []
    state = stream.init_state(x)
    with torch.no_grad():
        for _ in range(1000):
            _, state = stream.step(x, state)
            sizes.append(sum(leaf.nbytes for leaf in tree.leaves(state)))
            held.append(sum(leaf.untyped_storage().nbytes() for leaf in tree.leaves(state)))
    assert sizes[9] == sizes[999]
    assert max(held[:100]) == max(held[900:])


@every
@pytest.mark.parametrize("auto", [False, True])
def test_bfloat16(make: Made, auto: bool) -> None:
    """Close to float32, also when autocast chooses the type; sums are kept in float32."""
    stream, x = lively(make()).train(), random_frames([300, 200], D)
    expected = stream(x).values
    if not auto:
        stream, x = stream.bfloat16(), Frames(x.values.bfloat16(), x.mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=auto):
        y = stream(x).values
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(p.grad.isfinite().all() for p in stream.parameters())
    assert stream.init_state(x).memory.dtype == torch.float32


@every
def test_other_spans_are_refused(make: Made) -> None:
    stream = make()
    kind = type(stream)
    for span in (Span.full(), Span.sliding(3), Span.chunked(None, 2), Span.sliding(3, sinks=1), Span(None, 1, 1)):
        with pytest.raises(ValueError, match=f"{kind.__name__} .* needs Span.causal"):
            kind(D, 2, span)
    with pytest.raises(ValueError, match=r"needs Span\.causal"):
        set_span(stream, Span.chunked(4, 4))
    assert stream.span == CAUSAL
    set_span(stream, Span(None, 1))


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        LightningAttention(D, 3, CAUSAL)
    with pytest.raises(ValueError, match="grow without bound"):
        LightningAttention(D, 2, CAUSAL, fading=-0.1)
    with pytest.raises(ValueError, match="window 0"):
        Based(D, 2, CAUSAL, window=0)


def test_dropout_acts_in_training_only() -> None:
    stream, x = LightningAttention(D, 2, CAUSAL, dropout=0.9), random_frames([9], D)
    assert (stream(x).values == 0).float().mean() > 0.5
    assert torch.equal(stream.eval()(x).values, stream(x).values)
    assert (stream(x).values != 0).all()


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("kind", [LightningAttention, TaylorAttention, Based, SelfAttention])
def test_inside_an_encoder(kind: type[Stream]) -> None:
    position: type[Position] | None = None if kind in (LightningAttention, TaylorAttention) else Rotary
    encoder = Conformer(D, D, 2, 2, 12, span=CAUSAL, kernel=3, position=position, attention=kind)
    assert sum(isinstance(part, kind) for part in encoder.modules()) == 2
    check_stream(lively(encoder), random_frames([21, 14], D), reference=lambda stream, x: stream.at_once(x))


class Recall(nn.Module):
    """Layers over tokens [B, U]; the answer is the value that followed the same key before."""

    def __init__(self, layers: list[Stream], dim: int, keys: int) -> None:
        super().__init__()
        self.embed, self.layers, self.out = nn.Embedding(2 * keys, dim), nn.ModuleList(layers), nn.Linear(dim, keys)

    def forward(self, tokens: Tensor) -> Tensor:
        x = Frames(self.embed(tokens), torch.ones(tokens.shape, dtype=torch.bool))
        for layer in self.layers:
            x = Frames(x.values + layer(x).values, x.mask)
        return self.out(x.values)  # type: ignore[no-any-return]


def recall(make: Callable[[int], Stream], depth: int, *, steps: int = 100, pairs: int = 6, keys: int = 12) -> float:
    """Share of right answers on new lists of pairs, after a short training."""
    maker, dim = torch.Generator().manual_seed(0), 24

    def batch(size: int) -> tuple[Tensor, Tensor]:
        key = torch.rand(size, keys, generator=maker).argsort(1)[:, :pairs]
        value = torch.randint(keys, (size, pairs), generator=maker)
        asked = torch.rand(size, pairs, generator=maker).argsort(1)
        told = torch.stack([key, keys + value], 2).flatten(1)
        return torch.cat([told, key.gather(1, asked)], 1), value.gather(1, asked)

    model = Recall([make(dim) for _ in range(depth)], dim, keys)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        tokens, answers = batch(32)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens)[:, -pairs:].mT, answers).backward()
        optimizer.step()
    tokens, answers = batch(200)
    return float((model(tokens)[:, -pairs:].argmax(-1) == answers).float().mean())


def test_based_recalls_what_linear_attention_alone_does_not() -> None:
    """Keys and values in pairs, then keys: the filter joins a pair, the feature map tells the keys apart.

    Linear attention has two layers for it, BASED one.
    """
    based = recall(lambda dim: Based(dim, 2, CAUSAL, norm=nn.LayerNorm(dim), features=8, window=4), 1)
    alone = recall(lambda dim: LightningAttention(dim, 2, CAUSAL, norm=nn.LayerNorm(dim)), 2)
    assert based > 0.9
    assert alone < 0.6
