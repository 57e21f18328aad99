"""Linear attention: a memory of constant size in place of a cache that grows.

One function of queries and keys [B, H, T, F], values [B, H, T, D] and a mask [B, T], in three forms that agree:

    quadratic    o_t = sum over s <= t of r^(t - s) (q_t . k_s) v_s            by definition, T x T scores
    recurrent    M_t = r M_(t - 1) + k_t v_t^T,   o_t = M_t^T q_t              frame by frame, memory M [F, D]
    blocked      scores inside a block of frames, the memory between blocks    what the layers use

`t` counts the valid frames of a row, so an invalid one neither writes, nor lets the memory fade. The decay
r = exp(-slope) is the head's own; every power of it that is computed is at most 1, whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import slopes
from speechattn.attention.self_attention import Spanned
from speechattn.frames import Frames, known
from speechattn.linear import dropped, run
from speechattn.stream import Buffer, Plan
from speechattn.tree import node

__all__ = ["Causal", "LightningAttention", "LinearState", "blocked", "by_head", "full_precision", "gapless",
           "picked", "quadratic", "recurrent", "together", "wide"]  # fmt: skip

BLOCK = 64  # frames whose scores are computed at once

Features = Callable[[Tensor], Tensor]  # what queries and keys [..., F] become [..., F'] before they meet


def same(x: Tensor) -> Tensor:
    """x."""
    return x


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slope: Tensor | None = None, *, features: Features = same
) -> Tensor:
    """q, k [B, H, T, F], v [B, H, T, D], mask [B, T], slope [H] -> [B, H, T, D], by definition; None: no decay."""
    scores = features(q) @ features(k).mT
    return (scores * fading(mask, slope)) @ v


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slope: Tensor | None = None, *, features: Features = same,
    memory: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `quadratic`, frame by frame, from a memory [B, H, F', D] of what came before -> also the next memory."""
    q, k, outputs = features(q), features(k), []
    memory = empty(k, v) if memory is None else memory
    decay = k.new_ones(1) if slope is None else (-slope).exp()
    for t in range(q.shape[2]):
        written = decay[:, None, None] * memory + k[:, :, t, :, None] * v[:, :, t, None]
        memory = torch.where(mask[:, t, None, None, None], written, memory)
        outputs.append(torch.einsum("bhfd,bhf->bhd", memory, q[:, :, t]))
    return torch.stack(outputs, 2) if outputs else v, memory


def blocked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slope: Tensor | None = None, *, features: Features = same,
    memory: Tensor | None = None, block: int = BLOCK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `recurrent`, `block` frames at once (Lightning Attention-2, arXiv 2401.04658, algorithm 1).

    Time grows with T, not its square; `features` are made block by block, so that memory holds one block of them.
    """
    outputs = []
    for at in range(0, q.shape[2], block):
        piece = slice(at, at + block)
        seen, value = mask[:, piece], v[:, :, piece]
        query, key = features(q[:, :, piece]), features(k[:, :, piece])
        if memory is None:
            memory = empty(key, value)
        near = ((query @ key.mT) * fading(seen, slope)) @ value
        since, until = ages(seen, slope)  # decay from the block's begin to each frame, and from there to its end
        outputs.append(near + (query * since) @ memory)
        memory = since[:, :, -1:] * memory + (key * until).mT @ value
    if memory is None:
        memory = empty(features(k), v)
    return torch.cat(outputs, 2) if outputs else v, memory


def empty(key: Tensor, value: Tensor) -> Tensor:
    """The memory before the first frame, for keys [B, H, T, F'] and values [B, H, T, D]."""
    return value.new_zeros(*key.shape[:2], key.shape[3], value.shape[3])


def fading(mask: Tensor, slope: Tensor | None) -> Tensor:
    """mask [B, T] -> r^(t - s) [B, H, T, T], or 1 without a slope; 0 where s is later, or not valid."""
    frames = mask.shape[1]
    seen = torch.ones(frames, frames, dtype=torch.bool, device=mask.device).tril()
    if not (known(mask) and mask.all()):
        seen = seen & mask[:, None, None]
    else:
        mask = mask[:1]
    if slope is None:
        return seen
    at = mask.cumsum(1).to(slope.dtype)
    apart = (at[:, None, :, None] - at[:, None, None, :]).clamp(min=0)  # what is later would grow without bound
    return (-slope[:, None, None] * apart).exp() * seen


def ages(mask: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    """mask [B, T] -> by frame [B, H, T, 1] what is left of all before the block, and at its end of the frame's own."""
    if slope is None:
        return mask.new_ones(1, 1, 1, 1), mask[:, None, :, None]
    at = mask.cumsum(1).to(slope.dtype)[:, None, :, None]
    fade = -slope[:, None, None]
    return (fade * at).exp(), (fade * (at[:, :, -1:] - at)).exp() * mask[:, None, :, None]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a sum over thousands of frames is kept in."""
    return dtype if dtype == torch.float64 else torch.float32


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Autocast would round the products that are summed over thousands of frames: not in here."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def by_head(x: Tensor, heads: int) -> Tensor:
    """x [B, T, H * D] -> [B, H, T, D], wide enough to be summed."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2).to(wide(x.dtype))


def together(x: Frames) -> tuple[Frames, Tensor | None]:
    """The valid frames of each row at its end, and for each frame [B, T] where it went; None: all stay."""
    if known(x.mask) and x.mask.all():
        return x, None
    order = x.mask.byte().argsort(dim=1, stable=True)
    return Frames(picked(x.values, order), picked(x.mask, order)), order.argsort(dim=1)


def gapless(past: Buffer) -> Buffer:
    """The same frames without holes between them: the valid ones of each row at its end."""
    if known(past.mask) and not (past.mask[:, :-1] & ~past.mask[:, 1:]).any():
        return past
    order = past.mask.byte().argsort(dim=1, stable=True)
    return Buffer(picked(past.values, order), picked(past.mask, order))


def picked(x: Tensor, order: Tensor) -> Tensor:
    """The frames of x [B, T, ...] in the order [B, T']."""
    return x[torch.arange(len(order), device=order.device)[:, None], order]


@node
class LinearState:
    """All that linear attention knows of the past: the memory [B, H, F, D]."""

    memory: Tensor


class Causal(Spanned):
    """Base of what sees all of the past and nothing else, whatever the length, in a state of constant size."""

    def __init__(self, dim: int, heads: int, span: Pattern, *, norm: nn.Module | None, dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} features, {heads} heads: they do not divide")
        self.dim, self.heads, self.norm, self.dropout = dim, heads, norm, dropout
        self.span: Pattern = self.honoured(span)

    def honoured(self, span: Pattern) -> Pattern:
        """`span`; ValueError for any but `Span.causal()`, the only one that a memory without frames in it can have."""
        if span != Span.causal():
            raise ValueError(
                f"{type(self).__name__} keeps a sum over all frames so far, and none apart: nothing ahead can be "
                f"seen and nothing left out; it needs Span.causal(), not {span}"
            )
        return span

    def scaled(self, span: Pattern) -> Pattern:
        return self.honoured(super().scaled(span))

    def plan(self) -> Plan:
        return Plan(1, Fraction(1), 0, None, 0)

    def normed(self, x: Frames) -> Tensor:
        """The values behind the norm [B, T, D]."""
        return x.values if self.norm is None else self.norm(x.values)

    def said(self, layer: nn.Module, y: Tensor, mask: Tensor) -> Frames:
        """What `layer` makes of y [B, T, D], with dropout in training."""
        y = run(layer, y)
        return Frames.finite(dropped(y, self.dropout) if self.training else y, mask)


class LightningAttention(Causal):
    """Linear attention with a decay for each head, in blocks: Lightning Attention-2 (arXiv 2401.04658).

    Around it is the gated layer of its model (TransNormerLLM, arXiv 2307.14995, section 3.1): with q = silu(W_q x),
    k = silu(W_k x), v = W_v x and u = W_u x the output is W_o (rms(o) * u), where rms divides by the root mean square
    over all features and stands in for the sum that softmax divides by. Head h = 1 ... H fades by
    r = exp(-`fading` 2^(-8 h / H)) a frame; `fading` is the paper's 1 - l / L in layer l of L, and 0 never forgets.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, norm: nn.Module | None = None, dropout: float = 0.0,
        fading: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, span, norm=norm, dropout=dropout)
        if fading < 0:
            raise ValueError(f"fading {fading}: below 0 the memory would grow without bound")
        self.fading = fading
        self.parts = nn.Linear(dim, 4 * dim)  # queries, keys, values, gate
        self.out = nn.Linear(dim, dim)

    def init_state(self, x: Frames) -> LinearState:
        width, rows = self.dim // self.heads, x.values.shape[0]
        return LinearState(x.values.new_zeros(rows, self.heads, width, width, dtype=wide(x.values.dtype)))

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        parts = run(self.parts, self.normed(x))
        q, k, v, gate = parts.chunk(4, -1)
        q, k, v = (by_head(part, self.heads) for part in (F.silu(q), F.silu(k), v))
        slope = slopes(self.heads, q.device).to(q.dtype) * self.fading
        with full_precision(q):
            y, memory = blocked(q, k, v, x.mask, slope if self.fading else None, memory=state.memory)
        y = y.transpose(1, 2).flatten(2)
        size = y.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        return self.said(self.out, (y / size).to(gate.dtype) * gate, x.mask), LinearState(memory)
