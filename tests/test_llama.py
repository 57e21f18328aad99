"""Our own causal language model: pieces are the whole, bounded caches, groups that take turns, attention to nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn import tree
from speechattn.decoder.groups import Grouped, group_ids, group_mask
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.model.config import build
from speechattn.multimodal.attention import AttentionMaker, Gated, LearnedSink, OffByOne, Usual, attended
from speechattn.multimodal.causal import CausalLM
from speechattn.multimodal.llama import Llama, LlamaState

pytestmark = pytest.mark.usefixtures("precise")

DIM, HEADS, VOCAB, DEPTH = 16, 4, 11, 2
ATTENTION: list[AttentionMaker] = [Usual, OffByOne, LearnedSink, Gated]
KINDS: list[dict[str, Any]] = [
    {}, {"key_heads": 2, "tied": True}, *({"attention": kind, "key_heads": 2} for kind in ATTENTION[1:]),
    {"window": (2, 3), "key_heads": 2}, {"window": (0, 2)}, {"window": (1, 4), "attention": LearnedSink},
]  # fmt: skip


def model_of(**options: Any) -> Llama:
    made = Llama(VOCAB, DIM, HEADS, DEPTH, **({"inner": 20} | options))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.eval()


def circled(x: Tensor, place: int, base: float) -> Tensor:
    """A vector [D] as complex numbers, of which number i turns by place * base ** (-2 i / D)."""
    half = x.shape[-1] // 2
    angle = torch.tensor([place * base ** (-i / half) for i in range(half)])
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([z.real, z.imag])


def norm(x: Tensor, layer: nn.RMSNorm) -> Tensor:
    assert layer.eps is not None
    return x / (x.square().mean() + layer.eps).sqrt() * layer.weight


def oracle(model: Llama, x: Tensor, window: tuple[int, int] = (0, 1000)) -> Tensor:
    """What is made of x [T, D] by a model of `Usual` attention, one frame, one head and one kept key at a time."""
    sinks, recent = window
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.layers]
    outs, width = [], DIM // HEADS
    for frame in x:
        y = frame
        for layer, cache in zip(model.layers, kept, strict=True):
            h, own = norm(y, layer.input_layernorm), layer.self_attn
            cache.append((own.k_proj.weight @ h, own.v_proj.weight @ h))
            if len(cache) > sinks + recent:
                del cache[sinks]
            said = []
            for head in range(HEADS):
                at = head // (HEADS // model.key_heads) * width
                q = circled((own.q_proj.weight @ h)[head * width :][:width], len(cache) - 1, model.position.base)
                scores = [
                    circled(k[at : at + width], i, model.position.base) @ q / sqrt(width)
                    for i, (k, _) in enumerate(cache)
                ]
                weights = torch.stack(scores).exp()
                said.append(weights / weights.sum() @ torch.stack([v[at : at + width] for _, v in cache]))
            y = y + own.o_proj.weight @ torch.cat(said)
            h, mlp = norm(y, layer.post_attention_layernorm), layer.mlp
            gate = mlp.gate_proj.weight @ h
            y = y + mlp.down_proj.weight @ (gate * gate.sigmoid() * (mlp.up_proj.weight @ h))
        outs.append(norm(y, model.norm))
    return torch.stack(outs)


def drawn(chance: random.Random, rows: int = 3, frames: int = 12) -> Frames:
    """Frames of which some are missing anywhere, with NaN there."""
    mask = torch.tensor([[chance.random() < 0.7 for _ in range(frames)] for _ in range(rows)])
    mask[0] = True
    values = torch.randn(rows, frames, DIM)
    return Frames(values.masked_fill(~mask[..., None], torch.nan), mask)


def stepped(model: Llama, x: Frames, splits: Sequence[int]) -> tuple[Tensor, LlamaState]:
    cache, outs = model.start(len(x.mask)), []
    for a, b in zip([0, *splits], [*splits, x.mask.shape[1]], strict=True):
        hidden, cache = model.extend(x[a:b], cache)
        outs.append(hidden)
    return torch.cat(outs, 1), cache


@pytest.mark.parametrize("window", [None, (2, 3), (0, 4), (3, 1)])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_it_computes_what_the_formulas_say(window: tuple[int, int] | None, key_heads: int) -> None:
    model = model_of(window=window, key_heads=key_heads, base=300.0)
    x = drawn(random.Random(0))
    hidden, _ = model.extend(x, model.start(3))
    assert not hidden[~x.mask].any()
    for row in range(3):
        wanted = oracle(model, x.values[row, x.mask[row]], window or (0, 1000))
        torch.testing.assert_close(hidden[row, x.mask[row]], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", KINDS)
@given(chance=st.randoms(use_true_random=False))
@settings(max_examples=6, deadline=None)
def test_pieces_are_the_whole_and_a_row_does_not_know_its_batch(options: dict[str, Any], chance: random.Random) -> None:
    torch.manual_seed(chance.randint(0, 999))
    model, x = model_of(**options), drawn(chance)
    splits = sorted(chance.choices(range(13), k=chance.randint(0, 6)))
    whole, inside = model.inspect(x)
    pieces, _ = stepped(model, x, splits)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-9)
    for grad in (False, True):  # caches grow in room of their own where no gradient is asked
        with torch.set_grad_enabled(grad):
            for row in range(3):
                alone = Frames(
                    x.values[row, x.mask[row]][None], torch.ones(1, int(x.mask[row].sum()), dtype=torch.bool)
                )
                one, _ = stepped(model, alone, range(1, alone.mask.shape[1]))
                torch.testing.assert_close(whole[row, x.mask[row]], one[0], rtol=0, atol=1e-9)
    assert all(state.isfinite().all() for state in inside.states)


@pytest.mark.parametrize("options", [{}, {"window": (1, 2), "key_heads": 2}, {"attention": LearnedSink}])
def test_gradients_in_pieces_are_those_of_the_whole(options: dict[str, Any]) -> None:
    model, x = model_of(**options), drawn(random.Random(1))
    found = []
    for split in ([], [1, 5, 6]):
        values = torch.where(x.mask[..., None], x.values, 0).requires_grad_()
        hidden, _ = stepped(model, Frames(values, x.mask), split)
        found.append(torch.autograd.grad(hidden.sin().sum(), [values, *model.layers.parameters()]))  # type: ignore[attr-defined]
    for a, b in zip(*found, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_a_window_changes_nothing_while_it_holds_all_and_its_cache_never_grows() -> None:
    full, x = model_of(), drawn(random.Random(2), frames=9)
    bounded = model_of(window=(2, 5))
    bounded.load_state_dict(full.state_dict())
    short, _ = bounded.extend(x[:7], bounded.start(3))
    torch.testing.assert_close(short, full.extend(x[:7], full.start(3))[0])
    assert (full.inspect(x)[0] - bounded.inspect(x)[0])[0, -1].abs().max() > 1e-3
    cache = bounded.start(3)
    sizes = [leaf.shape for leaf in tree.leaves(cache)]
    with torch.no_grad():
        for _ in range(60):
            piece = drawn(random.Random(3), frames=random.Random(4).randint(1, 5))
            hidden, cache = bounded.extend(piece, cache)
            assert hidden.isfinite().all()
            assert [leaf.shape for leaf in tree.leaves(cache)] == sizes
    assert cache.places.length.tolist() == [7, 7, 7]


def test_rows_of_a_cache_are_chosen_and_put_together() -> None:
    model = model_of()
    x, more = drawn(random.Random(5)), drawn(random.Random(6), frames=3)
    _, cache = model.extend(x, model.start(3))
    chosen = torch.tensor([2, 0, 2, 1])
    again, _ = model.extend(Frames(more.values[chosen], more.mask[chosen]), tree.select(cache, chosen))
    torch.testing.assert_close(again, model.extend(more, cache)[0][chosen])
    _, early = model.extend(x[:4], model.start(3))
    both, _ = model.extend(Frames(more.values.repeat(2, 1, 1), more.mask.repeat(2, 1)), tree.concat([cache, early]))
    torch.testing.assert_close(both[3:], model.extend(more, early)[0])


def test_what_is_inside() -> None:
    model, x = model_of(key_heads=2, tied=True), drawn(random.Random(7))
    values = torch.where(x.mask[..., None], x.values, 0).requires_grad_()
    x = Frames(values, x.mask)
    hidden, inside = model.inspect(x)
    cheap, without = model.inspect(x, weights=False)
    assert without.weights is None
    assert inside.weights is not None
    assert (len(inside.states), len(inside.weights)) == (DEPTH + 1, DEPTH)
    assert torch.equal(inside.mask, x.mask)
    torch.testing.assert_close(cheap, hidden)
    for a, b in zip(inside.states, without.states, strict=True):
        torch.testing.assert_close(a, b)
        assert not a[~x.mask].any()
    torch.testing.assert_close(inside.states[0], values)
    torch.testing.assert_close(hidden, model.norm(inside.states[-1]))
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embed_tokens.weight.T)
    first = model.layers[0]
    for looks in inside.weights:
        assert looks.shape == (3, HEADS, 12, 12)
        assert not looks.triu(1).any()
        assert not looks.mT[~x.mask[:, None].expand(-1, HEADS, -1)].any()
        torch.testing.assert_close(looks.sum(-1), x.mask[:, None].expand(-1, HEADS, -1).double())
    v = first.self_attn.v_proj(first.input_layernorm(values)).view(3, 12, 2, 4).repeat_interleave(2, 2)
    y = values + first.self_attn.o_proj(torch.einsum("bhqk,bkhd->bqhd", inside.weights[0], v).flatten(2))
    y = y + first.mlp(first.post_attention_layernorm(y))
    torch.testing.assert_close(inside.states[1][x.mask], y[x.mask])
    for state in without.states[1:-1]:
        (grad,) = torch.autograd.grad(state.square().sum(), values, retain_graph=True)
        assert grad[x.mask].all(-1).all()


@given(chance=st.randoms(use_true_random=False))
@settings(max_examples=12, deadline=None)
def test_groups_that_take_turns_are_one_masked_pass(chance: random.Random) -> None:
    torch.manual_seed(chance.randint(0, 999))
    model = model_of(key_heads=2)
    frames, tokens, first = chance.randint(1, 6), chance.randint(1, 5), chance.choice([0, 7])
    source, target = torch.randn(1, frames, DIM), torch.randn(1, tokens, DIM)
    order = list("r" * frames + "w" * tokens)
    chance.shuffle(order)
    read = torch.tensor([[order[:i].count("r") for i, c in enumerate(order) if c == "w"]])
    everybody = torch.ones(1, frames + tokens, dtype=torch.bool)
    whole, _ = model.extend(
        Frames(torch.cat([source, target], 1), everybody), model.start(1),
        group_ids(read, frames, Grouped(first)), group_mask(read, frames),
    )  # fmt: skip
    cache, came = model.start(1), list[str]()
    heard, said = list[Tensor](), list[Tensor]()
    while order:
        kind, more = order[0], chance.randint(0, 1)
        n = chance.randint(1, len(order) - len("".join(order).lstrip(kind)))
        del order[:n]
        at = came.count(kind)
        came += kind * n + "-" * more  # nobody is there, though all shall see him
        own = torch.tensor([[[c in "r-" or kind == "w" for c in came]] * (n + more)])
        seen = own & torch.ones(len(came), len(came), dtype=torch.bool).tril()[-n - more :]
        x = Frames((source if kind == "r" else target)[:, at : at + n], everybody[:, :n]).pad(more)
        x.values[:, n:] = torch.nan
        places = torch.arange(at, at + n + more)[None] + (first if kind == "w" else 0)
        hidden, cache = model.extend(x, cache, places, seen)
        (heard if kind == "r" else said).append(hidden[:, :n])
    torch.testing.assert_close(torch.cat(heard + said, 1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weights", [False, True])
def test_attention_to_nothing(weights: bool) -> None:
    x = torch.randn(2, 5, 8)
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 2)
    seen = torch.rand(2, 5, 7) < 0.6
    seen[0, 2] = False
    usual, looks = Usual(8, 4)(x, q, k, v, seen, weights=weights)
    assert not usual[0, :, 2].any()
    zero = torch.zeros(2, 2, 1, 6)
    more = attended(
        q, torch.cat([k, zero], 2), torch.cat([v, zero[..., :2]], 2), torch.cat([seen, seen[..., :1] | True], -1)
    )
    off, less = OffByOne(8, 4)(x, q, k, v, seen, weights=weights)
    torch.testing.assert_close(off, more[0])
    learned = LearnedSink(8, 4)
    torch.testing.assert_close(learned(x, q, k, v, seen, weights=weights)[0], off)
    with torch.no_grad():
        learned.logit.copy_(torch.tensor([1.0, -2.0, 0.5, -800.0]))
    sunk, fewer = learned(x, q, k, v, seen, weights=weights)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) / sqrt(6)
    odds = scores.exp() * seen[:, None]
    wanted = odds / (odds.sum(-1, keepdim=True) + learned.logit.exp()[:, None, None])
    wanted[0, 3, 2] = 0.0  # 0 / 0
    torch.testing.assert_close(sunk, wanted @ v.repeat_interleave(2, 1))
    torch.testing.assert_close(sunk[:, 3], usual[:, 3])
    if weights:
        assert looks is not None
        assert less is not None
        assert fewer is not None
        torch.testing.assert_close(fewer, wanted)
        torch.testing.assert_close(looks.sum(-1), seen.any(-1)[:, None].expand(-1, 4, -1).double())
        torch.testing.assert_close(less, odds / (1 + odds.sum(-1, keepdim=True)))
        assert (less.sum(-1) < 1).all()


def test_a_gate_that_is_open_changes_nothing_and_one_that_is_shut_says_nothing() -> None:
    x = torch.ones(2, 5, 8)
    q, k, v = torch.randn(2, 4, 5, 2), torch.randn(2, 2, 7, 2), torch.randn(2, 2, 7, 2)
    seen = torch.ones(2, 5, 7, dtype=torch.bool)
    gated = Gated(8, 4)
    usual, _ = Usual(8, 4)(x, q, k, v, seen, weights=False)
    nn.init.constant_(gated.gate.weight, 5.0)
    torch.testing.assert_close(gated(x, q, k, v, seen, weights=False)[0], usual)
    with torch.no_grad():
        gated.gate.weight[3] = -100.0  # the second feature of the second head
    said, _ = gated(x, q, k, v, seen, weights=False)
    usual[:, 1, :, 1] = 0.0
    torch.testing.assert_close(said, usual)


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("weights", [False, True])
def test_gradients_of_attention(kind: Any, weights: bool) -> None:
    attend = kind(4, 2)
    for parameter in attend.parameters():
        nn.init.normal_(parameter)
    x, q, k, v = (torch.randn(*s, requires_grad=True) for s in ((1, 3, 4), (1, 2, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2)))
    seen = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    own = tuple(attend.parameters())

    def said(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for y in attend(*inputs[:4], seen, weights=weights) if y is not None)

    assert torch.autograd.gradcheck(said, (x, q, k, v, *own))


PART = "speechattn.multimodal.llama.Llama"


def test_a_configuration_makes_it() -> None:
    sizes = {"vocab": 11, "dim": 16, "heads": 4, "depth": 1}
    gated = "speechattn.multimodal.attention.Gated"
    made = build({"class_path": PART, "init_args": {**sizes, "attention": gated, "window": [2, 3]}}, "lm")
    assert isinstance(made, Llama)
    lm: CausalLM = made
    assert (lm.dim, lm.vocab, made.window) == (16, 11, (2, 3))
    assert isinstance(made.layers[0].self_attn.attend, Gated)
    assert (
        lm.logits(lm.extend(Frames(lm.embed(torch.tensor([[1, 2]])), torch.ones(1, 2) > 0), lm.start(1))[0]).shape[2]
        == 11
    )
    with pytest.raises(ModelError, match="window"):
        build({"class_path": PART, "init_args": {**sizes, "window": [2, 0]}}, "lm")
    with pytest.raises(ModelError, match="do not divide"):
        build({"class_path": PART, "init_args": {**sizes, "key_heads": 3}}, "lm")


def test_what_it_cannot_do() -> None:
    x, bounded, full = drawn(random.Random(8), frames=2), model_of(window=(1, 2)), model_of()
    with pytest.raises(ValueError, match="window"):
        bounded.extend(x, bounded.start(3), torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="window"):
        bounded.extend(x, bounded.start(3), seen=torch.ones(3, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="wanted"):
        full.extend(x, full.start(3), seen=torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="wanted"):
        full.extend(x, full.start(3), torch.zeros(1, 2, dtype=torch.long))


def test_dropout_is_for_training() -> None:
    model, x = model_of(dropout=0.5), drawn(random.Random(9))
    assert torch.equal(model.inspect(x)[0], model.inspect(x)[0])
    model.train()
    assert not torch.equal(model.inspect(x)[0], model.inspect(x)[0])
