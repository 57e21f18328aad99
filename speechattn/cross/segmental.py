"""Attention to the frames that a token is said in: hard, local window, segment (arXiv 2103.16710, arXiv 2210.14742)."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from speechattn.cross import Attended, chosen
from speechattn.cross.soft import Soft, SoftState
from speechattn.linear import run
from speechattn.tree import node

__all__ = ["Around", "AtFrame", "Boundary", "SegmentAttention", "Segments", "Within"]


@node
class Segments:
    """Where tokens are said: `start`, `end` [B, U], first and last-plus-one frame. Only valid frames are counted.

    As a place: where the next tokens are, that are not attended to yet.
    """

    start: Tensor
    end: Tensor

    @classmethod
    def until(cls, ends: Tensor) -> Segments:
        """Segments that follow each other [B, U], the first one from the beginning."""
        return cls(torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1), ends)

    def __getitem__(self, tokens: slice) -> Segments:
        return Segments(self.start[:, tokens], self.end[:, tokens])


class Boundary(nn.Module):
    """Which frames a segment means. It has no parameters.

    A segment longer than `reach` means the same as one of `reach` frames that ends there. At most `back` frames
    before a segment's end are seen, and `ahead` behind it. None: no such bound.
    """

    reach: int | None
    back: int | None
    ahead: int

    def frames(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """First and last-plus-one frame that are seen, of segments of any shape."""
        raise NotImplementedError


class AtFrame(Boundary):
    """The last frame of the segment alone: hard attention.

    frames       0 1 2 3 4 5 6 7
    segment            [   )
    seen                 x          (a segment 3 to 5)
    """

    reach: int | None = 1
    back: int | None = 1
    ahead = 0

    def frames(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        return end - 1, end


class Around(Boundary):
    """A window of `left` frames before the last frame of the segment and `right` behind it, wherever it starts.

    segment            [   )
    seen           x x x x x x      (a segment 3 to 5, left 3, right 2)
    """

    def __init__(self, left: int, right: int = 0) -> None:
        super().__init__()
        if left < 0 or right < 0:
            raise ValueError(f"{left} frames to the left, {right} to the right: wanted 0 or more")
        self.left, self.ahead = left, right
        self.reach: int | None = 1
        self.back: int | None = left + 1

    def frames(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        return end - self.left - 1, end + self.ahead


class Within(Boundary):
    """The segment, of one longer than `longest` its last frames, and `left` and `right` frames beside these.

    segment            [   )
    seen             x x x x        (a segment 3 to 5, left 1, right 1)
    """

    def __init__(self, longest: int | None = None, *, left: int = 0, right: int = 0) -> None:
        super().__init__()
        if left < 0 or right < 0 or (longest is not None and longest < 1):
            raise ValueError(f"segments of {longest} frames, {left} to the left, {right} to the right: not possible")
        self.longest, self.left, self.ahead = longest, left, right
        self.reach: int | None = longest
        self.back: int | None = None if longest is None else longest + left

    def frames(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        first = start if self.longest is None else torch.maximum(start, end - self.longest)
        return first - self.left, end + self.ahead


class SegmentAttention(Soft):
    """Soft attention of which each token sees the frames of its segment, as `boundary` means it, and no others.

    The place is the segments of the tokens that come next: whoever knows an alignment, or searches for it, puts it
    there. Law: it is full attention with a block mask. A token without a frame gets the context of zeros.
    """

    def __init__(self, dim: int, heads: int, *, boundary: Boundary, key_bias: bool = True) -> None:
        super().__init__(dim, heads, key_bias=key_bias)
        self.boundary = boundary

    def place(self, rows: Tensor) -> Segments:  # type: ignore[override]
        """Nobody knows yet."""
        none = torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
        return Segments(none, none.clone())

    def attend(  # type: ignore[override]
        self, query: Tensor, read: SoftState, place: Segments, *, heads: Sequence[int] | None = None
    ) -> tuple[Attended, Segments]:
        """`query` [B * K, U, D] -> what it saw in the first U segments, and the segments behind these.

        ValueError where fewer segments are known.
        """
        n, tokens, rows = len(query), query.shape[1], len(read.mask)
        if place.end.shape[1] < tokens:
            raise ValueError(
                f"segments of {place.end.shape[1]} tokens are known, not of {tokens}: segmental attention must be told "
                "where a token is; train and search with the head decoder.segmental.Segmental"
            )
        seen = self.seen(read.mask, place[:tokens])[:, None]
        dim, beam = query.shape[-1], n // max(rows, 1)
        q = self._split(run(self.query, query.reshape(rows, beam * tokens, dim))) / sqrt(dim // self.heads)
        scores = (q @ read.key.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
        weights = scores.softmax(-1, torch.promote_types(q.dtype, torch.float32)).masked_fill(~seen, 0.0).to(q.dtype)
        context = run(self.out, (weights @ read.value).transpose(1, 2).flatten(2)).view(query.shape)
        weights = chosen(weights, heads)
        shape = rows, weights.shape[1], beam, tokens, read.mask.shape[1]
        weights = weights.view(shape).transpose(1, 2).reshape(n, *shape[1:2], *shape[3:])
        waiting = query.new_zeros(n, self.heads, tokens, dtype=torch.bool)
        return Attended(context, weights, weights, waiting), place[tokens:]

    def seen(self, mask: Tensor, place: Segments) -> Tensor:
        """Which frames of `mask` [B, T] the segments [B * K, U] mean [B, K * U, T]."""
        shape = len(mask), place.end.numel() // max(len(mask), 1), 1
        first, last = (edge.reshape(shape) for edge in self.boundary.frames(place.start, place.end))
        at = (mask.cumsum(1) - 1)[:, None]
        return (at >= first) & (at < last) & mask[:, None]
