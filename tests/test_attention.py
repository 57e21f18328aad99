"""Patterns, positions and the backends that compute them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechattn.attention import (
    BACKENDS,
    Alibi,
    Blocks,
    Bucketed,
    Pattern,
    Position,
    Relative,
    Rotary,
    SelfAttention,
    Span,
    attend,
    draw,
)  # fmt: skip
from speechattn.attention.flex import Flex
from speechattn.attention.pattern import visible
from speechattn.attention.position import skewed
from speechattn.attention.triton import Triton
from speechattn.frames import Frames
from speechattn.testing import oracle, random_frames, stepped

DENSE = ("fused", "reference")


pytestmark = pytest.mark.usefixtures("precise")


def position(kind: str, dim: int, heads: int) -> Position | None:
    made: Position | None = None
    match kind:
        case "relative":
            made = Relative(dim, heads)
        case "rotary":
            made = Rotary(dim, heads)
        case "alibi":
            made = Alibi(dim, heads)
        case "bucketed":
            made = Bucketed(dim, heads, buckets=8, farthest=16)
    for parameter in made.parameters() if made else ():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


spans = st.builds(
    lambda left, chunk, right, dilation, sinks: Span(left, chunk, right, dilation, 0 if left is None else sinks),
    st.none() | st.integers(0, 9), st.integers(1, 5), st.integers(0, 6), st.integers(1, 3), st.integers(0, 3),
)  # fmt: skip
kinds = st.sampled_from(["none", "relative", "rotary", "alibi", "bucketed"])


@settings(max_examples=60, deadline=None)
@given(spans, kinds, st.lists(st.integers(0, 17), min_size=2, max_size=3), st.integers(0, 99))
def test_any_span_and_lengths_equal_the_definition_whole_and_in_steps(
    span: Span, kind: str, lengths: list[int], seed: int
) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    layer = SelfAttention(8, 2, span, position=position(kind, 8, 2), key_heads=1 + seed % 2).eval()
    x = random_frames(lengths, 8, seed=seed)
    expected = oracle(layer, x)
    for y in (layer(x), stepped(layer, x, seed=seed)):
        assert torch.equal(y.mask, expected.mask)
        torch.testing.assert_close(y.values, expected.values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["none", "relative", "rotary", "alibi", "bucketed"])
@pytest.mark.parametrize("span", [Span(5, 4), Span(3, 2, 3), Span(4, 1, 0, 2), Span(3, 2, 1, 1, 2), Span(None, 4, 2)])
def test_backends_agree_in_values_and_gradients(span: Span, kind: str) -> None:
    where, frames = position(kind, 16, 4), 8
    history = 4 if span.left is None else span.left
    n = span.sinks + history + frames + span.right
    q, k, v = torch.randn(2, 4, frames, 4), torch.randn(2, 2, n, 4), torch.randn(2, 2, n, 4)
    valid = torch.rand(2, n) > 0.3
    found = {}
    for name, backend in BACKENDS.items():
        if backend.supports(q, span, where) is None:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            y = attend(*leaves, pattern=span, valid=valid, position=where, backend=name)
            found[name] = (y, *torch.autograd.grad(y.square().sum(), leaves))
    assert set(found) >= {"reference"}
    assert ("window" in found) == (span.left is not None)
    for name, got in found.items():
        for a, b in zip(got, found["reference"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)


@pytest.mark.filterwarnings("ignore:flex_attention called without")  # eager, the only way without a GPU
@pytest.mark.parametrize("kind", ["none", "rotary", "alibi", "bucketed"])
@pytest.mark.parametrize("pattern", [Span(5, 4), Span(3, 2, 3), Span(None, 4), Span.full(),
                                     Blocks(4, ((True, False), (True, True)))])  # fmt: skip
def test_flex_says_the_same_where_it_can(pattern: Pattern, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flex, "supports", lambda self, q, pattern, position: self.expresses(pattern, position))
    where, frames = position(kind, 16, 4), 8
    n = (pattern.left or 0 if isinstance(pattern, Span) else 0) + frames + pattern.right
    q, k, v = torch.randn(2, 4, frames, 4), torch.randn(2, 2, n, 4), torch.randn(2, 2, n, 4)
    valid = torch.rand(2, n) > 0.2
    with torch.no_grad():
        expected = attend(q, k, v, pattern=pattern, valid=valid, position=where, backend="reference")
        y = attend(q, k, v, pattern=pattern, valid=valid, position=where, backend="flex")
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)


def example(pattern: Pattern, frames: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = frames + pattern.right + (getattr(pattern, "left", 0) or 0) + pattern.sinks
    return torch.randn(1, 2, frames, 4), torch.randn(1, 2, n, 4), torch.randn(1, 2, n, 4), torch.ones(1, n).bool()


@pytest.mark.parametrize("backend", ["window", "fused", "reference"])
def test_nan_where_nothing_is_valid_reaches_nobody(backend: str) -> None:
    q, k, v, valid = example(Span(3, 2), 8)
    valid[:, 4:9] = False
    clean = attend(q, k, v, pattern=Span(3, 2), valid=valid, backend=backend)
    k[:, :, 4:9], v[:, :, 4:9] = torch.nan, torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = attend(*leaves, pattern=Span(3, 2), valid=valid, backend=backend)
    assert torch.equal(y, clean)
    for grad in torch.autograd.grad(y.sum(), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["window", "fused", "reference"])
@pytest.mark.parametrize("span", [Span(1, 2), Span(2, 2, 0, 2), Span(1, 2, 0, 1, 1)])
def test_who_sees_nothing_gets_zeros(span: Span, backend: str) -> None:
    if backend == "fused" and span.sinks:
        return
    q, k, v, valid = example(span, 4)
    valid[:] = False
    valid[:, -1] = True
    y = attend(q, k, v, pattern=span, valid=valid, backend=backend)
    assert not y[:, :, :2].any()
    assert y[:, :, 3].all()
    for grad in torch.autograd.grad(
        attend(q.requires_grad_(), k, v, pattern=span, valid=valid, backend=backend).sum(), q
    ):
        assert grad.isfinite().all()


def test_a_block_that_sees_nobody_is_defined() -> None:
    pattern = Blocks(2, ((False, False), (True, True)))
    q, k, v, valid = example(pattern)
    for backend in DENSE:
        y = attend(q, k, v, pattern=pattern, valid=valid, backend=backend)
        assert not y[:, :, :2].any()
        assert y[:, :, 2:].all()


@pytest.mark.parametrize("kind", ["none", "relative", "rotary", "bucketed"])
def test_gradcheck_of_windows(kind: str) -> None:
    where = position(kind, 4, 2)
    span = Span(2, 2, 1)
    q, k, v = torch.randn(1, 2, 4, 2), torch.randn(1, 2, 7, 2), torch.randn(1, 2, 7, 2)
    valid = torch.ones(1, 7).bool()
    valid[:, 0] = False

    def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return attend(q, k, v, pattern=span, valid=valid, position=where, backend="window")

    parameters = tuple(where.parameters()) if where else ()
    assert torch.autograd.gradcheck(run, tuple(x.requires_grad_() for x in (q, k, v)) + parameters)


def test_skewed_finds_every_distance() -> None:
    rows = torch.arange(6.0).expand(3, 6)  # distances 2, 1, 0, -1, -2, -3 of 3 queries and 4 keys
    assert skewed(rows, 3, 4).tolist() == [[2, 3, 4, 5], [1, 2, 3, 4], [0, 1, 2, 3]]
    assert skewed(rows[:1], 1, 6).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_the_drawings_are_true() -> None:
    lines = (Span.__doc__ or "").splitlines()
    top = next(i for i, line in enumerate(lines) if "sliding(2, 1)" in line)
    columns = [(0, Span.sliding(2, 1)), (1, Span.causal()), (2, Span.chunked(2, 2)), (3, Span.chunked(2, 2, right=1)),
               (4, Span.dilated(4, 2)), (5, Span.sliding(1, sinks=1))]  # fmt: skip
    cells = [line.split() for line in lines[top + 1 : top + 9]]
    for i, span in columns:
        assert "\n".join(row[i] for row in cells) == draw(span, 8)
    assert draw(Blocks(2, ((True, False), (True, True))), 4) == "##..\n##..\n####\n####"


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Span(-1), "left is -1"), (lambda: Span(1, 0), "chunk is 0"),
    (lambda: Span(1, dilation=0), "dilation is 0"),
    (lambda: Span(3, None), "whole utterance leaves nothing"), (lambda: Span(None, sinks=2), "no sinks to keep"),
    (lambda: Blocks(0, ()), "at least 1"), (lambda: Blocks(2, ((True, True),)), "square table"),
    (lambda: Rotary(6, 2), "even number"), (lambda: Bucketed(8, 2, buckets=6), "multiple of 4"),
    (lambda: SelfAttention(8, 3, Span(1)), "do not divide"),
    (lambda: SelfAttention(8, 4, Span(1), key_heads=3), "do not divide"),
    (lambda: SelfAttention(8, 2, Span(1, 2, 1), group=2).plan(), "cannot look ahead"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_backends_give_their_reasons() -> None:
    q, k, v, valid = example(Span(None))
    for backend, pattern, message in [
        ("window", Span(None), "not bounded to the left"), ("window", Blocks(4, ((True,),)), "Blocks is not a band"),
        ("flex", Span(None), "needs CUDA"), ("fused", Span(1, sinks=1), "sinks"),
        ("fast", Span(None), "wanted auto or one of triton, window, fused, reference, flex"),
        ("triton", Blocks(4, ((True,),)), "Blocks is not a span"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, pattern=pattern, valid=valid, backend=backend)
    assert "sinks" in (Flex().expresses(Span(1, sinks=1), None) or "")
    assert "depends on the query" in (Flex().expresses(Span(1), Relative(8, 2)) or "")
    with pytest.raises(ValueError, match="3 query heads"):
        attend(torch.randn(1, 3, 4, 4), k, v, pattern=Span(None), valid=valid)
    with pytest.raises(ValueError, match="4 keys"):
        attend(q, k, v, pattern=Span(0, 4, 3), valid=valid)
    with pytest.raises(ValueError, match="5 keys, 4 of them"):
        attend(q, torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), pattern=Span(0, 4), valid=valid)


def test_the_kernels_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    q, kernels = torch.zeros(1, 2, 3, 8, dtype=torch.float32), Triton()
    assert kernels.supports(q, Span(1), None) == (
        "it needs CUDA, the tensors are on cpu (TRITON_INTERPRET=1 runs it there, slowly)"
    )
    assert "not in float64" in (kernels.supports(q.double(), Span(1), None) or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.supports(q, Span(None, None), Relative(16, 2)) is None
    assert not kernels.preferred(q)
    assert "257 features" in (kernels.supports(q.new_zeros(1, 1, 1, 257), Span(1), None) or "")
    assert "Position has no terms" in (kernels.supports(q, Span(1), Position()) or "")
    assert "as if it were integers" in (kernels.supports(q.bfloat16(), Span(1), None) or "")
    monkeypatch.setattr("speechattn.attention.triton.installed", lambda: False)
    assert "speechattn[kernels]" in (kernels.supports(q, Span(1), None) or "")


def test_a_table_is_made_once_and_can_meet_a_gradient() -> None:
    with torch.inference_mode():
        first = visible(Span(7, 3), range(3), range(-7, 3), None)
    assert visible(Span(7, 3), range(3), range(-7, 3), None) is first
    assert not first.is_inference()
    layer = SelfAttention(8, 2, Span(2, 2), position=Relative(8, 2))
    x = random_frames([5, 3], 8)
    with torch.inference_mode():
        before = layer(x).values.clone()
        again = layer(x).values.clone()
    assert torch.equal(before, again)
    layer(x).values.sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1
        changed = layer(x).values
    torch.testing.assert_close(changed, oracle(layer, x).values, rtol=0, atol=1e-9)


def test_a_teacher_that_is_averaged_through_data_is_never_stale() -> None:
    layer = SelfAttention(8, 2, Span(2, 2), position=Relative(8, 2)).eval()
    x = random_frames([9], 8)
    with torch.no_grad():
        layer(x)
        for parameter in layer.parameters():
            parameter.data.mul_(0.9).add_(torch.randn_like(parameter), alpha=0.1)
        torch.testing.assert_close(layer(x).values, oracle(layer, x).values, rtol=0, atol=1e-9)
        position = layer.position
        assert isinstance(position, Relative)
        position.linear.register_forward_hook(lambda module, inputs, output: 2 * output)
        torch.testing.assert_close(layer(x).values, oracle(layer, x).values, rtol=0, atol=1e-9)


def test_half_precision_is_near_and_finite() -> None:
    layer = SelfAttention(8, 2, Span(5, 4, 1), position=Relative(8, 2)).eval()
    x = random_frames([17, 9], 8)
    expected = layer(x).values
    for dtype in (torch.bfloat16, torch.float16):
        y = layer.to(dtype)(Frames(x.values.to(dtype), x.mask)).values
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.03)


def test_rows_of_different_age_share_an_unbounded_batch() -> None:
    from speechattn import tree

    layer = SelfAttention(8, 2, Span.chunked(None, 2, right=1), position=Relative(8, 2)).eval()
    x = random_frames([12, 12], 8)
    states = []
    for row, begun in ((0, 8), (1, 2)):
        one = Frames(x.values[row : row + 1], x.mask[row : row + 1])
        states.append(layer.step(one[:begun], layer.init_state(one))[1])
    both = tree.concat(states)
    parts = [x.values[0:1, 8:10], x.values[1:2, 2:4]]
    y, _ = layer.step(Frames(torch.cat(parts), x.mask[:, :2]), both)
    whole = layer(x)
    torch.testing.assert_close(y.values[0], whole.values[0, 6:8], rtol=0, atol=1e-12)
    torch.testing.assert_close(y.values[1], whole.values[1, 0:2], rtol=0, atol=1e-12)
