"""Attention to several memories at once: sound and lips, or two microphones (Libovicky & Helcl, arXiv 1704.06567)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from speechattn.cross import Attended
from speechattn.cross.soft import Soft, SoftState
from speechattn.frames import Frames, Memory
from speechattn.linear import run
from speechattn.tree import node

__all__ = ["Flat", "Hierarchical", "Sources", "SourcesRead"]


@node
class Sources:
    """Several memories of the same rows, in the place of one. A row without a frame of a source does not have it."""

    members: tuple[Memory, ...]

    @property
    def frames(self) -> Frames:
        """Those of the first."""
        return self.members[0].frames


@node
class SourcesRead:
    """What was read of each source; `mask` [B, T] is over their frames side by side, T = T1 + T2 + ..."""

    parts: tuple[SoftState, ...]

    @property
    def mask(self) -> Tensor:
        return torch.cat([part.mask for part in self.parts], 1)

    def trimmed(self) -> SourcesRead:
        """Without the frames in front of each source that no row has."""
        return SourcesRead(tuple(part.trimmed() for part in self.parts))

    def then(self, other: SourcesRead, skip: int) -> SourcesRead:
        """These frames, and behind them, source by source, those of `other`.

        `skip` is 0, or all frames of the first source: then of each source those that are here are left out.
        """
        if skip and skip != self.parts[0].mask.shape[1]:
            raise ValueError(f"{skip} frames to skip, of {self.parts[0].mask.shape[1]} that the first source has")
        pairs = zip(self.parts, other.parts, strict=True)
        return SourcesRead(tuple(a.then(b, a.mask.shape[1] if skip else 0) for a, b in pairs))


def members(memory: Sources | Memory, wanted: int) -> tuple[Memory, ...]:
    """The sources; ValueError for another number than `wanted`."""
    found = memory.members if isinstance(memory, Sources) else (memory,)
    if len(found) != wanted:
        raise ValueError(f"a memory of {len(found)} sources for attention to {wanted}")
    return found


class Flat(Soft):
    """One softmax over the frames of all sources, each with keys and values of its own (section 3.2 of the paper).

    Law: with one source it is `Soft`, whose weights fit. Weights [B, H, U, T] are over all frames side by side.
    """

    def __init__(
        self, dim: int, heads: int, *, sources: int = 2, normaliser: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__(dim, heads, normaliser=normaliser)
        self.more = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(sources - 1))  # keys, then values

    def read(self, memory: Sources | Memory) -> SourcesRead:  # type: ignore[override]
        """Keys and values of every frame of every source."""
        first, *others = members(memory, 1 + len(self.more))
        parts = [super().read(first)]
        for linear, other in zip(self.more, others, strict=True):
            key, value = run(linear, other.frames.values).chunk(2, -1)
            parts.append(SoftState(self._split(key), self._split(value), other.frames.mask))
        return SourcesRead(tuple(parts))

    def attend(  # type: ignore[override]
        self, query: Tensor, read: SourcesRead, place: tuple[()], *, heads: Sequence[int] | None = None
    ) -> tuple[Attended, tuple[()]]:
        """`query` [B * K, U, D] -> what it saw of all sources."""
        key, value = (torch.cat([getattr(part, name) for part in read.parts], 2) for name in ("key", "value"))
        return self._seen(query, SoftState(key, value, read.mask), heads), ()


class Hierarchical(nn.Module):
    """Attention to each source, then attention of the same query to what was seen of each (section 3.3 of the paper).

    Law: a source that a row does not have changes nothing in it. Weights [B, H, U, T] are those of the frames of a
    source, times that of the source.
    """

    def __init__(
        self, dim: int, heads: int, *, sources: int = 2, normaliser: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.each: Sequence[Soft] = nn.ModuleList(  # type: ignore[assignment]
            Soft(dim, heads, normaliser=normaliser) for _ in range(sources)
        )
        self.over = Soft(dim, heads)

    def read(self, memory: Sources | Memory) -> SourcesRead:
        """Keys and values of every frame of every source."""
        found = members(memory, len(self.each))
        return SourcesRead(tuple(soft.read(one) for soft, one in zip(self.each, found, strict=True)))

    def place(self, rows: Tensor) -> tuple[()]:
        """Nothing is remembered."""
        return ()

    def attend(
        self, query: Tensor, read: SourcesRead, place: tuple[()], *, heads: Sequence[int] | None = None
    ) -> tuple[Attended, tuple[()]]:
        """`query` [B * K, U, D] -> what it saw of all sources."""
        n, tokens, dim = query.shape
        seen = [soft.attend(query, part, (), heads=heads)[0] for soft, part in zip(self.each, read.parts, strict=True)]
        contexts = torch.stack([one.context for one in seen], 2).flatten(0, 1)  # [B * K * U, N, D]
        there = torch.stack([part.mask.any(1) for part in read.parts], 1)
        there = there.repeat_interleave(n // max(len(there), 1) * tokens, 0)
        heard = self.over.read(Memory.of(Frames.of(contexts, there)))
        both, _ = self.over.attend(query.reshape(n * tokens, 1, dim), heard, (), heads=heads)
        shares = both.weights.view(n, tokens, both.weights.shape[1], len(seen)).transpose(1, 2)  # [B * K, H, U, N]
        weights = torch.cat([one.weights * shares[..., i : i + 1] for i, one in enumerate(seen)], -1)
        waiting = query.new_zeros(n, self.over.heads, tokens, dtype=torch.bool)
        return Attended(both.context.view(n, tokens, dim), weights, weights, waiting), ()
