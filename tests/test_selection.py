"""Attention that chooses blocks of keys: MoBA and Quest."""

from __future__ import annotations

from functools import partial
from math import cos, sin, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from speechattn import tree
from speechattn.attention import Relative, Rotary, SelfAttention, Span, set_span
from speechattn.attention.blocks import TILE, Blockwise, Read, chosen, looked, tiles
from speechattn.attention.moba import MoBA
from speechattn.attention.position import Position
from speechattn.attention.quest import Quest, bound
from speechattn.encoder import Conformer
from speechattn.frames import Frames
from speechattn.testing import check_export, check_stream, oracle, random_frames, stepped

pytestmark = pytest.mark.usefixtures("precise")
D = 8
KINDS = pytest.mark.parametrize("kind", [MoBA, Quest])


def made(kind: type[Blockwise], size: int = 4, blocks: int = 3, **options: object) -> Blockwise:
    layer = kind(D, 2, Span.causal(), size=size, blocks=blocks, **options)  # type: ignore[arg-type]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def turn(x: Tensor, i: int, position: Position | None) -> Tensor:
    """x [D] turned by position i, pair by pair."""
    if position is None:
        return x
    assert isinstance(position, Rotary)
    half, y = len(x) // 2, []
    for n in range(len(x)):
        angle, other = i * position.base ** (-(n % half) / half), x[(n + half) % len(x)]
        y.append(x[n] * cos(angle) + (-other if n < half else other) * sin(angle))
    return torch.stack(y)


def moba_score(q: Tensor, keys: list[Tensor]) -> float:
    return sum(float(q @ k.detach()) for k in keys) / len(keys)


def quest_score(q: Tensor, keys: list[Tensor]) -> float:
    rows = [k.tolist() for k in keys]
    ends = [(min(row[d] for row in rows), max(row[d] for row in rows)) for d in range(len(q))]
    return sum(max(float(q[d]) * low, float(q[d]) * high) for d, (low, high) in enumerate(ends))


@oracle.register
def by_definition(layer: Blockwise, x: Frames) -> Frames:
    """Query by query, over the valid frames of each row."""
    score = moba_score if isinstance(layer, MoBA) else quest_score
    out = torch.zeros_like(x.values)
    for row, (values, mask) in enumerate(zip(x.values, x.mask, strict=True)):
        frames = values[mask] if layer.norm is None else layer.norm(values[mask])
        y = frames @ layer.qkv.weight.T + layer.qkv.bias
        width, share = D // layer.heads, layer.heads // layer.key_heads
        where = mask.nonzero().flatten().tolist()
        for i in range(len(frames)):
            heads = []
            for h in range(layer.heads):
                at = D + h // share * width
                value = at + layer.key_heads * width
                q = turn(y[i, h * width : (h + 1) * width], i, layer.position)
                k = [turn(y[j, at : at + width], j, layer.position) for j in range(i + 1)]
                own = i // layer.size
                full = {b: k[b * layer.size : (b + 1) * layer.size] for b in range(own)}
                best = sorted(full, key=lambda b: -score(q.detach(), full[b]))[: layer.blocks - 1]
                keys = [j for j in range(i + 1) if j // layer.size in (*best, own)]
                weights = torch.stack([q @ k[j] / sqrt(width) for j in keys]).softmax(0)
                heads.append(sum(w * y[j, value : value + width] for w, j in zip(weights, keys, strict=True)))
            out[row, where[i]] = layer.out(torch.cat(heads))
    return Frames.of(out, x.mask)


@KINDS
def test_laws(kind: type[Blockwise]) -> None:
    check_stream(made(kind), random_frames([26, 0, 19], D))


@KINDS
def test_laws_with_turned_and_shared_keys_behind_a_norm(kind: type[Blockwise]) -> None:
    layer = made(kind, 3, 2, position=Rotary(D, 2), key_heads=1, norm=nn.LayerNorm(D))
    check_stream(layer, random_frames([17, 8], D))


@KINDS
def test_all_blocks_are_dense_attention(kind: type[Blockwise]) -> None:
    for options in ({}, {"position": Rotary(D, 2), "key_heads": 1}):
        layer = made(kind, 5, 9, **options)
        dense = SelfAttention(D, 2, Span.causal(), **options)  # type: ignore[arg-type]
        dense.load_state_dict(layer.state_dict())
        x = random_frames([41, 13], D)
        leaf = x.values.requires_grad_()
        y, z = layer(x).values, dense(x).values
        torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(a.square().sum(), leaf)[0] for a in (y, z)), rtol=0, atol=1e-9)
    layer.blocks = 8  # the first block of the last frame is missing, or another one
    assert (layer(x).values - z).abs().max() > 1e-6


@KINDS
def test_nothing_leaks_from_the_future(kind: type[Blockwise]) -> None:
    layer, x = made(kind, 4, 2), random_frames([60], D)
    y = layer(x).values
    for t in (1, 22, 23, 24, 25):  # in the middle, at the end and at the beginning of a block
        values = x.values.clone()
        values[:, t:] = torch.randn(1, 60 - t, D) * 9
        z = layer(Frames(values, x.mask)).values
        assert (z[:, :t] - y[:, :t]).abs().max() < 1e-12
        assert (z[:, t:] - y[:, t:]).abs().min(-1).values.min() > 0


@KINDS
def test_positions_count_valid_frames(kind: type[Blockwise]) -> None:
    layer, x = made(kind, position=Rotary(D, 2)), random_frames([30], D)
    mask = torch.rand(1, 55).argsort() < 30
    values = torch.zeros(1, 55, D)
    values[mask] = x.values[0]
    holes = Frames(values, mask)
    expected = layer(x).values[0]
    torch.testing.assert_close(layer(holes).values[mask], expected, rtol=0, atol=1e-12)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = stepped(layer, holes, seed=3)
        assert torch.equal(y.mask, mask)
        torch.testing.assert_close(y.values[mask], expected, rtol=0, atol=1e-12)


@KINDS
def test_every_step_is_exported(kind: type[Blockwise]) -> None:
    check_export(made(kind, 2, 2, position=Rotary(D, 2)), random_frames([3, 2], D))


@KINDS
def test_what_was_not_chosen_is_not_read(kind: type[Blockwise]) -> None:
    layer, x = made(kind, 4, 3), random_frames([64], D)
    _, state = layer.step(x, layer.init_state(x))
    assert isinstance(state, Read)
    q, at = torch.randn(1, 2, 2, 4), torch.tensor([[61, 63]])
    blocks, there = layer.choice(q, at, state)
    assert there.all()
    assert (blocks[..., 0] == 15).all()
    values = state.values.clone()
    for head in range(2):
        others = [b for b in range(16) if b not in blocks[0, head].flatten().tolist()]
        assert len(others) >= 11
        for b in others:
            values[:, 4 * b : 4 * b + 4, head] = torch.nan
    expected = looked(q, state.values, at, blocks, there, 4)
    torch.testing.assert_close(looked(q, values, at, blocks, there, 4), expected, rtol=0, atol=0)


@KINDS
def test_gradients_go_through_what_was_chosen(kind: type[Blockwise]) -> None:
    layer, x = made(kind, 4, 3), random_frames([64], D)
    leaf = x.values.clone().requires_grad_()
    (layer(Frames(leaf, x.mask)).values[0, 62]).sum().backward()
    assert leaf.grad is not None
    moved = {t // 4 for t in range(64) if leaf.grad[0, t].any()}
    _, state = layer.step(x, layer.init_state(x))
    q = layer._project(x)[0].view(1, 64, 2, 4).transpose(1, 2)[:, :, 62:63]
    assert moved == set(layer.choice(q, torch.tensor([[62]]), state)[0].flatten().tolist())
    assert len(moved) < 6
    assert not leaf.grad[0, 63].any()


def test_the_work_of_a_query_does_not_grow() -> None:
    layer, work = made(MoBA, 16, 3), {}
    for frames in (512, 1024):
        with FlopCounterMode(display=False) as counter:
            q, values = torch.randn(1, 2, frames, 4), torch.randn(1, frames, 2, 8)
            own = torch.arange(frames)[None]
            blocks, there = chosen(torch.randn(1, 2, frames, frames // 16), own // 16, layer.blocks)
            looked(q, values, own, blocks, there, 16)
        # A tile may be filled up once for each block: two products of 2 * 4 operations for each key.
        work[frames] = counter.get_total_flops() - 2 * 2 * 4 * frames * 3  # the sum over blocks
        pairs = 2 * (frames * 3 + frames // 16 * TILE)
        assert 2 * 2 * 4 * 16 * frames * 3 * 2 <= work[frames] <= 2 * 2 * 4 * 16 * pairs
    assert work[1024] / work[512] < 2.05


def test_a_step_reads_no_more_when_there_is_more() -> None:
    layer = made(MoBA, 8, 3)
    flops = []
    for frames in (64, 640):
        x = random_frames([frames], D)
        with torch.no_grad():
            _, state = layer.step(x, layer.init_state(x))
            with FlopCounterMode(display=False) as counter:
                layer.step(random_frames([1], D), state)
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 2 * 2 * 4 * (80 - 8)  # a product with the mean of each block, for two heads


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_tiles_hold_each_pair_once_beside_those_of_its_block(picks: list[int], tile: int) -> None:
    blocks = torch.tensor([picks, picks[::-1]])
    slot, pair, block = tiles(blocks, 7, tile)
    for row in range(2):
        places = slot[row].tolist()
        assert len(set(places)) == len(picks)
        assert pair[row, slot[row]].tolist() == list(range(len(picks)))
        assert [int(block[row, place // tile]) for place in places] == blocks[row].tolist()


@given(st.integers(1, 16), st.integers(1, 9), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_no_key_of_a_page_exceeds_its_bound(size: int, features: int, seed: int) -> None:
    maker = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-3, 4, (1,), generator=maker)
    q = torch.randn(5, features, generator=maker, dtype=torch.float64)
    k = torch.randn(7, size, features, generator=maker, dtype=torch.float64) * scale
    best = bound(q, k.amin(1), k.amax(1))
    true = torch.einsum("td,nsd->tns", q, k).amax(-1)
    assert (best >= true - 1e-9 * scale).all()
    if size == 1:
        torch.testing.assert_close(best, true)


@pytest.mark.parametrize(("kind", "found"), [(MoBA, 5), (Quest, 2)])
def test_a_mean_hides_one_key_that_a_bound_shows(kind: type[Blockwise], found: int) -> None:
    layer = made(kind, 4, 2)
    k = torch.zeros(1, 32, 2, 4)
    k[:, 8:12, :, 0] = torch.tensor([9.0, -9.0, -9.0, 8.0])[:, None]  # block 2: one loud key, a mean below 0
    k[:, 20:24, :, 0] = 1.0  # block 5: all keys a little
    marks = torch.stack([layer.marked(k[:, i : i + 4]) for i in range(0, 32, 4)], 1)
    state = Read(torch.cat([k, k], -1), marks, torch.tensor([32]))
    q = torch.zeros(1, 2, 1, 4)
    q[..., 0] = 1.0
    assert layer.choice(q, torch.tensor([[31]]), state)[0].tolist() == [[[[7, found]], [[7, found]]]]


@KINDS
def test_marks_are_kept_up_to_date(kind: type[Blockwise]) -> None:
    layer, x = made(kind, 4, 3), random_frames([26, 9], D)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            state = layer.init_state(x)
            for at, size in ((0, 3), (3, 1), (4, 9), (13, 6), (19, 7)):
                _, state = layer.step(x[at : at + size], state)
        assert state.count.tolist() == [26, 9]
        k = state.values[..., :4]
        for row, count in enumerate((26, 9)):
            for block in range(count // 4):
                expected = layer.marked(k[row, 4 * block : 4 * block + 4])
                torch.testing.assert_close(state.marks[row, block], expected, rtol=0, atol=0)
        assert not state.marks.requires_grad


def test_rows_of_any_age_share_a_batch() -> None:
    layer, x = made(Quest), random_frames([30, 30], D)
    old, young = x[:20], x[20:23]
    with torch.no_grad():
        _, first = layer.step(Frames(old.values[:1], old.mask[:1]), layer.init_state(Frames(x.values[:1], x.mask[:1])))
        _, second = layer.step(Frames(young.values[1:], young.mask[1:]),
                               layer.init_state(Frames(x.values[1:], x.mask[1:])))  # fmt: skip
        y, state = layer.step(x[23:30], tree.concat([first, second]))
    assert state.count.tolist() == [27, 10]
    rows = [torch.cat([x.values[0, :20], x.values[0, 23:]]), x.values[1, 20:]]
    for row, values in enumerate(rows):
        expected = layer(Frames(values[None], torch.ones(1, len(values), dtype=torch.bool))).values[0, -7:]
        torch.testing.assert_close(y.values[row], expected, rtol=0, atol=1e-12)


@KINDS
def test_what_cannot_be_honoured_is_refused(kind: type[Blockwise]) -> None:
    for span in (Span.full(), Span.sliding(4), Span.chunked(None, 4)):
        with pytest.raises(ValueError, match=r"chooses among all that came before: its span is Span.causal\(\)"):
            kind(D, 2, span, size=4, blocks=2)
    with pytest.raises(ValueError, match="Relative: who reads only chosen keys"):
        made(kind, position=Relative(D, 2))
    with pytest.raises(ValueError, match="0 blocks of 4 keys"):
        made(kind, blocks=0)
    layer = made(kind)
    with pytest.raises(ValueError, match=r"its span is Span.causal\(\)"):
        set_span(layer, Span.full())
    set_span(layer, Span.causal())


@KINDS
def test_an_encoder_takes_it(kind: type[Blockwise]) -> None:
    def encoder(position: type[Position] | None) -> Conformer:
        return Conformer(D, D, 2, 2, 12, span=Span.causal(), kernel=3, position=position,
                         attention=partial(kind, size=4, blocks=2))  # fmt: skip

    with pytest.raises(ValueError, match="use Rotary, or no position"):
        encoder(Relative)
    stream = encoder(Rotary).eval()
    x = random_frames([90, 60], D)
    torch.testing.assert_close(stepped(stream, x).values, stream(x).values, rtol=0, atol=1e-9)
    stream.train()(x).values.sum().backward()
    assert all(p.grad is not None for p in stream.parameters())
