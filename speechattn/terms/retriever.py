"""Attention2Probability: which terms of a bank are said (arXiv 2508.18701).

B utterances, T frames, N terms, L tokens of a term, M tokens of all terms, H heads, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from speechattn.cross.soft import Soft
from speechattn.encoder.layers import Depthwise, Stack, convolution
from speechattn.frames import Frames, Memory, known
from speechattn.stream import Pointwise, Residual, Serial, Stream
from speechattn.terms.spelling import padded
from speechattn.tree import node

__all__ = ["Hearing", "Queries", "Retriever", "Running"]

PIECE = 1 << 11  # tokens whose scores are held at once when no gradient is asked
SHARP = 4.0  # queries begin so many times as long as linear layers make them: scores that are all alike teach little


class Hearing(Serial):
    """The projector of the sound: frames of an encoder, `stack` of them side by side -> frames of width `dim`.

    With `layers` a frame also knows its neighbours, by convolutions over `kernel` frames; it then waits for the half of
    these that follows it.
    """

    def __init__(
        self, features: int, dim: int, *, stack: int = 4, kernel: int = 7, layers: int = 0, dropout: float = 0.0
    ) -> None:
        wide = stack * features
        first = Pointwise(nn.LayerNorm(wide), nn.Linear(wide, dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, dim))
        near = [
            Residual(convolution(dim, Depthwise(dim, kernel, right=kernel // 2), dropout=dropout))
            for _ in range(layers)
        ]
        super().__init__(Stack(stack, stack), first, *near, Pointwise(nn.LayerNorm(dim)))


@dataclass(frozen=True)
class Queries:
    """What of a bank is computed once: `query` [M, D] of every token, scaled; `term` [M], to which of N terms it
    belongs; `share` [M], one divided by the tokens of that; `prior` [N], the log-odds of a term when nothing is heard.
    """

    query: Tensor
    term: Tensor
    share: Tensor
    prior: Tensor

    def __len__(self) -> int:
        return len(self.prior)

    def select(self, terms: Sequence[int]) -> Queries:
        """Those terms, in that order."""
        rows = torch.tensor(terms, dtype=torch.long, device=self.term.device)
        at = self.tokens(rows)
        count = torch.bincount(self.term, minlength=len(self))[rows]
        new = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
        return Queries(self.query[at], new, self.share[at], self.prior[rows])

    def tokens(self, terms: Tensor) -> Tensor:
        """Where the tokens of terms stand, in their order."""
        count = torch.bincount(self.term, minlength=len(self))
        first, size = count.cumsum(0) - count, count[terms]
        before = size.cumsum(0) - size
        return torch.arange(int(size.sum()), device=terms.device) + (first[terms] - before).repeat_interleave(size)

    def then(self, other: Queries) -> Queries:
        """These terms and behind them those of `other`."""
        term = torch.cat([self.term, other.term + len(self)])
        query, share, prior = (torch.cat([getattr(self, k), getattr(other, k)]) for k in ("query", "share", "prior"))
        return Queries(query, term, share, prior)


@node
class Running:
    """What the frames so far say of every token, for each head [B, H, M]: the largest score, and relative to it the sum
    of the weights and of what they weigh.
    """

    most: Tensor
    total: Tensor
    value: Tensor


class Retriever(nn.Module):
    """The released formulation: tokens of a term look at the sound, and what they see says whether it was said.

    `frames` makes frames of width `dim` of those of an encoder, `spelling` vectors of tokens. The presence of a term
    is a probability of its own: it does not depend on padding, on the order of the bank, or on what else is in it.

    Law: `odds` is the difference of the two logits of `reference`. Behind the softmax all is linear, so what a frame
    has to say is one number for each head, which is weighed instead of a vector, and tokens of a term are averaged
    before anything else. So a query costs O(T * M * D) once, and not O(M * D^2).
    """

    def __init__(
        self, frames: Stream, spelling: nn.Module, dim: int, heads: int, *,
        cross: Callable[[int, int], Soft] = Soft,
    ) -> None:  # fmt: skip
        super().__init__()
        self.frames, self.spelling, self.dim, self.heads = frames, spelling, dim, heads
        self.word = nn.Linear(spelling.features, dim)  # type: ignore[arg-type]
        self.cross = cross(dim, heads)
        self.out = nn.Linear(dim, 2)
        with torch.no_grad():
            self.cross.query.weight.mul_(SHARP)

    def embed(self, texts: Sequence[str]) -> Queries:
        """The queries of terms, whose cost is paid once. InputError for one that cannot be spelled."""
        return self.queries(*self.ids(texts))

    def ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of terms [N, U] and which are there."""
        return padded([self.spelling.tokens(text) for text in texts], self.out.weight.device)  # type: ignore[operator]

    def queries(self, ids: Tensor, mask: Tensor) -> Queries:
        """Of tokens [N, U]."""
        w, there = self.spelling(ids, mask)
        word = self.word(w)[there]
        term = there.nonzero()[:, 0]
        share = (1 / there.sum(1).to(word.dtype))[term]
        use = self.out.weight[1] - self.out.weight[0]
        prior = (self.out.bias[1] - self.out.bias[0] + self.cross.out.bias @ use).expand(len(ids))
        prior = prior.index_add(0, term, share * (word @ use))
        return Queries(self.cross.query(word) / sqrt(self.dim // self.heads), term, share, prior)

    def heard(self, x: Frames) -> tuple[Tensor, Tensor, Tensor]:
        """Frames [B, T, D] -> keys [B, H, T, D/H], what each frame has to say [B, H, T], which are there [B, T]."""
        read = self.cross.read(Memory.of(x))
        use = self.cross.out.weight.T @ (self.out.weight[1] - self.out.weight[0])
        say = (read.value @ use.view(self.heads, -1, 1))[..., 0]
        return read.key, say.masked_fill(~read.mask[:, None], 0.0), read.mask

    def odds(self, x: Frames, bank: Queries) -> Tensor:
        """Frames of the encoder [B, T, F] -> log-odds that each term was said [B, N]."""
        return self.present(self.frames(x), bank)

    def present(self, x: Frames, bank: Queries) -> Tensor:
        """The same of frames [B, T, D] of `self.frames`."""
        key, say, mask = self.heard(x)
        if not mask.shape[1] or not len(bank.query):
            return bank.prior.expand(len(mask), -1)
        whole = known(mask) and bool(mask.all())
        seen = []
        for query in self.pieces(bank):
            scores = query @ key.mT
            if not whole:
                scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
            seen.append((scores.softmax(-1) @ say[..., None])[..., 0].sum(1))
        return bank.prior + averaged(torch.cat(seen, 1), bank)

    @torch.no_grad()
    def calibrate(self, scale: float, bias: float) -> None:
        """From now on log-odds are `scale` times what they were, and `bias` more (`loss.calibration`)."""
        self.out.weight.mul_(scale)
        self.out.bias.mul_(scale)[-1] += bias

    def alike(self, x: Frames, bank: Queries) -> Tensor:
        """Frames [B, T, D] -> how well the tokens of each term find something like them [B, N]: the mean over heads
        and tokens of their largest score, before any softmax. Queries and keys learn from it to meet.
        """
        state = self.step(x, self.start(len(x.mask), bank), bank)
        return averaged(state.most.mean(1), bank)

    def pieces(self, bank: Queries) -> Iterator[Tensor]:
        """Queries of tokens [H, m, D/H], few enough to stay in a cache when no gradient is asked."""
        query = bank.query.view(-1, self.heads, self.dim // self.heads).transpose(0, 1)
        return iter(torch.split(query, max(1, query.shape[1]) if torch.is_grad_enabled() else PIECE, 1))

    def start(self, rows: int, bank: Queries) -> Running:
        """Nothing was heard yet in so many rows."""
        zeros = bank.query.new_zeros(rows, self.heads, len(bank.query))
        return Running(torch.full_like(zeros, -torch.inf), zeros, zeros)

    def step(self, x: Frames, state: Running, bank: Queries) -> Running:
        """More frames [B, T, D] of `self.frames`. Law: the same in whatever pieces they come."""
        key, say, mask = self.heard(x)
        parts, at = [], 0
        for query in self.pieces(bank):
            scores = (query @ key.mT).masked_fill(~mask[:, None, None], -torch.inf)
            parts.append(summed(scores, say, state, slice(at, at + query.shape[1])))
            at += query.shape[1]
        if not parts:
            return state
        return Running(*(torch.cat([getattr(part, k) for part in parts], 2) for k in ("most", "total", "value")))

    def judged(self, state: Running, bank: Queries) -> Tensor:
        """Log-odds [B, N] after what was heard; those of a row that heard nothing are the prior."""
        seen = torch.where(state.total > 0, state.value / state.total.clamp(min=1e-30), 0.0).sum(1)
        return bank.prior + averaged(seen, bank)

    def reference(self, x: Frames, ids: Tensor, mask: Tensor) -> Tensor:
        """The two logits [B, N, 2] of `out`, step by step as released; softmax gives absence and presence."""
        heard = self.frames(x)
        w, there = self.spelling(ids, mask)
        n, length, _ = w.shape
        word = self.word(w).expand(len(heard.mask), -1, -1, -1)
        seen, _ = self.cross.attend(word.flatten(1, 2), self.cross.read(Memory.of(heard)), ())
        context = mean(seen.context.view(len(seen.context), n, length, self.dim), there)
        return mean(self.out(word + context[:, :, None]), there)


def averaged(each: Tensor, bank: Queries) -> Tensor:
    """Numbers of tokens [B, M] -> their mean in each term [B, N]."""
    return each.new_zeros(len(each), len(bank)).index_add(1, bank.term, each * bank.share)


def summed(scores: Tensor, say: Tensor, state: Running, piece: slice) -> Running:
    """The running sums of some tokens after frames with `scores` [B, H, m, T], -inf where there is none."""
    before, total, value = state.most[..., piece], state.total[..., piece], state.value[..., piece]
    most = torch.maximum(before, scores.amax(-1)) if scores.shape[-1] else before
    base = most.masked_fill(most == -torch.inf, 0.0)
    weight = (scores - base[..., None]).exp()
    kept = (before - base).exp()
    return Running(most, total * kept + weight.sum(-1), value * kept + (weight @ say[..., None])[..., 0])


def mean(x: Tensor, there: Tensor) -> Tensor:
    """Over the tokens of each term: [B, N, L, D] -> [B, N, D]."""
    x = x.masked_fill(~there[..., None], 0.0)
    return x.sum(2) / there.sum(1).clamp(min=1)[:, None]
