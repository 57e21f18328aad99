"""Label encoders of a transducer: what was said so far -> what it means for the next label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.position import Relative
from speechattn.encoder.base import PositionMaker
from speechattn.encoder.transformer import LabelEncoder
from speechattn.frames import Frames

__all__ = ["LSTMPredictor", "Predictor", "StatelessPredictor", "TransformerPredictor"]


class Predictor(nn.Module):
    """Labels [B, U] -> [B, U + 1, D]: entry u has read the start symbol (`blank`) and the first u labels.

    Law: `step` from `init_state` over the start symbol and then each label gives the same entries one by one.
    The last `context` symbols alone, start symbols included, decide about an entry and the state behind it; None: all.
    """

    dim: int
    blank: int
    context: int | None = None

    def init_state(self, rows: int) -> Any:
        """Nothing read, not even the start symbol: a tree, rows first in every leaf."""
        raise NotImplementedError

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one symbol [N] in each row -> entries [N, D], the next state."""
        raise NotImplementedError

    def forward(self, labels: Tensor) -> Tensor:
        """Labels [B, U] -> [B, U + 1, D]; what stands behind the labels of a row must be ids, and changes nothing."""
        raise NotImplementedError


class LSTMPredictor(Predictor):
    """Embedding and `depth` LSTM layers (Graves, arXiv 1211.3711); `inner` wide, then projected to `dim`."""

    def __init__(
        self, vocab: int, dim: int, *, inner: int | None = None, depth: int = 1, dropout: float = 0.0, blank: int = 0
    ) -> None:
        super().__init__()
        self.dim, self.blank = dim, blank
        inner = inner or dim
        self.embed = nn.Embedding(vocab, dim)
        self.lstm = nn.LSTM(dim, inner, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)
        self.project = nn.Linear(inner, dim) if inner != dim else nn.Identity()

    def init_state(self, rows: int) -> tuple[Tensor, Tensor]:
        zero = self.embed.weight.new_zeros(rows, self.lstm.num_layers, self.lstm.hidden_size)
        return zero, zero.clone()

    def step(self, tokens: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """By cells: for one symbol they cost a fraction of a call of the sequence kernel."""
        x = self.embed(tokens)
        hidden, cell = [], []
        for layer, (h, c) in enumerate(zip(state[0].unbind(1), state[1].unbind(1), strict=True)):
            x, c = torch.lstm_cell(x, (h, c), *self.lstm.all_weights[layer])
            hidden.append(x)
            cell.append(c)
        return self.project(x), (torch.stack(hidden, 1), torch.stack(cell, 1))

    def forward(self, labels: Tensor) -> Tensor:
        y, _ = self.lstm(self.embed(F.pad(labels, [1, 0], value=self.blank)))
        out: Tensor = self.project(y)
        return out


class TransformerPredictor(Predictor):
    """The label encoder of the Transformer Transducer (arXiv 2002.02562); each layer sees `left` symbols back.

    With `left` it forgets: `depth * left` symbols before the last one decide, so hypotheses that differ only in what
    lies before have one state.
    """

    def __init__(
        self, vocab: int, dim: int = 512, depth: int = 2, heads: int = 8, inner: int = 2048, *, left: int | None = 4,
        position: PositionMaker | None = Relative, dropout: float = 0.0, blank: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.blank = dim, blank
        self.context = None if left is None else depth * left + 1
        self.encoder = LabelEncoder(vocab, dim, depth, heads, inner, left=left, position=position, dropout=dropout)

    def init_state(self, rows: int) -> Any:
        device = next(self.parameters()).device
        return self.encoder.init_state(said(torch.zeros(rows, 0, dtype=torch.long, device=device)))

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.encoder.step(said(tokens[:, None]), state)
        return y.values[:, 0], state

    def forward(self, labels: Tensor) -> Tensor:
        y: Frames = self.encoder(said(F.pad(labels, [1, 0], value=self.blank)))
        return y.values


def said(tokens: Tensor) -> Frames:
    """Tokens [B, U] that are all there."""
    return Frames(tokens, torch.ones_like(tokens, dtype=torch.bool))


class StatelessPredictor(Predictor):
    """Embeddings of the last `context` symbols, filtered feature by feature (Ghodsi et al., ICASSP 2020).

    Before the start symbol there are more start symbols. The state is the symbols themselves.
    """

    context: int

    def __init__(self, vocab: int, dim: int, *, context: int = 2, blank: int = 0) -> None:
        super().__init__()
        if context < 1:
            raise ValueError(f"context {context}: at least the last symbol is needed")
        self.dim, self.blank, self.context = dim, blank, context
        self.embed = nn.Embedding(vocab, dim)
        self.filter = nn.Parameter(torch.randn(context, dim) * context**-0.5)

    def init_state(self, rows: int) -> Tensor:
        return torch.full((rows, self.context - 1), self.blank, device=self.filter.device)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        recent = torch.cat([state, tokens[:, None]], 1)
        return self._filtered(recent[:, None])[:, 0], recent[:, 1:]

    def forward(self, labels: Tensor) -> Tensor:
        return self._filtered(F.pad(labels, [self.context, 0], value=self.blank).unfold(1, self.context, 1))

    def _filtered(self, recent: Tensor) -> Tensor:
        """Windows of symbols [B, U, context] -> [B, U, D]."""
        y: Tensor = self.embed(recent) * self.filter
        return y.sum(2).relu()
