"""The expected alignment in one kernel: against the recurrence, a walk, float64 and logarithms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechattn_kernels.common import recorded
from speechattn_kernels.monotonic import backward, forward, kernel, monotonic
from speechattn_kernels.monotonic.naive import monotonic as naive
from speechattn_kernels.monotonic.shipped import flops, shipped
from torch import Tensor
from triton.runtime.interpreter import ScanOps

from speechattn.cross.expected import doubling, fused, scan
from speechattn.cross.monotonic import HardMonotonic, MoChA
from speechattn.frames import Frames, Memory

Op = Callable[[Tensor, Tensor], Tensor]
P = [[0.2, 0.5, 0.9, 0.4], [0.6, 0.3, 0.8, 0.5], [0.1, 0.7, 0.2, 0.9]]
ALPHA = [[0.2, 0.4, 0.36, 0.016], [0.12, 0.144, 0.5568, 0.0776], [0.012, 0.1764, 0.12648, 0.525168]]
ONE_BY_ONE = ScanOps.generic_scan
HARD: dict[str, Callable[[Tensor], Tensor]] = {  # of uniform numbers [N, U, T]
    "rare": lambda r: torch.where(r < 0.003, 1 - 2**-24, 1e-6),
    "tiny": lambda r: torch.full_like(r, 2.9e-8),
    "small": lambda r: torch.full_like(r, 2.0001e-4),
    "first steps": lambda r: torch.sigmoid(-4 + 4 * (r - 0.5)),
    "any": lambda r: r,
    "large": lambda r: 1 - 1e-6 * r,
    "extremes": lambda r: torch.where(r < 0.5, 1e-7, 1 - 2**-23),
    "wide": lambda r: torch.sigmoid(torch.logit(r) * 12),
    "masked": lambda r: torch.where(r < 0.7, torch.zeros_like(r), r),
}


def by_doubling(self: ScanOps, input: Any) -> list[Any]:
    """A scan of blocks in the interpreter as a GPU groups it, like a tree, and not one by one: faster, and as exact."""
    data, lanes, reach = [x.handle.data for x in input], np.arange(input[0].handle.data.size), 1
    while reach < len(lanes):
        both = [np.roll(d, reach) for d in data] + data
        found = self.combine_fn.fn(*(self.to_tensor(d, input[0].dtype) for d in both))
        data = [np.where(lanes >= reach, new.handle.data, old) for new, old in zip(found, data, strict=True)]
        reach *= 2
    return [self.to_tensor(d, input[0].dtype) for d in data]


@contextmanager
def grouped(how: Callable[..., list[Any]]) -> Iterator[None]:
    """How the interpreter groups a scan; nothing to a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScanOps, "generic_scan", how)
        yield


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with grouped(by_doubling):
        yield


@contextmanager
def tiles_of(count: int) -> Iterator[None]:
    """With at most so many frames in a tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "LARGEST", count)
        yield


def drawn(
    device: torch.device, rows: int, tokens: int, frames: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """p with zeros and ones among others, start, and a gradient of alpha."""
    p = torch.sigmoid(3 * torch.randn(rows, tokens, frames))
    luck = torch.rand_like(p)
    p = p.masked_fill(luck < 0.1, 0.0).masked_fill(luck > 0.9, 1.0)
    start = torch.rand(rows, frames).softmax(-1)
    return [x.to(device, dtype) for x in (p, start, torch.randn_like(p))]


def all_of(op: Op, p: Tensor, start: Tensor, grad: Tensor) -> list[Tensor]:
    """alpha, and the gradients of p and start."""
    p, start = p.clone().requires_grad_(), start.clone().requires_grad_()
    alpha = op(p, start)
    return [alpha.detach(), *torch.autograd.grad(alpha, (p, start), grad)]


def same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 2e-6) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def by_logarithms(p: Tensor, start: Tensor) -> Tensor:
    """The recurrence in log space, where q + alpha is logaddexp: nothing overflows or vanishes."""
    stood, rows = start.log(), []
    for i in range(p.shape[1]):
        passed, q, row = torch.log1p(-p[:, i]), stood[:, 0], [stood[:, 0]]
        for j in range(1, p.shape[2]):
            q = torch.logaddexp(q + passed[:, j - 1], stood[:, j])
            row.append(q)
        stood = p[:, i].log() + torch.stack(row, -1)
        rows.append(stood)
    return torch.stack(rows, 1).exp()


def test_golden(device: torch.device) -> None:
    start = torch.tensor([[1.0, 0, 0, 0]], device=device)
    for op in (monotonic, naive):
        alpha = op(torch.tensor([P], device=device), start)
        torch.testing.assert_close(alpha, torch.tensor([ALPHA], device=device), rtol=1e-6, atol=1e-7)


def test_the_reference_has_right_gradients() -> None:
    p, start = torch.rand(2, 3, 5, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    p[0, 1, 2], p[1, 0, 1], p[1, 1] = 0.0, 1.0, 0.0
    assert torch.autograd.gradcheck(naive, (p.requires_grad_(), start.requires_grad_()))


@pytest.mark.parametrize("frames", [1, 31, 32, 33, 70])
def test_against_the_recurrence(device: torch.device, frames: int) -> None:
    x = drawn(device, 2, 3, frames)
    with tiles_of(32):
        found = all_of(monotonic, *x)
    same(found, all_of(naive, *x))


def test_the_interpreter_scans_one_by_one(device: torch.device) -> None:
    x = drawn(device, 1, 2, 33)
    with tiles_of(32), grouped(ONE_BY_ONE):
        found = all_of(monotonic, *x)
    same(found, all_of(naive, *x))


@given(
    rows=st.integers(0, 3), tokens=st.integers(0, 4), frames=st.integers(0, 70), tile=st.sampled_from([32, 64]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=10)
def test_any_shape(device: torch.device, rows: int, tokens: int, frames: int, tile: int, seed: int) -> None:
    torch.manual_seed(seed)
    p, start, grad = drawn(device, rows, tokens, frames)
    with tiles_of(tile):
        found = all_of(monotonic, p, start, grad)
    if tokens and frames:
        same(found, all_of(naive, p, start, grad))
    else:
        same(found, [p, grad, torch.zeros_like(start)])


def test_the_tile_of_long_recordings(device: torch.device) -> None:
    x = drawn(device, 1, 2, kernel.LARGEST + 5)
    same(all_of(monotonic, *x), all_of(naive, *x))
    assert kernel.shape(x[0]) == (1, 2, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_is_rounded_once(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    x = drawn(device, 1, 3, 40, dtype)
    with tiles_of(32):
        same(all_of(monotonic, *x), all_of(naive, *x), tolerance)
        alpha, wide = monotonic(*x[:2]), monotonic(*(y.float() for y in x[:2]))
    assert torch.equal(alpha, wide.to(dtype))


def test_certain_heads_walk(device: torch.device) -> None:
    frames, rows = 50, 4
    p = (torch.rand(rows, 5, frames, device=device) < 0.1).float()
    start = torch.nn.functional.one_hot(torch.tensor([0, 3, 20, 49]), frames).float().to(device)
    with tiles_of(32):
        alpha = monotonic(p, start)
    for row in range(rows):
        at: int | None = int(start[row].argmax())
        for i in range(5):
            stops = [] if at is None else (p[row, i, at:] == 1).nonzero()[:1, 0].tolist()
            at = None if at is None or not stops else at + stops[0]
            want = torch.zeros(frames, device=device) if at is None else torch.eye(frames, device=device)[at]
            assert torch.equal(alpha[row, i], want)


def test_nothing_is_lost_before_a_certain_stop(device: torch.device) -> None:
    p, start, _ = drawn(device, 2, 4, 70)
    p[..., -1] = 1.0
    with tiles_of(32):
        alpha = monotonic(p, start)
    torch.testing.assert_close(alpha.sum(-1), torch.ones_like(alpha[..., 0]))
    assert bool((alpha >= 0).all())


def test_rows_do_not_meet(device: torch.device) -> None:
    p, start, grad = drawn(device, 3, 2, 40)
    with tiles_of(32):
        wanted = all_of(monotonic, p[1:2], start[1:2], grad[1:2])
        p[0], start[2], grad[0] = torch.nan, torch.nan, torch.nan
        found = all_of(monotonic, p, start, grad)
        again = all_of(monotonic, p, start, grad)
    for a, b, c in zip(found, wanted, again, strict=True):
        assert torch.equal(a[1:2], b)
        assert torch.equal(a.nan_to_num(), c.nan_to_num())


def test_views_and_expanded_gradients(device: torch.device) -> None:
    p, start, _ = drawn(device, 2, 3, 40)
    spread = torch.full((40, 6, 2), torch.nan, device=device)[:, ::2].permute(2, 1, 0)
    spread.copy_(p)
    grad = torch.ones((), device=device).expand_as(p)
    same(all_of(monotonic, spread, start[:1].expand(2, -1), grad), all_of(naive, p, start[:1].expand(2, -1), grad))


def worst(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest error, and the largest in proportion among numbers that float32 can hold to the last digit."""
    error = (found.double() - exact).abs()
    return float(error.max()), float((error / exact)[exact > 1e-30].max())


def hard(frames: int, *cases: str) -> tuple[Tensor, Tensor]:
    """p [N, 2, T] and start [N, T], a row for each of the cases, which stand at the first frame."""
    luck, start = torch.rand(1, 2, frames), torch.zeros(len(cases), frames)
    start[:, 0] = 1.0
    return torch.cat([HARD[case](luck) for case in cases]), start


def test_as_exact_as_logarithms(device: torch.device) -> None:
    p, start = hard(3000, *HARD)
    exact, logs = naive(p.double(), start.double()), by_logarithms(p, start)
    found = monotonic(p.to(device), start.to(device)).cpu()
    for row, case in enumerate(HARD):
        error, share = worst(found[row], exact[row])
        error_of_logs, share_of_logs = worst(logs[row], exact[row])
        assert share < 2e-6, case
        assert share * 3 < share_of_logs, case
        assert error <= error_of_logs + 2**-22, case  # 4 units in the last place of 1


def test_exact_gradients(device: torch.device) -> None:
    cases = ("rare", "small", "masked")
    p, start = hard(1500, *cases)
    grad = torch.randn(p.shape)
    found = all_of(monotonic, *(x.to(device) for x in (p, start, grad)))
    exact = all_of(naive, p.double(), start.double(), grad.double())
    for a, b in zip(found, exact, strict=True):
        for row, case in enumerate(cases):
            worst = float((a[row].cpu().double() - b[row]).abs().max())
            assert worst < 2e-6 * max(1.0, float(b[row].abs().max())), case


def test_frames_that_are_not_there_have_gradients(device: torch.device) -> None:
    """Where p is 0 alpha / p says nothing, and the gradient is q (G - h) all the same."""
    p, start, grad = drawn(device, 2, 3, 40)
    p[:, :, 10:30] = 0.0
    found = all_of(monotonic, p, start, grad)
    same(found, all_of(naive, p, start, grad))
    assert float(found[1][:, 0, 10:30].abs().min()) > 0


@pytest.mark.parametrize("wrong", [((2, 3, 4), (2, 3)), ((2, 4), (2, 4)), ((2, 3, 4), (4,))])
def test_wrong_shapes(device: torch.device, wrong: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"wanted \[N, U, T\] and \[N, T\]"):
        monotonic(*(torch.zeros(shape, device=device) for shape in wrong))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # that opcheck reads
def test_the_operators_are_as_declared(device: torch.device) -> None:
    p, start, grad = drawn(device, 2, 3, 40)
    both = p.clone().requires_grad_(), start.clone().requires_grad_()
    torch.library.opcheck(forward.op, both)
    alpha, edges = forward(p, start)
    torch.library.opcheck(backward.op, (p, start, alpha, edges, grad))
    assert backward(p, start.half(), alpha, edges, grad)[1].dtype == torch.float16


def test_compiled(device: torch.device) -> None:
    op = torch.compile(monotonic, fullgraph=True, backend="aot_eager", dynamic=True)
    for frames in (40, 50):
        x = drawn(device, 2, 3, frames)
        same(all_of(op, *x), all_of(monotonic, *x), 0.0)


def test_everything_shipped_is_launched_and_counted() -> None:
    for name, default, call in shipped():
        with recorded() as launches:
            call()
        assert (default, len(launches)) == (True, 1)
        work = 8 * 60 * int(name.split("=")[1].split()[0])
        assert flops(launches[0]) == work * (20 if name.startswith("backward") else 6)
        assert launches[0].args["BLOCK"] <= kernel.LARGEST


@pytest.mark.parametrize("shape", [(2, 3, 4, 40), (3, 40), (2, 0, 40), (0, 2, 40)])
def test_the_form_is_that_of_a_scan(device: torch.device, shape: tuple[int, ...]) -> None:
    p = torch.rand(shape, device=device)
    start = torch.rand(shape[:-2] + shape[-1:], device=device).softmax(-1)
    for at in (None, start):
        same([fused(p, at)], [doubling(p, at)])
    same([fused(p.half())], [doubling(p.half())], 2e-3)
    chosen = scan(p)
    assert torch.equal(chosen, (fused if p.is_cuda else doubling)(p))


def test_the_form_says_why_it_cannot() -> None:
    with pytest.raises(ValueError, match=r"not in float64.*form"):
        fused(torch.rand(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", [HardMonotonic, partial(MoChA, window=3)])
def test_a_model_learns_the_same(device: torch.device, kind: Callable[..., HardMonotonic]) -> None:
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    frames = Frames.of(torch.randn(2, 12, 8).to(device), mask.to(device))
    query, learnt = torch.randn(2, 4, 8, device=device), []
    for form in (fused, doubling):
        torch.manual_seed(3)
        attention = kind(8, 2, form=form, noise=0.0, offset=-1.0).to(device).train()
        read = attention.read(Memory.of(frames))
        seen, _ = attention.attend(query, read, attention.place(mask.to(device)))
        seen.context.square().sum().backward()
        learnt.append([seen.context.detach(), *(x.grad for x in attention.parameters() if x.grad is not None)])
    same(*learnt, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("frames", [500, 5000, 100_000])
def test_long_rows(device: torch.device, frames: int) -> None:
    p, start, grad = drawn(device, 4, 20, frames)
    found = all_of(monotonic, p, start, grad)
    exact = all_of(doubling, p.double(), start.double(), grad.double())
    for a, b in zip(found, exact, strict=True):
        assert float((a.double() - b).abs().max()) < 2e-6 * max(1.0, float(b.abs().max()))


@pytest.mark.gpu
def test_an_address_beyond_32_bits(device: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 48e9:
        pytest.skip("needs 48 GB")
    p = torch.full((2, 1100, 1_000_000), 0.5, dtype=torch.float16, device=device)  # 2.2e9 numbers
    start = torch.zeros(2, 1_000_000, dtype=torch.float16, device=device)
    start[:, -1] = 1.0
    alpha, _ = forward(p, start)
    halves = 0.5 ** torch.arange(1, 1101, device=device, dtype=torch.float32)
    torch.testing.assert_close(alpha[1, :, -1], halves)
    assert float(alpha[:, :, 0].abs().max()) == 0
