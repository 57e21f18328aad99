"""The recurrence of the expected monotonic alignment as it is written."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["monotonic"]


def monotonic(p: Tensor, start: Tensor) -> Tensor:
    """p [N, U, T], start [N, T] -> alpha [N, U, T]; in at least float32, O(U T) steps in Python."""
    wide = torch.promote_types(p.dtype, torch.float32)
    stop, stood = p.to(wide), start.to(wide)
    lines = []
    for i in range(p.shape[1]):
        q, line = torch.zeros_like(stood[:, :0].sum(1)), []
        for j in range(p.shape[2]):
            q = q + stood[:, j]
            line.append(stop[:, i, j] * q)
            q = (1 - stop[:, i, j]) * q
        stood = torch.stack(line, 1) if line else stood
        lines.append(stood)
    return (torch.stack(lines, 1) if lines else stop * 0).to(p.dtype)
