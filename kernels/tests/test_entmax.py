"""Alpha-entmax attention: against all scores in float64, softmax, sparsemax in closed form, and by its laws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechattn_kernels.common import recorded
from speechattn_kernels.entmax import backward, entmax_attention, forward
from speechattn_kernels.entmax.forward import attended
from speechattn_kernels.entmax.naive import entmax_attention as naive
from speechattn_kernels.entmax.shipped import flops, shipped
from torch import Tensor

from speechattn.attention.entmax import entmax

Op = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
AT_THE_EDGE = {
    "backward D=256 U=60 float32", *(f"{way} D={size} bfloat16" for way in ("forward", "backward")
                                     for size in ("32 U=20", "80 U=1")),
}  # fmt: skip
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def dense(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """With all weights, by the function of the package; no levels."""
    k, v = (torch.where(valid[:, None, :, None], x, 0).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    p = entmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, alpha[:, None, None], valid[:, None, None])
    return p @ v, alpha


def drawn(
    device: torch.device, shape: tuple[int, int, int, int, int, int] = (2, 3, 1, 5, 40, 32), spread: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Inputs:  # fmt: skip
    """Of B, H, G, U, T, D: alpha from 1 to 2, both with the first and the last head."""
    rows, heads, groups, tokens, frames, width = shape
    q = spread * torch.randn(rows, heads, tokens, width)
    k, v = torch.randn(2, rows, groups, frames, width)
    valid, alpha = torch.rand(rows, frames) < 0.7, torch.linspace(1, 2, heads)
    return (*(x.to(device, dtype) for x in (q, k, v)), valid.to(device), alpha.to(device))


def all_of(op: Op, x: Inputs, like: torch.dtype | None = None, learnt: bool = True) -> list[Tensor]:
    """The context and the gradients of q, k, v and alpha, in one direction that depends on the shape alone."""
    q, k, v = (y.to(like or y.dtype, copy=True).requires_grad_() for y in x[:3])
    alpha = x[4].to(like or x[4].dtype, copy=True).requires_grad_(learnt)
    context = op(q, k, v, x[3], alpha)[0]
    grad = torch.randn(context.shape, generator=torch.Generator().manual_seed(1)).to(context)
    wanted = (q, k, v, alpha) if learnt else (q, k, v)
    return [context.detach(), *torch.autograd.grad(context, wanted, grad)]


def worst_of(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 2e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert worst_of(a, b) <= tolerance * max(1.0, float(b.abs().max()) if b.numel() else 0.0)


def sparsemax(z: Tensor) -> tuple[Tensor, Tensor]:
    """By sorting (Martins and Astudillo, arXiv 1602.02068, algorithm 1): weights and threshold."""
    ordered = z.sort(-1, descending=True).values
    sums, count = ordered.cumsum(-1), torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    k = (1 + count * ordered > sums).sum(-1, keepdim=True)
    tau = (sums.gather(-1, k - 1) - 1) / k
    return (z - tau).clamp(min=0), tau[..., 0]


def test_the_reference_has_right_gradients() -> None:
    q, k, v, valid, _ = drawn(torch.device("cpu"), (1, 3, 1, 1, 4, 2), 1.0, torch.float64)
    alpha = torch.tensor([1.0, 1.4, 1.9], dtype=torch.float64)
    x = [y.requires_grad_() for y in (q, k, v, alpha)]
    assert torch.autograd.gradcheck(lambda q, k, v, alpha: naive(q, k, v, valid, alpha)[0], x)


@pytest.mark.parametrize(("heads", "groups"), [(3, 1), (4, 2), (3, 3)])
def test_against_all_weights(device: torch.device, heads: int, groups: int) -> None:
    x = drawn(device, (2, heads, groups, 5, 40, 32))
    x[3][1] = False
    x[3][1, 3] = True  # one key
    found = all_of(entmax_attention, x)
    same(found, all_of(dense, x, torch.float64))
    same(found, all_of(naive, x, torch.float64))
    torch.testing.assert_close(entmax_attention(*x)[1], naive(*x)[1], rtol=1e-5, atol=1e-5)
    only = x[2][1, :, 3].repeat_interleave(heads // groups, 0)[:, None].expand(-1, 5, -1)
    torch.testing.assert_close(found[0][1], only, rtol=1e-6, atol=1e-6)


def test_six_steps_are_enough(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(device)
    monkeypatch.setitem(attended.__globals__, "STEPS", 6)
    assert worst_of(entmax_attention(*x)[0], naive(*x)[0]) < 5e-6


@pytest.mark.parametrize("width", [40, 64, 80, 128, 256])
def test_heads_of_any_size(device: torch.device, width: int) -> None:
    x = drawn(device, (1, 2, 1, 18, 34, width))
    same(all_of(entmax_attention, x), all_of(naive, x, torch.float64))


@given(
    rows=st.integers(0, 2), groups=st.integers(1, 2), times=st.integers(1, 2), tokens=st.integers(0, 18),
    frames=st.integers(0, 40), width=st.integers(1, 33), spread=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=8)
def test_any_shape(
    device: torch.device, rows: int, groups: int, times: int, tokens: int, frames: int, width: int, spread: float,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x = drawn(device, (rows, groups * times, groups, tokens, frames, width), spread)
    found = all_of(entmax_attention, x)
    if rows and tokens and frames:
        same(found[:4], all_of(naive, x, torch.float64)[:4], 1e-4)
    else:
        same(found, [torch.zeros_like(y) for y in (x[0], *x[:3], x[4])])


def test_both_ends(device: torch.device) -> None:
    q, k, v, valid, _ = x = drawn(device, (1, 2, 2, 5, 70, 32))
    z = (q @ k.transpose(-1, -2) / 32**0.5).double().masked_fill(~valid[:, None, None], -1e9)
    context, levels = entmax_attention(*x[:4], torch.ones(2, device=device))
    same([context, levels], [z.softmax(-1) @ v.double(), z.logsumexp(-1)], 5e-6)
    context, levels = entmax_attention(*x[:4], torch.full((2,), 2.0, device=device))
    p, tau = sparsemax(z)
    same([context, levels], [p @ v.double(), tau + 1], 5e-6)


@pytest.mark.parametrize("alpha", [1.0, 1 + 1e-6, 1.01, 1.5, 1.99, 2.0])
def test_the_gradient_of_alpha(device: torch.device, alpha: float) -> None:
    """Also at both ends, and where its formula cancels."""
    x = (*drawn(device, (1, 1, 1, 3, 33, 32))[:4], torch.full((1,), alpha, device=device))
    found, wanted = all_of(entmax_attention, x), all_of(dense, x, torch.float64)
    same(found, wanted, 5e-5)
    assert float(wanted[4].abs().min()) > 1e-2


def test_an_alpha_that_is_not_learnt(device: torch.device) -> None:
    x = drawn(device, (1, 2, 1, 5, 20, 32))
    for a, b in zip(all_of(entmax_attention, x, learnt=False), all_of(entmax_attention, x), strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 100.0, 3000.0])
def test_scores_of_any_size(device: torch.device, spread: float) -> None:
    """Equal ones share alike; with large ones the first gets everything."""
    x = drawn(device, (1, 3, 3, 5, 50, 32), spread)
    context, _ = entmax_attention(*x)
    same([context], [dense(*(y.double() if y.is_floating_point() else y for y in x))[0]], 2e-3 if spread > 10 else 1e-5)
    if not spread:
        same([context], [x[2][:, :, x[3][0]].mean(2, keepdim=True).expand_as(context)], 1e-6)


def test_rows_without_a_key_and_what_is_not_there(device: torch.device) -> None:
    x = drawn(device)
    wanted = all_of(entmax_attention, x)
    x[3][1] = False
    for y in x[1:3]:
        y.masked_fill_(~x[3][:, None, :, None], torch.nan)
    found = all_of(entmax_attention, x)
    for a, b in zip(found[:4], wanted[:4], strict=True):
        assert torch.equal(a[:1], b[:1])
        assert float(a[1].abs().max()) == 0.0
    assert bool(found[4].isfinite().all())
    assert all(float(y.transpose(1, 2)[~x[3]].abs().max()) == 0.0 for y in found[2:4])


def test_weights_are_not_negative_and_sum_to_one(device: torch.device) -> None:
    """With values that tell keys apart the context is the weights."""
    q, k, _, valid, alpha = drawn(device, (1, 4, 4, 5, 32, 32))
    weights, _ = entmax_attention(q, k, torch.eye(32, device=device).expand(1, 4, -1, -1), valid, alpha)
    assert float(weights.min()) >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    found = (weights > 0).sum(-1).double().mean((0, 2))
    assert bool((found[1:] <= found[:-1]).all())  # the larger alpha, the fewer
    assert int(found[0]) == int(valid.sum())
    assert found[3] < found[0] / 2


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param(torch.bfloat16, 4e-2, marks=pytest.mark.gpu), (torch.float16, 5e-3)]
)
def test_half_precision(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    x = drawn(device, dtype=dtype, spread=1.0)
    found = all_of(entmax_attention, x)
    assert [y.dtype for y in found] == [dtype] * 4 + [torch.float32]
    same(found, all_of(naive, x, torch.float64), tolerance)


def test_views(device: torch.device) -> None:
    x = drawn(device, (2, 2, 1, 5, 20, 32))
    views = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in x[:2]] + [x[2].mT.contiguous().mT]
    spread = (*views, x[3].repeat_interleave(2, 1)[:, ::2], x[4])
    for a, b in zip(all_of(entmax_attention, spread), all_of(entmax_attention, x), strict=True):
        assert torch.equal(a, b)


def test_always_the_same(device: torch.device) -> None:
    x = drawn(device, (1, 2, 1, 40, 20, 32))  # several tiles of queries
    found = all_of(entmax_attention, x)
    same(found, all_of(naive, x, torch.float64))
    for a, b in zip(found, all_of(entmax_attention, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # that opcheck reads
def test_the_operators_are_as_declared(device: torch.device) -> None:
    q, k, v, valid, alpha = drawn(device, (1, 2, 1, 3, 20, 16))
    context, levels = forward(q, k, v, valid, alpha)
    torch.library.opcheck(forward.op, (*(y.clone().requires_grad_() for y in (q, k, v)), valid, alpha.requires_grad_()))
    for learnt in (False, True):
        torch.library.opcheck(backward.op, (q, k, v, valid, alpha.detach(), levels, torch.ones_like(context), learnt))


def test_compiled(device: torch.device) -> None:
    x = drawn(device, (1, 2, 1, 3, 20, 16))
    op = torch.compile(entmax_attention, fullgraph=True, backend="aot_eager")
    same(all_of(op, x), all_of(entmax_attention, x), 0.0)


def test_wrong_shapes(device: torch.device) -> None:
    q, k, v, valid, alpha = drawn(device, (1, 4, 2, 3, 20, 16))
    for wrong in ((q, k, v[:, :1], valid, alpha), (q[:, :3], k, v, valid, alpha[:3]), (q[..., :8], k, v, valid, alpha)):
        with pytest.raises(ValueError, match="G a divisor of H"):
            entmax_attention(*wrong)
    for wrong in ((q, k, v, valid[:, 1:], alpha), (q, k, v, valid, alpha[1:])):
        with pytest.raises(ValueError, match=r"wanted \[B, T\] and \[H\]"):
            entmax_attention(*wrong)


def test_everything_shipped_is_launched() -> None:
    for name, default, call in shipped():
        with recorded() as launches:
            call()
        assert len(launches) == (1 if name.startswith("forward") else 2)
        assert default == (name not in AT_THE_EDGE)
        assert all(flops(launch) > 0 for launch in launches)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_memories(device: torch.device, dtype: torch.dtype) -> None:
    x = drawn(device, (1, 8, 2, 100, 20_000, 64), 2.0, dtype)
    same(all_of(entmax_attention, x), all_of(naive, x, torch.float64), 1e-4 if dtype == torch.float32 else 4e-2)
