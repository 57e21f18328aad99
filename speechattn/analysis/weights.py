"""Attention weights as return values: of self-attention layers, of whole encoders, of decoders over given tokens.

No hook is set and no module of the model is touched. Where a layer stands inside a network, the network is copied
around it (the copy shares its weights), with a stand-in for each attention layer that gives the same output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from speechattn.attention.duo import Divided
from speechattn.attention.self_attention import AttentionState, SelfAttention
from speechattn.decoder.attention import AttentionDecoder, DecoderState
from speechattn.frames import Frames, Memory
from speechattn.linear import run
from speechattn.stream import Buffer, Plan, Planned, Stream, flush

__all__ = ["LayerWeights", "Unseen", "Weighing", "attention_layers", "copied", "cross_weights", "encoder_weights",
           "gated", "layer_weights", "self_weights", "usual"]  # fmt: skip


class Unseen(ValueError):
    """A network without self-attention, or one that does not say where it looks."""


@runtime_checkable
class Weighing(Protocol):
    """A self-attention of another kind that can say what it looked at."""

    def weights(self, x: Frames) -> Tensor:
        """Frames [B, T, D] -> [B, H, T, T]: with the values, the layer's heads."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer: its `name` in the encoder, what it was given [B, T, D], and where it looked [B, H, T', T'].

    T' is T, or fewer frames where the layer puts neighbours into groups.
    """

    name: str
    input: Frames
    weights: Tensor


def self_weights(layer: nn.Module, x: Frames) -> Tensor:
    """Where each frame of x [B, T, D] looks [B, H, T, T]: rows sum to 1, or are 0 for a frame that is not there.

    Law: these weights times the layer's values, through its output projection, are `layer(x)`. They are found by that
    law: values that are one-hot come out of the heads as the weights, whatever span, position, sinks or normaliser a
    layer has. `Unseen` for a layer whose heads are no mixture of values, and which has no `weights`.
    """
    if isinstance(layer, Weighing):
        return layer.weights(x)
    layer = usual(layer)
    if not x.mask.shape[1]:
        return x.values.new_zeros(len(x.mask), layer.heads, 0, 0)
    asked = Asked.of(layer, x)
    keys, width = asked.past.values.shape[1], layer.width * layer.group
    one_hot = torch.eye(keys, dtype=x.values.dtype, device=x.values.device)
    columns = [asked.heads(one_hot[:, at : at + width]) for at in range(keys - asked.frames, keys, width)]
    return torch.cat(columns, -1)[..., : asked.length].transpose(1, 2) * x.mask[:, None, :: layer.group, None]


def usual(layer: nn.Module) -> SelfAttention:
    """The layer, whose steps are those of `SelfAttention`; `Unseen` for others."""
    if not isinstance(layer, SelfAttention) or type(layer).step is not SelfAttention.step:
        raise Unseen(f"{type(layer).__name__} does not say where it looks: it needs a method weights(x)")
    return layer


@dataclass(frozen=True)
class Asked:
    """A layer before its heads look at a whole utterance: queries, and what they may look at."""

    layer: SelfAttention  # without its output projection
    queries: Tensor
    past: Buffer
    sinks: Buffer
    late: int
    length: int  # queries that stand for frames
    frames: int  # keys that were pushed in

    @classmethod
    def of(cls, layer: SelfAttention, x: Frames) -> Asked:
        """The one step of `layer.forward`, as far as the projections of queries, keys and values."""
        bare = copy.copy(layer)
        bare._modules = {**layer._modules, "out": nn.Identity()}
        bare.training = False
        length, x = -(-x.mask.shape[1] // layer.group), flush(x, layer)
        x = x.pad(-x.mask.shape[1] % layer.group)
        state = layer.init_state(x)
        state = state if isinstance(state, AttentionState) else layer._state(x, 0, 0)
        q, kv, mask = layer._project(x)
        frames, late = mask.shape[1], state.waiting.shape[1]
        queries = torch.cat([state.waiting.to(q.dtype), q], 1)[:, :frames]
        return cls(bare, queries, state.past.append(kv, mask), state.sinks, late, length, frames)

    def heads(self, values: Tensor | None = None) -> Tensor:
        """What the heads say [B, T', H, W]; of the layer's own values, or of these for each key [N, up to W]."""
        past, layer = self.past, self.layer
        if values is not None:
            held = torch.zeros_like(past.values)
            held[:, :, 0] = past.values[:, :, 0]
            held[:, :, 1, :, : values.shape[1]] = values[:, None] * past.mask[..., None, None]
            past = Buffer(held, past.mask)
        y = layer._attend(self.queries, past, self.sinks, self.late)
        y = y.reshape(len(y), self.frames, layer.heads, -1)[:, self.late : self.late + self.length]
        return y if values is None else y[..., : values.shape[1]]


def gated(layer: nn.Module, x: Frames, gates: Tensor) -> Frames:
    """`layer(x)` with what each head says multiplied by `gates` [B, H], before the heads are projected together.

    With ones it is `layer(x)`; the gradient by a gate says how much the head matters (arXiv 1905.10650, section 2.3).
    """
    layer = usual(layer)
    y = Asked.of(layer, x).heads() * gates[:, None, :, None]
    y = y.reshape(len(y), -1, layer.heads * layer.width)[:, : x.mask.shape[1]]
    return Frames.of(run(layer.out, y), x.mask)


class StandIn(Planned):
    """In a copied network: calls `answer(x)` where the layer would have been called."""

    def __init__(self, layer: Stream, answer: Callable[[Frames], Frames]) -> None:
        super().__init__()
        self.layer, self.answer = (layer,), answer  # in a tuple: it is no part of this

    def plan(self) -> Plan:
        return self.layer[0].plan()

    def forward(self, x: Frames) -> Frames:
        return self.answer(x)


def attention_layers(network: nn.Module) -> dict[str, Stream]:
    """The self-attention layers of a network by name, in order of their names there."""
    streams = {name: module for name, module in network.named_modules() if isinstance(module, Stream)}
    return {name: stream for name, stream in streams.items() if weighs(stream)}


def weighs(layer: object) -> bool:
    """It is a self-attention that looks somewhere."""
    return isinstance(layer, SelfAttention | Weighing)


def copied(
    network: nn.Module, answer: Callable[[str, Stream, Frames], Frames], *, shared: Sequence[object] = ()
) -> nn.Module:  # fmt: skip
    """A copy of the network, in `eval()`, that asks `answer(name, layer, x)` in place of each attention layer.

    Weights and buffers are shared, and no gradient reaches them; what is in `shared` is not copied either.
    """
    memo: dict[int, Any] = {id(one): one for one in shared}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    memo |= {id(buffer): buffer.detach() for buffer in network.buffers()}
    for name, layer in attention_layers(network).items():
        twin = copy.deepcopy(layer, memo).eval()

        def answered(x: Frames, name: str = name, layer: Stream = twin) -> Frames:
            return answer(name, layer, x)

        memo[id(layer)] = StandIn(twin, answered)
    return copy.deepcopy(network, memo).eval()


def layer_weights(
    network: nn.Module, read: Callable[[Any], object], *, shared: Sequence[object] = ()
) -> list[LayerWeights]:  # fmt: skip
    """What every self-attention layer of `network` looked at while `read` called (a copy of) it, in order of calls.

    The two groups of heads of a `Divided` are one layer, `first` before `second`. `Unseen` for a network without such
    layers, and for a layer that cannot say.
    """
    if not attention_layers(network):
        raise Unseen(f"{type(network).__name__} has no self-attention whose weights could be shown")
    found: list[LayerWeights] = []

    def answer(name: str, layer: Stream, x: Frames) -> Frames:
        with torch.no_grad():
            found.append(LayerWeights(name, x, self_weights(layer, x)))
        y: Frames = layer(x)
        return y

    twin = copied(network, answer, shared=shared)
    with torch.inference_mode(False), torch.enable_grad():  # so that streams read the utterance at once
        read(twin)
    return together(found, {name for name, module in network.named_modules() if isinstance(module, Divided)})


def together(layers: Sequence[LayerWeights], divided: set[str]) -> list[LayerWeights]:
    """The layers, with those that are the two sides of a module in `divided` as one of its name."""
    found: list[LayerWeights] = []
    for one in layers:
        name, _, side = one.name.rpartition(".")
        if side == "second" and name in divided and found and found[-1].name == f"{name}.first":
            first = found.pop()
            one = LayerWeights(name, first.input, torch.cat([first.weights, one.weights], 1))
        found.append(one)
    return found


def encoder_weights(encoder: Stream, x: Frames) -> list[LayerWeights]:
    """What every self-attention layer of the encoder looks at, when it reads x [B, T, F]."""
    return layer_weights(encoder, lambda twin: twin(x))


@torch.no_grad()
def cross_weights(
    decoder: AttentionDecoder, memory: Memory, tokens: Tensor, *, behind: DecoderState | None = None
) -> Tensor:  # fmt: skip
    """Where every layer and head looks while `tokens` [B, U] are read [B, L, H, U, T], the frames `behind` included.

    Row u is the look with which the token behind tokens[u] is said.
    """
    layers, heads = len(decoder.layers), decoder.heads
    pairs = [(layer, head) for layer in range(layers) for head in range(heads)]
    _, seen, _ = decoder.step(tokens, decoder.start(memory, behind=behind), heads=pairs)
    return seen.view(len(seen), layers, heads, *seen.shape[2:])
