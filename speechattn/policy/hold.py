"""Policies that count: hold-n and wait-k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from speechattn.decoder.attention import Head
from speechattn.policy import Source
from speechattn.search import Draft

__all__ = ["Hold", "Told", "WaitK"]

FRAMES_OF_A_WORD = 14  # of 20 ms: 280 ms, the fixed pre-decision of arXiv 2011.02048


@dataclass(frozen=True)
class Hold:
    """hold-n (Liu et al., Interspeech 2020): commit all but the last `n` tokens of each draft."""

    n: int = 6
    heads: tuple[Head, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"hold-n holds back 0 or more tokens, not {self.n}")

    def initial(self) -> None:
        """Nothing to remember."""

    def accept(self, draft: Draft, source: Source, state: None) -> tuple[int, None]:
        """All but the last."""
        n = len(draft.tokens)
        return n if source.finished else max(0, n - self.n), None


@dataclass(frozen=True)
class Told:
    """The tokens that were committed so far, and the draft behind the first `first` of them since the session began."""

    committed: tuple[int, ...] = ()
    first: int = 0
    draft: tuple[int, ...] = ()


@dataclass(frozen=True)
class WaitK:
    """wait-k (arXiv 1810.08398) over an offline model: of n words that were heard n - `k` may be said.

    A word is heard in every `frames_of_a_word` frames of the draft's memory. `words` gives the number of tokens of each
    word of a text, as tokenizers do.
    """

    k: int
    words: Callable[[Sequence[int]], list[int]]
    frames_of_a_word: int = FRAMES_OF_A_WORD
    heads: tuple[Head, ...] = ()

    def __post_init__(self) -> None:
        if self.k < 0 or self.frames_of_a_word < 1:
            raise ValueError(f"wait-k: k {self.k}, frames of a word {self.frames_of_a_word}: wanted 0, 1 or more")

    def initial(self) -> Told:
        """Nothing said."""
        return Told()

    def accept(self, draft: Draft, source: Source, state: Told) -> tuple[int, Told]:
        """As many tokens as make the words that may be said."""
        said = tuple(draft.tokens.tolist())
        first = draft.first if not state.draft and not state.committed else state.first
        committed = state.committed + state.draft[: draft.first - first]
        if source.finished:
            return len(said), Told()
        after = Told(committed, draft.first, said)
        allowed = draft.weights.shape[-1] // self.frames_of_a_word - self.k
        ends = 0
        for size in self.words([*committed, *said])[: max(0, allowed)]:
            ends += size
        return min(len(said), max(0, ends - len(committed))), after
