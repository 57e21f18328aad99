"""Terms -> tokens, and a vector for each token.

N terms, U letters of a term, L tokens of a term, E features of a token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.decoder.letters import ALPHABET
from speechattn.errors import InputError
from speechattn.text.pieces import Encodes

__all__ = ["Spelling", "Subwords", "padded"]


class Spelling(nn.Module):
    """From letters: each token stands for `stride` of them, and knows its neighbours.

    Residual convolutions over the letters (a space at both ends), then the mean of `stride` letters. Sub-words of a
    text model know little of how a rare word sounds; letters do, and their number is small enough to be learnt from
    hours of speech. What is not in the `alphabet` is a space, but for accents, which go.
    """

    def __init__(
        self, dim: int, *, alphabet: str = ALPHABET, layers: int = 3, kernel: int = 5, stride: int = 3,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if " " not in alphabet or len({*alphabet}) < len(alphabet):
            raise ValueError(f"alphabet {alphabet!r}: wanted a space and letters, each once")
        if min(layers, stride) < 1 or kernel % 2 == 0:
            raise ValueError(f"layers {layers}, stride {stride}, kernel {kernel}: wanted 1 or more, and an odd kernel")
        self.alphabet, self.stride, self.features, self.rate = alphabet, stride, dim, dropout
        self.embed = nn.Embedding(1 + len(alphabet), dim, padding_idx=0)
        self.layers = nn.ModuleList(nn.Conv1d(dim, dim, kernel, padding=kernel // 2) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers + 1))

    def tokens(self, text: str) -> list[int]:
        """Ids of the letters, 1 and more; InputError where there is none."""
        bare = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
        words = "".join(c if c in self.alphabet else " " for c in bare).split()
        if not words:
            raise InputError(f"the term {text!r} has no letter of {self.alphabet.strip()!r}: spell it as it is said")
        return [1 + self.alphabet.index(letter) for letter in f" {' '.join(words)} "]

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [N, U] and which are there -> [N, L, E] and which are there [N, L]."""
        wide = mask[..., None]
        x = self.embed(ids.masked_fill(~mask, 0))
        for conv, norm in zip(self.layers, self.norms, strict=False):
            y = conv(norm(x).masked_fill(~wide, 0.0).mT).mT
            x = (x + F.dropout(F.gelu(y), self.rate, self.training)).masked_fill(~wide, 0.0)
        room = -ids.shape[1] % self.stride
        x, there = F.pad(x, [0, 0, 0, room]), F.pad(mask, [0, room])
        shape = len(x), x.shape[1] // self.stride, self.stride
        parts, counts = x.reshape(*shape, x.shape[2]), there.reshape(shape).sum(2)
        return self.norms[-1](parts.sum(2) / counts.clamp(min=1)[..., None]), counts > 0


class Subwords(nn.Module):
    """Rows of a model's own table of sub-words [V, E], which is not trained (arXiv 2508.18701: the LLM's input table).

    The table is no part of the weights: it belongs to the model.
    """

    def __init__(self, table: Tensor, tokenizer: Encodes) -> None:
        super().__init__()
        self.features, self.tokenizer = table.shape[1], tokenizer
        self.register_buffer("table", table.detach().float(), persistent=False)

    def tokens(self, text: str) -> list[int]:
        """As in the middle of a text; InputError where there is none."""
        found = self.tokenizer.encode(f" {text}")
        if not found or getattr(self.tokenizer, "unknown", None) in found:
            raise InputError(f"the model's vocabulary cannot spell the term {text!r}")
        return found

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [N, L] and which are there -> [N, L, E] and the same mask."""
        table: Tensor = self.table  # type: ignore[assignment]
        return F.embedding(ids.masked_fill(~mask, 0), table).masked_fill(~mask[..., None], 0.0), mask


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids of each term -> [N, U], and which are there."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    if not rows:
        return torch.zeros(0, 1, dtype=torch.long, device=device), torch.zeros(0, 1, dtype=torch.bool, device=device)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True).to(device)
    return ids, torch.arange(ids.shape[1], device=device) < lengths[:, None]
