"""State that grows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Buffer"]


@dataclass(frozen=True)
class Buffer:
    """A sequence that grows: `values` [B, Cap, ...], of which the first `length` [B] entries of each row count.

    Law: `append` consumes the buffer it is called on (it writes in place while there is room).
    """

    values: Tensor
    length: Tensor

    @classmethod
    def empty(cls, like: Tensor, capacity: int) -> Buffer:
        """No entries yet; room for `capacity` of the shape of `like` [B, U, ...]."""
        values = like.new_zeros(like.shape[0], capacity, *like.shape[2:])
        return cls(values, torch.zeros(like.shape[0], dtype=torch.long, device=like.device))

    def append(self, new: Tensor) -> Buffer:
        """Add `new` [B, U, ...] behind each row's own end; the capacity doubles when it is short."""
        need = int(self.length.max()) + new.shape[1]
        values = self.values
        if need > values.shape[1]:
            space = [0, 0] * (values.dim() - 2) + [0, max(need, 2 * values.shape[1]) - values.shape[1]]
            values = F.pad(values, space)
        rows = torch.arange(new.shape[0], device=new.device)[:, None]
        at = self.length[:, None] + torch.arange(new.shape[1], device=new.device)
        values[rows, at] = new
        return Buffer(values, self.length + new.shape[1])

    def truncate(self, length: int) -> Buffer:
        """Forget what stands behind the first `length` entries."""
        return Buffer(self.values, self.length.clamp(max=length))
