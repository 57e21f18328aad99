"""Batches of sequences.

Legend of shapes, used everywhere: B batch, T frames, U tokens, H heads, D features, V vocabulary, W window of keys,
C chunk, N keys or chosen heads.
Masks are True where a frame is valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.tree import node

__all__ = ["Frames", "Memory", "known"]


def known(x: Tensor) -> bool:
    """Python may look at `x` and choose its way: no device to wait for, nothing that traces or transforms functions."""
    return (
        x.is_cpu
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


@node
class Frames:
    """A batch of sequences: `values` [B, T, ...], `mask` [B, T]; values are zero where the mask is False."""

    values: Tensor
    mask: Tensor

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Frames:
        """Re-establish the invariant; by selection, because NaN times zero is NaN."""
        wide = mask.view(*mask.shape, *[1] * (values.dim() - 2))
        return cls(torch.where(wide, values, 0), mask)

    @classmethod
    def finite(cls, values: Tensor, mask: Tensor) -> Frames:
        """As `of`, for values that are finite everywhere: by multiplication, which is several times faster.

        Or as they are, where all frames are there, as mostly in a live stream.
        """
        if known(mask) and mask.all():
            return cls(values, mask)
        wide = mask[..., None] if values.dim() == 3 else mask.view(*mask.shape, *[1] * (values.dim() - 2))
        return cls(values * wide, mask)

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor) -> Frames:
        """Rows of `values` [B, T, ...] whose first `lengths` [B] frames are valid."""
        return cls.of(values, torch.arange(values.shape[1], device=values.device) < lengths[:, None])

    @property
    def lengths(self) -> Tensor:
        """Valid frames of each row [B]."""
        return self.mask.sum(1)

    @classmethod
    def cat(cls, parts: Sequence[Frames]) -> Frames:
        """One behind the other in time."""
        return cls(torch.cat([x.values for x in parts], 1), torch.cat([x.mask for x in parts], 1))

    def __getitem__(self, span: slice) -> Frames:
        return Frames(self.values[:, span], self.mask[:, span])

    def front(self) -> Frames:
        """The valid frames of each row in front, one behind the other, and no more room than the longest row needs."""
        if bool(self.mask.all()):
            return self
        order = (~self.mask).byte().argsort(dim=1, stable=True)[:, : int(self.lengths.max()) if len(self.mask) else 0]
        rows = torch.arange(len(order), device=order.device)[:, None]
        return Frames.of(self.values[rows, order], self.mask[rows, order])

    def pad(self, n: int) -> Frames:
        """`n` invalid frames more at the end."""
        space = [0, 0] * (self.values.dim() - 2) + [0, n]
        return Frames(F.pad(self.values, space), F.pad(self.mask, [0, n]))


@node
class Memory:
    """What the encoder has said so far.

    Law: frames before `stable` are final; later ones may still be replaced. An encoder that re-reads its whole
    input at each step (Whisper) has `stable = 0`.
    """

    frames: Frames  # [B, T, D]
    start: Tensor  # [B] position of the first frame, counted since the stream began
    stable: Tensor  # [B] frames of this memory that are final
    finished: Tensor  # [B] no more input will come: nobody waits

    @classmethod
    def of(cls, frames: Frames, *, start: int = 0, stable: int = 0, finished: bool = False) -> Memory:
        """The same position, stability and end for every row."""
        row = frames.mask.new_ones(frames.mask.shape[0])
        return cls(frames, start * row.long(), stable * row.long(), row & finished)

    def drop(self, n: int) -> Memory:
        """Forget the first `n` frames."""
        stable = (self.stable - n).clamp(min=0)
        return replace(self, frames=self.frames[n:], start=self.start + n, stable=stable)
