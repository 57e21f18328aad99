"""N-gram language models of the `kenlm` package (an optional extra), over words or over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from math import log
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from speechattn import tree
from speechattn.errors import ModelError
from speechattn.frames import Frames

__all__ = ["NGrams", "Said", "Spelt", "TokenNGramScorer", "WordNGramScorer"]

BEGIN, END = "<s>", "</s>"
ROOM = 32  # tokens of a word


class Spelt(Protocol):
    """A vocabulary whose tokens make words, such as `text.Pieces`."""

    @property
    def size(self) -> int: ...

    @property
    def begins(self) -> Sequence[bool]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class NGrams:
    """p(word | the words before), natural logarithms, of an ARPA file or a binary one of kenlm.

    kenlm's own state is not a tensor, but it follows from the last `order - 1` words: so these are the state, and
    what was asked for lately is remembered. ModelError when the package is missing or the file cannot be read.
    """

    def __init__(self, path: str | Path, *, memory: int = 1 << 16) -> None:
        try:
            kenlm: Any = import_module("kenlm")
        except ImportError as error:
            raise ModelError(f"{path} needs kenlm: pip install kenlm") from error
        try:
            self.model: Any = kenlm.Model(str(path))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{path}: cannot be read as an n-gram model ({str(error)[:200]})") from error
        self.context = int(self.model.order) - 1
        self._new: Any = kenlm.State
        self._state = lru_cache(memory)(self._found)
        self.chance = lru_cache(memory)(self._chance)

    def __contains__(self, word: str) -> bool:
        return word in self.model

    def _found(self, context: tuple[str, ...]) -> Any:
        """kenlm's state behind some words."""
        state = self._new()
        if not context:
            self.model.NullContextWrite(state)
        else:
            self.model.BaseScore(self._state(context[:-1]), context[-1], state)
        return state

    def _chance(self, context: tuple[str, ...], word: str) -> float:
        """Of `word` behind the last words `context`."""
        return float(self.model.BaseScore(self._state(context), word, self._new())) * log(10)


@tree.node
class Said:
    """The last words of each hypothesis as ids `context` [B, K, order - 1], -1 where there is none; and what its
    unfinished word is made of: `tokens` [B, K, 32], the first `length` [B, K] of them."""

    context: Tensor
    tokens: Tensor
    length: Tensor

    def picked(self, parents: Tensor) -> Said:
        """Hypotheses in another order [B, K']."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        return Said(self.context[rows, parents], self.tokens[rows, parents], self.length[rows, parents])


class TokenNGramScorer:
    """An n-gram model whose words are tokens, called `names`; token `end` is its end of a sentence.

    Law: the scores of a whole text and its end are those that kenlm gives to the sentence.
    """

    partial = True

    def __init__(self, model: NGrams, names: Sequence[str], *, end: int) -> None:
        self.model, self.end = model, end
        self.names = [END if i == end else name for i, name in enumerate(names)]

    def start(self, x: Frames) -> Said:
        """Nothing said, for each row of `x` [B, T, D]; the id of the beginning is behind all tokens."""
        return begun(x, self.model.context, len(self.names))

    def read(self, x: Frames, state: Said) -> Said:
        """Sound says nothing here."""
        return state

    def score(self, state: Said, candidates: Tensor | None) -> tuple[Tensor, Said]:
        """Log-probabilities of the `candidates` [B, K, C], or of every token [B, K, V]; and the same state."""
        if candidates is None:
            every = torch.arange(len(self.names), device=state.length.device)
            candidates = every.expand(*state.length.shape, -1)
        names = [*self.names, BEGIN]
        scores = [
            [
                [self.model.chance(context, self.names[token]) for token in some]
                for words, some in zip(row, each, strict=True)
                for context in [tuple(names[word] for word in words if word >= 0)]
            ]
            for row, each in zip(state.context.tolist(), candidates.tolist(), strict=True)
        ]
        return torch.tensor(scores, device=candidates.device).view(candidates.shape), state

    def extend(self, state: Said, parents: Tensor, tokens: Tensor) -> Said:
        """Hypothesis j of a row was that of `parents` [B, K'] and says `tokens` [B, K']."""
        said = state.picked(parents)
        return Said(torch.cat([said.context[..., 1:], tokens[..., None]], -1), said.tokens, said.length)

    def select(self, state: Said, parents: Tensor) -> Said:
        """Hypotheses in another order [B, K']."""
        return state.picked(parents)


class WordNGramScorer:
    """An n-gram model over words: a word counts when the next one begins, or with the token `end` of the hypothesis.

    Law: the scores of a whole text and its end are those that kenlm gives to the sentence. Until its word is complete
    a token costs nothing. A word of more than 32 tokens is an unknown one.
    """

    partial = True

    def __init__(self, model: NGrams, pieces: Spelt, *, end: int) -> None:
        self.model, self.pieces, self.end = model, pieces, end
        self.begins = torch.tensor(pieces.begins)
        self._words = ["<unk>", BEGIN]  # those of the model that were said: what an id in a state stands for
        self._ids = {BEGIN: 1}

    def start(self, x: Frames) -> Said:
        """Nothing said, for each row of `x` [B, T, D]."""
        return begun(x, self.model.context, 1)

    def read(self, x: Frames, state: Said) -> Said:
        """Sound says nothing here."""
        return state

    def score(self, state: Said, candidates: Tensor | None) -> tuple[Tensor, Said]:
        """Of the `candidates` [B, K, C], or of every token [B, K, V], what they complete; and the same state."""
        device = state.length.device
        begins = self.begins.to(device)
        if candidates is None:
            candidates = torch.arange(self.pieces.size, device=device).expand(*state.length.shape, -1)
        completed, ended = [], []
        for context, words in zip(self._contexts(state), self._pending(state), strict=True):
            total = 0.0
            for word in words:
                total += self.model.chance(context, word)
                context = self._next(context, word)
            completed.append(total)
            ended.append(total + self.model.chance(context, END))
        whole = torch.tensor(completed, device=device).view(*state.length.shape, 1)
        closed = torch.tensor(ended, device=device).view(*state.length.shape, 1)
        return torch.where(candidates == self.end, closed, whole * begins[candidates]), state

    def extend(self, state: Said, parents: Tensor, tokens: Tensor) -> Said:
        """Hypothesis j of a row was that of `parents` [B, K'] and says `tokens` [B, K']."""
        said = state.picked(parents)
        new = self.begins.to(tokens.device)[tokens] | (tokens == self.end)
        contexts = said.context
        if bool(new.any()):
            moved = []
            for ids, words in zip(said.context.flatten(0, 1).tolist(), self._pending(said), strict=True):
                moved.append([*ids, *map(self._id, words)][-self.model.context :])
            contexts = torch.where(new[..., None], torch.tensor(moved, device=new.device).view_as(contexts), contexts)
        length = torch.where(new, 0, said.length)
        at = torch.arange(ROOM, device=new.device) == length[..., None]
        return Said(contexts, torch.where(at, tokens[..., None], said.tokens), length + 1)

    def select(self, state: Said, parents: Tensor) -> Said:
        """Hypotheses in another order [B, K']."""
        return state.picked(parents)

    def _contexts(self, state: Said) -> list[tuple[str, ...]]:
        """The last words of each hypothesis, row by row."""
        return [tuple(self._words[i] for i in ids if i >= 0) for ids in state.context.flatten(0, 1).tolist()]

    def _pending(self, state: Said) -> list[list[str]]:
        """What each hypothesis would have said if its word ended here: one word, or none."""
        tokens, lengths = state.tokens.flatten(0, 1).tolist(), state.length.flatten().tolist()
        return [
            self.pieces.decode(some[:n]).split() if n <= ROOM else ["<unk>"]
            for some, n in zip(tokens, lengths, strict=True)
        ]

    def _next(self, context: tuple[str, ...], word: str) -> tuple[str, ...]:
        """The last words, when one more was said."""
        said = (*context, self._words[self._id(word)])
        return said[max(len(said) - self.model.context, 0) :]

    def _id(self, word: str) -> int:
        """0 for a word that the model does not know."""
        if word not in self._ids:
            if word not in self.model:
                return 0
            self._ids[word] = len(self._words)
            self._words.append(word)
        return self._ids[word]


def begun(x: Frames, context: int, begin: int) -> Said:
    """One hypothesis for each row of `x`, which has said nothing but the beginning."""
    rows, device = len(x.mask), x.mask.device
    words = torch.full((rows, 1, context), -1, device=device)
    words[..., context - 1 :] = begin
    tokens = torch.zeros(rows, 1, ROOM, dtype=torch.long, device=device)
    return Said(words, tokens, tokens[..., 0].clone())
