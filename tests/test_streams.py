"""Every stream of the package obeys the laws."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
from torch import nn

import speechattn
from speechattn.attention import Alibi, Blocks, Bucketed, Relative, Rotary, SelfAttention, Span, set_span
from speechattn.attention.self_attention import Spanned
from speechattn.audio.normal import GlobalCMVN
from speechattn.audio.spectrum import CentredLogMel, KaldiFbank, LogMel
from speechattn.encoder import (
    Conformer,
    EBranchformer,
    EfficientConformer,
    Encoder,
    LabelEncoder,
    Transformer,
    branchformer,
    conformer,
    efficient,
    layers,
    transformer,
)  # fmt: skip
from speechattn.frames import Frames
from speechattn.pretrained.espnet.legacy import Whole
from speechattn.pretrained.whisper import model as whisper
from speechattn.pretrained.whisper.features import FrontEnd
from speechattn.stream import (
    Delay,
    Join,
    Pair,
    Parallel,
    Planned,
    Pointwise,
    Residual,
    Serial,
    Sliding,
    Stream,
    flush,
    packed,
    seconds,
)  # fmt: skip
from speechattn.testing import (
    check_export,
    check_stream,
    measure,
    needed_delay,
    oracle,
    random_frames,
)  # fmt: skip

D = 8
BASES = {Stream, Planned, Sliding, Spanned}


@pytest.fixture(autouse=True)
def precise() -> Iterator[None]:
    """Laws are checked in float64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lively(stream: Stream) -> Stream:
    """No parameter stays at a value that hides something, and no activation is flat."""
    for part in stream.modules():
        if isinstance(part, Pointwise) and isinstance(part.f, nn.ReLU):
            part.f = nn.Softplus()
    for name, parameter in stream.named_parameters():
        mean = 1.0 if ("norm" in name and "weight" in name) or ("conv" in name and "bias" in name) else 0.0
        torch.nn.init.normal_(parameter, mean, 0.4)
    return stream.eval()


def attention(span: Span | Blocks, **options: object) -> SelfAttention:
    return SelfAttention(D, 2, span, **options)  # type: ignore[arg-type]


def block(**options: object) -> Stream:
    return conformer.ConformerBlock(D, 2, 12, Span(5, 4), layers.Depthwise(D, 3), position=Relative(D, 2))


FRONT = Pointwise(nn.Identity())
MAKERS: dict[type[Stream], list[Callable[[], Stream]]] = {
    Delay: [lambda: Delay(3), lambda: Delay(0)],
    Pointwise: [lambda: Pointwise(nn.Linear(D, 5))],
    Serial: [
        lambda: Serial(layers.Depthwise(D, 3, right=1), attention(Span(3, 4, 1)), layers.Depthwise(D, 5, right=2)),
        lambda: Serial(Delay(1), layers.Stack(3, 2), Delay(1), Pointwise(nn.Linear(3 * D, D)), attention(Span(2, 3))),
        lambda: Serial(attention(Span.full()), layers.Depthwise(D, 3, right=1)),
        lambda: Serial(layers.Depthwise(D, 3, right=1), attention(Blocks(3, ((True,) * 9,) * 9))),
        lambda: Serial(),
    ],
    Parallel: [lambda: Parallel(layers.Depthwise(D, 5, right=2), attention(Span(3, 4))),
               lambda: Parallel(attention(Span.full()), layers.Depthwise(D, 5, right=2))],
    Residual: [lambda: Residual(layers.Depthwise(D, 5, right=2), scale=0.5),
               lambda: Residual(layers.Depthwise(D, 5, stride=2), skip=layers.Every(D, D, 2)),
               lambda: Residual(layers.Depthwise(D, 2), skip=layers.Depthwise(D, 5, right=2))],
    SelfAttention: [
        lambda: attention(Span.full(), position=Relative(D, 2)),
        lambda: attention(Span.causal(), position=Relative(D, 2)),
        lambda: attention(Span.causal(), position=Bucketed(D, 2, buckets=8, farthest=16)),
        lambda: attention(Span.sliding(4, 2), position=Rotary(D, 2)),
        lambda: attention(Span.chunked(6, 4, right=3), position=Relative(D, 2)),
        lambda: attention(Span.chunked(None, 3, right=2), position=Alibi(D, 2)),
        lambda: attention(Span.dilated(6, 3), position=Bucketed(D, 2, buckets=8, farthest=16)),
        lambda: attention(Span.sliding(3, sinks=2), position=Relative(D, 2)),
        lambda: attention(Span(5, 4, 2, 2, 3), position=Alibi(D, 2)),
        lambda: attention(Span.chunked(4, 2), position=Rotary(D, 2), key_heads=1),
        lambda: attention(Span.chunked(4, 2), position=Relative(3 * D, 2), group=3),
        lambda: attention(Span.full(), group=3),
        lambda: attention(Blocks(6, tuple(tuple((i + j) % 3 != 1 for j in range(6)) for i in range(6)))),
    ],
    layers.Depthwise: [lambda: layers.Depthwise(D, 5), lambda: layers.Depthwise(D, 5, right=3),
                       lambda: layers.Depthwise(D, 4, right=2, stride=3), lambda: layers.Depthwise(D, 1)],
    layers.ChunkDepthwise: [lambda: layers.ChunkDepthwise(D, 5, Span(3, 4)),
                            lambda: layers.ChunkDepthwise(D, 5, Span.full())],
    layers.Conv2d: [lambda: layers.Conv2d(1, 3, 3, 2, right=1), lambda: layers.Conv2d(1, 3, 3, 2, right=2, whole=True),
                    lambda: layers.Conv2d(1, 3, 5, 3, right=4, whole=True)],
    layers.Stack: [lambda: layers.Stack(4, 3), lambda: layers.Stack(2, 3), lambda: layers.Stack(4, 1)],
    layers.Every: [lambda: layers.Every(D, 4, 3)],
    layers.Subsample: [lambda: layers.Subsample(D, 6, factor=2), lambda: layers.Subsample(D, 6, factor=4),
                       lambda: layers.Subsample(11, 6, factor=6), lambda: layers.Subsample(15, 6, factor=8),
                       lambda: layers.Subsample(11, 6, factor=6, whole=True)],
    conformer.ConformerBlock: [block],
    branchformer.Gate: [lambda: branchformer.Gate(D // 2, layers.Depthwise(D // 2, 5, right=2))],
    branchformer.EBranchformerBlock: [lambda: branchformer.EBranchformerBlock(
        D, 2, 12, 6, Span(5, 4, 1), layers.Depthwise(6, 5, right=1), layers.Depthwise(2 * D, 3, right=1),
        position=Relative(D, 2))],
    efficient.EfficientConformerBlock: [lambda: efficient.EfficientConformerBlock(
        D, 2, 12, Span(4, 2), kernel=3, stride=2, outputs=6, group=3, position=Relative(3 * D, 2))],
    transformer.TransformerBlock: [lambda: transformer.TransformerBlock(
        D, 4, 12, Span.sliding(4, 1), position=Relative(D, 4), key_heads=2)],
    Encoder: [lambda: Encoder(FRONT, [block(), block()], Pointwise(nn.LayerNorm(D)), dim=D)],
    Conformer: [lambda: Conformer(D, D, 2, 2, 12, span=Span(5, 2), kernel=3),
                lambda: Conformer(D, D, 2, 2, 12, span=Span(5, 2, 1), kernel=5, conv_right=1, macaron=False),
                lambda: Conformer(D, D, 1, 2, 12, span=Span.full(), kernel=5, conv_right=None),
                lambda: Conformer(11, D, 1, 2, 12, span=Span(2, 2), kernel=5, conv_right=None, factor=6)],
    Transformer: [lambda: Transformer(D, D, 2, 2, 12, span=Span.sliding(4, 2)),
                  lambda: Transformer(D, D, 2, 2, 12, span=Span.sliding(3, sinks=2), position=Rotary)],
    LabelEncoder: [lambda: LabelEncoder(7, D, 2, 2, 12, left=3), lambda: LabelEncoder(7, D, 2, 2, 12)],
    EBranchformer: [lambda: EBranchformer(D, D, 2, 2, 12, span=Span(5, 2), kernel=3, gate=6),
                    lambda: EBranchformer(D, D, 1, 2, 12, span=Span(2, 2, 1), kernel=3, gate=6, conv_right=1)],
    LogMel: [lambda: LogMel(4, rate=1600, window=40, hop=16), lambda: LogMel(4, rate=1600, window=10, hop=16)],
    CentredLogMel: [lambda: CentredLogMel(4, rate=1600, window=40, hop=16)],
    KaldiFbank: [lambda: KaldiFbank(4, rate=1600, window=40, hop=16)],
    GlobalCMVN: [lambda: GlobalCMVN(torch.randn(D), torch.rand(D) + 0.5)],
    EfficientConformer: [lambda: EfficientConformer(
        D, (8, 12), (2, 1), 2, span=Span(6, 3), kernel=3, widening=2, group=3)],
}  # fmt: skip
CASES = [pytest.param(make, id=f"{kind.__name__}-{i}") for kind, makers in MAKERS.items()
         for i, make in enumerate(makers)]  # fmt: skip


def subclasses(kind: type) -> set[type]:
    return {kind} | {inner for sub in kind.__subclasses__() for inner in subclasses(sub)}


def test_no_stream_is_forgotten() -> None:
    for module in pkgutil.walk_packages(speechattn.__path__, "speechattn."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    mine = {kind for kind in subclasses(Stream) if kind.__module__.startswith("speechattn.")}
    assert mine - BASES - ELSEWHERE == set(MAKERS)


# Whisper's front-end is a CentredLogMel with its numbers; the two others are checked beside their models, because they
# are no stream that could be cut (and the length of what `Whole` gives depends on the data).
ELSEWHERE = {FrontEnd, whisper.Encoder, Whole}


@oracle.register
def mirrored(stream: CentredLogMel, x: Frames) -> Frames:
    """Each row with its mirror image in front and zeros behind."""
    side, hop = stream.kernel - 1 - stream.right, stream.block or 1
    outs, rows = -(-x.mask.shape[1] // hop), []
    for values, length in zip(x.values, x.lengths.tolist(), strict=True):
        row = values[:length]
        image = torch.stack([row[i] if i < length else row.new_zeros(()) for i in range(side, 0, -1)])
        row = torch.cat([image, row, row.new_zeros(stream.kernel + outs * hop)])
        rows.append(stream.windows(row[None])[0, :outs])
    return Frames.of(torch.stack(rows), x.mask[:, ::hop])


def features(stream: Stream) -> tuple[tuple[int, ...], int | None]:
    """Shape of one frame of its input, and the vocabulary if it reads labels."""
    if isinstance(stream, LogMel | KaldiFbank):
        return (), None
    if isinstance(stream, LabelEncoder):
        return (), 7
    for part in stream.modules():
        if isinstance(part, layers.Conv2d):
            linear = [m for m in stream.modules() if isinstance(m, layers.Subsample)]
            return ({2: 8, 4: 8, 6: 11, 8: 15}[int(1 / linear[0].ratio)] if linear else 8,), None
    return (D,), None


@pytest.mark.parametrize("make", CASES)
def test_laws(make: Callable[[], Stream]) -> None:
    stream = lively(make())
    shape, vocab = features(stream)
    check_stream(stream, random_frames([26, 0, 19], *shape, vocab=vocab), seed=1)


@pytest.mark.parametrize("make", CASES)
def test_every_step_is_exported(make: Callable[[], Stream]) -> None:
    stream = lively(make())
    shape, vocab = features(stream)
    block = stream.plan().block or 9
    check_export(stream, random_frames([3 * block, 2 * block], *shape, vocab=vocab))


@pytest.mark.parametrize("make", CASES)
def test_declared_numbers_are_the_measured_ones(make: Callable[[], Stream]) -> None:
    stream = lively(make())
    plan = stream.plan()
    if plan.block is None or not list(stream.children()):
        return
    shape, vocab = features(stream)
    frames = plan.block * (16 + (2 * (plan.left or 30) + 5 * plan.latency) // plan.block)
    x = random_frames([frames], *shape, vocab=vocab)
    assert measure(stream, x) == plan
    least = needed_delay(stream, x)
    parts = [part for part in stream.modules() if isinstance(part, Stream) and part.plan().latency]
    assert least == plan.delay if len(parts) <= 1 and type(stream) is not Delay else least <= plan.delay


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
