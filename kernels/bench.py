"""Attention kernels against their peers on a GPU: forward, backward and the streaming step.

    python kernels/bench.py            # everything, a few minutes
    python kernels/bench.py --quick    # up to 8,000 frames
    python kernels/bench.py --dtype float32 --json figures.json

A time is the median of CUDA events after a warm-up, between which the L2 cache is emptied; compiling is not in it.
TFLOP/s counts visible keys only, GB/s every argument and result once. "roof" is the time that this GPU cannot beat,
from a large copy and a large product measured here, over the time taken. What a peer cannot do is said, and why.
Without a GPU nothing is measured, and nothing is claimed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import sqrt
from typing import NamedTuple

import torch
import triton.testing
from speechattn_kernels.step import step
from speechattn_kernels.window import window
from torch import Tensor
from torch.nn import functional as F

from speechattn.attention import Relative, Span, attend

__all__ = ["CASES", "PEERS", "Case", "Figure", "Inputs", "main", "measured"]

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
    Case("chunk 64, left 256", Span(256, 64), (2000, 30000)),
    Case("sliding, left 64", Span(64, 1), (8000,)),
    Case("causal", Span.causal(), (2000, 8000)),
    Case("full", Span.full(), (2000, 8000)),
    Case("chunk 16, left 64, rows", Span(64, 16), (2000, 30000), rows=True),
)
STREAMS = (1, 64, 1024)


def batch(frames: int) -> int:
    """Rows: about as many frames in all, whatever their length."""
    return 8 if frames <= 8000 else 1


class Cannot(Exception):
    """Why a peer is not measured here."""


@dataclass(frozen=True)
class Figure:
    """One line of the report; what was not measured has a reason."""

    case: str
    frames: int
    batch: int
    peer: str
    turn: str
    dtype: str
    ms: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    roof: float | None = None
    peak_mb: float | None = None
    error: float | None = None  # of the result, from ours, relative to its size
    reason: str | None = None


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
        position = Relative(HEADS * DIM, HEADS).to(device, dtype).requires_grad_(False) if case.rows else None
        return cls(case, *(x.requires_grad_() for x in (q, k, v)), position)

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
        """Operations, and bytes that must move: two products and q, k, v, out; backward five, and gradients too."""
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
    terms = x.position.terms(distances, places, x.q)
    assert terms is not None
    assert terms.shift is not None
    shift = terms.shift[:, None].to(x.q.dtype)
    return lambda: window(
        x.q + shift, k, v, valid, left=span.left, chunk=span.chunk, right=span.right, rows=terms.rows,
        table=terms.table, origin=least,
    )[0]  # fmt: skip


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


def timed(run: Callable[[], object]) -> float:
    """Median milliseconds of a call."""
    return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))


def ceilings(dtype: torch.dtype, device: torch.device) -> Cost:
    """A product of 8192 x 8192, and a copy of a gigabyte."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty(2**30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    product, copy = timed(lambda: a @ b), timed(lambda: y.copy_(x))
    return Cost(2.0 * 8192**3 / product * 1e3, 2.0 * x.nbytes / copy * 1e3)


def peak(run: Callable[[], object]) -> float:
    """Megabytes that a call has at most, beyond what was there."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def judged(base: Figure, run: Callable[[], object], cost: Cost, most: Cost, error: float | None = None) -> Figure:
    """The figures of one call."""
    run()  # compiles
    mb, ms = peak(run), timed(run)
    best = max(cost.flops / most.flops, cost.bytes / most.bytes)
    return replace(
        base,
        ms=ms,
        tflops=cost.flops / ms / 1e9,
        gbs=cost.bytes / ms / 1e6,
        roof=1e3 * best / ms,
        peak_mb=mb,
        error=error,
    )


def refused(base: Figure, error: Exception) -> Figure:
    """Why there is no figure."""
    said = (str(error).strip().splitlines() or [""])[0]
    if not isinstance(error, Cannot):
        said = f"{type(error).__name__}: {said}"
    return replace(base, reason=said[:120])


def apart(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, relative to what is wanted; in strips, which need little memory."""
    pairs = list(zip(found.split(4096, 2), wanted.split(4096, 2), strict=True))
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return sqrt(off / max(sum(float(b.double().square().sum()) for _, b in pairs), 1e-30))


def measured(
    case: Case, frames: int, rows: int, dtype: torch.dtype, device: torch.device, most: Cost, until: float
) -> Iterator[Figure]:
    """All peers on one input, forward and backward; after the time `until` the rest is named, not measured."""
    x, wanted, kind = Inputs.make(case, frames, rows, dtype, device), None, str(dtype).removeprefix("torch.")
    for name, peer in PEERS.items():
        base = Figure(case.name, frames, rows, name, "forward", kind)
        try:
            if time.monotonic() > until:
                raise Cannot("not measured: the time is up")
            run = peer(x)
            with torch.no_grad():
                out = run()
                wanted = out if wanted is None else wanted
                figure = judged(base, run, x.cost("forward"), most, apart(out, wanted))
            yield figure
            base, y = replace(base, turn="backward"), run()
            back = partial(torch.autograd.grad, y, (x.q, x.k, x.v), torch.ones_like(y), retain_graph=True)
            yield judged(base, back, x.cost("backward"), most)
        except Exception as error:  # a peer that fails is a line of the report
            yield refused(base, error)
        finally:
            run = out = back = y = None
            gc.collect()
            torch.cuda.empty_cache()


def stepped(streams: int, dtype: torch.dtype, device: torch.device, most: Cost) -> Iterator[Figure]:
    """One chunk of so many streams."""
    x, wanted, kind = Live(streams, dtype, device), None, str(dtype).removeprefix("torch.")
    for name, run in (("ours", x.ours), ("window", x.window), ("sdpa", x.sdpa)):
        base = Figure(f"step, chunk {CHUNK}, left {LEFT}", CHUNK, streams, name, "step", kind)
        try:
            with torch.no_grad():
                out = run()
                wanted = out if wanted is None else wanted
                figure = judged(base, run, x.cost(), most, apart(out, wanted))
            yield figure
        except Exception as error:
            yield refused(base, error)


HEADER = f"{'case':<24} {'T':>6} {'B':>5} {'turn':<9} {'peer':<10} {'ms':>9} {'TFLOP/s':>8} {'GB/s':>7} {'roof':>5} "


def line(figure: Figure) -> str:
    """One row of the table."""
    head = f"{figure.case:<24} {figure.frames:>6} {figure.batch:>5} {figure.turn:<9} {figure.peer:<10} "
    if figure.ms is None:
        return f"{head}{figure.reason}"
    off = "" if figure.error is None else f"{figure.error:.1e}"
    share, rate = f"{figure.roof:>5.0%}", f"{figure.tflops:>8.2f} {figure.gbs:>7.0f}"
    return f"{head}{figure.ms:>9.4f} {rate} {share} {figure.peak_mb:>9.1f} {off}"


def everything(dtype: torch.dtype, device: torch.device, most: Cost, *, quick: bool, until: float) -> Iterator[Figure]:
    """All cases at all their lengths, then the step."""
    for streams in STREAMS:
        yield from stepped(streams, dtype, device, most)
    for case in CASES:
        for frames in case.lengths:
            if not quick or frames <= 8000:
                yield from measured(case, frames, batch(frames), dtype, device, most, until)


def main(arguments: list[str] | None = None) -> int:
    """The table, and the figures as JSON where they are wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 8,000 frames")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--seconds", type=float, default=220.0, help="after so many, what is left is only named")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No GPU here: GPU times are unmeasured.")
        return 0
    warnings.filterwarnings("ignore")
    from torch._functorch import config

    config.donated_buffer = False  # graphs are walked more than once
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    torch.manual_seed(0)
    until = time.monotonic() + options.seconds
    most = ceilings(dtype, device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {options.dtype}; "
          f"{HEADS} heads of {DIM}")  # fmt: skip
    print(f"ceilings: {most.flops / 1e12:.0f} TFLOP/s, {most.bytes / 1e9:.0f} GB/s\n")
    print(f"{HEADER}{'peak MB':>9} error")
    figures: list[Figure] = []
    for figure in everything(dtype, device, most, quick=options.quick, until=until):
        figures.append(figure)
        print(line(figure), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"ceilings": most._asdict(), "figures": [asdict(figure) for figure in figures]}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
