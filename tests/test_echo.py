"""Echo-MSA: windows of several sizes beside self-attention, and the gate between them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from speechattn.attention import Alibi, Relative, SelfAttention, Span, set_span
from speechattn.attention.echo import EchoAttention, Gated, Scale, Together
from speechattn.encoder import Conformer
from speechattn.frames import Frames
from speechattn.stream import Plan, Stream
from speechattn.testing import check_export, check_stream, measure, oracle, random_frames, stepped

pytestmark = pytest.mark.usefixtures("precise")
D = 8
WINDOWS = (Span.sliding(2), Span.sliding(3, 2), Span.chunked(0, 4))
SPANS = [Span.full(), Span.causal(), Span.chunked(4, 2, right=3)]


def made(span: Span, **options: object) -> EchoAttention:
    layer = EchoAttention(D, 2, span, **options)  # type: ignore[arg-type]
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, 1.0 if name == "norm.f.weight" else 0.0, 0.5)
    return layer.eval()


def scales(stream: Stream) -> list[Stream]:
    return [*scales(stream.first), *scales(stream.second)] if isinstance(stream, Together) else [stream]


def gated(layer: EchoAttention) -> Gated:
    part = layer.members[-1]
    assert isinstance(part, Gated)
    return part


@oracle.register
def together(stream: Together, x: Frames) -> Frames:
    """The sum of all windows."""
    return Frames.of(sum(oracle(scale, x).values for scale in scales(stream)), x.mask)  # type: ignore[arg-type]


@oracle.register
def by_definition(stream: Gated, x: Frames) -> Frames:
    """Feature by feature."""
    main = oracle(stream.first, x).values
    windows = scales(stream.second)
    echo = torch.stack([oracle(scale, x).values for scale in windows]).sum(0) / len(windows)
    weight, bias = stream.gate.weight, stream.gate.bias
    score = main @ weight[:, :D].T + echo @ weight[:, D:].T + bias
    gate = 1 / (1 + (-score).exp())
    return Frames.of(gate * main + echo - gate * echo, x.mask)


@pytest.mark.parametrize("span", SPANS)
def test_laws(span: Span) -> None:
    layer = made(span, position=Relative(D, 2), norm=nn.LayerNorm(D), windows=WINDOWS)
    check_stream(layer, random_frames([22, 0, 9], D))


def test_laws_with_shared_keys_and_one_window() -> None:
    check_stream(made(Span.chunked(4, 2), position=Alibi(D, 2), key_heads=1, windows=[Span.sliding(5)]),
                 random_frames([17, 8], D))  # fmt: skip


@pytest.mark.parametrize("span", SPANS)
def test_a_gate_of_one_is_the_attention_alone_bit_for_bit(span: Span) -> None:
    norm = nn.LayerNorm(D)
    layer = made(span, position=Relative(D, 2), norm=norm, windows=WINDOWS)
    alone = SelfAttention(D, 2, span, position=Relative(D, 2), norm=norm).eval()
    gate = gated(layer)
    alone.load_state_dict({**gate.first.state_dict(), **{f"norm.{k}": v for k, v in norm.state_dict().items()}})
    x = random_frames([40, 13], D)
    assert (layer(x).values - alone(x).values).abs().max() > 0.01
    nn.init.zeros_(gate.gate.weight)
    nn.init.constant_(gate.gate.bias, 100.0)
    assert torch.equal(layer(x).values, alone(x).values)
    if span.chunk is not None:
        assert torch.equal(stepped(layer, x, [12] * 4).values, stepped(alone, x, [12] * 4).values)


def test_windows_that_hold_the_utterance_are_full_attention() -> None:
    windows = [Span.sliding(40, 40), Span.chunked(0, 40), Span.chunked(12, 45)]
    layer = made(Span.sliding(2), windows=windows)
    gate = gated(layer)
    nn.init.zeros_(gate.gate.weight)
    nn.init.constant_(gate.gate.bias, -100.0)
    full = SelfAttention(D, 2, Span.full())
    for scale in scales(gate.second):
        scale.load_state_dict(full.state_dict())
    x = random_frames([40, 13], D)
    torch.testing.assert_close(layer(x).values, full(x).values, rtol=0, atol=1e-12)
    alone = made(Span.sliding(2), windows=[Span.sliding(38, 40)])
    alone.load_state_dict({k: v for k, v in layer.state_dict().items() if ".second." not in k}
                          | {f"echo.second.{k}": v for k, v in full.state_dict().items()})  # fmt: skip
    assert (alone(x).values - full(x).values).abs().max() > 1e-4  # one frame less


def test_block_latency_and_history_follow_from_the_spans() -> None:
    layer = made(Span.chunked(4, 2, right=3), windows=[Span.sliding(9, 1), Span.chunked(0, 6)])
    assert layer.plan() == Plan(6, layer.plan().ratio, 4, 9, 4)
    assert measure(layer, random_frames([120], D)) == layer.plan()
    assert made(Span.causal()).plan().latency == 0  # by default windows look back
    assert made(Span.causal()).plan().block == 1
    assert made(Span.sliding(6, 1)).plan().left == 63
    assert made(Span.full()).plan().block is None


@pytest.mark.parametrize("span", SPANS[:2])
def test_every_step_is_exported(span: Span) -> None:
    check_export(made(span, position=Relative(D, 2), windows=WINDOWS[:2]), random_frames([9, 7], D))


def test_a_span_from_outside_leaves_the_windows_alone() -> None:
    layer = made(Span.chunked(4, 2), windows=WINDOWS)
    set_span(layer, Span.chunked(6, 3))
    assert [m.span for m in layer.modules() if type(m) is SelfAttention] == [Span.chunked(6, 3)]
    assert [m.span for m in layer.modules() if isinstance(m, Scale)] == list(WINDOWS)
    assert layer.plan().block == 12


def test_an_encoder_learns_all_of_it() -> None:
    maker = partial(EchoAttention, windows=[Span.sliding(2), Span.sliding(6)])
    stream = Conformer(D, D, 2, 2, 12, span=Span.chunked(4, 2), kernel=3, attention=maker).eval()
    x = random_frames([90, 60], D)
    torch.testing.assert_close(stepped(stream, x).values, stream(x).values, rtol=0, atol=1e-9)
    stream.train()(x).values.square().sum().backward()
    assert all(p.grad is not None for p in stream.parameters())
    spans = [m.position for m in stream.modules() if isinstance(m, SelfAttention)]
    assert len({id(position) for position in spans}) == 6  # each has its own


def test_without_windows_there_is_no_echo() -> None:
    with pytest.raises(ValueError, match="at least one"):
        made(Span.causal(), windows=[])
