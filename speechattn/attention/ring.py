"""Keys and values of live streams in slots that are used over and over, for the kernel of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechattn.attention.pattern import Span
from speechattn.attention.position import Position, Terms
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["Ring", "looked"]


@node
class Ring:
    """The last N frames of each row: a `Buffer` whose frames never move.

    `values` [B, Cap, 2, G, D] are slots, of which each row uses N: the oldest frame is in slot `at` [B], the others
    behind it, around the end. `mask` [B, N] says which frames are there, the oldest first. The rest of Cap is room for
    what is new, so a step writes no slot that holds history: a state is whole until steps behind it fill the room.

    Frames that are written in place are counted beside the memory, so a state that was overrun is noticed where it is
    used or copied, by `tree`, `copy.deepcopy` or pickle (`stale`); copies of its single tensors know nothing of it.
    Compiled steps cannot count: they write to a copy, which counts as fresh, and take any state as whole.
    """

    values: Tensor
    mask: Tensor
    at: Tensor

    @classmethod
    def of(cls, buffer: Buffer, room: int) -> Ring:
        """The frames of a buffer, and room for so many new ones; the memory is its own."""
        rows, held = buffer.mask.shape
        values = buffer.values.new_zeros(rows, held + room, *buffer.values.shape[2:])
        values[:, :held] = buffer.values
        return cls(values, buffer.mask, torch.zeros(rows, dtype=torch.long, device=values.device))

    @property
    def room(self) -> int:
        """New frames that fit in."""
        return self.values.shape[1] - self.mask.shape[1]

    def stale(self) -> int:
        """Frames that steps behind this state have written; RuntimeError where they took the place of history."""
        if torch.compiler.is_compiling():
            return 0
        frames = written(self.values) - written(self.at)
        if frames > self.room:
            raise RuntimeError("steps were made behind this state, which took its place; to fork a stream, clone it")
        return frames

    def __reduce__(self) -> tuple[type[Ring], tuple[Tensor, ...]]:
        self.stale()
        return Ring, (self.values, self.mask, self.at)

    @property
    def length(self) -> Tensor:
        """Frames of each row [B]."""
        return self.mask.sum(1)

    def buffer(self) -> Buffer:
        """The same frames, each row in order."""
        self.stale()
        slots = (self.at[:, None] + torch.arange(self.mask.shape[1], device=self.at.device)) % self.values.shape[1]
        return Buffer(self.values[torch.arange(len(slots), device=slots.device)[:, None], slots], self.mask)

    def append(self, values: Tensor, mask: Tensor) -> Buffer:
        """Newer frames [B, T, ...] behind the others."""
        return self.buffer().append(values, mask)

    def truncate(self, length: int) -> Buffer:
        """Without what stands behind the first `length` frames of each row."""
        return self.buffer().truncate(length)

    def open(self, frames: int, dtype: torch.dtype) -> Ring:
        """A ring of this type that `frames` can be written to, by nobody else: itself, where that is possible.

        Who makes a second step behind one state gets a copy, and so does who compiles. RuntimeError as `stale`.
        """
        values, stale = self.values, self.stale()
        if frames > self.room:
            buffer = self.buffer()
            return Ring.of(Buffer(buffer.values.to(dtype), buffer.mask), frames)
        if values.dtype != dtype:
            values = values.to(dtype)
        elif (
            torch.compiler.is_compiling() or stale or (values.is_inference() and not torch.is_inference_mode_enabled())
        ):
            values = values.clone()
        return self if values is self.values else Ring(values, self.mask, self.at.clone())

    def next(self, mask: Tensor, at: Tensor, frames: int) -> Ring:
        """What the ring is when so many frames were written."""
        if not torch.compiler.is_compiling():
            count = written(self.values) + frames
            for x in (self.values, at):
                x.untyped_storage().written = count  # type: ignore[attr-defined]
        return Ring(self.values, mask, at)

    @staticmethod
    def align(rings: Sequence[Ring]) -> list[Ring]:
        """The same frames in rings of one capacity; every `tree.map` asks for it, so nobody copies what is overrun."""
        for ring in rings:
            ring.stale()
        most = max(ring.room for ring in rings)
        return [ring if ring.room == most else Ring.of(ring.buffer(), most) for ring in rings]


def written(x: Tensor) -> int:
    """Frames that were written to this memory since it was made, or when `at` was: views know it too."""
    return int(getattr(x.untyped_storage(), "written", 0))


def looked(
    q: Tensor, kv: Tensor, mask: Tensor, ring: Ring, span: Span, late: int, position: Position | None
) -> tuple[Tensor, Ring]:  # fmt: skip
    """Queries [B, T, H, D], `late` frames behind the newest of kv [B, T, 2, G, D] -> [B, T, H, D] and the next ring.

    The kernel writes what is new into the ring, and looks at as much of it as `span` allows.
    """
    from speechattn_kernels.step import step

    left, chunk = span.left or 0, span.chunk or 1
    ring = ring.open(q.shape[1], q.dtype)
    q, (k, v) = q.transpose(1, 2), kv.permute(2, 0, 3, 1, 4).unbind()
    terms = Terms() if position is None else position.terms(
        range(1 - chunk - span.right, left + chunk), range(ring.values.shape[1]), q
    )  # fmt: skip
    assert terms is not None
    if terms.shift is not None:
        q = q + terms.shift[:, None].to(q.dtype)
    y, filled, at = step(
        q, k, v, mask, ring.values, ring.mask, ring.at, left=left, chunk=chunk, right=span.right,
        dilation=span.dilation, late=late, rows=terms.rows, table=terms.table, turns=terms.turns,
    )  # fmt: skip
    return y.transpose(1, 2), ring.next(filled, at, q.shape[2])
