"""Self-attention with fewer heads: what stays says exactly what it said before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from speechattn.attention.gates import GatedLinear, GatedSelfAttention
from speechattn.attention.position import Alibi, Bucketed, Position, Relative, Rotary
from speechattn.attention.self_attention import SelfAttention

__all__ = ["SomeAlibi", "SomeRelative", "fewer", "head_size", "heads_of", "prune_heads", "replaced", "taken"]

M = TypeVar("M", bound=nn.Module)


class SomeRelative(Relative):
    """`Relative` of `heads` that are `width` wide each, with the sinusoids of `dim` features."""

    def __init__(self, dim: int, heads: int, *, width: int) -> None:
        super().__init__(dim, 1)
        self.heads, self.width = heads, width
        self.linear = nn.Linear(dim, heads * width, bias=False)
        self.u, self.v = nn.Parameter(torch.zeros(heads, width)), nn.Parameter(torch.zeros(heads, width))


class SomeAlibi(Alibi):
    """The slopes of some of `heads`."""

    def __init__(self, dim: int, heads: int, *, which: Sequence[int]) -> None:
        super().__init__(dim, heads)
        self.which = list(which)

    def scalars(self, distances: range, device: torch.device) -> Tensor:
        return super().scalars(distances, device)[self.which]


def stretches(which: Sequence[int], width: int) -> Tensor:
    """The indices of features [N * width], where head h has those from h * width on."""
    return torch.tensor([h * width + i for h in which for i in range(width)], dtype=torch.long)


def some(position: Position | None, heads: Sequence[int], width: int) -> Position | None:
    """The position as these heads know it; ValueError for a kind of which that is not known."""
    if position is None or type(position) is Rotary:
        return deepcopy(position)
    if type(position) in (Relative, SomeRelative):
        assert isinstance(position, Relative)
        narrow = SomeRelative(position.dim, len(heads), width=width)
        narrow.linear.weight.data = position.linear.weight.data[stretches(heads, width)]
        narrow.u.data, narrow.v.data = position.u.data[list(heads)], position.v.data[list(heads)]
        return narrow
    if type(position) is Bucketed:
        table = Bucketed(1, len(heads), buckets=position.buckets, farthest=position.farthest)
        table.table.weight.data = position.table.weight.data[:, list(heads)]
        return table
    if type(position) in (Alibi, SomeAlibi):
        assert isinstance(position, Alibi)
        known = position.which if isinstance(position, SomeAlibi) else range(position.heads)
        return SomeAlibi(width, position.heads, which=[known[h] for h in heads])
    raise ValueError(f"{type(position).__name__}: it is not known how fewer heads see it")


def key_heads_for(attention: SelfAttention, heads: Sequence[int]) -> list[int]:
    """The key heads that these heads need: each once if equally many heads share it, else one for each head."""
    share = attention.heads // attention.key_heads
    found = [h // share for h in heads]
    kinds = list(dict.fromkeys(found))
    each = len(found) // len(kinds)
    return kinds if found == [kind for kind in kinds for _ in range(each)] else found


def fewer(attention: SelfAttention, heads: Sequence[int]) -> SelfAttention:
    """A plain layer of these heads alone, in that order, with weights of its own; gates become a part of them.

    Law: in `eval()` its output is that of `attention` with a zero in place of what the other heads say. ValueError for
    heads that there are none of, and for a layer whose heads cannot be taken apart.
    """
    if type(attention) not in (SelfAttention, GatedSelfAttention):
        raise ValueError(f"{type(attention).__name__} cannot be pruned: it is not known how its heads come apart")
    return taken(attention, heads)


def taken(attention: SelfAttention, heads: Sequence[int]) -> SelfAttention:
    """`fewer`, of any attention whose weights are those of `SelfAttention`."""
    if attention.group > 1:
        raise ValueError(f"heads of a group of {attention.group} frames cannot be taken apart: they share features")
    if not heads or len({*heads}) < len(heads) or not 0 <= min(heads) <= max(heads) < attention.heads:
        raise ValueError(f"heads {list(heads)}: wanted some of 0 to {attention.heads - 1}, each once")
    width, shared = attention.width, key_heads_for(attention, heads)
    found = SelfAttention(
        attention.dim, len(heads), attention.span, position=some(attention.position, heads, width),
        key_heads=len(shared), norm=deepcopy(attention.norm), dropout=attention.dropout, backend=attention.backend,
        width=width,
    )  # fmt: skip
    found.rate = attention.rate
    own, keys = attention.heads * width, attention.key_heads * width
    rows = torch.cat([stretches(heads, width), *(begin + stretches(shared, width) for begin in (own, own + keys))])
    found.qkv.weight.data, found.qkv.bias.data = attention.qkv.weight.data[rows], attention.qkv.bias.data[rows]
    out = attention.out.settled if isinstance(attention.out, GatedLinear) else attention.out.weight
    found.out.weight.data = out.data[:, stretches(heads, width)]
    found.out.bias.data = attention.out.bias.data.clone()
    weight = attention.qkv.weight
    return found.to(weight.device, weight.dtype).train(attention.training).requires_grad_(weight.requires_grad)


def head_size(attention: SelfAttention) -> int:
    """Parameters that go with a head: all that belong to it alone."""
    columns = attention.width * (1 if attention.key_heads < attention.heads else 3)
    position = 0 if attention.position is None else sum(p.numel() for p in attention.position.parameters())
    return columns * (attention.dim + 1) + attention.width * attention.dim + position // attention.heads


def heads_of(encoder: nn.Module) -> dict[str, SelfAttention]:
    """Every self-attention inside, by name, in order."""
    return {name: module for name, module in encoder.named_modules() if isinstance(module, SelfAttention)}


def replaced(root: nn.Module, change: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put what `change` returns, unless it is None, in place of each module inside, from the outside inwards."""
    for name, module in list(root.named_children()):
        new = change(module)
        if new is None:
            replaced(module, change)
        else:
            setattr(root, name, new)


def prune_heads(encoder: M, keep: Sequence[Sequence[int]]) -> M:
    """A copy of `encoder` with these heads alone in each of its self-attentions, in order.

    Law: it says what `encoder` says when the others are silent. ValueError where the lists do not fit.
    """
    layers = heads_of(encoder)
    if len(layers) != len(keep):
        raise ValueError(f"heads of {len(keep)} layers, of {len(layers)} that there are")
    left = iter(keep)
    encoder = deepcopy(encoder)
    replaced(encoder, lambda module: cut(module, next(left)) if isinstance(module, SelfAttention) else None)
    return encoder


def cut(attention: SelfAttention, heads: Sequence[int]) -> SelfAttention | None:
    """`fewer`; None where all stay as they are, so that a kind that cannot be taken apart need not be."""
    if [*heads] == [*range(attention.heads)] and not isinstance(attention.out, GatedLinear):
        return None
    return fewer(attention, heads)
