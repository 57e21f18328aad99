"""Attention sinks and massive activations of a language model that hears: where they are, and in which features.

Legend: K kinds of places (`speechattn.multimodal.layout.KINDS`), N layers, G groups of places (`GROUPS`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speechattn.analysis.statistics import massive, received
from speechattn.frames import Frames
from speechattn.multimodal.causal import Inspected
from speechattn.multimodal.decorrelation import to_first
from speechattn.multimodal.layout import BOS, NOTHING, SINK

__all__ = ["GROUPS", "Attention", "Hidden", "Thresholds", "attention", "grouped", "hidden"]

GROUPS = ("BOS", "sinks", "others", "dedicated")  # of places: sinks between BOS and the end; tokens made to be sinks


@dataclass(frozen=True)
class Thresholds:
    """What counts as a sink, as massive, as alike.

    - `received`: a sink gets more than this share of the attention of later queries, mean over queries (and heads).
      0.2 to 0.3 is usual in the literature on sinks (the effect: arXiv 2309.17453).
    - `even`: and at least so many times what it would get if every query looked evenly at itself and all before it.
      Ours: BOS of a sequence of 10 would get 0.21 of even attention, and compression makes sequences short.
    - `queries`: with fewer later queries a place is not judged; their mean is noise. Ours.
    - `absolute`, `relative`: an activation is massive if it is larger than 100 and at least 1000 times the median
      magnitude of its row and layer (arXiv 2402.17762, section 2). Small models have smaller ones, so reports have
      the plain ratio as well.
    - `alike`: cosine with BOS from which a place is alike. arXiv 2510.22603 says "close to 1"; the number is ours.
    - `top`: as many largest features of two groups are compared. Ours.
    """

    received: float = 0.2
    even: float = 2.0
    queries: int = 8
    absolute: float = 100.0
    relative: float = 1000.0
    alike: float = 0.9
    top: int = 3

    def __post_init__(self) -> None:
        for name, least in (("received", 0), ("even", 0), ("absolute", 0), ("relative", 0), ("queries", 1), ("top", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} {getattr(self, name)}: at least {least}")
        for name in ("received", "alike"):
            if not getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: at most 1")


@dataclass(frozen=True)
class Attention:
    """What places get in every layer. `received` [N, B, H, S] is their share of the attention of later queries.

    `judged` [B, S]: places with enough later queries; a place that is not has received 0 here. `sinks` [N, B, S] go by
    the mean over heads, `head_sinks` [N, B, H, S] by each head. `share` [N, B, S]: of the attention of all queries
    behind place 0, what lies on a sink; 0 on others.
    """

    received: Tensor
    judged: Tensor
    sinks: Tensor
    head_sinks: Tensor
    share: Tensor


@dataclass(frozen=True)
class Hidden:
    """What a state is like: `relative` [B, S, D], sizes of activations in medians of their row; 0 where that is 0.

    `median` and `largest` [B] magnitude of a row, `massive` [B, S, D] bool, `cosine` [B, S] with place 0. All are 0
    where nothing is.
    """

    relative: Tensor
    median: Tensor
    largest: Tensor
    massive: Tensor
    cosine: Tensor


def attention(inspected: Inspected, thresholds: Thresholds) -> Attention:
    """Who gets attention, found on the CPU. ValueError where the model was inspected without weights."""
    if inspected.weights is None:
        raise ValueError("sinks are seen in attention weights: inspect the model with weights=True")
    mask = inspected.mask.cpu()
    behind = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril(-1)
    visible = mask[:, :, None] & mask[:, None] & (behind | behind.new_ones(len(behind)).diag())  # [B, S, S]
    judged = mask & ((visible & behind).sum(1) >= thresholds.queries)
    even = received(visible / visible.sum(-1, keepdim=True).clamp(min=1), allowed=behind)[:, None]
    got, shares = [], []
    for layer in inspected.weights:
        weights = torch.where(visible[:, None], layer.cpu().to(torch.promote_types(layer.dtype, torch.float32)), 0)
        got.append(received(weights, allowed=behind) * judged[:, None])
        shares.append(received(weights[:, :, 1:]).mean(1))
    found = torch.stack(got)

    def sunk(x: Tensor) -> Tensor:
        return (x > thresholds.received) & (x >= thresholds.even * even)

    sinks = sunk(found.mean(2, keepdim=True)).squeeze(2)
    return Attention(found, judged, sinks, sunk(found), torch.stack(shares) * sinks)


def hidden(state: Tensor, mask: Tensor, thresholds: Thresholds) -> Hidden:
    """Of a state [B, S, D] at the places of `mask` [B, S], found on the CPU, at least in float32."""
    mask = mask.cpu()
    x = Frames.of(state.cpu().to(torch.promote_types(state.dtype, torch.float32)), mask)
    size = x.values.abs()
    median = size.masked_fill(~mask[..., None], torch.nan).flatten(1).nanmedian(1).values.nan_to_num()
    relative = torch.where(median > 0, 1 / median, 0)[:, None, None] * size
    found = massive(x, least=thresholds.absolute, factor=thresholds.relative)
    return Hidden(relative, median, size.amax((1, 2)), found, to_first(x.values, mask))


def grouped(sinks: Tensor, kinds: Tensor) -> Tensor:
    """Which of `GROUPS` a place belongs to [G, B, S], given `sinks` [N, B, S] and kinds [B, S].

    A sink of any layer is one in all, so that states before and behind it can be compared.
    """
    there, first, made = kinds != NOTHING, kinds == BOS, kinds == SINK
    sunk = sinks.any(0) & there & ~first & ~made
    return torch.stack([first, sunk, there & ~first & ~made & ~sunk, made])
