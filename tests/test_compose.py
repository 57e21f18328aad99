"""Streams put together: arithmetic, spans, packing, clocks, states."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from streams import D, attention, lively
from torch import nn

from speechattn import tree
from speechattn.attention import SelfAttention, Span, set_span
from speechattn.attention.self_attention import Spanned
from speechattn.encoder import (
    Conformer,
    EfficientConformer,
    Encoder,
    layers,
)  # fmt: skip
from speechattn.frames import Frames
from speechattn.stream import (
    Delay,
    Join,
    Pair,
    Parallel,
    Pointwise,
    Serial,
    Stream,
    flush,
    packed,
    seconds,
)  # fmt: skip
from speechattn.testing import (
    check_stream,
    measure,
    oracle,
    random_frames,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("precise")


def test_a_wrong_declaration_is_found() -> None:
    class Late(layers.Depthwise):
        def plan(self):  # type: ignore[no-untyped-def]
            return super().plan()._replace(left=1)

    stream = lively(Late(D, 5, right=1))
    assert measure(stream, random_frames([40], D)) != stream.plan()
    assert measure(stream, random_frames([40], D)) == layers.Depthwise(D, 5, right=1).plan()


def test_latency_adds_up_and_delays_land_on_the_grid() -> None:
    body = Serial(layers.Depthwise(D, 3, right=1), attention(Span(3, 4, 1)), layers.Depthwise(D, 5, right=2))
    plan = body.plan()
    assert (plan.block, plan.ratio, plan.latency, plan.left, plan.delay) == (4, 1, 10, 8, 10)
    assert body.gaps() == [0, 3, 0]
    assert seconds(body, 25) == (3 + 10) / 25
    assert seconds(attention(Span.full()), 25) == float("inf")
    x = flush(random_frames([5], D), body)
    assert x.mask.shape[1] == 16
    assert x.lengths.tolist() == [5]


def test_parallel_streams_need_one_ratio() -> None:
    with pytest.raises(ValueError, match="ratios 1 and 1/2"):
        Parallel(layers.Depthwise(D, 3), layers.Every(D, D, 2)).plan()


def test_intermediate_outputs_are_those_of_the_shorter_encoder() -> None:
    for span in (Span(5, 2, 1), Span.full()):
        encoder = lively(Conformer(D, D, 3, 2, 12, span=span, kernel=5, conv_right=1))
        assert isinstance(encoder, Encoder)
        x = random_frames([50, 31], D)
        y, (first, last) = encoder.intermediate(x, [0, 2])
        torch.testing.assert_close(y.values, encoder(x).values, rtol=0, atol=1e-12)
        expected = encoder.layers.members[0](encoder.subsample(x))
        torch.testing.assert_close(first.values, expected.values, rtol=0, atol=1e-12)
        assert torch.equal(first.mask, y.mask)
        assert torch.equal(last.mask, y.mask)
    with pytest.raises(ValueError, match="layers \\[3\\]: there are 0 to 2"):
        encoder.intermediate(x, [3])


def test_a_span_is_set_everywhere_at_the_rate_of_each_layer() -> None:
    encoder = EfficientConformer(D, (8, 12), (2, 1), 2, span=Span(6, 3), kernel=3, widening=2, group=3)
    set_span(encoder, Span(3, 6))
    spans = [m.span for m in encoder.modules() if isinstance(m, SelfAttention)]
    assert spans == [Span(2, 4), Span(2, 4), Span(3, 6)]  # two frames each, in groups of three; then whole frames
    with pytest.raises(ValueError, match="divide by the group of 3"):
        set_span(encoder, Span(3, 2))
    with pytest.raises(ValueError, match="cannot look ahead"):
        set_span(encoder, Span(6, 3, 3))
    assert [m.span for m in encoder.modules() if isinstance(m, SelfAttention)] == spans  # all or none
    chunked = Conformer(D, D, 2, 2, 12, span=Span(6, 3), kernel=5, conv_right=None)
    set_span(chunked, Span(4, 5))
    assert {m.span for m in chunked.modules() if isinstance(m, Spanned)} == {Span(4, 5)}
    with pytest.raises(ValueError, match="nothing that a span governs"):
        set_span(layers.Depthwise(D, 3), Span(3, 2))
    check_stream(lively(chunked), random_frames([60, 22], D))


def test_a_long_utterance_is_read_in_pieces_when_no_gradient_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = lively(Conformer(D, D, 2, 2, 12, span=Span(5, 2, 1), kernel=5, conv_right=1))
    x = random_frames([90, 31], D)
    whole, sizes = encoder(x), list[int]()
    monkeypatch.setattr("speechattn.stream.contract.PIECE", 20)
    step = encoder.layers.step
    monkeypatch.setattr(encoder.layers, "step", lambda z, s: (sizes.append(z.mask.shape[1]), step(z, s))[1])
    with torch.no_grad():
        torch.testing.assert_close(encoder(x).values, whole.values.detach(), rtol=0, atol=1e-12)
    assert max(sizes) == 6  # frames at a quarter of the rate, in 24 input frames


@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 2), (2, 0)])
def test_two_clocks_are_joined_in_exact_time(a: int, b: int) -> None:
    sound = Serial(layers.Stack(4, 4), Pointwise(nn.Linear(4 * D, D)), layers.Depthwise(D, 5, right=a))
    lips = Serial(layers.Depthwise(3, 5, right=b), attention_of(3, Span(4, 2)))
    join = Join(lively(sound), lively(lips), rates=(100, 25)).eval()
    assert join.blocks == (8, 2)
    x = Pair(random_frames([37, 12], D), random_frames([9, 9], 3, seed=1))
    y = join(x)
    left, right = oracle(sound, x.first), oracle(lips, x.second)
    n = max(left.mask.shape[1], right.mask.shape[1])
    left, right = left.pad(n - left.mask.shape[1]), right.pad(n - right.mask.shape[1])
    expected = Frames(torch.cat([left.values, right.values], -1), left.mask | right.mask)
    assert torch.equal(y.mask, expected.mask)
    torch.testing.assert_close(y.values, expected.values, rtol=0, atol=1e-12)
    state, outputs = join.init_state(x), []
    steps = 2 + max(-(-37 // 8), -(-9 // 2)) + join.delay
    x = Pair(x.first.pad(8 * steps - 37), x.second.pad(2 * steps - 9))
    for i in range(steps):
        piece, state = join.step(Pair(x.first[8 * i : 8 * i + 8], x.second[2 * i : 2 * i + 2]), state)
        outputs.append(piece)
    z = Frames.cat(outputs)[join.delay : join.delay + n]
    torch.testing.assert_close(z.values, y.values, rtol=0, atol=1e-12)


def attention_of(dim: int, span: Span) -> SelfAttention:
    return SelfAttention(dim, 1, span)


def test_clocks_that_do_not_meet_are_refused() -> None:
    with pytest.raises(ValueError, match="outputs at 25 and 30 frames a second"):
        Join(layers.Every(D, D, 4), Delay(0), rates=(100, 30))
    assert Join(layers.Every(D, D, 4), Delay(0), rates=(100, 25)).blocks == (4, 1)
    assert Join(Delay(0), Delay(0), rates=(Fraction(30000, 1001), Fraction(30000, 1001))).blocks == (1, 1)


def test_packed_utterances_are_those_alone_and_cost_follows_their_total() -> None:
    encoder = lively(Conformer(D, D, 2, 2, 12, span=Span(5, 2, 1), kernel=5, conv_right=1))
    lengths = [31, 0, 90, 7, 260, 64, 65]
    utterances = [random_frames([n], D, seed=n) for n in lengths]
    steps, step = list[int](), encoder.step
    encoder.step = lambda x, s: (steps.append(x.mask.numel()), step(x, s))[1]  # type: ignore[method-assign]
    found = packed(encoder, utterances, rows=3, piece=16)
    assert sum(steps) <= sum(n + encoder.latency + 16 for n in lengths) + 3 * 16
    for x, y in zip(utterances, found, strict=True):
        expected = oracle(encoder, x)
        assert torch.equal(y.mask, expected.mask)
        torch.testing.assert_close(y.values, expected.values, rtol=0, atol=1e-9)
    leaf = utterances[2].values.clone().requires_grad_()
    grads = [
        torch.autograd.grad(y.values.square().sum(), leaf)[0]
        for y in (encoder(Frames(leaf, utterances[2].mask)), packed(encoder, [Frames(leaf, utterances[2].mask)])[0])
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-9)
    assert packed(encoder, []) == []
    with pytest.raises(ValueError, match="needs all that came before"):
        packed(attention(Span.causal()), utterances)
    with pytest.raises(ValueError, match="one row"):
        packed(encoder, [random_frames([3, 4], D)])


def test_a_state_that_is_used_twice_spoils_neither() -> None:
    """States are written in place where no gradient is asked, but the room behind one is given away only once."""
    encoder = lively(Conformer(D, D, 2, 2, 12, span=Span(5, 2), kernel=5))
    one, two = random_frames([64], D), random_frames([64], D, seed=1)
    with torch.no_grad():
        _, begun = encoder.step(one[:16], encoder.init_state(one))
        _, first = encoder.step(one[16:32], begun)
        _, second = encoder.step(two[16:32], begun)
        for state, x in ((first, one), (second, Frames.cat([one[:16], two[16:]]))):
            y, _ = encoder.step(x[32:48], state)
            torch.testing.assert_close(y.values, encoder(x).values[:, 8:12], rtol=0, atol=1e-12)


def memory(state: object) -> int:
    """Bytes that a state keeps alive."""
    stores = [leaf.untyped_storage() for leaf in tree.leaves(state)]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def test_memory_of_a_running_state_is_bounded() -> None:
    encoder = lively(Conformer(D, D, 2, 2, 12, span=Span(5, 2), kernel=5))
    x, held = random_frames([16], D), list[int]()
    with torch.inference_mode():
        state = encoder.init_state(x)
        for _ in range(40):
            _, state = encoder.step(x, state)
            held.append(memory(state))
        _, after = encoder.step(random_frames([1600], D), state)
    assert max(held[20:]) == max(held[:20])
    assert memory(after) < 4 * max(held)  # what a long step read is not kept
    y, _ = encoder.step(x, state)  # a state of inference mode goes on outside of it
    assert y.values.isfinite().all()


def test_mutants_are_noticed() -> None:
    """The laws can fail: every broken copy of the package is noticed, the unbroken one is not."""
    script = Path(__file__).with_name("mutants.py")
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    lines = found.stdout.splitlines()
    assert len(lines) >= 15, found.stderr
    assert [line.split("  ")[0] for line in lines] == ["ALIVE", *["noticed"] * (len(lines) - 1)], found.stdout


def test_a_batch_of_none_and_a_step_of_nothing() -> None:
    encoder = lively(Conformer(D, D, 1, 2, 12, span=Span(5, 2), kernel=5))
    nobody = Frames(torch.zeros(0, 40, D), torch.zeros(0, 40, dtype=torch.bool))
    assert encoder(nobody).values.shape == (0, 10, D)
    x = random_frames([32], D)
    y, state = encoder.step(x[:16], encoder.init_state(x))
    with torch.no_grad():
        encoder.step(x[:0], state)
    z, _ = encoder.step(x[16:], state)
    (y.values.sum() + z.values.sum()).backward()  # the step of nothing left the graph alone


def test_streams_of_different_validity_side_by_side_are_zero_where_one_is_not() -> None:
    pair = Parallel(layers.Depthwise(D, 3), layers.Stack(3, 1, right=2))
    pair.second.whole = True  # type: ignore[assignment]
    check_stream(lively(Serial(pair, layers.Depthwise(4 * D, 3, right=1))), random_frames([20, 9], D))
    assert not packed(layers.Depthwise(D, 3), [random_frames([0], D), random_frames([5], D)])[0].mask.numel()


def test_a_step_compiles_without_a_break() -> None:
    stream = lively(Serial(layers.Depthwise(D, 3), attention(Span(2, 4))))
    x = random_frames([8], D)
    with torch.no_grad():
        program = torch.export.export(Whole(stream), (x[:4], stream.init_state(x)), strict=True)
        y, _ = program.module()(x[:4], stream.init_state(x))
        expected, _ = stream.step(x[:4], stream.init_state(x))
    torch.testing.assert_close(y.values, expected.values, rtol=0, atol=1e-12)


class Whole(nn.Module):
    """`step` as a module."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, x: Frames, state: object) -> object:
        return self.stream.step(x, state)
