"""Attention that moves relative to where it was, whatever it hears (Battenberg et al., arXiv 1910.10288).

The place of the last token and the decoder's state decide where the next one looks: so nothing learned depends on the
length of the input, and a text that is ten times as long is read in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, expm1, lgamma, log, pi, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.cross import Attended, chosen
from speechattn.cross.soft import SoftState
from speechattn.frames import Memory
from speechattn.linear import run
from speechattn.tree import node

__all__ = ["Alignment", "DynamicConvolution", "Mixture", "MixtureAttention", "beta_binomial"]


@node
class Mixture:
    """Where the components of the last token stood: `means` [B, H, K], counted in valid frames."""

    means: Tensor


@node
class Alignment:
    """Where the last token looked: `weights` [B, H, T] over the valid frames that were there; none came behind them."""

    weights: Tensor

    @staticmethod
    def align(places: Sequence[Alignment]) -> list[Alignment]:
        """The same over one number of frames."""
        most = max(place.weights.shape[-1] for place in places)
        return [Alignment(F.pad(place.weights, [0, most - place.weights.shape[-1]])) for place in places]


class Located(nn.Module):
    """What both kinds share: heads of values, no keys, and one hidden layer behind the query."""

    def __init__(self, dim: int, heads: int, inner: int, outputs: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} features and {heads} heads: they do not divide")
        self.heads = heads
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.hidden, self.last = nn.Linear(dim, inner), nn.Linear(inner, heads * outputs)

    def read(self, memory: Memory) -> SoftState:
        """Values of every frame of the memory [B, T, D]; the keys have no features."""
        x = memory.frames
        value = self._split(run(self.value, x.values))
        return SoftState(value[..., :0], value, x.mask)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)

    def predicted(self, query: Tensor) -> Tensor:
        """`query` [B, U, D] -> what each head does for each token [B, H, U, N]."""
        return self._split(self.last(self.hidden(query).tanh()))

    def seen(self, weights: Tensor, read: SoftState, asked: Sequence[int] | None) -> Attended:
        """`weights` [B * K, H, U, T] of the frames that were read, for the K hypotheses of each row."""
        n, heads, tokens, frames = weights.shape
        rows = len(read.mask)
        together = weights.reshape(rows, n // max(rows, 1), heads, tokens, frames).transpose(1, 2).flatten(2, 3)
        context = (together @ read.value).view(rows, heads, -1 if tokens else 0, tokens, read.value.shape[-1])
        context = run(self.out, context.permute(0, 2, 3, 1, 4).reshape(n, tokens, heads * read.value.shape[-1]))
        shown = chosen(weights, asked)
        return Attended(context, shown, shown, weights.new_zeros(weights.shape[:3], dtype=torch.bool))


def repeated(mask: Tensor, rows: int) -> Tensor:
    """`mask` [B, T] for B * K rows."""
    return mask if rows == len(mask) else mask.repeat_interleave(rows // len(mask), 0)


NARROWEST = 0.3  # frames: of a Gaussian that is narrower the weights of whole frames would not sum to 1


def unsoftplus(y: float) -> float:
    """The x of which softplus is `y`."""
    return log(expm1(y))


class MixtureAttention(Located):
    """K Gaussians whose means only move on (GMM attention, version V2b of the paper):

        weight of frame j = sum_k w[k] / sqrt(2 pi sigma[k]^2) exp(-(j - mu[k])^2 / (2 sigma[k]^2))
        mu[k] = mu of the last token + delta[k],   w = softmax, delta and sigma = softplus, of the decoder's state

    The weights of a token sum to 1 as far as its Gaussians are inside the input. At first `step` is about the delta of
    all components and `width` their sigma.
    """

    def __init__(
        self, dim: int, heads: int, *, components: int = 5, inner: int = 128, step: float = 1.0, width: float = 10.0
    ) -> None:
        if components < 1 or step <= 0 or width < NARROWEST:
            raise ValueError(
                f"{components} components of width {width} that move by {step}: wanted {NARROWEST} or wider"
            )
        super().__init__(dim, heads, inner, 3 * components)
        self.components = components
        nn.init.normal_(self.last.weight, std=0.01)  # not 0: all components would stay the same
        start = torch.tensor([0.0, unsoftplus(step), unsoftplus(width)]).repeat_interleave(components)
        with torch.no_grad():
            self.last.bias.copy_(start.repeat(heads))

    def place(self, rows: Tensor) -> Mixture:
        """Before the first frame there is, by one."""
        wide = torch.promote_types(rows.dtype, torch.float32)  # frames are counted
        return Mixture(torch.full((len(rows), self.heads, self.components), -1.0, dtype=wide, device=rows.device))

    def mixture(self, query: Tensor, place: Mixture) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of the shares, means and widths [B, H, U, K] of the next tokens."""
        share, step, width = self.predicted(query).to(place.means.dtype).chunk(3, -1)
        means = place.means[:, :, None] + F.softplus(step).cumsum(2)
        return share.log_softmax(-1), means, F.softplus(width).clamp(min=NARROWEST)

    def attend(
        self, query: Tensor, read: SoftState, place: Mixture, *, heads: Sequence[int] | None = None
    ) -> tuple[Attended, Mixture]:
        """`query` [B * K, U, D] -> what it saw, and the means of the last token."""
        share, means, width = self.mixture(query, place)
        mask = repeated(read.mask, len(query))
        at = (mask.cumsum(1) - 1)[:, None, None, :, None].to(means.dtype)
        height = share - width.log() - 0.5 * log(2 * pi)
        far = (at - means[..., None, :]) / width[..., None, :]
        weights = (height[..., None, :] - 0.5 * far.square()).exp().sum(-1).masked_fill(~mask[:, None, None], 0.0)
        seen = self.seen(weights.to(query.dtype), read, heads)
        return seen, Mixture(means[:, :, -1]) if query.shape[1] else place


def beta_binomial(n: int, a: float, b: float) -> Tensor:
    """Probabilities of 0 to n [n + 1], with a mean of n a / (a + b)."""

    def beta(x: float, y: float) -> float:
        return lgamma(x) + lgamma(y) - lgamma(x + y)

    return torch.tensor([comb(n, k) * torch.e ** (beta(k + a, n - k + b) - beta(a, b)) for k in range(n + 1)])


class DynamicConvolution(Located):
    """Filters of the last token's alignment, some learned and some made from the decoder's state (DCA of the paper):

        score of frame j = v . tanh(U f[j] + T g[j] + b) + log(p[j])

    f: `filters` static ones over 2 `reach` + 1 frames; g: as many dynamic ones; p: the prior, a fixed filter over
    `ahead` + 1 frames, beta-binomial, which moves on by 1 frame on average. Tokens follow each other one by one.
    """

    prior: Tensor

    def __init__(
        self, dim: int, heads: int, *, filters: int = 8, reach: int = 10, ahead: int = 10, inner: int = 128
    ) -> None:
        if filters < 1 or not 1 < ahead <= reach:
            raise ValueError(f"{filters} filters that reach {reach}, a prior that reaches {ahead}: wanted some, and a "
                             "prior of 2 frames or more that reaches no further")  # fmt: skip
        super().__init__(dim, heads, inner, filters * (2 * reach + 1))
        self.filters, self.reach = filters, reach
        size = 2 * reach + 1
        self.static = nn.Parameter(torch.randn(heads, size, filters) / sqrt(size))
        self.mixed = nn.Parameter(torch.randn(heads, 2 * filters, inner) / sqrt(2 * filters))
        self.shift = nn.Parameter(torch.zeros(heads, 1, inner))
        self.score = nn.Parameter(torch.randn(heads, inner, 1) / sqrt(inner))
        window = torch.zeros(size)  # entry i looks at the frame j + i - reach
        window[reach - ahead : reach + 1] = beta_binomial(ahead, 1 / ahead, 1 - 1 / ahead).flip(0)
        self.register_buffer("prior", window[:, None], persistent=False)

    def place(self, rows: Tensor) -> Alignment:
        """At the first frame."""
        return Alignment(rows.new_ones(len(rows), self.heads, 1))

    def attend(
        self, query: Tensor, read: SoftState, place: Alignment, *, heads: Sequence[int] | None = None
    ) -> tuple[Attended, Alignment]:
        """`query` [B * K, U, D] -> what it saw, and where the last token looked."""
        mask = repeated(read.mask, len(query))
        frames, n = mask.shape[1], len(query)
        width = max(frames, place.weights.shape[-1])
        there = torch.arange(width, device=mask.device) < mask.sum(1, keepdim=True)
        last = F.pad(place.weights, [0, width - place.weights.shape[-1]])
        dynamic = self.predicted(query)
        dynamic = dynamic.view(*dynamic.shape[:3], 2 * self.reach + 1, self.filters)
        rows = []
        for token in range(query.shape[1]):
            last = self.moved(last, dynamic[:, :, token], there[:, None])
            rows.append(last)
        counted = torch.stack(rows, 2) if rows else last[:, :, None][:, :, :0]
        at = (mask.cumsum(1) - 1).clamp(min=0)[:, None, None].expand(n, self.heads, len(rows), frames)
        weights = counted.gather(-1, at).masked_fill(~mask[:, None, None], 0.0)
        return self.seen(weights, read, heads), Alignment(last)

    def moved(self, last: Tensor, dynamic: Tensor, there: Tensor) -> Tensor:
        """The alignment behind that of the last token [B, H, T], over the frames that are `there` [B, 1, T].

        Where none is, it stays.
        """
        windows = F.pad(last, [self.reach, self.reach]).unfold(-1, 2 * self.reach + 1, 1)
        features = torch.cat([windows @ self.static, windows @ dynamic], -1)
        scores = ((features @ self.mixed + self.shift).tanh() @ self.score)[..., 0]
        scores = scores + (windows @ self.prior)[..., 0].clamp(min=1e-6).log()
        moved = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~there, 0.0)
        return torch.where(there.any(-1, keepdim=True), moved, last)
