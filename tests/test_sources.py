"""Cross attention to several memories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speechattn import tree
from speechattn.attention.entmax import Entmax
from speechattn.cross.soft import Soft
from speechattn.cross.sources import Flat, Hierarchical, Sources
from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Frames, Memory
from speechattn.model.config import build

pytestmark = pytest.mark.usefixtures("precise")

DIM, HEADS = 8, 2
KINDS = [Flat, Hierarchical]


def lively(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.6)
    return module.eval()


def memory(lengths: list[int], frames: int | None = None) -> Memory:
    values = torch.randn(len(lengths), frames or max(lengths), DIM)
    mask = torch.arange(values.shape[1]) < torch.tensor(lengths)[:, None]
    values[~mask] = torch.nan
    return Memory.of(Frames.of(values, mask))


def pair() -> Sources:
    return Sources((memory([5, 3]), memory([4, 7])))


def test_flat_with_one_source_is_soft() -> None:
    soft, flat, heard = lively(Soft(DIM, HEADS)), Flat(DIM, HEADS, sources=1), memory([5, 3])
    flat.load_state_dict(soft.state_dict())
    query = torch.randn(4, 3, DIM)
    expected, _ = soft.attend(query, soft.read(heard), soft.place(query))
    for one in (heard, Sources((heard,))):
        seen, place = flat.attend(query, flat.read(one), flat.place(query))
        assert place == ()
        for name in ("context", "weights", "alignment", "waiting"):
            assert torch.equal(getattr(seen, name), getattr(expected, name))


def test_hierarchical_with_one_source_is_soft() -> None:
    soft, kind, heard = lively(Soft(DIM, HEADS)), lively(Hierarchical(DIM, HEADS, sources=1)), memory([5, 3])
    kind.each[0].load_state_dict(soft.state_dict())
    for linear in (kind.over.value, kind.over.out):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    query = torch.randn(4, 3, DIM)
    expected, _ = soft.attend(query, soft.read(heard), ())
    seen, _ = kind.attend(query, kind.read(heard), ())
    torch.testing.assert_close(seen.context, expected.context, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen.weights, expected.weights, rtol=0, atol=1e-12)


def attended(x: Tensor, query: Tensor, key: Any, value: Any) -> Tensor:
    """Softmax attention of one query [D] to rows x [N, D], head by head, without the last projection."""
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (query, key(x), value(x)))
    weights = (torch.einsum("hd,nhd->hn", q, k) / (DIM // HEADS) ** 0.5).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, v).flatten()


def test_flat_is_one_softmax_and_hierarchical_two_by_definition() -> None:
    heard, query = pair(), torch.randn(2, 3, DIM)
    flat, kind = lively(Flat(DIM, HEADS)), lively(Hierarchical(DIM, HEADS))
    one, _ = flat.attend(query, flat.read(heard), ())
    two, _ = kind.attend(query, kind.read(heard), ())
    for b in range(2):
        x = [m.frames.values[b, m.frames.mask[b]] for m in heard.members]
        both = torch.cat([torch.cat([flat.key(x[0]), flat.value(x[0])], 1), flat.more[0](x[1])])
        for u in range(3):
            found = attended(both, flat.query(query[b, u]), lambda y: y[:, :DIM], lambda y: y[:, DIM:])
            torch.testing.assert_close(one.context[b, u], flat.out(found), rtol=0, atol=1e-12)
            contexts = torch.stack([soft.out(attended(y, soft.query(query[b, u]), soft.key, soft.value))
                                    for soft, y in zip(kind.each, x, strict=True)])  # fmt: skip
            found = attended(contexts, kind.over.query(query[b, u]), kind.over.key, kind.over.value)
            torch.testing.assert_close(two.context[b, u], kind.over.out(found), rtol=0, atol=1e-12)
    for seen in (one, two):
        torch.testing.assert_close(seen.weights.sum(-1), torch.ones(2, HEADS, 3), rtol=0, atol=1e-12)
        assert seen.weights.shape[-1] == 5 + 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_a_row_does_not_have_is_ignored(kind: type[nn.Module]) -> None:
    layer, query = lively(kind(DIM, HEADS)), torch.randn(2, 3, DIM)  # type: ignore[call-arg]
    lips = memory([0, 7])
    heard = Sources((memory([5, 3]), lips))
    seen, _ = layer.attend(query, layer.read(heard), ())
    assert not seen.weights[0, :, :, 5:].any()
    other = Sources((heard.members[0], Memory.of(Frames.of(torch.randn(2, 2, DIM), torch.zeros(2, 2).bool()))))
    alone, _ = layer.attend(query, layer.read(other), ())
    torch.testing.assert_close(alone.context[0], seen.context[0], rtol=0, atol=1e-12)
    assert (alone.context[1] - seen.context[1]).abs().max() > 1e-3
    if isinstance(layer, Flat):
        soft = Soft(DIM, HEADS)
        soft.load_state_dict(layer.state_dict(), strict=False)
        expected, _ = soft.attend(query, soft.read(heard.members[0]), ())
        torch.testing.assert_close(seen.context[0], expected.context[0], rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(seen.weights[0].sum(-1), torch.ones(HEADS, 3), rtol=0, atol=1e-12)
        torch.testing.assert_close(seen.weights[0, ..., :5], layer.each[0].attend(
            query, layer.each[0].read(heard.members[0]), ())[0].weights[0], rtol=0, atol=1e-12)  # fmt: skip
    nothing, _ = layer.attend(query, layer.read(Sources((other.members[1], other.members[1]))), ())
    assert nothing.context.isfinite().all()
    assert not nothing.weights.any()


def decoder(kind: type[nn.Module]) -> AttentionDecoder:
    made: AttentionDecoder = lively(AttentionDecoder(20, 40, DIM, HEADS, 2, cross=kind)).requires_grad_(False)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_reads_and_hears_several_sources(kind: type[nn.Module]) -> None:
    net, heard, tokens = decoder(kind), pair(), torch.randint(20, (2, 5))
    whole, seen, _ = net.step(tokens, net.start(heard), heads=[(1, 0)])  # type: ignore[arg-type]
    assert seen.shape == (2, 1, 5, 12)
    state, parts = net.start(heard), []  # type: ignore[arg-type]
    for u in range(5):
        y, _, state = net.step(tokens[:, u : u + 1], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    begun = net.start(Sources(tuple(Memory.of(m.frames[:2]) for m in heard.members)))  # type: ignore[arg-type]
    rest = Sources(tuple(Memory.of(m.frames[2:]) for m in heard.members))
    state = type(begun)(begun.cache, net.read(rest, begun.cross), begun.place)  # type: ignore[arg-type]
    torch.testing.assert_close(net.step(tokens, state)[0], whole, rtol=0, atol=1e-12)
    front = Sources(tuple(Memory.of(m.frames[:2]) for m in heard.members))
    state = net.start(front, behind=net.start(heard))  # type: ignore[arg-type]
    torch.testing.assert_close(net.step(tokens, state)[0], whole, rtol=0, atol=1e-12)
    three = tokens.repeat_interleave(3, 0)
    beam, _, _ = net.step(three, net.start(heard, beam=3))  # type: ignore[arg-type]
    torch.testing.assert_close(beam, whole.repeat_interleave(3, 0), rtol=0, atol=1e-12)
    assert net.log_prob(heard, three, torch.full((6,), 5), sos=18, eos=19).shape == (6,)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_moved_joined_and_trimmed(kind: type[nn.Module]) -> None:
    net, heard, tokens = decoder(kind), pair(), torch.randint(20, (2, 3))
    whole, _, _ = net.step(tokens, net.start(heard))  # type: ignore[arg-type]
    states = []
    for row in (1, 0):
        alone = tree.select(heard, [row])
        states.append(net.start(Sources(tuple(Memory.of(m.frames.front()) for m in alone.members))))  # type: ignore[arg-type]
    joined = tree.concat(states)
    y, _, _ = net.step(tokens.flip(0), joined)
    torch.testing.assert_close(y, whole.flip(0), rtol=0, atol=1e-12)
    one = tree.split(joined)[0].cross[0].trimmed()
    assert [part.mask.shape[1] for part in one.parts] == [3, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_source_and_nan_nobody(kind: type[nn.Module]) -> None:
    layer = lively(kind(DIM, HEADS, normaliser=Entmax))  # type: ignore[call-arg]
    leaves = [torch.randn(2, 4, DIM, requires_grad=True) for _ in range(2)]
    masks = [torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool(), torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]]).bool()]
    heard = Sources(tuple(Memory.of(Frames.of(x, mask)) for x, mask in zip(leaves, masks, strict=True)))
    seen, _ = layer.attend(torch.randn(2, 3, DIM), layer.read(heard), ())
    used = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(seen.context.square().sum(), [*leaves, *used])
    for grad in grads:
        assert grad.isfinite().all()
        assert grad.any()
    assert grads[1][1, :2].any()
    assert not grads[1][0].any()


def test_another_number_of_sources_is_refused() -> None:
    with pytest.raises(ValueError, match="a memory of 2 sources for attention to 3"):
        Flat(DIM, HEADS, sources=3).read(pair())
    with pytest.raises(ValueError, match="a memory of 1 sources for attention to 2"):
        Hierarchical(DIM, HEADS).read(memory([3, 2]))
    read = Flat(DIM, HEADS).read(pair())
    with pytest.raises(ValueError, match="2 frames to skip, of 5"):
        read.then(read, 2)


def test_a_decoder_of_two_sources_is_built_from_its_configuration() -> None:
    spec = {"class_path": "speechattn.decoder.attention.AttentionDecoder", "init_args": {
        "vocab": 20, "context": 40, "dim": DIM, "heads": HEADS, "depth": 1,
        "cross": {"class_path": "speechattn.cross.sources.Hierarchical", "init_args": {
            "sources": 2, "normaliser": {"class_path": "speechattn.attention.entmax.Entmax"}}},
    }}  # fmt: skip
    net = build(spec, "here")
    assert isinstance(net.layers[0].cross, Hierarchical)
    assert [type(soft.normaliser) for soft in net.layers[0].cross.each] == [Entmax, Entmax]
    hidden, _, _ = net.step(torch.randint(20, (2, 3)), net.start(pair()))
    assert hidden.isfinite().all()
