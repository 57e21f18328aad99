"""Kernels compiled ahead of time, on a machine that has no GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from speechattn_kernels.common import Launch, launch, recorded  # noqa: E402

KERNELS = Path(__file__).parents[1] / "kernels"
sys.path.insert(0, str(KERNELS))

import aot  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # whatever a compiler may warn of


@triton.jit
def toy_product_kernel(
    a, b, bias, out, stride, rows, K,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = a @ b + bias of one tile."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        x = tl.load(a + i[:, None] * stride + k + i[None])
        y = tl.load(b + (k + i[:, None]) * stride + i[None])
        total = tl.dot(x, y, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + i)[None]
    tl.store(out + i[:, None] * stride + i[None], total, mask=i[:, None] < rows)


@triton.jit
def toy_hoard_kernel(x, y, BLOCK: tl.constexpr):
    """Needs all values at a time, twice."""
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(y + i, values / tl.sum(values, 0) + tl.max(values, 0))


@triton.jit
def toy_negative_kernel(x, n: tl.constexpr):
    """Compiles for no n that is not a power of two."""
    tl.store(x + tl.arange(0, n), 0.0)


def product(size: int = 64, *, kind: torch.dtype = torch.bfloat16, warps: int = 4, stages: int = 2) -> Launch:
    x = torch.empty(size, size, device="meta", dtype=kind)
    out = torch.empty(size, size, device="meta")
    args = {"a": x, "b": x, "bias": None, "out": out, "stride": size, "rows": 1, "K": 4 * size, "BLOCK": size}
    with recorded() as launches:
        launch(toy_product_kernel, (1,), {**args, "PRECISION": "ieee"}, warps=warps, stages=stages)
    return launches[0]


def hoard(size: int) -> Launch:
    x = torch.empty(size, device="meta")
    return Launch(toy_hoard_kernel, (1,), {"x": x, "y": x, "BLOCK": size}, 1, 1)


def report(of: Launch, target: int = 90, *, default: bool = True, flops: float | None = None) -> aot.Report:
    return aot.reports([aot.Shipped("toy", "a toy", default, of, flops)], [target])[0]


def test_a_product_runs_on_tensor_cores_of_both() -> None:
    old, new = report(product(), 80), report(product(), 90)
    assert old.mma > 0
    assert old.wgmma == 0
    assert new.wgmma > 0
    for each in (old, new):
        assert each.tensor
        assert each.cubin > 1000
        assert 0 < each.registers <= 255
        assert each.spills == 0
        assert each.faults == ()
        assert each.shared in (2 * 64 * 64 * 2, 4 * 64 * 64 * 2)  # two tiles, once or once for each stage
        assert each.ctas >= 2


def test_float32_that_is_exact_is_not_meant_for_tensor_cores() -> None:
    found = report(product(16, kind=torch.float32))
    assert not found.tensor
    assert found.mma + found.wgmma == 0
    assert found.faults == ()


def test_a_launch_is_specialised_as_a_real_one() -> None:
    """Ones and None are constants, what is divisible by 16 is known to be, the rest is not."""
    of = product()
    of.args["K"] = 100
    source, options = aot.specialised(of, aot.GPUTarget("cuda", 90, 32))
    names = toy_product_kernel.arg_names
    assert {names[path[0]]: value for path, value in source.constants.items()} == {
        "bias": None, "rows": 1, "BLOCK": 64, "PRECISION": "ieee",
    }  # fmt: skip
    assert {names[path[0]] for path, value in source.attrs.items() if value} == {"a", "b", "out", "stride"}
    assert source.signature["a"] == "*bf16"
    assert source.signature["out"] == "*fp32"
    assert source.signature["K"] == "i32"
    assert (options["num_warps"], options["num_stages"]) == (4, 2)


def test_a_default_that_spills_is_refused() -> None:
    found = report(hoard(8192))
    assert found.spills > 0
    assert any("spills" in fault for fault in found.faults)
    assert report(hoard(8192), default=False).faults == ()
    assert report(hoard(2048)).faults == ()


@pytest.mark.parametrize("target", aot.LIMITS)
def test_too_much_shared_memory_is_refused(target: int) -> None:
    found = report(product(128, warps=8, stages=5), target, default=False)
    assert found.shared > aot.LIMITS[target].most
    assert any("shared memory" in fault for fault in found.faults)
    assert found.ctas == 0


def test_a_grid_that_cannot_be_launched_is_refused() -> None:
    of = product(16)
    found = report(Launch(of.kernel, (1, 65536), of.args, 4, 2))
    assert found.faults == ("a grid of 65536 along y, it can have 65535",)


def test_what_does_not_compile_is_refused_with_the_compiler_s_reason() -> None:
    x = torch.empty(3, device="meta")
    (fault,) = report(Launch(toy_negative_kernel, (1,), {"x": x, "n": 3}, 1, 1)).faults
    assert fault.startswith("does not compile")
    assert "power of 2" in fault


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "ctas"),
    [
        (90, 32, 0, 4, 16),  # 2048 threads
        (90, 255, 0, 4, 2),  # 8192 registers a warp, 8 warps
        (90, 168, 0, 4, 3),  # 5376 a warp: 12 warps
        (90, 169, 0, 4, 2),  # 5632: 11, in four groups 8
        (90, 32, 100 * 1024, 4, 2),
        (90, 32, 114 * 1024, 4, 1),  # the reserved kilobyte
        (80, 32, 81 * 1024, 4, 2),
        (80, 32, 82 * 1024, 4, 1),
        (90, 16, 0, 1, 32),
        (90, 255, 0, 16, 0),
    ],
)
def test_occupancy(target: int, registers: int, shared: int, warps: int, ctas: int) -> None:
    assert aot.LIMITS[target].occupancy(registers, shared, warps) == ctas


def test_intensity_counts_each_tensor_once() -> None:
    found = report(product(16), flops=1024.0)
    assert found.of.intensity == 1024 / (16 * 16 * 2 + 16 * 16 * 4)


def test_first_takes_each_kernel_once_and_only_defaults() -> None:
    small, large, other = product(16), product(32), hoard(2048)
    every = [
        aot.Shipped("a", "aside", False, small), aot.Shipped("a", "one", True, large),
        aot.Shipped("a", "two", True, small), aot.Shipped("a", "rest", True, other),
        aot.Shipped("b", "one", True, small),
    ]  # fmt: skip
    assert [(one.op, one.name) for one in aot.first(every)] == [("a", "one"), ("a", "rest"), ("b", "one")]


def test_the_same_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    compile_ = triton.compile
    monkeypatch.setattr(triton, "compile", lambda *args, **options: made.append(args) or compile_(*args, **options))
    same = [aot.Shipped("toy", name, True, product(16, warps=warps)) for name, warps in (("a", 4), ("b", 4), ("c", 8))]
    other = aot.Shipped("toy", "d", True, product(32))
    found = aot.reports([*same, other], [80])
    assert len(made) == 3
    assert found[3].shared > found[0].shared
    assert found[0].registers == found[1].registers


def test_the_command_prints_one_table_and_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toys = {"good": product(16), "hoard": hoard(8192)}
    monkeypatch.setattr(aot, "ops", lambda: (*toys, "nothing"))
    monkeypatch.setattr(
        aot, "shipped", lambda op, target: iter([aot.Shipped(op, op, op == "good", toys[op])] if op in toys else [])
    )
    assert aot.main(["--target", "sm_90"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == [*aot.COLUMNS]
    assert "toy_product_kernel  good           sm_90" in out
    assert "hoard *" in out
    assert "sm_80" not in out
    assert "nothing lists no configurations" in out
    assert aot.main(["--op", "hoard", "--default"]) == 0
    assert "hoard" not in capsys.readouterr().out
    assert aot.main(["--first", "--target", "sm_80"]) == 0
    out = capsys.readouterr().out
    assert "good" in out
    assert "hoard" not in out
    monkeypatch.setattr(aot, "shipped", lambda op, target: iter([aot.Shipped(op, op, True, toys["hoard"])]))
    assert aot.main(["--op", "hoard"]) == 1
    assert capsys.readouterr().err.count("refused: toy_hoard_kernel, hoard, sm_") == 2


def test_the_interpreter_is_not_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 1
    assert "unset it" in capsys.readouterr().err


def check(found: list[aot.Report]) -> None:
    """What every shipped configuration owes, on every target."""
    for each in found:
        name = f"{each.of.kernel}, {each.of.name}, sm_{each.target}"
        assert each.faults == (), f"{name}: {each.faults}"
        assert each.cubin > 0, name
        assert each.shared <= aot.LIMITS[each.target].most, name
        assert each.spills == 0 or not each.of.default, name
        assert each.mma + each.wgmma > 0 or not each.tensor, name
        assert each.ctas > 0, name


@pytest.mark.parametrize("target", aot.LIMITS)
@pytest.mark.parametrize("op", aot.ops())
def test_each_kernel_in_its_first_default_configuration(op: str, target: int) -> None:
    listed = aot.first(aot.shipped(op, target))
    assert listed, f"{op} ships nothing"
    check(aot.reports(listed, [target]))


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.LIMITS)
@pytest.mark.parametrize("op", aot.ops())
def test_every_configuration(op: str, target: int) -> None:
    check(aot.reports(aot.shipped(op, target), [target]))


def window_launches(heads: int, frames: int) -> list[Launch]:
    """Forward and backward of bfloat16 heads of 64 features, chunks of 16 with 64 frames before."""
    from speechattn_kernels.window import window

    q, k, v = (
        torch.empty(1, heads, frames, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)
    )
    with recorded() as launches:
        valid = torch.empty(1, frames, dtype=torch.bool, device="meta")
        window(q, k, v, valid, left=64, chunk=16)[0].sum().backward()
    assert len(launches) == 3
    return launches


@pytest.mark.parametrize("frames", [2000, 1999])
def test_the_window_kernels_share_a_multiprocessor(frames: int) -> None:
    """On sm_90 nothing spills, and two CTAs or more run at a time, whatever the length divides by."""
    found = aot.reports([aot.Shipped("window", "plain", True, each) for each in window_launches(8, frames)], [90])
    check(found)
    assert min(each.ctas for each in found) >= 2
    assert all(each.mma + each.wgmma for each in found)


def test_addresses_are_made_in_64_bits() -> None:
    """Forty heads of a million frames: head times stride passes 2^31."""
    compiler = aot.Compiler()
    for one in window_launches(40, 1_000_000):
        text = compiler(one, 90)[0].asm["ttir"]
        for name in ("q_head", "k_head", "v_head", "q_frame", "k_frame", "v_frame"):
            assert re.search(rf"arith.extsi %{name} : i32 to i64", text), f"{one.kernel.__name__}: {name}"
            assert not re.search(rf"arith.muli [^\n]*%{name}[^\n]*: i32", text), f"{one.kernel.__name__}: {name}"
