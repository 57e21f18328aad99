"""Fewer heads and hidden units: what is left says what it said when the others were silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import D, lively
from torch import Tensor, nn
from training import part

from speechattn.attention import Alibi, Bucketed, Position, Relative, Rotary, SelfAttention, Span
from speechattn.attention.duo import DuoAttention, hardened
from speechattn.attention.gates import GatedLinear, HardConcrete, StraightThrough
from speechattn.attention.pruning import fewer, head_size, heads_of, prune_heads
from speechattn.encoder import Conformer, EBranchformer, EfficientConformer, Encoder, Transformer
from speechattn.encoder.layers import FeedForward
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.model import Recognizer, from_config, load_model, save_model
from speechattn.model.pruning import (
    GatedEncoder,
    PrunedEncoder,
    SplitEncoder,
    forgetful,
    forwards_of,
    gates_of,
    prune_units,
    pruned,
    smaller,
    sparsity,
)  # fmt: skip
from speechattn.task.objectives import Heard, Said
from speechattn.task.pruning import SparsityObjective
from speechattn.testing import check_export, check_stream, random_frames, stepped
from speechattn.testing.attention import dense
from speechattn.text.pieces import Pieces

POSITIONS: dict[str, Any] = {
    "none": None, "relative": Relative, "rotary": Rotary, "alibi": Alibi,
    "bucketed": lambda dim, heads: Bucketed(dim, heads, buckets=8, farthest=16),
}  # fmt: skip
PIECES = Pieces(["<blank>", "▁", *"abcdef", "<sos/eos>"])


def attention(kind: str, key_heads: int, span: Span, *, heads: int = 4, dim: int = 16) -> SelfAttention:
    position: Position | None = POSITIONS[kind] and POSITIONS[kind](dim, heads)
    layer = lively(SelfAttention(dim, heads, span, position=position, key_heads=key_heads, norm=nn.LayerNorm(dim)))
    assert isinstance(layer, SelfAttention)
    return layer


def silenced(layer: SelfAttention, keep: list[int]) -> SelfAttention:
    """The same object, in which the other heads say nothing."""
    with torch.no_grad():
        for h in {*range(layer.heads)} - {*keep}:
            layer.out.weight[:, h * layer.width : (h + 1) * layer.width] = 0
    return layer


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(list(POSITIONS)), st.sampled_from([1, 2, 4]),
    st.sampled_from([Span(3, 2), Span(None, 3, 1), Span(2, 2, 3, 1, 2), Span.full()]),
    st.lists(st.integers(0, 3), min_size=1, unique=True),
)  # fmt: skip
def test_fewer_heads_say_what_they_said(kind: str, key_heads: int, span: Span, keep: list[int]) -> None:
    torch.set_default_dtype(torch.float64)
    whole = attention(kind, key_heads, span)
    small, x = fewer(whole, keep), random_frames([9, 4], 16)
    expected = dense(silenced(whole, keep), x)
    for y in (small(x), stepped(small, x) if span.chunk else small(x)):
        torch.testing.assert_close(y.values, expected.values, rtol=0, atol=1e-9)
    again, last = fewer(small, [0]), [keep[0]]  # and once more
    torch.testing.assert_close(again(x).values, dense(silenced(whole, last), x).values, rtol=0, atol=1e-9)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("kind", ["relative", "alibi"])
def test_laws_of_fewer_heads(kind: str) -> None:
    whole = attention(kind, 4, Span(5, 4, 1, 1, 2))
    small = fewer(whole, [0, 2, 3])
    assert (small.heads, small.width, small.qkv.out_features, small.out.in_features) == (3, 4, 36, 12)
    silenced(whole, [0, 2, 3])
    check_stream(small, random_frames([9, 0, 7], 16), reference=lambda _, x: dense(whole, x))
    check_export(small, random_frames([12, 12], 16))


@pytest.mark.usefixtures("precise")
def test_tables_of_positions_that_are_kept_follow_their_weights() -> None:
    small, x = fewer(attention("relative", 4, Span(3, 2)), [1, 2]), random_frames([8, 8], 16)
    with torch.no_grad():
        first = small(x).values
        assert torch.equal(small(x).values, first)
        small.position.linear.weight.mul_(2)  # type: ignore[union-attr,operator]
        second = small(x).values
    assert not torch.equal(first, second)
    torch.testing.assert_close(small(x).values.detach(), second)


def numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", list(POSITIONS))
def test_a_head_is_as_large_as_what_goes_with_it(kind: str) -> None:
    whole = attention(kind, 4, Span(3, 2))
    assert numel(whole) - numel(fewer(whole, [0, 3])) == 2 * head_size(whole)
    shared = attention(kind, 1, Span(3, 2))
    assert numel(shared) - numel(fewer(shared, [2])) == 3 * head_size(shared)


ENCODERS: dict[str, Any] = {
    "conformer": lambda: Conformer(D, D, 2, 4, 12, span=Span(5, 2, 1), kernel=5, conv_right=1),
    "transformer": lambda: Transformer(D, D, 2, 4, 12, span=Span.sliding(3, sinks=2), position=Rotary, key_heads=2),
    "branchformer": lambda: EBranchformer(D, D, 2, 2, 12, span=Span(5, 2), kernel=3, gate=6),
}


def closing(encoder: Encoder, seed: int = 0) -> Encoder:
    """With gates, half of which are closed and some between."""
    made = GatedEncoder(encoder)
    maker = torch.Generator().manual_seed(seed)
    for gates, _ in gates_of(made):
        gates.logits.data = torch.randn(len(gates.logits), generator=maker, dtype=gates.logits.dtype) * 3 - 2
    return made.eval()


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("kind", list(ENCODERS))
def test_a_pruned_encoder_is_the_gated_one(kind: str) -> None:
    whole = lively(ENCODERS[kind]())
    assert isinstance(whole, Encoder)
    gated, x = closing(whole), random_frames([40, 23], D)
    small = pruned(gated)
    assert not any(isinstance(module, GatedLinear) for module in small.modules())
    assert numel(small) < numel(gated)
    open_heads = [int((m.out.gates.settled > 0).sum()) for m in heads_of(gated).values()]  # type: ignore[attr-defined]
    assert [m.heads for m in heads_of(small).values()] == [max(n, 1) for n in open_heads]
    expected = gated(x)
    for y in (small(x), stepped(small, x)):
        assert torch.equal(y.mask, expected.mask)
        torch.testing.assert_close(y.values, expected.values, rtol=0, atol=1e-9)
    torch.testing.assert_close(gated(x).values, expected.values, rtol=0, atol=0)  # which stayed as it was
    if kind == "conformer":
        check_stream(small, x, reference=lambda _, x: gated(x))


@pytest.mark.usefixtures("precise")
def test_new_gates_change_nothing_and_closed_ones_everything() -> None:
    whole, x = lively(ENCODERS["conformer"]()), random_frames([24, 9], D)
    expected = whole(x).values
    gated = GatedEncoder(whole).eval()  # type: ignore[arg-type]
    assert torch.equal(gated(x).values, expected)
    assert float(sparsity(gated).detach()) == pytest.approx(0.01)
    for gates, _ in gates_of(gated):
        gates.logits.data.fill_(-9.0)
    torch.testing.assert_close(pruned(gated)(x).values, gated(x).values, rtol=0, atol=1e-9)
    assert not torch.allclose(gated(x).values, expected)
    assert [m.heads for m in heads_of(pruned(gated)).values()] == [1, 1]  # silent ones


@pytest.mark.usefixtures("precise")
def test_heads_and_units_by_number() -> None:
    whole, x = lively(ENCODERS["conformer"]()), random_frames([24, 9], D)
    small = prune_units(prune_heads(whole, [[1], [3, 0]]), [[5], range(12), [11, 0], [2]])
    before = numel(whole)
    for layer, heads in zip(heads_of(whole).values(), [[1], [0, 3]], strict=True):
        silenced(layer, heads)
    with torch.no_grad():
        for forward, units in zip(forwards_of(whole).values(), [[5], range(12), [11, 0], [2]], strict=True):
            forward.narrow.weight[:, [u for u in range(12) if u not in units]] = 0
    torch.testing.assert_close(small(x).values, whole(x).values, rtol=0, atol=1e-9)
    assert numel(whole) == before
    assert [m.widen.out_features for m in small.modules() if isinstance(m, FeedForward)] == [1, 12, 2, 1]


def test_what_cannot_be_pruned_is_refused() -> None:
    conformer = ENCODERS["conformer"]()
    for keep, why in (([[0]], "heads of 1 layers, of 2"), ([[0], [4]], "0 to 3"), ([[0], [1, 1]], "each once"),
                      ([[0], []], "wanted some")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            prune_heads(conformer, keep)
    with pytest.raises(ValueError, match="DuoAttention cannot be pruned"):
        fewer(DuoAttention(D, 2, Span(None, 2)), [0])
    with pytest.raises(ValueError, match="group of 3 frames"):
        GatedEncoder(EfficientConformer(D, (8, 12), (1, 1), 2, span=Span(6, 3), kernel=3, group=3))
    with pytest.raises(ValueError, match="hidden units of 3 feed-forwards, of 4"):
        prune_units(conformer, [[0]] * 3)
    with pytest.raises(ValueError, match="0 to 11, each once"):
        PrunedEncoder(conformer, units=[12, 12, 13, 12])
    with pytest.raises(ModelError, match="has no gates"):
        sparsity(conformer)


def config(encoder: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1, "sample_rate": 8000,
        "front_end": part("speechattn.audio.spectrum.LogMel", mels=8, rate=8000, window=200, hop=80),
        "encoder": encoder, "heads": {"ctc": part("speechattn.decoder.ctc.CTC", dim=16, vocab=9)},
    }  # fmt: skip


def conformer(**changes: Any) -> dict[str, Any]:
    span = part("speechattn.attention.Span", left=8, chunk=4)
    return part("speechattn.encoder.Conformer", mels=8, dim=16, depth=2, heads=4, inner=24, kernel=5, span=span,
                **changes)  # fmt: skip


GATED = part("speechattn.model.pruning.GatedEncoder", encoder=conformer())


@pytest.mark.parametrize("spec", [
    GATED,
    part("speechattn.model.pruning.GatedEncoder", encoder=conformer(), units=None,
         heads=part("speechattn.attention.gates.StraightThrough", start=0.6)),
    conformer(attention=part("speechattn.attention.gates.GatedSelfAttention"),
              position=part("speechattn.attention.Alibi")),
])  # fmt: skip
def test_a_pruned_model_is_written_and_read(spec: dict[str, Any], tmp_path: Path) -> None:
    model = from_config(config(spec), PIECES)
    for gates, _ in gates_of(model.encoder):
        gates.logits.data = torch.linspace(-4, 3, len(gates.logits))
    save_model(model, tmp_path / "gated")
    gated = load_model(tmp_path / "gated")
    assert isinstance(gated, Recognizer)
    small = smaller(gated)
    save_model(small, tmp_path / "small")
    found = load_model(tmp_path / "small")
    assert isinstance(found, Recognizer)
    sound = torch.randn(2, 8000)
    x = Frames(sound, torch.ones_like(sound, dtype=torch.bool))
    expected = gated.listening(x).values
    torch.testing.assert_close(found.listening(x).values, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(stepped(found.listening, x).values, expected, rtol=0, atol=1e-5)
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("gated", "small")}
    assert size["small"] < size["gated"]
    with pytest.raises(ModelError, match="not built from a configuration"):
        smaller(Recognizer(model.front_end, model.encoder, dict(model.heads), PIECES))


def test_a_split_model_is_written_and_read(tmp_path: Path) -> None:
    span = part("speechattn.attention.Span", left=None, chunk=4)
    spec = conformer(attention=part("speechattn.attention.duo.DuoAttention", left=8, sinks=2))
    spec["init_args"]["span"] = span
    model = from_config(config(spec), PIECES).eval()
    for layer in heads_of(model.encoder).values():
        layer.gates.data = torch.rand(4)  # type: ignore[union-attr]
    save_model(forgetful(model, 0.5), tmp_path)
    found = load_model(tmp_path)
    assert isinstance(found, Recognizer)
    sound = torch.randn(2, 8000)
    x = Frames(sound, torch.ones_like(sound, dtype=torch.bool))
    model.encoder = hardened(model.encoder, 0.5)
    expected = model.encoder(model.front_end(x)).values
    for y in (found.listening(x), stepped(found.listening, x)):
        torch.testing.assert_close(y.values, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="wanted some of each of 2 layers"):
        SplitEncoder(model.encoder, [[0]])  # type: ignore[arg-type]


def said(*lengths: int) -> Said:
    return Said(torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.tensor(lengths))


HEARD = Heard(*[random_frames([4, 4], D)] * 3)


@pytest.mark.usefixtures("precise")
def test_the_price_of_open_gates() -> None:
    model = from_config(config(GATED), PIECES).double()
    objective = SparsityObjective(0.5, rate=0.1, square=2.0, ramp=4)
    objective.fit(model)
    assert objective.heads == ()
    for gates, _ in gates_of(model.encoder):
        gates.logits.data.fill_(-50.0)
        gates.logits.data[0] = 50.0  # one is open
    whole = sum(size * len(gates.logits) for gates, size in gates_of(model.encoder))
    one = sum(size for _, size in gates_of(model.encoder))
    share = 1 - one / whole
    assert float(sparsity(model.encoder).detach()) == pytest.approx(share)
    small = pruned(model.encoder)
    assert numel(small) == sum(p.numel() for n, p in model.encoder.named_parameters() if "gates" not in n) - whole + one
    linear, square = 0.0, 2.0
    for step in range(6):
        gap = share - 0.5 * min(step / 4, 1)
        for mode in (False, False, True):  # validation moves nothing
            losses = objective.train(mode).losses(model, HEARD, said(3, 5)).detach()
            torch.testing.assert_close(losses, torch.tensor([3.0, 5.0]) * (linear * gap + square * gap**2), atol=1e-6,
                                       rtol=0)  # fmt: skip
        linear, square = linear + 0.1 * gap, square + 0.1 * gap**2
    assert {"seen", "multipliers"} <= objective.state_dict().keys()


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_the_target_is_met_against_what_resists(target: float) -> None:
    """Gates that want to stay open, some more than others, end at the target; those that matter least go first."""
    model = from_config(config(GATED), PIECES)
    objective = SparsityObjective(target, ramp=50).train()
    gates = [g for g, _ in gates_of(model.encoder)]
    optimizer = torch.optim.Adam([g.logits for g in gates], 0.1)
    worth = [torch.linspace(0.2, 1.0, len(g.logits)) for g in gates]
    for _ in range(300):
        missed = torch.stack([(w * (1 - g.opening)).mean() for g, w in zip(gates, worth, strict=True)]).mean()
        loss = missed + objective.losses(model, HEARD, said(1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(sparsity(model.encoder).detach()) == pytest.approx(target, abs=0.01)
    for g in gates:
        settled = g.settled.detach()
        assert bool((settled[1:] >= settled[:-1] - 0.05).all())


def test_options_of_the_price() -> None:
    for options in ({"target": 1.0}, {"target": 0.5, "rate": 0.0}, {"target": 0.5, "ramp": -1}):
        with pytest.raises(ValueError, match="wanted a share"):
            SparsityObjective(**options)  # type: ignore[arg-type]
    model = from_config(config(conformer()), PIECES)
    with pytest.raises(ModelError, match="GatedEncoder"):
        SparsityObjective(0.5).fit(model)
    assert isinstance(HardConcrete(3), nn.Module)
    assert isinstance(StraightThrough(3)(), Tensor)
