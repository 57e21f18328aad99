"""Mega: its average in four forms, its gates, and a chunk-wise stream whose state does not grow."""

from __future__ import annotations

from collections.abc import Callable
from math import erf, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn import tree
from speechattn.attention import Alibi, Relative, Rotary, Span, set_span
from speechattn.attention.mega import (
    Averages,
    Laplace,
    Mega,
    MovingAverage,
    Softmax,
    averaged,
    averaged_by_definition,
    averaged_one_by_one,
    convolved,
)
from speechattn.encoder import Conformer
from speechattn.frames import Frames
from speechattn.stream import Stream
from speechattn.testing import check_export, check_stream, measure, oracle, random_frames
from speechattn.testing.attention import score

D = 8
MAKERS: list[Callable[[], Mega]] = [
    lambda: Mega(D, 1, Span.chunked(0, 4), norm=nn.LayerNorm(D), position=Relative(D, 1), averages=3),
    lambda: Mega(D, 1, Span.chunked(0, 3), function=Laplace(), averages=2, keys=3, values=5),
    lambda: Mega(D, 1, Span.sliding(0), position=Alibi(D, 1), function=Laplace(), averages=1),
    lambda: Mega(D, 1, Span.full(), norm=nn.LayerNorm(D), position=Rotary(D, 1), averages=2),
    lambda: Mega(D, 1, Span.full(), function=Laplace(), averages=2, keys=4),
]
Made = Callable[[], Mega]
every = pytest.mark.parametrize("make", MAKERS, ids=range(len(MAKERS)))
streaming = pytest.mark.parametrize("make", MAKERS[:3], ids=range(3))


def lively(stream: Stream) -> Stream:
    """No parameter stays at a value that hides something."""
    for name, parameter in stream.named_parameters():
        nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.4)
    return stream.eval()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


@oracle.register
def _(stream: Mega, x: Frames) -> Frames:
    """Frame by frame and pair by pair, from the paper's equations."""
    y = torch.zeros_like(x.values)
    for b, mask in enumerate(x.mask.tolist()):
        chunk = stream.span.chunk or len(mask)
        normed = x.values[b] if stream.norm is None else stream.norm(x.values[b])
        moved = remembered(stream.average, normed, mask)
        d, z = stream.dim, stream.keys
        gates = moved @ stream.parts.weight.T + stream.parts.bias
        update, hidden, shared, reset = gates.split([d, d, z, stream.values], 1)
        q, k = (silu(shared) * stream.scale[i] + stream.shift[i] for i in range(2))
        v = silu(stream.value(normed))
        for t, there in enumerate(mask):
            if there:
                begin = t // chunk * chunk
                seen = [s for s in range(begin, min(begin + chunk, len(mask))) if mask[s]]
                read = weights(stream, q[t], [(k[s], t - s) for s in seen]) @ v[seen]
                candidate = silu(hidden[t] + stream.out.weight @ (silu(reset[t]) * read))
                gate = update[t].sigmoid()
                y[b, t] = gate * candidate + (1 - gate) * x.values[b, t] - x.values[b, t]
    return Frames(y, x.mask)


def remembered(average: MovingAverage, x: Tensor, mask: list[bool]) -> Tensor:
    """silu(average + omega x) of one row [T, D], by the recurrence."""
    alpha, delta = average.alpha.sigmoid(), average.delta.sigmoid()
    h, out = torch.zeros_like(alpha), []
    for t, there in enumerate(mask):
        if there:
            h = alpha * (average.beta * x[t, :, None]) + (1 - alpha * delta) * h
        read = (average.eta * h).sum(1) / sqrt(alpha.shape[1])
        out.append(silu(read + average.omega * x[t]))
    return torch.stack(out) if out else x


def weights(stream: Mega, q: Tensor, keys: list[tuple[Tensor, int]]) -> Tensor:
    """The weights of the keys, each with its distance."""
    position = stream.position
    if isinstance(stream.function, Softmax):
        return torch.stack([score(position, q, k, 0, d) for k, d in keys]).softmax(0)
    found = []
    for k, d in keys:
        s = q @ k / len(keys) + score(position, torch.zeros_like(q), k, 0, d)
        found.append((1 + torch.erf((s - sqrt(1 / 2)) / (sqrt(1 / (4 * torch.pi)) * sqrt(2)))) / 2)
    return torch.stack(found)


# The average.


def numbers(seed: int, dim: int = 3, size: int = 2) -> Averages:
    maker = torch.Generator().manual_seed(seed)
    draws = [torch.randn(dim, size, generator=maker, dtype=torch.float64) for _ in range(4)]
    alpha, delta = draws[0].sigmoid(), draws[1].sigmoid()
    return Averages(alpha * draws[2], 1 - alpha * delta, draws[3])


def test_golden_values() -> None:
    """An impulse, with alpha = delta = 1/2, beta = 1, eta = 2: the filter itself."""
    one = torch.ones(1, 1, dtype=torch.float64)
    by, x = Averages(0.5 * one, 0.75 * one, 2 * one), torch.zeros(1, 4, 1, dtype=torch.float64)
    x[0, 0] = 1
    mask, start = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 1, 1, dtype=torch.float64)
    expected = torch.tensor([1.0, 0.75, 0.5625, 0.421875], dtype=torch.float64)
    for y in (averaged_by_definition(x, by), averaged_one_by_one(x, mask, by, start)[0],
              averaged(x, mask, by, start, block=3)[0], convolved(x, by)):  # fmt: skip
        torch.testing.assert_close(y.flatten(), expected)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 90), st.integers(1, 40))
def test_four_forms_agree(seed: int, frames: int, block: int) -> None:
    by, maker = numbers(seed), torch.Generator().manual_seed(seed)
    x = torch.randn(2, frames, 3, generator=maker, dtype=torch.float64)
    mask, start = torch.ones(2, frames, dtype=torch.bool), torch.zeros(2, 3, 2, dtype=torch.float64)
    expected, state = averaged_one_by_one(x, mask, by, start)
    for y in (averaged_by_definition(x, by), convolved(x, by), averaged(x, mask, by, start, block=block)[0]):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(averaged(x, mask, by, start, block=block)[1], state, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 20))
def test_a_state_goes_on_and_waits(seed: int, frames: int, block: int) -> None:
    """From a state, with frames in front that are not valid: they change nothing."""
    by, maker = numbers(seed), torch.Generator().manual_seed(seed)
    start = torch.randn(2, 3, 2, generator=maker, dtype=torch.float64)
    first = torch.randint(frames + 1, (2, 1), generator=maker)
    mask = torch.arange(frames) >= first
    x = torch.randn(2, frames, 3, generator=maker, dtype=torch.float64) * mask[..., None]
    expected, state = averaged_one_by_one(x, mask, by, start)
    y, last = averaged(x, mask, by, start, block=block)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-9)
    for row, n in enumerate(first.flatten().tolist()):
        if n == frames:
            assert torch.equal(last[row], start[row])


def test_gradients_of_the_average() -> None:
    by, mask = numbers(3, 2), torch.tensor([[False, True, True, True, True]])
    x, start = torch.randn(1, 5, 2, dtype=torch.float64) * mask[..., None], torch.randn(1, 2, 2, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, *by, start)]
    assert torch.autograd.gradcheck(lambda x, a, b, c, s: averaged(x, mask, Averages(a, b, c), s, block=2), leaves)
    assert torch.autograd.gradcheck(lambda x, a, b, c: convolved(x, Averages(a, b, c)), leaves[:4])


def test_long_rows_in_float32() -> None:
    """5000 frames, averages that keep nearly all or nothing of the past."""
    keep = torch.tensor([[1 - 1e-4, 0.5], [1e-30, 0.0], [0.9, 0.99]], dtype=torch.float64)
    by = Averages(torch.ones_like(keep), keep, torch.ones_like(keep))
    x, start = torch.randn(1, 5000, 3, dtype=torch.float64), torch.zeros(1, 3, 2, dtype=torch.float64)
    mask = torch.ones(1, 5000, dtype=torch.bool)
    exact, _ = averaged_one_by_one(x, mask, by, start)
    single = Averages(*(part.float() for part in by))
    for y in (averaged(x.float(), mask, single, start.float())[0], convolved(x.float(), single)):
        assert y.isfinite().all()
        assert (
            y - exact
        ).abs().max() < 1e-4 * exact.abs().max()  # float32 does not know 1 - 1e-4 to more than 4 digits


# The weights.


def test_weights() -> None:
    q, seen = torch.tensor([[[[2.0], [0.0]]]]), torch.ones(1, 1, 1, 2, dtype=torch.bool)
    k = torch.tensor([[[[sqrt(0.5)], [-1.0]]]])
    found = Laplace()(q, k, None, seen)[0, 0]
    assert found[0, 0] == pytest.approx(0.5)  # 2 * sqrt(1/2) / 2 keys = mu
    assert found[0, 1] == pytest.approx((1 + erf((-1 - sqrt(0.5)) * sqrt(2 * torch.pi))) / 2, abs=1e-7)
    seen[..., 1] = False
    found = Laplace()(q / 2, k, torch.zeros(1, 1, 2, 2), seen)[0, 0]
    assert found[0, 0] == pytest.approx(0.5)  # one key is left: q . k is divided by 1
    assert not found[:, 1].any()
    near = torch.linspace(0, 1.2, 50)
    s = Laplace()(near.view(1, 1, -1, 1), torch.ones(1, 1, 1, 1), None, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    assert (s.flatten() - near.square()).abs()[near < 0.9].max() < 0.05  # what it stands in for
    torch.testing.assert_close(Softmax()(q, k, None, seen)[0, 0, :, 0], torch.ones(2))


# The layer.


@every
@pytest.mark.usefixtures("precise")
def test_laws(make: Made) -> None:
    check_stream(lively(make()), random_frames([26, 0, 19], D), seed=1)


@every
@pytest.mark.usefixtures("precise")
def test_plan_and_export(make: Made) -> None:
    stream = lively(make())
    block = stream.block or 9
    check_export(stream, random_frames([3 * block, 2 * block], D))
    if stream.block:
        assert measure(stream, random_frames([40 * block], D)) == stream.plan()


@every
@pytest.mark.usefixtures("precise")
def test_rows_with_holes(make: Made) -> None:
    """The average counts valid frames, the chunk counts all."""
    stream, x = lively(make()), random_frames([36, 36, 36], D)
    x = Frames.of(x.values, torch.rand(3, 36) < torch.tensor([0.8, 0.4, 0.0])[:, None])
    torch.testing.assert_close(stream(x).values, oracle(stream, x).values, rtol=0, atol=1e-9)
    if stream.block:
        state, outputs = stream.init_state(x), []
        for at in range(0, 36, 12):
            y, state = stream.step(x[at : at + 12], state)
            outputs.append(y)
        torch.testing.assert_close(Frames.cat(outputs).values, oracle(stream, x).values, rtol=0, atol=1e-9)
        silence = Frames(torch.zeros(3, 12, D), torch.zeros(3, 12, dtype=torch.bool))
        before = state.averages.clone()
        torch.testing.assert_close(stream.step(silence, state)[1].averages, before, rtol=0, atol=0)


@streaming
def test_state_does_not_grow(make: Made) -> None:
    stream = lively(make())
    block = stream.block or 1
    x, sizes = random_frames([block, block], D), []
    state = stream.init_state(x)
    with torch.no_grad():
        for _ in range(1000):
            _, state = stream.step(x, state)
            sizes.append(sum(leaf.untyped_storage().nbytes() for leaf in tree.leaves(state)))
    assert sizes[9] == sizes[999]


@every
@pytest.mark.parametrize("auto", [False, True])
def test_bfloat16(make: Made, auto: bool) -> None:
    stream, x = lively(make()).train(), random_frames([120, 90], D)
    expected = stream(x).values
    if not auto:
        stream, x = stream.bfloat16(), Frames(x.values.bfloat16(), x.mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=auto):
        y = stream(x).values
    y.float().square().mean().backward()
    assert (y - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(p.grad.isfinite().all() for p in stream.parameters())
    assert stream.block is None or tree.leaves(stream.init_state(x))[0].dtype == torch.float32


def test_what_cannot_be_honoured_is_refused() -> None:
    stream = Mega(D, 1, Span.chunked(0, 4))
    for span in (Span.causal(), Span.chunked(4, 4), Span.sliding(3), Span(0, 4, 1), Span(0, 4, 0, 2)):
        with pytest.raises(ValueError, match=r"it needs Span\.full\(\) or Span\.chunked\(0, C\)"):
            Mega(D, 1, span)
        with pytest.raises(ValueError, match="it needs"):
            set_span(stream, span)
    set_span(stream, Span.chunked(0, 2))
    assert stream.block == 2
    with pytest.raises(ValueError, match="1 head"):
        Mega(D, 2, Span.full())
    with pytest.raises(ValueError, match="a position for 8 features, but queries and keys have 4"):
        Mega(D, 1, Span.full(), position=Relative(D, 1), keys=4)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("span", [Span.full(), Span.chunked(0, 4)])
def test_inside_an_encoder(span: Span) -> None:
    encoder = Conformer(D, D, 1, 1, 12, span=span, kernel=3, attention=Mega)
    assert sum(isinstance(part, Mega) for part in encoder.modules()) == 1
    check_stream(lively(encoder), random_frames([40, 23], D), reference=lambda stream, x: stream.at_once(x))


@pytest.mark.parametrize("chunk", [4, -1])
def test_parity_with_espnet(chunk: int) -> None:
    """ESPnet's layer, which is made after the authors' program; x + Mega(x) is what it says. Its FFT is in float32."""
    theirs = pytest.importorskip("espnet2.asr_transducer.decoder.blocks.mega").MEGA(
        D, num_heads=3, qk_size=4, v_size=6, activation=nn.SiLU(), normalization=nn.Identity(), chunk_size=chunk
    )
    ours = Mega(D, 1, Span.full() if chunk < 0 else Span.chunked(0, chunk), averages=3, keys=4, values=6)
    lively(theirs)
    nn.init.zeros_(theirs.proj_h.bias)
    nn.init.zeros_(theirs.rel_pos_bias.relative_position_bias)
    moved = theirs.multihead_damped_ema
    pairs = {
        "average.alpha": moved.damping_factor, "average.delta": moved.decay_factor,
        "average.beta": moved.ema_expansion_matrix, "average.eta": moved.kernel_projection_matrix,
        "average.omega": moved.residual_weight, "value.weight": theirs.proj_v.weight, "value.bias": theirs.proj_v.bias,
        "out.weight": theirs.proj_h.weight, "scale": theirs.qk_weight, "shift": theirs.qk_bias,
        "parts.weight": reordered(theirs.proj_mx.weight), "parts.bias": reordered(theirs.proj_mx.bias),
    }  # fmt: skip
    ours.load_state_dict({name: tensor.reshape(ours.get_parameter(name).shape) for name, tensor in pairs.items()})
    x = torch.randn(2, 12, D)
    expected, _ = theirs(x.transpose(0, 1))
    y = ours.eval()(Frames(x, torch.ones(2, 12, dtype=torch.bool))).values
    torch.testing.assert_close(x + y, expected.transpose(0, 1), rtol=0, atol=1e-5)


def reordered(x: Tensor) -> Tensor:
    """Update gate, keys, reset gate, hidden -> update gate, hidden, keys, reset gate."""
    update, keys, reset, hidden = x.split([D, 4, 6, D])
    return torch.cat([update, hidden, keys, reset])
