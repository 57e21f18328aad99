"""What can be known of the attention kernels without a GPU: work, memory, registers; with one, also their times.

    make bench-kernels         # about two minutes
    python benchmarks/kernels.py --quick

Work is counted in Triton's interpreter (a process of its own): which key blocks a program loads, what it multiplies,
what it moves. Memory is that of torch's allocator on the CPU, where the launches are recorded and nothing runs.
Registers and shared memory are what the compiler for sm_90 says. Ratios of times need a GPU: without one they are
unmeasured, and nothing here stands for them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from report import Report
from torch import Tensor

KERNELS = Path(__file__).parents[1] / "kernels"
# left, chunk, right, head size: chunks smaller and larger than a tile, a window of one frame, look-ahead.
BANDS = ((64, 16, 0, 64), (256, 64, 0, 64), (64, 1, 0, 64), (0, 16, 0, 32), (100, 40, 24, 32), (40, 100, 8, 64))
LENGTHS = (512, 1024, 2048)
QUICK = LENGTHS[:1]


class Counter:
    """What the kernels of the interpreter load, store and multiply, by kernel."""

    def __init__(self) -> None:
        self.flops: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)
        self.tiles: dict[str, tuple[int, int]] = {}
        # of each program, how often it loads a tile of a tensor
        self.loads: dict[tuple[str, str], dict[tuple[int, ...], int]] = defaultdict(lambda: defaultdict(int))
        self.kernel, self.args = "", dict[str, Any]()

    def most(self, kernel: str, *tensors: str) -> int:
        """Tiles of one of the tensors that a program loads at most; a tile that is loaded twice counts twice."""
        return max(max(self.loads[kernel, tensor].values()) for tensor in tensors)

    def moved(self, mask: Any, size: int) -> None:
        """Bytes in memory, of what is not masked."""
        self.bytes[self.kernel] += float(mask.sum()) * size

    def loaded(self, where: Any, program: tuple[int, ...]) -> None:
        """Whose memory this is."""
        first = int(where.reshape(-1)[0])
        for name in ("q", "k", "v", "d_out", "extra_values"):
            x: Tensor | None = self.args.get(name)
            if x is not None and 0 <= first - x.data_ptr() < x.nbytes:
                assert x.is_contiguous()
                self.loads[self.kernel, name][program] += 1


@contextmanager
def counted() -> Iterator[Counter]:
    """Inside, the interpreter counts."""
    from triton.runtime import interpreter

    counter, builder, executor = Counter(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, dot, call = (
        builder.create_masked_load, builder.create_masked_store, builder.create_dot, executor.__call__,
    )  # fmt: skip

    def loading(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        found = load(self, ptrs, mask, other, *rest)
        counter.moved(mask.data, found.data.itemsize)
        counter.loaded(ptrs.data, tuple(self.grid_idx))
        return found

    def storing(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.moved(mask.data, value.data.itemsize)
        return store(self, ptrs, value, mask, *rest)

    def multiplying(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        counter.flops[counter.kernel] += 2.0 * prod(a.data.shape) * b.data.shape[-1]
        return dot(self, a, b, *rest)

    def calling(self: Any, *args: Any, **options: Any) -> Any:
        counter.kernel, counter.args = self.fn.__name__, {**dict(zip(self.arg_names, args, strict=False)), **options}
        counter.tiles[counter.kernel] = counter.args["BLOCK_M"], counter.args["BLOCK_N"]
        return call(self, *args, **options)

    builder.create_masked_load, builder.create_masked_store = loading, storing
    builder.create_dot, executor.__call__ = multiplying, calling
    try:
        yield counter
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_dot, executor.__call__ = dot, call


def inputs(frames: int, keys: int, dim: int, heads: int = 1, **options: Any) -> tuple[Tensor, ...]:
    """q, k, v that want gradients, and what is valid."""
    q = torch.randn(1, heads, frames, dim, requires_grad=True, **options)
    k, v = (torch.randn(1, heads, keys, dim, requires_grad=True, **options) for _ in range(2))
    return q, k, v, torch.ones(1, keys, dtype=torch.bool, device=q.device)


def work(frames: int, left: int, chunk: int, right: int, dim: int, sinks: int = 0) -> Counter:
    """Forward and backward of one head."""
    from speechattn_kernels.window import window

    scores, held = (torch.randn(1, 1, frames, sinks), torch.randn(1, 1, sinks, dim)) if sinks else (None, None)
    with counted() as counter:
        q, k, v, valid = inputs(frames, frames + right, dim)
        out, _ = window(q, k, v, valid, left=left, chunk=chunk, right=right, extra=scores, extra_values=held)
        out.sum().backward()
    return counter


def visits(frames: int) -> Iterator[tuple[str, int, int]]:
    """Of each band and kernel, tiles that a program loads at most, and what it may."""
    for left, chunk, right, dim in BANDS:
        counter = work(frames, left, chunk, right, dim)
        for kernel, (m, n) in counter.tiles.items():
            walked, own, step = (("q", "d_out"), n, m) if "keys" in kernel else (("k", "v"), m, n)
            bound = -(-(left + right + own + 2 * (chunk - 1)) // step) + 1
            yield f"{kernel}, left {left} chunk {chunk} right {right}", counter.most(kernel, *walked), bound
    left, chunk, right, dim = BANDS[0]
    counter, kernel = work(frames, left, chunk, right, dim, sinks=4), "window_forward_kernel"
    m, n = counter.tiles[kernel]
    bound = -(-(left + right + m + 2 * (chunk - 1)) // n) + 1
    yield f"{kernel}, the same with 4 sinks", counter.most(kernel, "k", "v"), bound
    yield f"{kernel}, blocks of sinks", counter.most(kernel, "extra_values"), 1


def growth() -> Iterator[tuple[str, float, float]]:
    """Of each kernel, operations and bytes of the second half of a sequence over those of the first."""
    found = [work(frames, *BANDS[0]) for frames in LENGTHS]
    for kernel in found[0].tiles:
        flops, moved = ([getattr(one, name)[kernel] for one in found] for name in ("flops", "bytes"))
        yield (
            kernel,
            (flops[2] - flops[1]) / (flops[1] - flops[0]) / 2,
            (moved[2] - moved[1]) / (moved[1] - moved[0]) / 2,
        )


def memory(
    frames: int, left: int | None, *, rows: bool = False, heads: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Bytes that the backward pass has at most, beyond what the forward pass left, and those of the gradients in it."""
    from speechattn_kernels.common import recorded
    from speechattn_kernels.window import window

    table = torch.randn(heads, 64, (left or 0) + 31, dtype=dtype, requires_grad=True) if rows else None
    with recorded():
        q, k, v, valid = inputs(frames, frames, 64, heads, dtype=dtype)
        out = window(q, k, v, valid, left=left, chunk=16, rows=table, origin=-15)[0]
        given = torch.ones_like(out)
        wanted = [x for x in (q, k, v, table) if x is not None]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            found = torch.autograd.grad(out, wanted, given)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    gradients = sum(x.nbytes for x in found)
    assert most >= gradients, "the profiler has missed an allocation"
    return float(most), float(gradients)


def beyond(left: int | None, frames: int = 8000, heads: int = 4) -> float:
    """Bytes of each frame and head that backward has besides the gradients; float16, so that wider copies are seen."""
    most, gradients = memory(frames, left, heads=heads, dtype=torch.float16)
    return (most - gradients) / frames / heads


def interpreted(quick: bool) -> dict[str, Any]:
    """What this process, in which Triton interprets, has counted."""
    return {
        "visits": list(visits(QUICK[0])),
        "growth": [] if quick else list(growth()),
        "memory": {f"{frames} {left}": memory(frames, left)[0] for frames in (4000, 8000) for left in (64, 256, 1024)},
        "rows": {f"{n} {left}": memory(n, left, rows=True)[0] for n in (4000, 8000) for left in (64, 1024)},
        "beyond": {str(left): beyond(left) for left in (64, 1024, None)},
    }


def asked(quick: bool) -> dict[str, Any]:
    """The same from a process of its own."""
    command = [sys.executable, __file__, "--interpreted", *(["--quick"] if quick else [])]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def compiled(frames: int) -> list[Any]:
    """Forward and backward of so many frames, D = 64, chunk 16, left 64 in bfloat16 for sm_90, plain."""
    sys.path.insert(0, str(KERNELS))
    import aot
    from speechattn_kernels.common import recorded
    from speechattn_kernels.window import window

    with recorded() as launches:
        q, k, v, valid = inputs(frames, frames, 64, 8, dtype=torch.bfloat16, device="meta")
        window(q, k, v, valid, left=64, chunk=16)[0].sum().backward()
    return aot.reports([aot.Shipped("window", "D=64 chunk 16 left 64 bf16", True, one) for one in launches], [90])


def times(report: Report, quick: bool) -> None:
    """Against the peers, where there is a GPU; else a sentence."""
    if not torch.cuda.is_available():
        print("No GPU here: GPU times are unmeasured.\n")
        return
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, str(KERNELS / "bench.py"), "--json", file.name, *(["--quick"] if quick else [])]
        subprocess.run(command, check=True)
        figures = json.load(file)["figures"]
    own = {(f["case"], f["frames"], f["batch"], f["turn"]): f["ms"] for f in figures if f["peer"] == "ours"}
    for one in figures:
        key = one["case"], one["frames"], one["batch"], one["turn"]
        if one["peer"] != "ours" and one["ms"] and own.get(key):
            name = f"{one['turn']}, {one['case']}, T={one['frames']}: {one['peer']} / ours"
            report.row(name, one["ms"] / own[key], "x", f"ours {own[key]:.3f} ms")


def reported(report: Report, found: dict[str, Any]) -> None:
    """The figures of the interpreter."""
    for name, most, bound in found["visits"]:
        report.row(name, most, "blocks", "visited at most by a program", f"<= {bound}", lambda x, n=bound: x <= n)  # type: ignore[misc]
    for kernel, flops, moved in found["growth"]:
        for what, value in (("FLOPs", flops), ("bytes", moved)):
            report.row(f"{kernel}, {what}", value, "x", "frames 1025 to 2048 over twice 513 to 1024", "0.99 to 1.01",
                       lambda x: abs(x - 1) <= 0.01)  # fmt: skip
    used: dict[str, float] = found["memory"]
    by_left, by_time = used["8000 1024"] / used["8000 64"], used["8000 64"] / used["4000 64"]
    report.row("backward memory, left 1024 / left 64", by_left, "x", "T = 8000", "<= 1.01", lambda x: x <= 1.01)
    report.row("backward memory, T 8000 / T 4000", by_time, "x", "left 64", "<= 2.02", lambda x: x <= 2.02)
    report.row(
        "backward memory, bytes a frame and head", used["8000 64"] / 8000 / 4, "B", "float32, D = 64, with gradients"
    )
    for left, more in found["beyond"].items():
        report.row(f"backward memory beyond gradients, left {left}", more, "B", "a frame and head, float16, D = 64",
                   "<= 16", lambda x: x <= 16)  # fmt: skip
    wider = [found["rows"][f"{n} 1024"] - found["rows"][f"{n} 64"] for n in (4000, 8000)]
    note = f"{wider[1] / 1e6:.1f} MB, of the tables alone; T x W would be 2"
    name = "rows: what left 1024 adds, T 8000 / T 4000"
    report.row(name, wider[1] / max(wider[0], 1.0), "x", note, "<= 1.01", lambda x: x <= 1.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the growth of work; under a minute")
    parser.add_argument("--interpreted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.interpreted:
        print(json.dumps(interpreted(options.quick)))
        return
    report = Report()
    reported(report, asked(options.quick))
    for frames in (2000, 1999):  # a multiple of 16, and none
        for one in compiled(frames):
            note = f"T = {frames}, {one.registers} registers, {one.shared} bytes shared, sm_90"
            report.row(f"{one.of.kernel}, spills", one.spills, "B", note, "0", lambda x: x == 0)
            report.row(f"{one.of.kernel}, CTAs of a multiprocessor", one.ctas, "", note, ">= 2", lambda x: x >= 2)
    times(report, options.quick)
    report.print()


if __name__ == "__main__":
    main()
