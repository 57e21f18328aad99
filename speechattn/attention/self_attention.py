"""Self-attention as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from speechattn.attention.attend import BACKENDS, choose
from speechattn.attention.pattern import Pattern, Span
from speechattn.attention.position import Position
from speechattn.attention.ring import Ring, looked
from speechattn.attention.softmax import first_valid
from speechattn.frames import Frames
from speechattn.linear import dropped, run
from speechattn.stream import Buffer, Plan, Planned
from speechattn.tree import node

__all__ = ["AttentionState", "SelfAttention", "Spanned", "joined", "separated", "set_backend", "set_span", "unable"]

LONGEST = 64  # frames of a step that the kernel of steps reads, or one chunk


@node
class AttentionState:
    """What self-attention keeps: queries that wait for their look-ahead, keys and values [B, N, 2, G, D], sinks."""

    waiting: Tensor
    past: Buffer | Ring
    sinks: Buffer

    @staticmethod
    def align(states: Sequence[AttentionState]) -> Sequence[AttentionState]:
        """The same with buffers in all, where some have a ring and others none."""
        if len({type(state.past) for state in states}) == 1:
            return states
        return [replace(s, past=s.past.buffer()) if isinstance(s.past, Ring) else s for s in states]


def joined(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with `query`, `key` and `value` apart -> with the `qkv` of the self-attention in `network`.

    A bias that is missing is zero; what is not complete stays as it is.
    """
    tensors = dict(tensors)
    for name, module in network.named_modules():
        at = [f"{name}.{part}" if name else part for part in ("query", "key", "value", "qkv")]
        if not isinstance(module, SelfAttention) or any(f"{part}.weight" not in tensors for part in at[:3]):
            continue
        weights = [tensors.pop(f"{part}.weight") for part in at[:3]]
        biases = [tensors.pop(f"{part}.bias", w.new_zeros(len(w))) for part, w in zip(at[:3], weights, strict=True)]
        tensors |= {f"{at[3]}.weight": torch.cat(weights), f"{at[3]}.bias": torch.cat(biases)}
    return tensors


def separated(network: nn.Module) -> dict[str, Tensor]:
    """The weights of `network` with `query`, `key` and `value` of its self-attention apart: what `joined` undoes."""
    tensors = dict(network.state_dict())
    for name, module in network.named_modules():
        if isinstance(module, SelfAttention):
            at = f"{name}." if name else ""
            sizes = [module.heads * module.width, *2 * [module.key_heads * module.width]]
            for kind in ("weight", "bias"):
                parts = tensors.pop(f"{at}qkv.{kind}").split(sizes)
                tensors |= {f"{at}{p}.{kind}": t for p, t in zip(("query", "key", "value"), parts, strict=True)}
    return tensors


class Spanned(Planned):
    """A stream that a `Span` governs; its frames are `rate` times as short as those that the span counts."""

    span: Pattern
    rate: int = 1

    def scaled(self, span: Pattern) -> Pattern:
        """The same stretch of time in frames of this stream; ValueError when that is not a whole number."""
        if self.rate == 1:
            return span
        if not isinstance(span, Span):
            raise ValueError(f"{type(span).__name__} counts blocks; it cannot be set at {self.rate} times the rate")
        return span.scaled(self.rate)


def set_span(stream: nn.Module, span: Pattern) -> None:
    """Give all attention (and chunked convolution) inside `stream` another span, counted in its output frames.

    Draw it before each batch for dynamic chunk training (arXiv 2012.05481). ValueError when nothing in the stream
    has a span, or when it cannot be expressed at the rate of an inner layer. A running state does not survive it.
    """
    inner = [module for module in stream.modules() if isinstance(module, Spanned)]
    if not inner:
        raise ValueError(f"{type(stream).__name__} has nothing that a span governs")
    for module, scaled in [(module, module.scaled(span)) for module in inner]:
        module.span = scaled


def set_backend(stream: nn.Module, name: str) -> None:
    """All attention inside `stream` computes by this backend from now on: a name in `BACKENDS`, or "auto".

    ValueError for another name, and when nothing in the stream attends by a backend. A running state goes on.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend {name}: wanted auto or one of {', '.join(BACKENDS)}")
    layers = attending(stream)
    if not layers:
        raise ValueError(f"{type(stream).__name__} has nothing that attends by a backend")
    for layer in layers:
        layer.backend = name


def unable(stream: nn.Module, name: str) -> str | None:
    """Why some attention inside `stream` cannot compute by this backend; None if all can."""
    for layer in attending(stream) if name != "auto" else []:
        weights = (getattr(layer.qkv, "weight", None), *layer.parameters())  # quantised layers have a method there
        like = next((w for w in weights if isinstance(w, Tensor) and w.is_floating_point()), torch.empty(0))
        q = torch.empty(1, layer.heads, 1, layer.width * layer.group, dtype=like.dtype, device=like.device)
        if reason := BACKENDS[name].supports(q, layer.span, layer.position):
            return reason
    return None


def attending(stream: nn.Module) -> list[SelfAttention]:
    """What computes by a backend."""
    layers = [module for module in stream.modules() if isinstance(module, SelfAttention)]
    return [layer for layer in layers if type(layer)._looked is SelfAttention._looked]


class SelfAttention(Spanned):
    """Frames look at frames of their own row, as `span` allows, behind a `norm` if there is one.

    `key_heads` fewer than `heads` are shared by groups of query heads (arXiv 2305.13245). `group` > 1 puts so many
    neighbours into one wider frame (Efficient Conformer, arXiv 2109.01163, section 3.2); the span counts those.
    A head is `width` features wide, by default its share of `dim`: so a layer may have any number of heads.
    """

    def __init__(
        self, dim: int, heads: int, span: Pattern, *, position: Position | None = None, key_heads: int | None = None,
        group: int = 1, norm: nn.Module | None = None, dropout: float = 0.0, backend: str = "auto",
        width: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        key_heads = key_heads or heads
        if (width is None and dim % heads) or heads % key_heads:
            raise ValueError(f"{dim} features, {heads} heads, {key_heads} key heads: they do not divide")
        self.dim, self.heads, self.key_heads, self.group, self.backend = dim, heads, key_heads, group, backend
        self.width = dim // heads if width is None else width
        self.span: Pattern = span
        self.position = position
        self.norm = norm
        self.qkv = nn.Linear(dim, (heads + 2 * key_heads) * self.width)  # queries, then keys, then values
        self.out = nn.Linear(heads * self.width, dim)
        self.dropout = dropout

    def scaled(self, span: Pattern) -> Pattern:
        span = super().scaled(span)
        if self.group == 1:
            return span
        if not isinstance(span, Span) or span.right:
            raise ValueError(f"{span}: grouped frames cannot look ahead; use a larger chunk")
        if any(number and number % self.group for number in (span.left, span.chunk)):
            raise ValueError(f"{span} at this layer's rate: its frames must divide by the group of {self.group}")
        left, chunk = (number // self.group if number else number for number in (span.left, span.chunk))
        return Span(left, chunk, 0, span.dilation, span.sinks)

    def plan(self) -> Plan:
        span = self.span
        if self.group > 1 and span.right:
            raise ValueError("grouped frames cannot look ahead: use a larger chunk")
        if not isinstance(span, Span) or span.chunk is None:
            return Plan(None, Fraction(1), 0, None, 0)
        latency = -(-span.right // span.chunk) * span.chunk * self.group
        left = None if span.left is None or span.sinks else span.left * self.group
        return Plan(span.chunk * self.group, Fraction(1), latency, left, latency)

    def init_state(self, x: Frames) -> Any:
        plan = self.plan()
        if plan.block is None:
            return ()
        late = plan.latency // self.group
        state = self._state(x, late, late + (getattr(self.span, "left", None) or 0))
        return replace(state, past=self._kept(state.past)) if self._rings(x) else state

    def _rings(self, x: Frames) -> bool:
        """The kernel of steps will be used, so the history of a new state is a `Ring`."""
        kind = type(self)
        usual = kind._attend is SelfAttention._attend and kind._looked is SelfAttention._looked
        if not usual or not self._by_kernel():
            return False
        q = x.values.new_empty(len(x.mask), self.heads, 1, self.width * self.group)
        triton = BACKENDS["triton"]
        chosen = self.backend == "triton" or triton.preferred(q)
        return chosen and triton.supports(q, self.span, self.position) is None

    def _by_kernel(self) -> bool:
        """A `Ring` may be written to: nobody asks for a gradient, for another backend, or for what a ring lacks."""
        fits = isinstance(self.span, Span) and self.span.left is not None and not self.span.sinks
        return fits and self.backend in ("auto", "triton") and not torch.is_grad_enabled()

    def _kept(self, past: Buffer | Ring) -> Ring:
        """History as a ring that a step of one chunk fits in."""
        return past if isinstance(past, Ring) else Ring.of(past, getattr(self.span, "chunk", None) or 1)

    def _state(self, x: Frames, late: int, history: int) -> AttentionState:
        """Room for so many waiting queries and so much history, and nothing in it."""
        rows, width = x.values.shape[0], self.width * self.group
        like = x.values.new_zeros(rows, 0, 2, self.key_heads, width)
        waiting = x.values.new_zeros(rows, late, self.heads * width)
        return AttentionState(waiting, Buffer.empty(like, history), Buffer.empty(like, self.span.sinks))

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        whole = not isinstance(state, AttentionState)
        spent = self._spend(state) if whole else None
        length = x.mask.shape[1]
        if not length:
            return x, spent if whole else state
        if whole:
            x = x.pad(-length % self.group)
            state = self._state(x, 0, 0)
        q, kv, mask = self._project(x)
        frames, late = mask.shape[1], state.waiting.shape[1]
        waiting, asks = state.waiting, x.mask
        if late:
            queries = torch.cat([waiting.to(q.dtype), q], 1)
            q, waiting = queries[:, :frames], queries[:, frames:]
            asks = torch.cat([state.past.mask[:, -late:], mask], 1)[:, :frames]
        ring = isinstance(state.past, Ring) and self._by_kernel()
        if ring and frames <= max(LONGEST, getattr(self.span, "chunk", None) or 1):
            said, after = self._stepped(q, kv, mask, state.past, late)
            return Frames.finite(said, asks), AttentionState(waiting, after, state.sinks)
        past = state.past.append(kv, mask)
        y = Frames.finite(self._attend(q, past, state.sinks, late), asks)
        if whole:
            return y[:length], spent
        left = getattr(self.span, "left", None)
        kept = past if left is None else past.last(left + late)
        return y, AttentionState(waiting, self._kept(kept) if ring else kept, self._sunk(past, kept, state.sinks))

    def _project(self, x: Frames) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> queries [B, T, H * width], keys and values [B, T, 2, G, width], mask; all by group."""
        b, frames = x.mask.shape
        y = run(self.qkv, x.values if self.norm is None else self.norm(x.values))
        own, shared, group = self.heads * self.width, self.key_heads * self.width, self.group
        q, kv, mask = y[..., :own], y[..., own:], x.mask[:, ::group]
        kv = kv.view(b, frames, 2, shared)
        if group > 1:
            q = q.reshape(b, frames // group, own * group)
            kv = kv.view(b, frames // group, group, 2, shared).transpose(2, 3) * mask[..., None, None, None]
        return q, kv.reshape(b, frames // group, 2, self.key_heads, self.width * group), mask

    def _attend(self, queries: Tensor, past: Buffer, sinks: Buffer, late: int) -> Tensor:
        """Queries [B, T, H * width], `late` frames behind the newest keys -> [B, T, D], ungrouped and projected."""
        return self._said(self._looked(self.span, queries, past, sinks, late))

    def _said(self, y: Tensor) -> Tensor:
        """What the heads say [B, T, H * width], projected."""
        out = run(self.out, y)
        return dropped(out, self.dropout) if self.training else out

    def _stepped(self, q: Tensor, kv: Tensor, mask: Tensor, ring: Ring, late: int) -> tuple[Tensor, Ring]:
        """As `_attend`, of queries [B, T, H * width] and what is new behind a ring, and the next ring."""
        assert isinstance(self.span, Span)
        b, frames, _ = q.shape
        q = q.view(b, frames, self.heads, -1)
        y, ring = looked(q, kv, mask, ring, self.span, late, self.position)
        return self._said(y.reshape(b, frames * self.group, self.heads * self.width)), ring

    def _looked(self, span: Pattern, queries: Tensor, past: Buffer, sinks: Buffer, late: int) -> Tensor:
        """The same as `span` allows, before the projection [B, T, H * width]."""
        keys, valid = past.values, past.mask
        if end := span.right - late:  # the last query does not see farther
            keys, valid = keys[:, :end], valid[:, :end]
        if sinks.mask.shape[1]:
            keys, valid = torch.cat([sinks.values, keys], 1), torch.cat([sinks.mask, valid], 1)
        b, frames, width = queries.shape
        q = queries.reshape(b, frames, self.heads, width // self.heads).transpose(1, 2)
        k, v = keys.permute(2, 0, 3, 1, 4).unbind()
        backend = choose(q, span, self.position, self.backend)
        y = backend(q, k, v, pattern=span, valid=valid, position=self.position)
        return y.transpose(1, 2).reshape(b, frames * self.group, self.heads * self.width)

    def _sunk(self, past: Buffer, kept: Buffer, sinks: Buffer) -> Buffer:
        """The first valid frames of the row, as far as they left the history that is kept."""
        n = sinks.mask.shape[1]
        if not n:
            return sinks
        gone = past.mask.shape[1] - kept.mask.shape[1]
        values = torch.cat([sinks.values, past.values[:, :gone]], 1)
        mask = torch.cat([sinks.mask, past.mask[:, :gone]], 1)
        which = first_valid(mask, n)
        return Buffer(torch.einsum("bsn,bn...->bs...", which.to(values.dtype), values), which.any(-1))
