"""A Transformer language model, and what it says of the next token of each hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn import tree
from speechattn.attention.position import Relative
from speechattn.encoder.base import PositionMaker
from speechattn.encoder.transformer import LabelEncoder
from speechattn.frames import Frames

__all__ = ["LanguageModel", "LanguageModelScorer", "LanguageState"]


class LanguageModel(nn.Module):
    """Tokens [B, U] -> log-probabilities of each next one [B, U + 1, V], behind the token `end` that begins a text.

    The same token ends it. `left` tokens before it are seen by each layer; None: all. `tied`: the output has the
    weights of the embedding (arXiv 1608.05859), by the root of `dim` smaller.
    Law: `step` token by token gives what the whole text gives.
    """

    def __init__(
        self, vocab: int, dim: int = 512, depth: int = 6, heads: int = 8, inner: int = 2048, *, end: int,
        left: int | None = None, position: PositionMaker | None = Relative, tied: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= end < vocab:
            raise ValueError(f"end {end}: tokens are 0 to {vocab - 1}")
        self.vocab, self.end = vocab, end
        self.encoder = LabelEncoder(vocab, dim, depth, heads, inner, left=left, position=position, dropout=dropout)
        self.output = nn.Linear(dim, vocab)
        self.scale = 1.0
        if tied:
            embedding: nn.Embedding = self.encoder.subsample.f  # type: ignore[assignment]
            self.output.weight = embedding.weight
            self.scale = dim**-0.5

    def init_state(self, rows: int) -> Any:
        """Nothing read, not even the beginning."""
        return self.encoder.init_state(self._tokens(torch.zeros(rows, 0, dtype=torch.long)))

    def step(self, x: Frames, state: Any) -> tuple[Tensor, Any]:
        """Read tokens [B, U] -> log-probabilities of what follows each of them [B, U, V], the next state."""
        hidden, state = self.encoder.step(x, state)
        return self._scores(hidden.values), state

    def log_probs(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Entry u of [B, U + 1, V]: what follows the first u of the `tokens` [B, U]; zero behind the `lengths`."""
        if lengths is None:
            lengths = tokens.new_full((len(tokens),), tokens.shape[1])
        x = Frames.from_lengths(F.pad(tokens, [1, 0], value=self.end), lengths + 1)
        hidden: Frames = self.encoder(x)
        return Frames.of(self._scores(hidden.values), x.mask).values

    def surprise(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the log-probability of each row [B], its end included; the number of tokens that are asked for [B]."""
        at = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        known = torch.where(at[:-1] < lengths[:, None], tokens, self.end)
        targets = F.pad(known, [0, 1], value=self.end)
        chosen = self.log_probs(known, lengths).gather(2, targets[..., None])[..., 0]
        return -(chosen * (at <= lengths[:, None])).sum(1), lengths + 1

    def loss(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Mean over all tokens of [B, U], ends included, of minus their log-probability."""
        cost, count = self.surprise(tokens, lengths)
        return cost.sum() / count.sum()

    @torch.inference_mode()
    def perplexity(self, tokens: Tensor, lengths: Tensor) -> float:
        """Among so many equally likely tokens the model hesitates, ends included."""
        return float(self.loss(tokens, lengths).exp())

    def _tokens(self, tokens: Tensor) -> Frames:
        """All there."""
        tokens = tokens.to(self.output.weight.device)
        return Frames(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def _scores(self, hidden: Tensor) -> Tensor:
        scores: Tensor = self.output(hidden * self.scale)
        return scores.log_softmax(-1, torch.promote_types(scores.dtype, torch.float32))


@tree.node
class LanguageState:
    """`read` is what the model made of the tokens before the `last` [B, K], which is still to be read.

    Leaves of `read` are [B, N, K, ...], masks [B, N]: the hypotheses of a row have said equally many tokens.
    """

    read: Any
    last: Tensor


class LanguageModelScorer:
    """A `LanguageModel` as a `Scorer`; its token `end` ends a hypothesis.

    `context` is text that was said before: every hypothesis goes on behind it. Law: the scores behind a context are
    those of the whole text.
    """

    partial = False

    def __init__(self, model: LanguageModel, *, context: Sequence[int] = ()) -> None:
        self.model = model
        self.context = tuple(context)

    def start(self, x: Frames) -> LanguageState:
        """One hypothesis for each row of `x` [B, T, D], behind the `context`."""
        rows = len(x.mask)
        tokens = torch.tensor([self.context], dtype=torch.long, device=x.mask.device).expand(rows, -1)
        return self.behind(tokens, torch.full((rows,), len(self.context), device=x.mask.device))

    def behind(self, tokens: Tensor, lengths: Tensor) -> LanguageState:
        """One hypothesis a row, where the first `lengths` [B] of `tokens` [B, U] were said before: a session's own."""
        rows, most = tokens.shape
        text = F.pad(tokens, [1, 0], value=self.model.end)
        last = text.gather(1, lengths[:, None])
        at = torch.arange(most, device=tokens.device) - (most - lengths)[:, None]  # the newest at the end
        past = Frames.of(text.gather(1, at.clamp(min=0)), at >= 0)
        state = self.model.init_state(rows)
        if most:
            _, state = self.model.step(past, state)
        return LanguageState(folded(state, 1), last)

    def read(self, x: Frames, state: LanguageState) -> LanguageState:
        """Sound says nothing here."""
        return state

    def score(self, state: LanguageState, candidates: Tensor | None = None) -> tuple[Tensor, LanguageState]:
        """Log-probabilities of every token [B, K, V], and the state that has read the last one."""
        rows, beam = state.last.shape
        scores, read = self.model.step(self.model._tokens(state.last.reshape(-1, 1)), unfolded(state.read, beam))
        return scores.view(rows, beam, self.model.vocab), LanguageState(folded(read, beam), state.last)

    def extend(self, state: LanguageState, parents: Tensor, tokens: Tensor) -> LanguageState:
        """Hypothesis j of a row was that of `parents` [B, K'] and says `tokens` [B, K']."""
        return LanguageState(self.select(state, parents).read, tokens)

    def select(self, state: LanguageState, parents: Tensor) -> LanguageState:
        """Hypotheses in another order [B, K']."""
        read = picked(state.read, parents, state.last.shape[1])
        return LanguageState(read, state.last.gather(1, parents))


def picked(state: Any, parents: Tensor, beam: int) -> Any:
    """Of leaves [B, N, K, ...] with K = `beam` the hypotheses `parents` [B, K']; masks [B, N] are those of all."""
    which = (parents + beam * torch.arange(len(parents), device=parents.device)[:, None]).view(-1)

    def pick(leaf: Tensor) -> Tensor:
        if leaf.dtype == torch.bool:
            return leaf
        if not leaf.shape[1]:  # most leaves: nothing waits
            return leaf.new_empty(len(parents), 0, parents.shape[1], *leaf.shape[3:])
        chosen = leaf.transpose(1, 2).flatten(0, 1).index_select(0, which)
        return chosen.view(*parents.shape, *chosen.shape[1:]).transpose(1, 2)

    return tree.map(pick, state)


def folded(state: Any, beam: int) -> Any:
    """Leaves [B * K, N, ...] -> [B, N, K, ...], masks [B * K, N] -> [B, N], which is that of each hypothesis."""

    def fold(leaf: Tensor) -> Tensor:
        leaf = leaf.view(len(leaf) // beam, beam, *leaf.shape[1:])
        return leaf[:, 0] if leaf.dtype == torch.bool else leaf.transpose(1, 2)

    return tree.map(fold, state)


def unfolded(state: Any, beam: int) -> Any:
    """What `folded` undoes."""

    def unfold(leaf: Tensor) -> Tensor:
        whole = leaf[:, None].expand(-1, beam, -1) if leaf.dtype == torch.bool else leaf.transpose(1, 2)
        return whole.flatten(0, 1)

    return tree.map(unfold, state)
