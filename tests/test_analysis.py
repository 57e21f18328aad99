"""Attention, looked at: weights, statistics, rollout and flow, saliency."""

from __future__ import annotations

import copy
import re
from functools import partial
from itertools import product
from math import log
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn.analysis import cross_weights, encoder_weights, flow, half_explanation, rollout, self_weights
from speechattn.analysis.saliency import Reading, gradients, integrated, pearson, pooled, relevance, smoothed
from speechattn.analysis.statistics import (
    centres,
    coverage,
    distance,
    entropy,
    first_share,
    head_importance,
    massive,
    monotonicity,
    received,
    sink_share,
    sinks,
    support,
)
from speechattn.analysis.weights import attention_layers, gated, layer_weights
from speechattn.attention import Alibi, Blocks, Pattern, Relative, Rotary, SelfAttention, Span
from speechattn.attention.duo import DuoAttention, hardened, split
from speechattn.cross.monotonic import HardMonotonic
from speechattn.cross.segmental import SegmentAttention, Within
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.segmental import NoLength, Segmental
from speechattn.encoder import Conformer, EBranchformer, EfficientConformer
from speechattn.errors import InputError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer, load_model
from speechattn.pretrained.whisper import WhisperModel
from speechattn.stream import Pointwise, Stream
from speechattn.testing import random_frames

D, H = 12, 2
ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "tests" / "digits"
SPANS: list[Pattern] = [
    Span.full(), Span.causal(), Span.sliding(3, 2), Span.chunked(4, 4, right=3), Span.dilated(6, 2),
    Span.sliding(2, sinks=2), Span(4, 4, 2, 1, 2), Blocks(4, ((True, False, False), (True,) * 3, (False, True, True))),
]  # fmt: skip


def random(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network.eval()


def close(a: Tensor, b: Tensor | list[float] | float, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol)


def stochastic(*shape: int) -> Tensor:
    return torch.randn(*shape).softmax(-1)


# --- weights


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("kind", [None, Relative, Rotary, Alibi], ids=str)
def test_weights_and_values_are_the_layer(span: Pattern, kind: type | None, precise: None) -> None:
    position = kind and kind(D, H)
    layer = SelfAttention(D, H, span, position=position, key_heads=1, norm=nn.LayerNorm(D))
    random(layer)
    x = random_frames([11, 7], D)
    weights = self_weights(layer, x)
    close(weights.sum(-1), x.mask[:, None].expand(-1, H, -1).double())
    assert not weights[1, :, :, 7:].any()
    values = layer.qkv(layer.norm(x.values))[..., -D // H :]  # type: ignore[misc]
    said = layer.out(torch.cat([weights[:, h] @ values for h in range(H)], -1))
    close(said * x.mask[..., None], layer(x).values)
    close(gated(layer, x, torch.ones(2, H)).values, layer(x).values)


def test_weights_are_the_softmax_of_the_scores(precise: None) -> None:
    layer = SelfAttention(D, H, Span.causal())
    random(layer)
    x = random_frames([6], D)
    q, k, _ = (y.unflatten(-1, (H, D // H)).transpose(1, 2) for y in layer.qkv(x.values).chunk(3, -1))
    scores = (q @ k.mT / (D // H) ** 0.5).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    close(self_weights(layer, x), scores.softmax(-1))
    assert self_weights(layer, x[:0]).shape == (1, H, 0, 0)


def test_grouped_frames_look_at_groups(precise: None) -> None:
    layer = SelfAttention(D, H, Span.chunked(6, 6), position=Relative(3 * D, H), group=3)
    random(layer)
    x = random_frames([11, 4], D)
    weights = self_weights(layer, x)
    assert weights.shape == (2, H, 4, 4)
    close(weights.sum(-1)[1, 0], [1, 1, 0, 0])
    close(gated(layer, x, torch.ones(2, H)).values, layer(x).values)


def test_a_layer_that_looks_nowhere_is_named() -> None:
    class Other(SelfAttention):
        def step(self, x, state):  # type: ignore[no-untyped-def]
            return x, state

    with pytest.raises(ValueError, match=r"Other does not say where it looks: it needs a method weights"):
        self_weights(Other(D, H, Span.full()), random_frames([3], D))
    with pytest.raises(ValueError, match="Pointwise has no self-attention whose weights"):
        encoder_weights(Pointwise(nn.Identity()), random_frames([3], D))
    with pytest.raises(ValueError, match="Pointwise has no self-attention whose heads"):
        head_importance(Pointwise(nn.Identity()), random_frames([3], D), lambda y: y.values.sum((1, 2)))


class Mean(Stream):
    """Everybody sees all: an attention of another kind."""

    block = None

    def weights(self, x: Frames) -> Tensor:
        return (x.mask[:, None, None] & x.mask[:, None, :, None]) / x.lengths[:, None, None, None]

    def step(self, x, state):  # type: ignore[no-untyped-def]
        return Frames.of(self.weights(x)[:, 0] @ x.values, x.mask), self._spend(state)


def encoders() -> list[Stream]:
    return [
        Conformer(D, D, 2, H, 8, span=Span(4, 2), kernel=3), Conformer(D, D, 2, H, 8, span=Span.full(), kernel=3),
        EBranchformer(D, D, 2, H, 8, span=Span(2, 2, 1), kernel=3),
        EfficientConformer(D, (D, D), (1, 1), H, span=Span(6, 6), kernel=3, group=3),
    ]  # fmt: skip


@pytest.mark.parametrize("encoder", encoders(), ids=lambda e: type(e).__name__)
def test_every_layer_of_an_encoder_and_nothing_is_touched(encoder: Stream, precise: None) -> None:
    random(encoder.double())
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    x = random_frames([60, 41], D)
    with torch.inference_mode():  # what it caches there must not get into our way
        encoder(x)
    found = encoder_weights(encoder, x)
    layers = attention_layers(encoder)
    assert [one.name for one in found] == list(layers)
    for one in found:
        close(one.weights, self_weights(layers[one.name], one.input))
    assert encoder.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    x0 = found[0].input  # what the first layer was given is what the network gives it: the copy is the network
    top = found[-1].input
    assert x0.mask.shape[1] >= top.mask.shape[1] > 0
    assert not found[-1].weights.requires_grad


def test_the_copy_says_what_the_network_says(precise: None) -> None:
    encoder = encoders()[1].double()
    random(encoder)
    x = random_frames([60, 41], D)
    said: list[Frames] = []
    layer_weights(encoder, lambda twin: said.append(twin(x)))
    close(said[0].values, encoder(x).values)


def test_an_attention_of_another_kind_may_say_where_it_looks() -> None:
    found = encoder_weights(nn.Sequential(Mean()), random_frames([4, 2], D))  # type: ignore[arg-type]
    close(found[0].weights[1, 0, 0], [0.5, 0.5, 0, 0])


def test_cross_weights_are_those_of_each_head(precise: None) -> None:
    decoder = AttentionDecoder.soft(9, 20, D, H, 3)
    random(decoder)
    memory = Memory.of(random_frames([7, 5], D), finished=True)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = cross_weights(decoder, memory, tokens)
    assert found.shape == (2, 3, H, 3, 7)
    for layer, head in product(range(3), range(H)):
        _, seen, _ = decoder.step(tokens, decoder.start(memory), heads=[(layer, head)])
        close(found[:, layer, head], seen[:, 0])


def test_heads_that_were_split_are_one_layer(precise: None) -> None:
    encoder = Conformer(D, D, 2, H, 8, span=Span(None, 2), kernel=3, attention=partial(DuoAttention, left=2, sinks=1))
    random(encoder.double())
    layers = [module for module in encoder.modules() if isinstance(module, DuoAttention)]
    for layer, gates in zip(layers, ([0, 1], [1, 0]), strict=True):
        layer.gates.data = torch.tensor(gates).double()
    x = random_frames([60, 41], D)
    found, whole = encoder_weights(split(encoder, 0.5), x), encoder_weights(hardened(encoder, 0.5), x)
    assert [one.name for one in found] == [f"layers.{i}.attention.first.heads" for i in range(2)]
    assert [one.weights.shape[1] for one in found] == [H, H]
    close(found[0].weights, whole[0].weights.flip(1))  # those that see everything come first
    close(rollout([one.weights for one in found]), rollout([one.weights for one in whole]))


# --- statistics


def test_statistics_of_known_heads(precise: None) -> None:
    uniform, own = torch.full((4, 4), 0.25), torch.eye(4)
    first = torch.zeros(4, 4)
    first[:, 0] = 1
    weights = torch.stack([uniform, own, first])[None]
    close(entropy(weights)[0], [log(4), 0, 0])
    close(distance(weights)[0], [1.25, 0, 1.5])
    close(support(weights)[0], [4, 1, 1])
    close(support(weights, above=0.3)[0], [0, 1, 1])
    close(first_share(weights, 1)[0], [0.25, 0.25, 1])
    close(received(weights)[0], torch.tensor([[0.25] * 4, [0.25] * 4, [1, 0, 0, 0]]))
    assert sinks(weights, threshold=0.3).tolist() == [[True, False, False, False]]
    close(sink_share(weights, threshold=0.3)[0], [0.25, 0.25, 1])


def test_frames_that_are_not_there_count_nowhere(precise: None) -> None:
    weights = stochastic(1, H, 5, 5)
    padded = torch.zeros(1, H, 8, 8)
    padded[:, :, :5, :5] = weights
    for statistic in (entropy, distance, support, first_share, sink_share):
        close(statistic(padded), statistic(weights))  # type: ignore[operator]
    close(received(padded)[..., :5], received(weights))


def test_a_causal_key_is_judged_by_those_who_may_see_it(precise: None) -> None:
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    weights = (torch.tensor([[0.0, 0, 0, 1]]).repeat(4, 1) * allowed).double()[None, None]
    weights[..., 0] += 1 - weights.sum(-1)
    close(received(weights, allowed=allowed)[0, 0], [0.75, 0, 0, 1])
    assert sinks(weights, threshold=0.8, allowed=allowed)[0].tolist() == [False, False, False, True]
    assert sinks(weights, threshold=0.8)[0].tolist() == [False] * 4


def test_planted_massive_activations_are_found_and_nothing_else() -> None:
    x = random_frames([20, 15], 16)
    x.values[0, 7, 3], x.values[0, 0, 3] = -4000.0, 3000.0
    x.values[1, 17, 2] = 9000.0  # behind the end of its row
    x.values[1, 2, 2] = 90.0  # not large enough
    assert massive(x).nonzero().tolist() == [[0, 0, 3], [0, 7, 3]]


def test_the_importance_of_a_head_is_the_gradient_of_its_gate(precise: None) -> None:
    encoder = encoders()[0].double()
    random(encoder)
    x = random_frames([40, 29, 33], D)

    def losses(y: Frames) -> Tensor:
        return y.values.square().sum((1, 2))

    found = head_importance(encoder, x, losses)
    layers = attention_layers(encoder)
    assert list(found) == list(layers)
    for name, layer in layers.items():
        each = []
        for row in range(3):  # the gate scales the columns of the output projection that belong to the head
            assert isinstance(layer, SelfAttention)
            one = Frames(x.values[row : row + 1], x.mask[row : row + 1])
            (grad,) = torch.autograd.grad(losses(encoder(one)).sum(), layer.out.weight)
            each.append((grad * layer.out.weight).unflatten(1, (H, -1)).sum((0, 2)).abs())
        close(found[name], torch.stack(each).mean(0), 1e-7)


def test_a_gate_of_zero_removes_the_head(precise: None) -> None:
    layer = SelfAttention(D, H, Span(2, 2, 1), position=Relative(D, H))
    random(layer)
    without = copy.deepcopy(layer)
    without.out.weight.data[:, D // H :] = 0
    x = random_frames([9, 6], D)
    close(gated(layer, x, torch.tensor([[1.0, 0.0]]).repeat(2, 1)).values, without(x).values)


def test_alignments_that_go_forward_and_back(precise: None) -> None:
    forward = torch.eye(6)[[0, 2, 2, 5]]
    close(centres(forward), [0, 2, 2, 5])
    close(monotonicity(forward), 1.0)
    close(monotonicity(forward[[0, 3, 1]]), 0.5)
    close(monotonicity(forward[:1]), 1.0)
    close(coverage(torch.eye(6)), 1.0)
    close(coverage(forward[:1].repeat(3, 1)), 1 / 6)
    close(coverage(torch.eye(6)[[0, 3]]), 2 / 6)


def test_tokens_that_look_nowhere(precise: None) -> None:
    forward, nowhere = torch.eye(6)[[0, 2, 2, 5]], torch.zeros(1, 6)
    close(monotonicity(torch.cat([nowhere, forward[:2], nowhere, nowhere, forward[2:], nowhere])), 1.0)
    rows = torch.stack([torch.cat([forward[[3]], nowhere, forward[[0]]]), nowhere.repeat(3, 1)])
    close(monotonicity(rows), [0.0, 1.0])
    close(coverage(torch.stack([nowhere, forward[:1]])), [0.0, 1 / 6])
    close(coverage(torch.zeros(2, 3, 0)), [0.0, 0.0])


# --- rollout and flow


def test_rollout_by_hand(precise: None) -> None:
    own, uniform = torch.eye(3)[None, None], torch.full((1, 1, 3, 3), 1 / 3)
    close(rollout([own, own]), own[:, 0])
    close(rollout([uniform, uniform], residual=0.0), uniform[:, 0])
    low = torch.tensor([[1.0, 0], [1.0, 0]])[None, None]
    high = torch.tensor([[[[0, 1.0], [0, 1.0]], [[1.0, 0], [0, 1.0]]]])  # mean of two heads: [[.5, .5], [0, 1]]
    # low: [[1, 0], [.5, .5]]; high: [[.75, .25], [0, 1]]; high @ low:
    close(rollout([low, high]), torch.tensor([[[0.875, 0.125], [0.5, 0.5]]]))
    close(rollout([high, low]), torch.tensor([[[0.75, 0.25], [0.375, 0.625]]]))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 100))
def test_rows_of_a_rollout_sum_to_one_and_padding_stays_apart(depth: int, frames: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers = [torch.zeros(1, H, frames + 2, frames + 2, dtype=torch.float64) for _ in range(depth)]
    for layer in layers:
        layer[..., :frames, :frames] = stochastic(1, H, frames, frames).double()
    found = rollout(layers)
    close(found.sum(-1), torch.ones(1, frames + 2))
    close(found[:, frames:], torch.eye(frames + 2, dtype=torch.float64)[None, frames:])
    close(found[:, :frames, :frames], rollout([layer[..., :frames, :frames] for layer in layers]))


def least_cut(layers: list[Tensor], top: int, bottom: int) -> float:
    """Of all ways to part the frames of all levels: what crosses from the top's side. By max-flow, it is the flow."""
    depth, frames = len(layers), len(layers[0])
    pipes = layers[::-1]  # level 0 is the top
    best = float("inf")
    for sides in product((False, True), repeat=(depth + 1) * frames):
        side = np.array(sides).reshape(depth + 1, frames)
        if side[0, top] and not side[depth, bottom]:
            crossing = sum(float(pipes[i][side[i]][:, ~side[i + 1]].sum()) for i in range(depth))
            best = min(best, crossing)
    return best


@pytest.mark.parametrize(("depth", "frames"), [(1, 3), (2, 3), (3, 2)])
def test_flow_is_the_least_cut(depth: int, frames: int, precise: None) -> None:
    layers = [stochastic(1, H, frames, frames) ** 3 for _ in range(depth)]
    layers = [layer / layer.sum(-1, keepdim=True) for layer in layers]
    found = flow(layers)[0]
    mixed = [0.5 * layer[0].mean(0) + 0.5 * torch.eye(frames) for layer in layers]
    for top, bottom in product(range(frames), repeat=2):
        assert float(found[top, bottom]) == pytest.approx(least_cut(mixed, top, bottom), abs=1e-7)
    if depth == 1:
        close(found, mixed[0], 1e-7)  # one pipe each


def test_flow_of_known_layers(precise: None) -> None:
    own, uniform = torch.eye(3)[None, None], torch.full((1, 1, 3, 3), 1 / 3)
    close(flow([own, own]), own[:, 0], 1e-7)
    close(flow([uniform] * 2, residual=0.0), torch.ones(1, 3, 3), 1e-7)  # a third through each frame between
    assert flow([own.float()]).dtype == torch.float32


def test_what_cannot_be_rolled_out_is_refused() -> None:
    square, other = stochastic(1, 1, 3, 3), stochastic(1, 1, 2, 2)
    for wrong, message in (([], "nothing"), ([square, other], "3x3, 2x2"), ([stochastic(1, 1, 2, 3)], "2x3")):
        with pytest.raises(ValueError, match=message):
            rollout(wrong)
    with pytest.raises(ValueError, match="residual 2"):
        rollout([square], residual=2)
    with pytest.raises(ValueError, match="49 frames"):
        flow([stochastic(1, 1, 49, 49)])


# --- saliency


def test_attributions_of_known_functions(precise: None) -> None:
    x = torch.randn(1, 4, 3)
    weight = torch.randn(2, 12)
    linear = partial(lambda w, y: w @ y.flatten(), weight)
    for attribution in (gradients, partial(smoothed, samples=3)):
        close(attribution(linear, x), weight.view(2, 1, 4, 3))
    close(integrated(linear, x), (weight * x.flatten()).view(2, 1, 4, 3))
    assert gradients(lambda y: y[0, 0, :0], x).shape == (0, 1, 4, 3)


def test_integrated_gradients_are_complete(precise: None) -> None:
    x, base = torch.randn(1, 4, 3), torch.randn(1, 4, 3)

    def f(y: Tensor) -> Tensor:
        return torch.stack([y.tanh().sum(), (y[0, 0] * y[0, 1]).sum()])

    found = integrated(f, x, baseline=base, steps=64)
    close(found.sum((1, 2, 3)), f(x) - f(base), 1e-3)


def test_correlation_of_maps() -> None:
    a = torch.randn(20, 50)
    assert pearson(a, a) == pytest.approx(1)
    assert pearson(a, 3 - 2 * a) == pytest.approx(-1)
    assert abs(pearson(a, a[:, torch.randperm(50)])) < 0.1
    assert np.isnan(pearson(a, torch.ones(20, 50)))
    assert pearson(a, a + 0.1) == pytest.approx(float(np.corrcoef(a.flatten(), a.flatten())[0, 1]))


def test_features_fall_to_their_frames() -> None:
    saliency = torch.arange(1.0, 10).view(1, 9)
    assert pooled(saliency, 3, 2.0).tolist() == [[3, 7, 11]]
    assert pooled(saliency, 3, 4.0).tolist() == [[10, 26, 9]]
    close(relevance(torch.ones(2, 1, 4, 3)), torch.full((2, 4), 0.25))


@pytest.fixture(scope="module")
def digits() -> Recognizer:
    model = load_model(DIGITS)
    assert isinstance(model, Recognizer)
    return model


def clip() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    samples, _ = soundfile.read(DIGITS / "01.flac", dtype="float32")
    return samples  # type: ignore[no-any-return]


def test_a_reading_is_what_the_decoder_does(digits: Recognizer) -> None:
    reading = Reading.of(digits, clip(), "seven eight")
    assert reading.labels[1:6] == ("s", "e", "v", "e", "n")
    memory = reading.memory()
    weights = reading.cross_weights()
    assert weights.shape == (2, 4, len(reading.tokens), memory.mask.shape[1])
    decoder, end = digits.heads["attention"], digits.tokenizer.end
    state, last, rows, scores = decoder.start(Memory.of(memory, finished=True)), end, [], []
    for token in reading.tokens:  # one by one, as a search says them
        hidden, seen, state = decoder.step(torch.tensor([[last]]), state, heads=[(1, 2)])
        rows.append(seen[0, 0, 0])
        scores.append(decoder.logits(hidden[0, 0]).log_softmax(-1)[token])
        last = token
    close(weights[1, 2], torch.stack(rows), 1e-5)
    close(reading.log_probs(memory), torch.stack(scores), 1e-4)
    assert [one.weights.shape[1] for one in reading.self_weights()] == [4] * 4


def test_attention_explains_about_half(digits: Recognizer) -> None:
    rows = {row.attention: row for row in half_explanation(digits, clip(), text="seven eight nine zero")}
    mean = rows["mean of all"]
    assert list(rows)[:3] == ["mean of all", "layer 0", "layer 1"]
    assert mean.output > 0.6
    assert 0.2 < mean.input < mean.output
    assert abs(rows["shuffled"].output) < 0.2
    assert abs(rows["shuffled"].input) < 0.2


def test_saliency_lies_where_a_word_is_said(digits: Recognizer) -> None:
    reading = Reading.of(digits, clip(), "seven eight nine zero")
    share = reading.by_input()[:, round(1.2 / 0.04) :].sum(1)  # zero, from 1.2 s on
    assert float(share[-4:].mean()) > 2 * float(share[:6].mean())
    assert reading.by_frames().shape[1] == reading.frames
    close(reading.by_frames().sum(-1), torch.ones(len(reading.tokens)), 1e-5)


def test_whisper_reads_as_it_drafts(tiny: WhisperModel) -> None:
    samples = clip()
    reading = Reading.of(tiny, samples, " 7890")
    assert reading.frames == -(-len(samples) // 320)
    weights = reading.cross_weights()
    features = reading.features.values
    memory = tiny.encode(features, samples=len(samples), finished=True)
    draft = tiny.draft(memory, reading.tokens, heads=((2, 3),), frames=reading.frames, max_tokens=1)
    first = len(reading.prompt) - 1
    close(weights[2, 3, :, : reading.frames], draft.weights[0, first : first + len(reading.tokens)], 1e-5)
    assert not torch.isnan(reading.by_frames()).any()
    assert [one.name for one in reading.self_weights()] == [f"encoder.layers.{i}.attention" for i in range(4)]


def test_readings_that_cannot_be(digits: Recognizer) -> None:
    with pytest.raises(InputError, match="nothing is said"):
        Reading.of(digits, clip(), " ")
    with pytest.raises(InputError, match="do not fit into the decoder's context of 128"):
        Reading.of(digits, clip(), "seven " * 60).cross_weights()
    bare = Recognizer(digits.front_end, digits.encoder, {"ctc": digits.ctc}, digits.tokenizer)
    with pytest.raises(InputError, match="no attention decoder"):
        half_explanation(bare, clip(), text="seven")


def test_heads_that_walk_are_shown_and_segments_are_not(digits: Recognizer) -> None:
    tokens, dim, end = digits.tokenizer.size, digits.ctc.head.in_features, digits.tokenizer.end
    walking = AttentionDecoder(tokens, 40, dim, 4, 2, cross=HardMonotonic).eval()
    bare = Recognizer(digits.front_end, digits.encoder, {"monotonic": walking}, digits.tokenizer)
    reading = Reading.of(bare, clip(), "seven eight")
    assert reading.decoder is walking
    assert reading.prompt == (end,)
    assert reading.cross_weights().shape[:3] == (2, 4, len(reading.tokens))
    both = Recognizer(digits.front_end, digits.encoder, {**digits.heads, "monotonic": walking}, digits.tokenizer)
    assert Reading.of(both, clip(), "seven").decoder is digits.heads["attention"]
    cross = partial(SegmentAttention, boundary=Within())
    segmental = Segmental(AttentionDecoder(tokens, 40, dim, 4, 1, cross=cross), NoLength())
    heads = {"segmental": segmental, "ctc": digits.ctc}
    with pytest.raises(InputError, match="its cross-attention is its segments"):
        Reading.of(Recognizer(digits.front_end, digits.encoder, heads, digits.tokenizer), clip(), "one").cross_weights()


def test_the_how_to_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {"folder": tmp_path}
    text = (ROOT / "docs" / "attention-analysis.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 3
    for example in examples:
        exec(compile(example, "docs/attention-analysis.md", "exec"), names)
    said = capsys.readouterr().out
    assert "mean of all" in said
