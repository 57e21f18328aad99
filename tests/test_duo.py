"""DuoAttention: heads that keep everything and heads that forget, mixed by gates and then taken apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from streams import D, lively
from torch import nn

from speechattn import tree
from speechattn.attention import Bucketed, Relative, Rotary, SelfAttention, Span, set_span
from speechattn.attention.duo import Divided, DuoAttention, Rolling, divided, hardened, opened, split
from speechattn.attention.pruning import heads_of
from speechattn.encoder import Conformer, Encoder, Transformer
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.model import Recognizer
from speechattn.stream import Pointwise, Serial, Stream
from speechattn.task.objectives import Heard, Said
from speechattn.task.pruning import DuoObjective
from speechattn.testing import check_export, check_stream, oracle, random_frames, stepped
from speechattn.testing.attention import dense

pytestmark = pytest.mark.usefixtures("precise")


CHUNKS = Span(None, 3)


def made(
    span: Span = CHUNKS, *, heads: int = 2, key_heads: int | None = None, gates: list[float] | None = None,
    left: int = 4, sinks: int = 2, position: bool = True,
) -> DuoAttention:  # fmt: skip
    where = Relative(D, heads) if position else None
    layer = lively(DuoAttention(
        D, heads, span, position=where, key_heads=key_heads, norm=nn.LayerNorm(D), left=left, sinks=sinks
    ))  # fmt: skip
    assert isinstance(layer, DuoAttention)
    layer.gates.data = torch.ones(layer.key_heads) if gates is None else torch.tensor(gates)
    return layer


def plain(layer: SelfAttention, span: Span) -> SelfAttention:
    """The same weights with another span, in a module of its own."""
    one = SelfAttention(
        layer.dim, layer.heads, span, position=layer.position, key_heads=layer.key_heads, norm=layer.norm
    )
    one.qkv, one.out = layer.qkv, layer.out
    return one.eval()


@oracle.register
def mixed(stream: DuoAttention, x: Frames) -> Frames:
    """Both kinds of heads by definition, and each head's share of the output weighed by the gate of its keys."""
    full, (left, sinks) = stream.span, stream.kept
    assert isinstance(full, Span)
    width, share = D // stream.heads, stream.heads // stream.key_heads
    total = stream.out.bias.expand(*x.mask.shape, -1)
    for span, weigh in ((full, lambda a: a), (Span(left, full.chunk, full.right, sinks=sinks), lambda a: 1 - a)):
        layer = plain(stream, span)
        layer.out = nn.Linear(D, D, bias=False)
        for column in range(D):
            gate = stream.gates.data[column // width // share]
            layer.out.weight.data[:, column] = weigh(gate) * stream.out.weight.data[:, column]
        total = total + dense(layer, x).values
    return Frames.of(total, x.mask)


MAKERS: list[Callable[[], DuoAttention]] = [
    lambda: made(gates=[0.3, 0.8]),
    lambda: made(Span(None, 2, 3), heads=4, key_heads=2, gates=[0.0, 0.6], left=3, sinks=1),
    lambda: made(Span.causal(), gates=[0.5, 0.5], left=2, sinks=0, position=False),
]


@pytest.mark.parametrize("make", MAKERS)
def test_laws(make: Callable[[], DuoAttention]) -> None:
    layer = make()
    check_stream(layer, random_frames([13, 0, 8], D))
    check_export(layer, random_frames([12, 12], D))


@pytest.mark.parametrize("span", [Span(None, 3), Span.causal(), Span(None, 2, 3)])
def test_with_all_gates_open_it_is_full_attention_to_the_last_bit(span: Span) -> None:
    layer = made(span, heads=4, key_heads=2)
    full, x = plain(layer, span), random_frames([23, 9], D)
    assert torch.equal(layer(x).values, full(x).values)
    assert torch.equal(stepped(layer, x).values, stepped(full, x).values)
    layer.gates.data = torch.tensor([0.2, 0.7])
    assert not torch.allclose(layer(x).values, full(x).values)
    with opened(layer):
        assert torch.equal(layer(x).values, full(x).values)
    assert not torch.allclose(layer(x).values, full(x).values)


def test_a_plain_layer_lends_its_weights() -> None:
    layer = made()
    full = SelfAttention(D, 2, Span(None, 3), position=Relative(D, 2), norm=nn.LayerNorm(D))
    missing, unknown = layer.load_state_dict(full.state_dict(), strict=False)
    assert (missing, unknown) == (["gates"], [])


def test_while_all_fits_in_the_window_nobody_notices() -> None:
    layer, x = made(gates=[0.0, 0.4], left=6, sinks=0), random_frames([9, 5], D)
    torch.testing.assert_close(layer(x).values, plain(layer, Span(None, 3))(x).values, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("heads", "gates"), [(2, [1.0, 0.0]), (4, [0.0, 1.0]), (2, [0.0, 0.0]), (4, [1.0, 1.0])])
def test_heads_taken_apart_say_what_hard_gates_say(heads: int, gates: list[float]) -> None:
    layer = made(Span(None, 3, 2), heads=heads, key_heads=2, gates=gates)
    apart = divided(layer, [i for i, a in enumerate(gates) if a])
    check_stream(apart, random_frames([13, 0, 8], D), reference=lambda _, x: mixed(layer, x))
    check_export(apart, random_frames([12, 12], D))
    kinds = [type(m) for m in apart.modules() if isinstance(m, SelfAttention)]
    assert kinds == [*[SelfAttention] * (1.0 in gates), *[Rolling] * (0.0 in gates)]


def encoder(**options: object) -> Encoder:
    stream = lively(Conformer(
        D, D, 2, 4, 12, span=Span(None, 2), kernel=5, attention=lambda *a, **o: DuoAttention(*a, **o, left=4, sinks=1)
    ))  # fmt: skip
    assert isinstance(stream, Encoder)
    for layer, gates in zip(heads_of(stream).values(), ([0.9, 0.1, 0.5, 0.2], [0.3, 0.8, 0.6, 0.05]), strict=True):
        layer.gates.data = torch.tensor(gates)  # type: ignore[union-attr]
    return stream


def test_the_lowest_gates_of_the_encoder_are_closed() -> None:
    whole = encoder()
    for sparsity, closed in ((0.0, []), (0.5, [1, 3, 4, 7]), (1.0, list(range(8)))):
        gates = torch.cat([m.gates for m in heads_of(hardened(whole, sparsity)).values()])  # type: ignore[misc]
        assert [i for i, a in enumerate(gates.tolist()) if a == 0] == closed
        assert gates.sum() == 8 - len(closed)
    assert heads_of(whole)["layers.0.attention.first"].gates[0] == 0.9  # type: ignore[index]
    with pytest.raises(ValueError, match="wanted a share"):
        hardened(whole, 1.5)
    with pytest.raises(ValueError, match="no DuoAttention"):
        split(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 1.0])
def test_a_split_encoder_is_the_hardened_one(sparsity: float) -> None:
    whole, x = encoder(), random_frames([90, 31], D)
    small = split(whole, sparsity)
    assert not any(isinstance(module, DuoAttention) for module in small.modules())
    expected = hardened(whole, sparsity)(x)
    for y in (small(x), stepped(small, x)):
        assert torch.equal(y.mask, expected.mask)
        torch.testing.assert_close(y.values, expected.values, rtol=0, atol=1e-9)


def held(stream: Stream, blocks: int) -> int:
    """Bytes of what the state says after so many blocks."""
    block = stream.plan().block or 1
    x = random_frames([block * blocks], D)
    with torch.no_grad():
        state = stream.init_state(x)
        for at in range(0, x.mask.shape[1], 10 * block):
            _, state = stream.step(x[at : at + 10 * block], state)
    return sum(leaf.nbytes for leaf in tree.leaves(state))


def test_only_the_heads_that_need_it_remember_everything() -> None:
    layer = made(heads=4, gates=[1.0, 0.0, 0.0, 0.0])
    rolling = divided(layer, [])
    assert held(rolling, 10) == held(rolling, 1000)
    whole, apart = (held(stream, 1000) - held(stream, 10) for stream in (layer, divided(layer, [0])))
    frames, keys, valid = 990 * 3, 2 * 8, 1
    assert whole == frames * (D * keys + valid)
    assert apart == frames * (D // 4 * keys + valid)  # one head of four


def test_spans_keep_their_kind() -> None:
    layer, rolling = made(), divided(made(), [])
    for stream in (layer, rolling):
        with pytest.raises(ValueError, match="wanted chunks and everything before them"):
            set_span(stream, Span.full())
        with pytest.raises(ValueError, match="wanted chunks and everything before them"):
            set_span(stream, Span(8, 2))
        set_span(stream, Span(None, 5))
    assert (layer.span, rolling.span) == (Span(None, 5), Span(4, 5, sinks=2))  # type: ignore[attr-defined]
    for kind in (DuoAttention, Rolling):
        for span in (Span.full(), Span(8, 2), Span(None, 2, 0, 2)):
            with pytest.raises(ValueError, match="wanted chunks and everything before them"):
                kind(D, 2, span)
    apart = divided(made(), [0])
    set_span(apart, Span(None, 5))
    assert [m.span for m in heads_of(apart).values()] == [Span(None, 5), Span(4, 5, sinks=2)]
    assert isinstance(apart, Serial)
    assert isinstance(apart.heads, Divided)


def test_gates_that_left_their_range_come_back() -> None:
    layer = made(gates=[1.7, -0.4])
    assert layer.eval().mixture.tolist() == [1.0, 0.0]
    assert layer.gates.tolist() == [1.7, -0.4]  # listening changes nothing
    (grad,) = torch.autograd.grad(layer.train().mixture.sum(), layer.gates)
    assert layer.gates.tolist() == [1.0, 0.0]
    assert grad.tolist() == [1.0, 1.0]  # so they can move again


def model(*layers: Stream) -> Recognizer:
    """As much of a recogniser as the objective looks at."""
    whole = Encoder(Pointwise(nn.Identity()), list(layers), Pointwise(nn.Identity()), dim=D)
    return Holder(whole).train()  # type: ignore[return-value]


class Holder(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder


def planted() -> DuoAttention:
    """Head 0 looks at all frames alike; head 1 at its own neighbours, whatever else there is."""
    layer = DuoAttention(D, 2, Span(None, 2), position=Bucketed(D, 2, buckets=8, farthest=16), left=6, sinks=0)
    with torch.no_grad():
        layer.qkv.weight[: 2 * D] = 0  # queries and keys say nothing: position alone decides
        layer.qkv.bias[: 2 * D] = 0
        layer.position.table.weight[:, 0] = 0  # type: ignore[union-attr,index,operator]
        layer.position.table.weight[:, 1] = torch.tensor([9.0, 9, -30, -30, 9, 9, 9, 9])  # type: ignore[union-attr,index]
    return layer


def test_training_finds_the_head_that_needs_everything() -> None:
    layer = planted()
    whole, objective = model(layer), DuoObjective(penalty=0.002)
    objective.fit(whole)
    trained = [name for name, p in whole.named_parameters() if p.requires_grad]
    assert trained == ["encoder.layers.0.gates"]
    x = random_frames([40, 29], D)
    optimizer = torch.optim.Adam([layer.gates], 0.05)
    said = Said(torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 2]))
    first = None
    for _ in range(60):
        losses = objective.losses(whole, Heard(x, x, whole.encoder(x)), said)
        first = losses.detach() if first is None else first
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    assert first is not None
    assert first.tolist() == pytest.approx(
        [3 * 0.002 * 2, 2 * 0.002 * 2]
    )  # all open: the gates are all there is to pay
    a = layer.eval().mixture
    assert a[1] < 0.01
    assert a[0] > 0.5
    assert heads_of(split(whole.encoder, 0.5))["layers.0.first"].heads == 1


def test_the_loss_is_the_distance_of_each_utterance() -> None:
    layer, x = made(gates=[0.3, 0.6]), random_frames([20, 7], D)
    whole, objective = model(layer), DuoObjective()
    objective.fit(whole)
    losses = objective.losses(whole, Heard(x, x, whole.encoder(x)), Said(torch.zeros(2, 4), torch.tensor([4, 1])))
    y, full = layer(x).values, plain(layer, Span(None, 3))(x).values
    for row, (n, tokens) in enumerate(((20, 4), (7, 1))):
        apart = sum(float((y[row, t] - full[row, t]).detach().square().mean()) for t in range(n)) / n
        assert float(losses[row].detach()) == pytest.approx(tokens * (apart + 0.05 * 0.9))


def test_what_the_objective_cannot_do_is_refused() -> None:
    objective = DuoObjective()
    with pytest.raises(ModelError, match="has no DuoAttention"):
        objective.fit(model(SelfAttention(D, 2, Span.causal())))
    with pytest.raises(ModelError, match=r"encoder.layers.0 has dropout"):
        objective.fit(model(DuoAttention(D, 2, Span.causal(), dropout=0.1)))
    with pytest.raises(ModelError, match=r"encoder.layers.1.f has dropout"):
        objective.fit(model(DuoAttention(D, 2, Span.causal()), Pointwise(nn.Dropout(0.1))))
    with pytest.raises(ValueError, match="wanted 0 or more"):
        DuoObjective(penalty=-1.0)


def test_rotary_heads_come_apart() -> None:
    stream = lively(Transformer(
        D, D, 1, 2, 12, span=Span(None, 2), position=Rotary,
        attention=lambda *a, **o: DuoAttention(*a, **o, left=4, sinks=1),
    ))  # fmt: skip
    heads_of(stream)["layers.0.attention.first"].gates.data = torch.tensor([0.2, 0.9])  # type: ignore[union-attr]
    x = random_frames([60, 13], D)
    torch.testing.assert_close(
        stepped(split(stream, 0.5), x).values, hardened(stream, 0.5)(x).values, rtol=0, atol=1e-9
    )
