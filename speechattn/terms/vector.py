"""The baseline: terms and windows of sound as vectors in one space, and the nearest are said.

B utterances, T frames, W windows, N terms, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.frames import Frames
from speechattn.stream import Stream
from speechattn.terms.retriever import mean
from speechattn.terms.spelling import padded

__all__ = ["VectorIndex", "Vectors"]


@dataclass(frozen=True)
class Vectors:
    """Unit vectors of terms [N, D]."""

    vectors: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def select(self, terms: Sequence[int]) -> Vectors:
        """Those terms, in that order."""
        return Vectors(self.vectors[list(terms)])

    def then(self, other: Vectors) -> Vectors:
        """These terms and behind them those of `other`."""
        return Vectors(torch.cat([self.vectors, other.vectors]))


class VectorIndex(nn.Module):
    """Cosine of the mean of a term's tokens and the mean of the frames in a window, the largest over all windows.

    Windows of `window` frames (of `frames`, not of the encoder) begin at every `hop`; an utterance that is shorter is
    one window. It says how alike they are, not whether a term was said.
    """

    def __init__(self, frames: Stream, spelling: nn.Module, dim: int, *, window: int, hop: int = 1) -> None:
        super().__init__()
        if not 1 <= hop <= window:
            raise ValueError(f"window {window}, hop {hop}: wanted 1 <= hop <= window")
        self.frames, self.spelling, self.dim, self.window, self.hop = frames, spelling, dim, window, hop
        self.word = nn.Linear(spelling.features, dim)  # type: ignore[arg-type]
        self.sound = nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.tensor(0.07).log())  # its logarithm

    def embed(self, texts: Sequence[str]) -> Vectors:
        """The vectors of terms. InputError for one that cannot be spelled."""
        return self.queries(*self.ids(texts))

    def ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of terms [N, U] and which are there."""
        return padded([self.spelling.tokens(text) for text in texts], self.temperature.device)  # type: ignore[operator]

    def queries(self, ids: Tensor, mask: Tensor) -> Vectors:
        """Of tokens [N, U]."""
        w, there = self.spelling(ids, mask)
        return Vectors(F.normalize(mean(self.word(w)[None], there)[0], dim=-1))

    def windows(self, x: Frames) -> tuple[Tensor, Tensor]:
        """Frames of the encoder [B, T, F] -> unit vectors [B, W, D] and which windows are there [B, W].

        A window counts when all of its frames are there, or all that the utterance has.
        """
        heard = self.frames(x)
        room = max(0, self.window - heard.mask.shape[1])
        heard = heard.pad(room)
        sums = F.pad(heard.values.cumsum(1), [0, 0, 1, 0])
        counts = F.pad(heard.mask.long().cumsum(1), [1, 0])
        total = (sums[:, self.window :] - sums[:, : -self.window])[:, :: self.hop]
        count = (counts[:, self.window :] - counts[:, : -self.window])[:, :: self.hop]
        there = count == heard.mask.sum(1, keepdim=True).clamp(max=self.window)
        return F.normalize(self.sound(total / count.clamp(min=1)[..., None]), dim=-1), there & (count > 0)

    def nearest(self, x: Frames, bank: Vectors, k: int) -> tuple[Tensor, Tensor]:
        """The k largest `odds` of each row [B, k], and of which terms they are; exact, by FAISS where it is installed.

        Each window asks for its own k nearest terms: the k of all windows are among them.
        """
        k, search = min(k, len(bank)), flat(bank.vectors)
        if search is None or not k:
            return tuple(self.odds(x, bank).topk(k, dim=1))  # type: ignore[return-value]
        vectors, there = self.windows(x)
        cosine, term = search(vectors.flatten(0, 1), k)
        cosine, term = (part.view(len(vectors), -1, k) for part in (cosine, term))
        best = cosine.new_full((len(vectors), len(bank)), -1.0)
        best.scatter_reduce_(1, term.flatten(1), cosine.masked_fill(~there[..., None], -1.0).flatten(1), "amax")
        return tuple((best / self.temperature.exp()).topk(k, dim=1))  # type: ignore[return-value]

    def odds(self, x: Frames, bank: Vectors) -> Tensor:
        """The largest cosine of each term [B, N], divided by the temperature: a score, no odds of anything."""
        vectors, there = self.windows(x)
        found = (vectors @ bank.vectors.T).masked_fill(~there[..., None], -1.0).amax(1)
        return found / self.temperature.exp()


def flat(vectors: Tensor) -> Callable[[Tensor, int], tuple[Tensor, Tensor]] | None:
    """A search for the k largest products of queries [Q, D] with `vectors` [N, D]: values and places [Q, k].

    None where FAISS is not installed.
    """
    try:
        import faiss
    except ImportError:
        return None
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.detach().float().cpu().numpy())

    def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, places = index.search(queries.detach().float().cpu().numpy(), k)
        return torch.from_numpy(values).to(queries), torch.from_numpy(places).to(queries.device)

    return search
