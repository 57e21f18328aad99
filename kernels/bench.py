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

import torch
import triton.testing
from peers import CASES, CHUNK, DIM, HEADS, LEFT, PEERS, STREAMS, Cannot, Case, Cost, Inputs, Live
from torch import Tensor

__all__ = ["Figure", "main", "measured"]


def batch(frames: int) -> int:
    """Rows: about as many frames in all, whatever their length."""
    return 8 if frames <= 8000 else 1


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
            back = partial(torch.autograd.grad, y, x.wanted, torch.ones_like(y), retain_graph=True)
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
