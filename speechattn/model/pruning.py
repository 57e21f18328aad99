"""Encoders with gates, and what is left when gates have closed: smaller ones, and ones that remember less."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar, cast

import torch
from torch import nn

from speechattn.attention.duo import apart, hardened, needed
from speechattn.attention.gates import GatedLinear, GateMaker, HardConcrete
from speechattn.attention.pruning import fewer, head_size, heads_of, prune_heads, replaced
from speechattn.attention.self_attention import SelfAttention
from speechattn.encoder import Encoder
from speechattn.encoder.layers import FeedForward
from speechattn.errors import ModelError
from speechattn.model.recognizer import Recognizer

__all__ = ["GatedEncoder", "PrunedEncoder", "SplitEncoder", "forgetful", "gates_of", "prune_units", "pruned",
           "smaller", "sparsity"]  # fmt: skip

M = TypeVar("M", bound=nn.Module)


class GatedEncoder(Encoder):
    """The parts of `encoder`, with a gate for each head of its attention and each hidden unit of its feed-forwards.

    `heads` or `units` None are without. Law: in `eval()`, with gates of 1, it says what `encoder` says.
    """

    def __init__(
        self, encoder: Encoder, heads: GateMaker | None = HardConcrete, units: GateMaker | None = HardConcrete
    ) -> None:
        super().__init__(encoder.subsample, encoder.layers.members, encoder.norm, dim=encoder.dim)
        for module in self.modules():
            if heads is not None and isinstance(module, SelfAttention) and not isinstance(module.out, GatedLinear):
                fewer(module, range(module.heads))  # says now that it cannot be pruned
                module.out = GatedLinear.of(module.out, heads(module.heads))
            if units is not None and isinstance(module, FeedForward):
                module.narrow = GatedLinear.of(module.narrow, units(module.narrow.in_features))


class PrunedEncoder(Encoder):
    """The parts of `encoder`, of whose attentions and feed-forwards only so many are left.

    `heads` are the numbers of those that stay in each attention, `units` says how many hidden units each feed-forward
    has; None: all. It is what a `config.yaml` says of a pruned encoder, whose weights are then loaded.
    """

    def __init__(
        self, encoder: Encoder, heads: Sequence[Sequence[int]] | None = None, units: Sequence[int] | None = None
    ) -> None:
        if heads is not None:
            encoder = prune_heads(encoder, heads)
        if units is not None:
            encoder = prune_units(encoder, [range(n) for n in units])
        super().__init__(encoder.subsample, encoder.layers.members, encoder.norm, dim=encoder.dim)


class SplitEncoder(Encoder):
    """The parts of `encoder`, in which of each `DuoAttention` only the key heads `full` remember everything."""

    def __init__(self, encoder: Encoder, full: Sequence[Sequence[int]]) -> None:
        encoder = apart(encoder, full)
        super().__init__(encoder.subsample, encoder.layers.members, encoder.norm, dim=encoder.dim)


def forwards_of(encoder: nn.Module) -> dict[str, FeedForward]:
    """Every feed-forward inside, by name, in order."""
    return {name: module for name, module in encoder.named_modules() if isinstance(module, FeedForward)}


def thinner(layer: FeedForward, units: Sequence[int]) -> FeedForward:
    """A feed-forward of these hidden units alone, in that order; gates become a part of it.

    Law: in `eval()` its output is that of `layer` with a zero in place of the others.
    """
    if not units or len({*units}) < len(units) or not 0 <= min(units) <= max(units) < layer.widen.out_features:
        raise ValueError(f"{len(units)} hidden units: wanted some of 0 to {layer.widen.out_features - 1}, each once")
    dim, which = layer.widen.in_features, torch.as_tensor(list(units), dtype=torch.long)
    found = FeedForward(dim, len(units), activation=lambda: layer.activation, dropout=layer.dropout)
    found.norm = deepcopy(layer.norm)
    found.widen.weight.data, found.widen.bias.data = layer.widen.weight.data[which], layer.widen.bias.data[which]
    narrow = layer.narrow.settled if isinstance(layer.narrow, GatedLinear) else layer.narrow.weight
    found.narrow.weight.data, found.narrow.bias.data = narrow.data[:, which], layer.narrow.bias.data.clone()
    weight = layer.widen.weight
    return found.to(weight.device, weight.dtype).train(layer.training).requires_grad_(weight.requires_grad)


def prune_units(encoder: M, keep: Sequence[Sequence[int]]) -> M:
    """A copy of `encoder` with these hidden units alone in each of its feed-forwards, in order."""
    layers = forwards_of(encoder)
    if len(layers) != len(keep):
        raise ValueError(f"hidden units of {len(keep)} feed-forwards, of {len(layers)} that there are")
    left = iter(keep)
    encoder = deepcopy(encoder)
    replaced(encoder, lambda module: thinner(module, next(left)) if isinstance(module, FeedForward) else None)
    return encoder


def gates_of(encoder: nn.Module) -> list[tuple[HardConcrete, int]]:
    """All gates inside, and how many parameters go when one of them closes."""
    found = [(m.out.gates, head_size(m)) for m in heads_of(encoder).values() if isinstance(m.out, GatedLinear)]
    for layer in forwards_of(encoder).values():
        if isinstance(layer.narrow, GatedLinear):
            found.append((layer.narrow.gates, layer.widen.in_features + layer.narrow.out_features + 1))
    return found


def sparsity(encoder: nn.Module) -> torch.Tensor:
    """The expected share of the parameters behind gates that are gone; ModelError where there are no gates."""
    gates = gates_of(encoder)
    if not gates:
        raise ModelError(f"{type(encoder).__name__} has no gates: wrap it in speechattn.model.pruning.GatedEncoder")
    kept = torch.stack([size * gate.opening.sum() for gate, size in gates]).sum()
    return 1 - kept / sum(size * len(gate.logits) for gate, size in gates)


def still_open(layer: nn.Linear, all_of_them: int) -> list[int]:
    """Which gates are open; the first, which then says nothing, where none is."""
    if not isinstance(layer, GatedLinear):
        return list(range(all_of_them))
    return layer.gates.settled.nonzero().flatten().tolist() or [0]


def pruned(encoder: M) -> M:
    """A copy without gates, and without the heads and hidden units whose gates are closed in `eval()`.

    Law: it says what `encoder` says in `eval()`, whole and in steps. A layer that is all closed keeps one silent head.
    """
    keep = [still_open(m.out, m.heads) for m in heads_of(encoder).values()]
    encoder = prune_heads(encoder, keep)
    return prune_units(encoder, [still_open(m.narrow, m.narrow.in_features) for m in forwards_of(encoder).values()])


def smaller(model: Recognizer) -> Recognizer:
    """The same recogniser with its encoder `pruned`, which `save_model` can write; `model` stays as it is.

    ModelError where the model does not know its configuration.
    """
    whole, said = cast(Encoder, model.encoder), told(model)
    heads, encoder = [still_open(m.out, m.heads) for m in heads_of(whole).values()], pruned(whole)
    units = [m.narrow.in_features for m in forwards_of(encoder).values()]
    if said["class_path"] == name_of(GatedEncoder):
        said = said["init_args"]["encoder"]
    return rebuilt(model, encoder, PrunedEncoder, {"encoder": said, "heads": heads, "units": units})


def forgetful(model: Recognizer, sparsity: float) -> Recognizer:
    """The same recogniser with its encoder `split` (DuoAttention), which `save_model` can write.

    ModelError where the model does not know its configuration, ValueError where it has no `DuoAttention`.
    """
    hard, said = hardened(cast(Encoder, model.encoder), sparsity), told(model)
    full = needed(hard)
    return rebuilt(model, apart(hard, full), SplitEncoder, {"encoder": said, "full": full})


def name_of(kind: type) -> str:
    """As a configuration says it."""
    return f"{kind.__module__}.{kind.__name__}"


def told(model: Recognizer) -> dict[str, Any]:
    """What the configuration says of the encoder."""
    if model.config is None:
        raise ModelError("a model that was not built from a configuration cannot be written as one; use from_config")
    said: dict[str, Any] = model.config["encoder"]
    return said


def rebuilt(model: Recognizer, encoder: Encoder, kind: type[Encoder], args: dict[str, Any]) -> Recognizer:
    """A copy with this encoder, of which the configuration says that it is `kind(**args)`."""
    made = {"class_path": name_of(kind), "init_args": args}
    heads = {name: deepcopy(head) for name, head in model.heads.items()}
    return Recognizer(
        deepcopy(model.front_end), encoder, heads, model.tokenizer, sample_rate=model.sample_rate,
        language=model.language, spaceless=model.spaceless, config=deepcopy({**(model.config or {}), "encoder": made}),
    ).train(model.training)  # fmt: skip
