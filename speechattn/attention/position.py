"""Relative positions. In a window of keys the distances are the same for every chunk, so all tables are constant."""

from __future__ import annotations

from math import log, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from speechattn.attention.pattern import constant
from speechattn.linear import eager

__all__ = ["Alibi", "Bucketed", "Position", "Relative", "Rotary", "Terms", "turned"]


class Terms(NamedTuple):
    """A position as kernels compute it in their tiles; R distances (query minus key index) in ascending order.

    `shift` [H, D] is added to the queries; q . `rows` [H, D, R] and `table` [H, R] are added to the scaled scores;
    queries and keys turn by `turns` [2, P, D / 2], cosines and sines of P places.
    """

    shift: Tensor | None = None
    rows: Tensor | None = None
    table: Tensor | None = None
    turns: Tensor | None = None


class Position(nn.Module):
    """How distance enters attention: by turning queries and keys, by a term added to the scores, or both.

    `queries` and `keys` are the indices of q [B, H, C, D] and k [B, H, W, D] in a window, the same in each row; only
    differences of indices matter. Every kind is made from (dim, heads).
    """

    def turn(self, q: Tensor, k: Tensor, queries: range, keys: range) -> tuple[Tensor, Tensor]:
        """Queries and keys as the scores should see them, before scaling by 1 / sqrt(D)."""
        return q, k

    def bias(self, q: Tensor, queries: range, keys: range) -> Tensor | None:
        """What is added to the scaled scores: broadcasts to [B, H, C, W]; None for nothing."""
        return None

    def scalars(self, distances: range, device: torch.device) -> Tensor | None:
        """The bias as a table [H, len(distances)] of query minus key index, where it does not depend on q."""
        return None

    def terms(self, distances: range, places: range, like: Tensor) -> Terms | None:
        """The same for kernels, for queries like `like` [B, H, T, D]; None where it has no such form."""
        return None


def skewed(rows: Tensor, queries: int, keys: int) -> Tensor:
    """Scores by distance [..., C, C + W - 1], the greatest first -> by key [..., C, W]; a view, nothing is gathered.

    Query i finds its first key at distance index C - 1 - i: in memory that is one entry less for each row.
    """
    if queries == 1:
        return rows
    if rows.requires_grad and torch.is_grad_enabled() and eager(rows):
        found: Tensor = Skewed.apply(rows, keys)
        return found
    return along(rows, queries, keys)


def along(rows: Tensor, queries: int, keys: int) -> Tensor:
    """The view of `skewed`."""
    step = queries + keys - 2
    flat = rows.flatten(-2)[..., queries - 1 : queries - 1 + queries * step]
    return flat.view(*flat.shape[:-1], queries, step)[..., :keys]


class Skewed(torch.autograd.Function):
    """The view of `skewed`, whose gradient is written once; autograd would fill and copy all rows for each slice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: int) -> Tensor:
        """rows [..., C, C + W - 1] -> [..., C, W]."""
        ctx.shape = rows.shape
        return along(rows, rows.shape[-2], keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Between two rows of the result there are as many zeros as it has rows, less two."""
        grad, queries = grads[0], ctx.shape[-2]
        found = grad.new_empty(*ctx.shape[:-2], ctx.shape[-2] * ctx.shape[-1])
        found[..., : queries - 1] = 0
        found[..., -1] = 0
        middle = found[..., queries - 1 : -1]
        middle = middle.view(*middle.shape[:-1], queries, -1)
        middle[..., : grad.shape[-1]] = grad
        middle[..., grad.shape[-1] :] = 0
        return found.view(ctx.shape), None


def distances(queries: range, keys: range) -> range:
    """Query minus key index, the greatest first: as many as `skewed` wants."""
    return range(queries.stop - 1 - keys.start, queries.start - keys.stop, -1)


def numbers(indices: range, device: torch.device) -> Tensor:
    """The numbers [len(indices)] in float64, made where they are needed, so that nobody waits for a copy."""
    # MPS has no float64.
    where = device if device.type != "mps" else torch.device("cpu")
    return torch.arange(indices.start, indices.stop, indices.step, dtype=torch.float64, device=where)


@constant
def sinusoids(distances: range, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sines at even and cosines at odd places [len(distances), dim] (arXiv 1901.02860)."""
    at = numbers(distances, device)
    rate = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64, device=at.device) * (-log(10000.0) / dim))
    angle = at[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim].to(device, dtype)


class Relative(Position):
    """Transformer-XL: score = (q + u) . k + (q + v) . W r(distance)  (arXiv 1901.02860, section 3.3)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.linear = nn.Linear(dim, dim, bias=False)
        self.u, self.v = nn.Parameter(torch.zeros(heads, dim // heads)), nn.Parameter(torch.zeros(heads, dim // heads))
        self._rows: tuple[Any, Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    def turn(self, q: Tensor, k: Tensor, queries: range, keys: range) -> tuple[Tensor, Tensor]:
        return q + self.u[:, None], k

    def bias(self, q: Tensor, queries: range, keys: range) -> Tensor | None:
        rows, own = self.rows(distances(queries, keys), q)
        b, h, c, d = q.shape
        scores = torch.baddbmm(own, q.transpose(0, 1).reshape(h, b * c, d), rows)
        return skewed(scores.view(h, b, c, scores.shape[2]), c, len(keys)).transpose(0, 1)

    def terms(self, distances: range, places: range, like: Tensor) -> Terms | None:
        rows, own = self.rows(distances, like)  # (q + v) . r = (q + u) . r + (v - u) . r
        return Terms(shift=self.u, rows=rows, table=(own - self.u[:, None].to(rows.dtype) @ rows)[:, 0])

    def rows(self, distances: range, like: Tensor) -> tuple[Tensor, Tensor]:
        """W r(distance) by head [H, D, R] and v . W r(distance) [H, 1, R], scaled; R is len(distances).

        Kept while the weights stay and no gradient is asked. A change that leaves no trace in their version (through
        `.data`, as averaged teachers are updated) is noticed by a sample of them. Not on a GPU, which would be waited
        for to see it: making the table is faster.
        """
        weight, kept = self.linear.weight, self._rows
        keep = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_cuda) and self._plain()
        key, sample = None, None
        if keep:
            key = (distances, like.dtype, like.device, weight._version, self.v._version, id(weight), id(self.v))
            sample = weight.diagonal()
            if kept is not None and kept[0] == key and torch.equal(kept[1], sample) and torch.equal(kept[2], self.v):
                return kept[3]
        table = self.linear(sinusoids(distances, self.dim, like.dtype, like.device)) / sqrt(self.u.shape[1])
        rows = table.view(len(distances), *self.u.shape).permute(1, 2, 0).contiguous()
        found = rows, self.v[:, None] @ rows
        self._rows = (key, sample.clone(), self.v.detach().clone(), found) if sample is not None else None
        return found

    def _plain(self) -> bool:
        """Nothing but the weights decides about the table: no adapter, hook, quantisation or function transform."""
        linear = self.linear
        if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
            return False
        return all(type(w) is nn.Parameter and not w.is_inference() for w in (linear.weight, self.v))


@constant
def turns(indices: range, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosine and sine of each index and pair of features [2, len(indices), dim / 2]."""
    return circled(numbers(indices, device), dim, base).to(device, dtype)


def circled(at: Tensor, dim: int, base: float) -> Tensor:
    """Cosine and sine of places `at` [...] in float64 and of each pair of features [2, ..., dim / 2]."""
    angle = at[..., None] * base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=at.device) / dim)
    return torch.stack([angle.cos(), angle.sin()])


class Rotary(Position):
    """Rotary positions (arXiv 2104.09864, eq. 34): halves of the features turn against each other.

    The cache holds keys that are not turned; both sides turn by their place in the window, so no clock runs.
    """

    def __init__(self, dim: int, heads: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if dim // heads % 2:
            raise ValueError(f"{dim // heads} features a head: an even number is needed to turn pairs")
        self.base = base

    def turn(self, q: Tensor, k: Tensor, queries: range, keys: range) -> tuple[Tensor, Tensor]:
        return self._turned(q, queries), self._turned(k, keys)

    def terms(self, distances: range, places: range, like: Tensor) -> Terms | None:
        return Terms(turns=turns(places, like.shape[-1], self.base, torch.float32, like.device))

    def placed(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [B, H, T, D] turned by places of its own [B, T]: two that are turned like this see how far they differ."""
        return turned(x, self.angles(ids, x))

    def angles(self, ids: Tensor, like: Tensor) -> Tensor:
        """How what stands at `ids` [B, T] is `turned`, in the type of `like` [..., D]: [2, B, 1, T, D / 2]."""
        at = ids.to("cpu" if ids.device.type == "mps" else ids.device).double()  # MPS has no float64
        return circled(at[:, None], like.shape[-1], self.base).to(like.device, like.dtype)

    def _turned(self, x: Tensor, indices: range) -> Tensor:
        return turned(x, turns(indices, x.shape[-1], self.base, x.dtype, x.device))


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x [..., T, D], whose halves turn against each other by cosines and sines [2, ..., T, D / 2]."""
    cos, sin = turns
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Scalar(Position):
    """A bias that depends on head and distance alone."""

    def bias(self, q: Tensor, queries: range, keys: range) -> Tensor | None:
        table = self.scalars(distances(queries, keys), q.device)
        assert table is not None
        rows = table.to(q.dtype)[:, None].expand(-1, len(queries), -1)
        return skewed(rows, len(queries), len(keys))[None]  # the fused kernel wants all four dimensions

    def terms(self, distances: range, places: range, like: Tensor) -> Terms | None:
        return Terms(table=self.scalars(distances, like.device))


@constant
def slopes(heads: int, device: torch.device) -> Tensor:
    """One a head, a geometric series that ends in 2 ** -8."""
    return (2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)).to(device)


@constant
def penalties(heads: int, distances: range, device: torch.device) -> Tensor:
    """What each head takes off for each distance [H, len(distances)], negative."""
    at = torch.arange(distances.start, distances.stop, distances.step, device=device)
    return -slopes(heads, device)[:, None] * at.abs()


class Alibi(Scalar):
    """A penalty that grows with distance, to both sides; nothing to learn (arXiv 2108.12409)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def scalars(self, distances: range, device: torch.device) -> Tensor:
        return penalties(self.heads, distances, device)


@constant
def buckets(distances: range, count: int, farthest: int, device: torch.device) -> Tensor:
    """Bucket of each distance: near ones have their own, far ones share, keys ahead use the upper half."""
    at = numbers(distances, device).long()
    half, size = (at < 0).long() * (count // 2), at.abs()
    near = count // 4
    far = near + (size.clamp(min=1).double() / near).log() / log(farthest / near) * (count // 2 - near)
    return (half + torch.where(size < near, size, far.long().clamp(max=count // 2 - 1))).to(device)


class Bucketed(Scalar):
    """A learned value for each head and bucket of distances (T5, arXiv 1910.10683)."""

    def __init__(self, dim: int, heads: int, *, buckets: int = 32, farthest: int = 128) -> None:
        super().__init__()
        if buckets % 4 or farthest <= buckets // 4:
            raise ValueError(f"{buckets} buckets up to {farthest}: wanted a multiple of 4, and farther than a quarter")
        self.buckets, self.farthest = buckets, farthest
        self.table = nn.Embedding(buckets, heads)

    def scalars(self, distances: range, device: torch.device) -> Tensor:
        found: Tensor = self.table(buckets(distances, self.buckets, self.farthest, device))
        return found.T
