"""What attention weights say in numbers. Weights are [..., T, N]: how much each of T queries looks at N keys.

A query whose row is empty (a frame that is not there) counts nowhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from speechattn.analysis.weights import attention_layers, copied, gated, usual
from speechattn.frames import Frames
from speechattn.stream import Stream

__all__ = ["centres", "coverage", "distance", "entropy", "first_share", "head_importance", "massive", "monotonicity",
           "received", "sink_share", "sinks", "support"]  # fmt: skip


def over_queries(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values [..., T] over the queries that look at anything [...]; 0 where none does."""
    there = weights.sum(-1) > 0
    return (values * there).sum(-1) / there.sum(-1).clamp(min=1)


def entropy(weights: Tensor) -> Tensor:
    """Of where a query looks, in nats, mean over queries [...]: 0 for one key, log(N) for all of N alike."""
    return over_queries(torch.special.entr(weights).sum(-1), weights)


def distance(weights: Tensor) -> Tensor:
    """How many frames away a self-attention looks, mean over queries [...]."""
    queries, keys = (torch.arange(n, device=weights.device) for n in weights.shape[-2:])
    return over_queries((weights * (queries[:, None] - keys).abs()).sum(-1), weights)


def support(weights: Tensor, *, above: float = 0.0) -> Tensor:
    """How many keys get a weight of more than `above`, mean over queries [...]: what sparse attention makes small."""
    return over_queries((weights > above).sum(-1).to(weights.dtype), weights)


def first_share(weights: Tensor, frames: int = 4) -> Tensor:
    """Share of the mass that lies on the first so many keys, mean over queries [...]."""
    return over_queries(weights[..., :frames].sum(-1), weights)


def received(weights: Tensor, *, allowed: Tensor | None = None) -> Tensor:
    """What each key gets, mean over the queries that look at anything and may see it [..., N].

    `allowed` [T, N] says which may; for a causal pattern these are the later ones. 0 where no query may.
    """
    there = (weights.sum(-1, keepdim=True) > 0).expand(weights.shape)
    there = there if allowed is None else there & allowed
    return (weights * there).sum(-2) / there.sum(-2).clamp(min=1)


def sinks(weights: Tensor, *, threshold: float = 0.2, allowed: Tensor | None = None) -> Tensor:
    """Keys that get more than `threshold` of the mass, mean over heads and queries: [B, H, T, N] -> [B, N] bool.

    The literature's thresholds are 0.2 to 0.3 (arXiv 2309.17453 for the effect).
    """
    return received(weights, allowed=allowed).mean(1) > threshold


def sink_share(weights: Tensor, *, threshold: float = 0.2, allowed: Tensor | None = None) -> Tensor:
    """Share of each head's mass that lies on `sinks` [B, H]."""
    sunk = sinks(weights, threshold=threshold, allowed=allowed)
    return over_queries((weights * sunk[:, None, None]).sum(-1), weights)


def massive(hidden: Frames, *, least: float = 100.0, factor: float = 1000.0) -> Tensor:
    """Massive activations of hidden [B, T, D] (arXiv 2402.17762): larger than `least` and so many times the median.

    -> [B, T, D] bool; the median magnitude is that of the row's valid frames.
    """
    size, mask = hidden.values.abs(), hidden.mask[..., None]
    median = size.masked_fill(~mask, torch.nan).flatten(1).nanmedian(1).values
    return mask & (size > least) & (size >= factor * median[:, None, None])


def head_importance(encoder: Stream, x: Frames, losses: Callable[[Frames], Tensor]) -> dict[str, Tensor]:
    """Mean over utterances of |d loss / d gate| for each head [H] of each layer (arXiv 1905.10650, eq. 2).

    `losses` makes a loss for each row [B] of what the encoder says. A gate of one multiplies each head's output in a
    copy of the encoder, whose attention is computed anew with it (`gated`); each row has gates of its own, so one
    backward pass gives the gradient of every utterance.
    """
    gates: dict[str, Tensor] = {}

    def answer(name: str, layer: Stream, y: Frames) -> Frames:
        gates[name] = y.values.new_ones(len(y.mask), usual(layer).heads).requires_grad_()
        return gated(layer, y, gates[name])

    if not attention_layers(encoder):
        raise ValueError(f"{type(encoder).__name__} has no self-attention whose heads could be judged")
    with torch.inference_mode(False), torch.enable_grad():
        total = losses(copied(encoder, answer)(x)).sum()
        found = torch.autograd.grad(total, list(gates.values()))
    return {name: grad.abs().mean(0) for name, grad in zip(gates, found, strict=True)}


def centres(alignment: Tensor) -> Tensor:
    """The mean frame at which each token looks: [..., U, T] -> [..., U]; NaN for a token that looks nowhere."""
    at = torch.arange(alignment.shape[-1], dtype=alignment.dtype, device=alignment.device)
    return (alignment * at).sum(-1) / alignment.sum(-1)


def monotonicity(alignment: Tensor) -> Tensor:
    """Share of tokens [...] that look no earlier than the token before: 1 for speech read from left to right.

    By their `centres`. Tokens that look nowhere are left out; fewer than two of the others are monotonic.
    """
    at = centres(alignment)
    if at.shape[-1] < 2:
        return at.new_ones(at.shape[:-1])
    there = ~at.isnan()
    number = torch.arange(at.shape[-1], device=at.device)
    before = torch.where(there, number, -1).cummax(-1).values[..., :-1]  # the last one that looks somewhere
    pairs = there[..., 1:] & (before >= 0)
    forward = pairs & (at[..., 1:] >= at.gather(-1, before.clamp(min=0)))
    count = pairs.sum(-1)
    return torch.where(count > 0, forward.sum(-1) / count.clamp(min=1), 1.0).to(alignment.dtype)


def coverage(alignment: Tensor) -> Tensor:
    """Share of the frames that the tokens of a text look at together [...]: exp(entropy of their mean) / T.

    1 when all frames get the same, 1/T when there is one that gets everything, 0 when none gets anything.
    """
    mean = alignment.sum(-2)
    any_mass = mean.sum(-1) > 0
    mean = mean / mean.sum(-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    spread: Tensor = torch.special.entr(mean).sum(-1).exp()
    return (spread / max(alignment.shape[-1], 1)).where(any_mass, 0.0)
