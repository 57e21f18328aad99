"""What is measured: cases, their inputs, and everybody who can compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch
from speechattn_kernels.step import step
from speechattn_kernels.window import window
from torch import Tensor
from torch.nn import functional as F

from speechattn.attention import Relative, Span, attend

__all__ = ["CASES", "CHUNK", "DIM", "HEADS", "LEFT", "PEERS", "STREAMS", "Cannot", "Case", "Cost", "Inputs", "Live"]

HEADS, DIM = 8, 64
CHUNK, LEFT = 16, 64  # of the streaming step


@dataclass(frozen=True)
class Case:
    """A band with the lengths at which it is measured; `rows` adds the Transformer-XL term."""

    name: str
    span: Span
    lengths: tuple[int, ...]
    rows: bool = False


CASES = (
    Case("chunk 16, left 64", Span(64, 16), (500, 2000, 8000, 30000, 90000)),
    Case("chunk 16, left 64, rows", Span(64, 16), (2000, 8000, 30000), rows=True),
    Case("chunk 64, left 256", Span(256, 64), (2000, 30000)),
    Case("causal", Span.causal(), (2000, 8000)),
    Case("full", Span.full(), (2000, 8000)),
    Case("sliding, left 64", Span(64, 1), (8000,)),
)
STREAMS = (1, 64, 1024)


class Cannot(Exception):
    """Why a peer is not measured here."""


class Cost(NamedTuple):
    """Floating-point operations and bytes of a call; or, of a GPU, those that it reaches in a second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Inputs:
    """q, k, v [B, H, T, D] over an utterance that is all there."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    position: Relative | None

    @classmethod
    def make(cls, case: Case, frames: int, rows: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        q, k, v = (torch.randn(rows, HEADS, frames, DIM, device=device, dtype=dtype) for _ in range(3))
        position = Relative(HEADS * DIM, HEADS).to(device, dtype) if case.rows else None
        return cls(case, *(x.requires_grad_() for x in (q, k, v)), position)

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """What gradients are asked for: q, k, v, and what the position has learned."""
        return self.q, self.k, self.v, *(() if self.position is None else self.position.parameters())

    @property
    def visible(self) -> int:
        """Pairs of query and key that see each other, of one head."""
        span, frames = self.case.span, self.q.shape[2]
        at = torch.arange(frames)
        if span.chunk is None:
            return frames * frames
        own = at // span.chunk * span.chunk
        begin = torch.zeros_like(at) if span.left is None else (own - span.left).clamp(min=0)
        return int(((own + span.chunk + span.right).clamp(max=frames) - begin).sum())

    def cost(self, turn: str) -> Cost:
        """Operations, and bytes that must move: two products and q, k, v, out; backward five, and gradients too.

        Backward makes the scores once more, then the gradients of weights, q, k and v. Rows add a product to the
        scores, both times, and backward those for q and for themselves; to make the table of rows is not counted.
        """
        pairs = self.visible * len(self.q) * HEADS
        products, tensors = (2, 4) if turn == "forward" else (5, 8)
        if self.case.rows:
            products += 1 if turn == "forward" else 3
        return Cost(2.0 * products * pairs * DIM, tensors * self.q.nbytes)

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """k, v and valid with the empty history that a span bounded to the left is given."""
        valid = torch.ones(len(self.q), self.q.shape[2], dtype=torch.bool, device=self.q.device)
        pad = [self.case.span.left or 0, self.case.span.right]
        return F.pad(self.k, [0, 0, *pad]), F.pad(self.v, [0, 0, *pad]), F.pad(valid, pad)


def room(need: float, device: torch.device) -> None:
    """Cannot, where the GPU has less memory than `need`."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2.0**34
    if need > free:
        raise Cannot(f"out of memory: needs {need / 1e9:.0f} GB at least, {free / 1e9:.0f} GB are free")


def table(x: Inputs) -> Tensor:
    """Who sees whom [T, T], made in strips: all indices at once would need 8 T T bytes."""
    frames, device = x.q.shape[2], x.q.device
    seen, keys = torch.empty(frames, frames, dtype=torch.bool, device=device), torch.arange(frames, device=device)
    for begin in range(0, frames, 1024):
        seen[begin : begin + 1024] = x.case.span.allowed(keys[begin : begin + 1024, None], keys)
    return seen


def ours(x: Inputs) -> Callable[[], Tensor]:
    """The window kernel; it needs no history where there is none."""
    span, valid = x.case.span, x.q.new_ones(len(x.q), x.q.shape[2] + x.case.span.right, dtype=torch.bool)
    k, v = (F.pad(y, [0, 0, 0, span.right]) if span.right else y for y in (x.k, x.v))
    if x.position is None:
        return lambda: window(x.q, k, v, valid, left=span.left, chunk=span.chunk, right=span.right)[0]
    assert span.left is not None
    assert span.chunk is not None
    least = 1 - span.chunk - span.right
    distances, places = range(least, span.left + span.chunk), range(k.shape[2])
    made = x.position.terms

    def run() -> Tensor:
        terms = made(distances, places, x.q)  # in each call, as the other backends make theirs
        assert terms is not None
        assert terms.shift is not None
        return window(
            x.q + terms.shift[:, None].to(x.q.dtype), k, v, valid, left=span.left, chunk=span.chunk, right=span.right,
            rows=terms.rows, table=terms.table, origin=least,
        )[0]  # fmt: skip

    return run


def windowed(x: Inputs) -> Callable[[], Tensor]:
    """speechattn's window backend."""
    if x.case.span.left is None:
        raise Cannot("the pattern is not bounded to the left")
    room(8.0 * x.visible * len(x.q) * HEADS, x.q.device)
    k, v, valid = x.padded()
    return lambda: attend(x.q, k, v, pattern=x.case.span, valid=valid, position=x.position, backend="window")


def reference(x: Inputs) -> Callable[[], Tensor]:
    """speechattn's dense backend: scores and weights of every pair."""
    room((4.0 * x.q.element_size() * len(x.q) * HEADS + 24) * x.q.shape[2] ** 2, x.q.device)  # 24: of the mask
    k, v, valid = x.padded()
    return lambda: attend(x.q, k, v, pattern=x.case.span, valid=valid, position=x.position, backend="reference")


def sdpa(x: Inputs) -> Callable[[], Tensor]:
    """torch's fused attention; a band is a mask of T x T."""
    if x.position is not None:
        raise Cannot("the Transformer-XL term would be a bias of T x T for each head")
    if x.case.span in (Span.full(), Span.causal()):
        causal = x.case.span == Span.causal()
        return lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=causal)
    room(6.0 * x.q.shape[2] ** 2, x.q.device)
    seen = table(x)
    return lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=seen)


def flex(x: Inputs) -> Callable[[], Tensor]:
    """FlexAttention, compiled for this length, with a block mask that is made before."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if x.position is not None:
        raise Cannot("the Transformer-XL term depends on the query")
    if x.q.device.type != "cuda":
        raise Cannot("it needs CUDA")
    span, frames, mask = x.case.span, x.q.shape[2], None
    if span != Span.full():  # compiled where it is long: else all pairs would be in memory at once
        mask = create_block_mask(
            lambda b, h, i, j: span.allowed(i, j), None, None, frames, frames, str(x.q.device), _compile=frames > 8000
        )
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> Tensor:
        with torch.enable_grad():  # compiled once for both
            return compiled(x.q, x.k, x.v, block_mask=mask, scale=1 / sqrt(DIM))

    return run


def flash(x: Inputs) -> Callable[[], Tensor]:
    """The package flash-attn: full, causal, or a window of each frame."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        raise Cannot("flash-attn is not installed") from None
    span = x.case.span
    if x.q.dtype == torch.float32 or x.position is not None or span.chunk not in (1, None):
        raise Cannot("it has no float32, no Transformer-XL term, and no chunks")
    size = (-1 if span.left is None else span.left, 0 if span.chunk else -1)
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    return lambda: flash_attn_func(q, k, v, window_size=size).transpose(1, 2)


PEERS: dict[str, Callable[[Inputs], Callable[[], Tensor]]] = {
    "ours": ours, "window": windowed, "flex": flex, "flash-attn": flash, "sdpa": sdpa, "reference": reference,
}  # fmt: skip


class Live:
    """`streams` streams that have run for a while, each about to hear one chunk of 16 frames, 64 behind it."""

    def __init__(self, streams: int, dtype: torch.dtype, device: torch.device) -> None:
        made = {"device": device, "dtype": dtype}
        self.q, self.k, self.v = (torch.randn(streams, HEADS, CHUNK, DIM, **made) for _ in range(3))
        self.history = torch.randn(2, streams, HEADS, LEFT, DIM, **made)
        self.cache = torch.zeros(streams, LEFT + CHUNK, 2, HEADS, DIM, **made)
        self.cache[:, :LEFT] = self.history.permute(1, 3, 0, 2, 4)
        self.mask = torch.ones(streams, CHUNK, dtype=torch.bool, device=device)
        self.filled = torch.ones(streams, LEFT, dtype=torch.bool, device=device)
        self.at = torch.zeros(streams, dtype=torch.long, device=device)

    def ours(self) -> Tensor:
        """The step kernel: new keys go into the ring."""
        mask, cache, filled, at = self.mask, self.cache, self.filled, self.at
        return step(
            self.q, self.k, self.v, mask, cache, filled, at, left=LEFT, chunk=CHUNK, right=0, dilation=1, late=0
        )[0]  # fmt: skip

    def shifted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and what is valid, of a cache that is shifted instead; the next cache is a view of it."""
        k, v = torch.cat([self.history[0], self.k], 2), torch.cat([self.history[1], self.v], 2)
        return k, v, torch.cat([self.filled, self.mask], 1)

    def window(self) -> Tensor:
        """speechattn's window backend."""
        k, v, valid = self.shifted()
        return attend(self.q, k, v, pattern=Span(LEFT, CHUNK), valid=valid, backend="window")

    def sdpa(self) -> Tensor:
        """torch's fused attention with a mask of each row."""
        k, v, valid = self.shifted()
        return F.scaled_dot_product_attention(self.q, k, v, attn_mask=valid[:, None, None])

    def cost(self) -> Cost:
        """Operations, and bytes: four tensors of a chunk, new keys and values once more, and the history."""
        pairs = len(self.q) * HEADS * CHUNK * (LEFT + CHUNK)
        return Cost(4.0 * pairs * DIM, 6 * self.q.nbytes + self.history.nbytes)
