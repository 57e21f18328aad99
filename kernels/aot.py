"""What the compiler makes of every kernel that is shipped, for GPUs that need not be here.

    python kernels/aot.py                        # every configuration, for sm_80 and sm_90
    python kernels/aot.py --default --op window  # the default ones of one op
    python kernels/aot.py --first                # each kernel in its first default configuration, as the tests do

An op ships what the module `shipped` in its folder lists:

    def shipped() -> Iterator[tuple[str, bool, Callable[[], object]]]:
        ...  # a name, whether it is a default, and a call that launches it on tensors of the device meta
    def flops(launch: Launch) -> float:
        ...  # operations of one launch on what is visible

The calls are recorded, not run. Each launch is specialised as a real one would be and compiled. A configuration over a
limit of the architecture, one that does not compile, and a default one that spills are refused: exit status 1.
Occupancy is what fits on a multiprocessor at once, from registers, shared memory and threads; the arithmetic intensity
counts every byte of the arguments once, as if all reuse were caught.
"""

from __future__ import annotations

import argparse
import io
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import speechattn_kernels
import triton
from speechattn_kernels.common import Launch, recorded
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

__all__ = ["LIMITS", "Limits", "Report", "Shipped", "first", "main", "ops", "reports", "shipped", "table"]


@dataclass(frozen=True)
class Limits:
    """Of one architecture; shared memory in bytes, of which each CTA loses `reserved`."""

    shared: int  # of a multiprocessor
    reserved: int = 1024
    registers: int = 65536
    threads: int = 2048
    ctas: int = 32

    @property
    def most(self) -> int:
        """Bytes of shared memory that one CTA can have."""
        return self.shared - self.reserved

    def occupancy(self, registers: int, shared: int, warps: int) -> int:
        """CTAs at a time: registers come in units of 256 for each warp, warps in four groups, memory in 128 bytes."""
        each = -(-registers * 32 // 256) * 256
        by_registers = 4 * (self.registers // 4 // max(each, 1)) // warps if registers else self.ctas
        by_shared = self.shared // (-(-shared // 128) * 128 + self.reserved)
        return min(by_registers, by_shared, self.threads // (32 * warps), self.ctas)


LIMITS = {80: Limits(164 * 1024), 90: Limits(228 * 1024)}
GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Shipped:
    """One launch of one configuration."""

    op: str
    name: str
    default: bool
    launch: Launch
    flops: float | None = None

    @property
    def kernel(self) -> str:
        name: str = self.launch.kernel.__name__
        return name

    @property
    def intensity(self) -> float | None:
        """Operations for each byte of device memory."""
        seen = {id(x): x.nbytes for x in self.launch.args.values() if isinstance(x, Tensor)}
        return None if self.flops is None else self.flops / max(sum(seen.values()), 1)


@dataclass(frozen=True)
class Report:
    """What became of it on one architecture."""

    of: Shipped
    target: int
    shared: int = 0
    registers: int = 0
    spills: int = 0  # bytes stored and loaded
    mma: int = 0
    wgmma: int = 0
    ctas: int = 0
    cubin: int = 0  # bytes
    tensor: bool = False  # has products that belong on tensor cores
    faults: tuple[str, ...] = ()


def ops() -> tuple[str, ...]:
    """Folders of the package, one for each op."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(speechattn_kernels.__path__) if module.ispkg))


def shipped(op: str, target: int = 90) -> Iterator[Shipped]:
    """Every launch that the op's configurations make on sm_`target`; nothing for an op without a list."""
    if find_spec(f"speechattn_kernels.{op}.shipped") is None:
        return
    listed = import_module(f"speechattn_kernels.{op}.shipped")
    flops: Callable[[Launch], float] | None = getattr(listed, "flops", None)
    for name, default, call in listed.shipped():
        with recorded(target // 10) as launches:
            call()
        if not launches:
            raise RuntimeError(f"{op}, {name}: the call launched nothing that could be recorded")
        for launch in launches:
            yield Shipped(op, name, default, launch, flops(launch) if flops else None)


def first(wanted: Iterable[Shipped]) -> list[Shipped]:
    """Each kernel once: in the first of its default configurations."""
    found: dict[tuple[str, str], Shipped] = {}
    for one in wanted:
        if one.default:
            found.setdefault((one.op, one.kernel), one)
    return list(found.values())


def specialised(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel with types, constants and alignments as a launch on this target would find them, and its options."""
    kernel, backend = launch.kernel, make_backend(target)
    given = {**launch.args, "num_warps": launch.warps, "num_stages": launch.stages}
    bound, special, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(**given)
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, special, None)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


class Compiler:
    """Compiles each distinct kernel once for each architecture, and keeps what ptxas said about it."""

    def __init__(self) -> None:
        self.made: dict[tuple[object, ...], tuple[Any, str]] = {}

    def __call__(self, launch: Launch, target: int) -> tuple[Any, str]:
        """The compiled kernel, and the log of ptxas."""
        gpu, log = GPUTarget("cuda", target, 32), io.StringIO()
        source, options = specialised(launch, gpu)
        key = (source.hash(), target, launch.warps, launch.stages)
        if key not in self.made:
            with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
                triton.knobs.nvidia.dump_ptxas_log = True
                triton.knobs.compilation.always_compile = True  # what comes out of the cache has no log
                self.made[key] = triton.compile(source, target=gpu, options=options), log.getvalue()
        return self.made[key]


def build(of: Shipped, target: int, compiler: Compiler) -> Report:
    """One launch, compiled for sm_`target`, and what is wrong with it."""
    if not isinstance(of.launch.kernel, JITFunction):
        raise RuntimeError(f"{of.kernel} is interpreted: unset TRITON_INTERPRET to compile it")
    try:
        kernel, log = compiler(of.launch, target)
    except Exception as error:  # whatever the compiler or ptxas raises is a fault of the kernel
        return Report(of, target, faults=(f"does not compile: {last_line(error)}",))
    ptx, shared, warps = kernel.asm["ptx"], kernel.metadata.shared, of.launch.warps
    registers, spills = used(log)
    report = Report(
        of, target, shared, registers, spills,
        mma=ptx.count("mma.sync"), wgmma=ptx.count("wgmma.mma_async"),
        ctas=LIMITS[target].occupancy(registers, shared, warps), cubin=len(kernel.asm["cubin"]),
        tensor=any(fits_tensor_cores(line) for line in kernel.asm["ttir"].splitlines()),
    )  # fmt: skip
    return replace(report, faults=tuple(refusals(report)))


def used(log: str) -> tuple[int, int]:
    """Registers of a thread, and bytes spilled (stores and loads), as `ptxas -v` says."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not registers or len(spills) < 2:
        raise RuntimeError(f"ptxas did not say what it used: {log!r}")
    return int(registers[-1]), sum(map(int, spills))


def fits_tensor_cores(line: str) -> bool:
    """A product in Triton's own language, of half precision or of float32 as TF32."""
    return "tt.dot" in line and any(kind in line for kind in ("xbf16", "xf16", "tf32"))


def refusals(report: Report) -> Iterator[str]:
    """Why a configuration cannot be shipped."""
    limits, threads = LIMITS[report.target], 32 * report.of.launch.warps
    if report.shared > limits.most:
        yield f"{report.shared} bytes of shared memory, a CTA can have {limits.most}"
    if threads > 1024:
        yield f"{threads} threads, a CTA can have 1024"
    for axis, size, most in zip("xyz", report.of.launch.grid, GRID, strict=False):
        if size > most:
            yield f"a grid of {size} along {axis}, it can have {most}"
    if report.of.default and report.spills:
        yield f"a default configuration that spills {report.spills} bytes"
    if report.tensor and not report.mma + report.wgmma:
        yield "products that could run on tensor cores do not"


def last_line(error: Exception) -> str:
    """What an error says, in one line: compilers say it last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def reports(wanted: Iterable[Shipped], targets: Iterable[int]) -> list[Report]:
    """All of them, on every target."""
    compiler, targets = Compiler(), list(targets)
    jobs = [(one, target) for one in wanted for target in targets]
    return [build(one, target, compiler) for one, target in tqdm(jobs, "compiling", disable=None, leave=False)]


COLUMNS = ("kernel", "configuration", "target", "shared", "registers", "spills", "mma", "wgmma", "CTAs/SM", "FLOP/byte")


def table(found: list[Report]) -> str:
    """One line for each: bytes of shared memory, registers of a thread, bytes spilled, instructions, occupancy."""
    cells = [COLUMNS]
    for report in found:
        name = report.of.name + ("" if report.of.default else " *")
        intensity = "-" if report.of.intensity is None else f"{report.of.intensity:.1f}"
        numbers = (report.shared, report.registers, report.spills, report.mma, report.wgmma, report.ctas)
        cells.append((report.of.kernel, name, f"sm_{report.target}", *map(str, numbers), intensity))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if at < 3 else cell.rjust(width) for at, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The table, then what is refused; 1 if anything is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--default", action="store_true", help="only the default configurations")
    parser.add_argument("--first", action="store_true", help="only the first default configuration of each kernel")
    parser.add_argument("--target", choices=[f"sm_{n}" for n in LIMITS], help="only this architecture")
    parser.add_argument("--op", choices=ops(), help="only this op")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 replaces the compiler: unset it", file=sys.stderr)
        return 1
    targets = [int(options.target.removeprefix("sm_"))] if options.target else list(LIMITS)
    found: list[Report] = []
    listed = [options.op] if options.op else ops()
    empty = set(listed)
    for target in targets:
        every = [one for op in listed for one in shipped(op, target)]
        empty -= {one.op for one in every}
        wanted = [one for one in every if one.default or not options.default]
        found += reports(first(wanted) if options.first else wanted, [target])
    print(table(found))
    print(f"\nbytes of shared memory and of spills; * is not a default; triton {triton.__version__}")
    for op in sorted(empty):
        print(f"{op} lists no configurations")
    faults = [(report, fault) for report in found for fault in report.faults]
    for report, fault in faults:
        print(f"refused: {report.of.kernel}, {report.of.name}, sm_{report.target}: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
