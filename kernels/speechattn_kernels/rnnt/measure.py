"""How long the loss takes on a GPU, forward and backward, and how much memory: this one, and that over the tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speechattn_kernels.rnnt import rnnt

__all__ = ["Measured", "measure", "work"]


@dataclass(frozen=True)
class Measured:
    """Seconds of forward and of backward, the most bytes beyond the inputs, and how far loss and gradients differ.

    `differences` are root mean squares relative to those of torchaudio over the joint network's tensor in float32.
    """

    name: str
    forward: float
    backward: float
    memory: int
    differences: tuple[float, ...]


def work(batch: int, frames: int, labels: int, vocab: int, inner: int, *, size: int = 2) -> dict[str, float]:
    """FLOPs of the products, and bytes that must be kept at once, of both ways, for numbers of `size` bytes.

    Over the tensor: one product forward, two backward; the hidden layer, the scores, their copy in float32 and its
    gradient are there at once. Fused: twice the scores; 6 float32 for each pair, and the slab.
    """
    from speechattn_kernels.rnnt import tiles

    pairs = batch * frames * (labels + 1)
    product = 2.0 * pairs * vocab * inner
    return {
        "tensor FLOPs": 3 * product,
        "fused FLOPs": 4 * product,
        "tensor bytes": pairs * (size * inner + size * vocab + 2 * 4 * vocab),
        "fused bytes": pairs * 6 * 4 + size * tiles.WORKSPACE,
    }


def tensor_loss(
    frames: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, frame_lengths: Tensor,
    label_lengths: Tensor,
) -> Tensor:  # fmt: skip
    """torchaudio's kernel over [B, T, U + 1, V]."""
    from torchaudio.functional import rnnt_loss

    scores = torch.nn.functional.linear((frames[:, :, None] + labels[:, None]).tanh(), weight, bias)
    return rnnt_loss(scores.float(), targets.int(), frame_lengths.int(), label_lengths.int(), blank=0, reduction="none")


def once(op: Callable[..., Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """The loss and its gradients."""
    real = [x.detach().requires_grad_() for x in given[:4]]
    loss = op(*real, *given[4:])
    return [loss.detach(), *torch.autograd.grad(loss.sum(), real)]


def timed(op: Callable[..., Tensor], given: Sequence[Tensor], repeat: int) -> tuple[float, float]:
    """The median seconds of forward and of backward, by the GPU's own clock."""
    found = []
    for _ in range(repeat):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        real = [x.detach().requires_grad_() for x in given[:4]]
        marks[0].record()
        loss = op(*real, *given[4:])
        marks[1].record()
        torch.autograd.grad(loss.sum(), real)
        marks[2].record()
        torch.cuda.synchronize()
        found.append([marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])])
    forward, backward = torch.tensor(found).median(0).values / 1000
    return float(forward), float(backward)


def measure(
    batch: int = 16, frames: int = 400, labels: int = 60, vocab: int = 1000, inner: int = 512, *,
    dtype: torch.dtype = torch.bfloat16, repeat: int = 10,
) -> list[Measured]:  # fmt: skip
    """This loss and the other for full rows of random numbers of one size."""
    real = {"device": "cuda", "dtype": dtype}
    torch.manual_seed(0)
    given = [
        torch.randn(batch, frames, inner, **real), torch.randn(batch, labels + 1, inner, **real),
        torch.randn(vocab, inner, **real) / inner**0.5, torch.zeros(vocab, **real),
        torch.randint(1, vocab, (batch, labels), device="cuda"),
        torch.full((batch,), frames, device="cuda"), torch.full((batch,), labels, device="cuda"),
    ]  # fmt: skip
    wanted = once(tensor_loss, [x.float() if x.is_floating_point() else x for x in given])
    found = []
    for name, op in (("torchaudio over the tensor", tensor_loss), ("fused", rnnt)):
        got = once(op, given)  # which also compiles
        differences = tuple(
            float((x.float() - y).square().mean().sqrt() / y.square().mean().sqrt())
            for x, y in zip(got, wanted, strict=True)
        )
        del got
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(op, given)
        memory = torch.cuda.max_memory_allocated() - before
        found.append(Measured(name, *timed(op, given, repeat), memory, differences))
    return found
