"""A bank of terms: what may be said, and the embedding of it, made once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.terms.text import Term, known, read_terms, written

__all__ = ["Bank", "Found", "Matcher", "best"]

TEXT, EMBEDDING = "terms.txt", "bank.safetensors"
PIECE = 512  # terms that are embedded at once


class Matcher(Protocol):
    """A `Retriever` or a `VectorIndex`: embeds terms, and says of sound how likely each was said."""

    def embed(self, texts: Sequence[str]) -> Any: ...

    def odds(self, x: Frames, bank: Any) -> Tensor: ...


class Bank:
    """Terms in the order in which they were added, for one matcher in `eval()`.

    Law: however it was added to, removed from, saved and loaded, it says what a bank of the same terms says that was
    made at once. The matcher is not to be trained while the bank is used.
    """

    def __init__(self, matcher: Matcher, terms: Sequence[Term] = ()) -> None:
        self.matcher, self.terms, self.embedding = matcher, tuple[Term, ...](), embedded(matcher, ())
        self.add(terms)

    @classmethod
    def read(cls, matcher: Matcher, path: str | Path) -> Bank:
        """Of a text file (`parse_terms`)."""
        return cls(matcher, read_terms(path))

    def copy(self) -> Bank:
        """The same terms, which may be changed without changing these."""
        made = Bank(self.matcher)
        made.terms, made.embedding = self.terms, self.embedding
        return made

    def __len__(self) -> int:
        return len(self.terms)

    def add(self, terms: Sequence[Term]) -> None:
        """More terms. InputError, and nothing is changed, for one that is there or that cannot be spelled."""
        there = {known(term) for term in self.terms}
        for term in terms:
            if known(term) in there:
                raise InputError(f"the term {term.source!r} is in the bank already")
            there.add(known(term))
        new = embedded(self.matcher, terms)
        self.embedding = self.embedding.then(new)
        self.terms += tuple(terms)

    def remove(self, sources: Sequence[str]) -> None:
        """Fewer terms. InputError, and nothing is changed, for one that is not there."""
        places = {known(term): i for i, term in enumerate(self.terms)}
        if missing := [source for source in sources if source.casefold() not in places]:
            raise InputError(f"not in the bank: {', '.join(map(repr, missing))}")
        gone = {places[source.casefold()] for source in sources}
        kept = [i for i in range(len(self)) if i not in gone]
        self.embedding = self.embedding.select(kept)
        self.terms = tuple(self.terms[i] for i in kept)

    @torch.no_grad()
    def odds(self, x: Frames) -> Tensor:
        """Frames of the encoder [B, T, F] -> the matcher's score of each term [B, N]."""
        return self.matcher.odds(x, self.embedding)

    def found(self, odds: Tensor, *, top_k: int, threshold: float = 0.0) -> list[Found]:
        """The `best` of one row of `odds` [N]."""
        return [Found(self.terms[i], p) for i, p in best(odds, top_k, threshold)]

    def save(self, folder: Path) -> None:
        """The terms as text, and their embedding, which says by which weights and of what it was made."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / TEXT).write_text(written(self.terms), encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in vars(self.embedding).items()}
        save_file(tensors, folder / EMBEDDING, {"of": digest(self.matcher, self.terms)})

    @classmethod
    def load(cls, matcher: Matcher, folder: Path) -> Bank:
        """What `save` wrote; an embedding by other weights, or of other terms, is made anew.

        InputError when there are no terms.
        """
        from safetensors import SafetensorError, safe_open

        terms = read_terms(folder / TEXT)
        made = cls(matcher)
        try:
            with safe_open(folder / EMBEDDING, "pt") as file:
                fits = (file.metadata() or {}).get("of") == digest(matcher, terms)
                names = file.keys()
                stored = type(made.embedding)(**{name: file.get_tensor(name) for name in names}) if fits else None
        except (OSError, SafetensorError, TypeError):
            stored = None
        if stored is None:
            return cls(matcher, terms)
        made.terms, made.embedding = tuple(terms), stored
        return made


@dataclass(frozen=True)
class Found:
    """A term that was retrieved, and its probability."""

    term: Term
    probability: float


def best(odds: Tensor, top_k: int, threshold: float = 0.0) -> list[tuple[int, float]]:
    """Places of up to `top_k` terms of `odds` [N] with their probabilities, the likeliest first, the earlier first
    where two are alike; those below `threshold` are left out. InputError for numbers that mean nothing.
    """
    if top_k < 1 or not 0 <= threshold <= 1:
        raise InputError(f"top k {top_k}, threshold {threshold:g}: wanted 1 or more, and 0 to 1")
    order = odds.argsort(descending=True, stable=True)[:top_k].tolist()
    p = odds.sigmoid()
    return [(i, float(p[i])) for i in order if p[i] >= threshold]


@torch.no_grad()
def embedded(matcher: Matcher, terms: Sequence[Term]) -> Any:
    """The embedding of terms, some at a time."""
    texts = [term.source for term in terms]
    made = matcher.embed(texts[:PIECE])
    for at in range(PIECE, len(texts), PIECE):
        made = made.then(matcher.embed(texts[at : at + PIECE]))
    return made


def digest(matcher: Matcher, terms: Sequence[Term]) -> str:
    """Of its weights and the terms."""
    found = hashlib.sha256(type(matcher).__name__.encode() + b"\0" + written(terms).encode())
    state = matcher.state_dict() if isinstance(matcher, nn.Module) else {}
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
