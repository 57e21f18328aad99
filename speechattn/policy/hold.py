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

    def why(self, draft: Draft, source: Source, state: None, n: int) -> str:
        """It is one of the last."""
        return "" if n < len(draft.tokens) - self.n else f"one of the last {self.n} tokens (hold-n)"


@dataclass(frozen=True)
class Told:
    """The tokens that were committed so far, and the draft behind the first `first` of them since the session began."""

    committed: tuple[int, ...] = ()
    first: int = 0
    draft: tuple[int, ...] = ()


@dataclass(frozen=True)
class WaitK:
    """wait-k (arXiv 1810.08398) over an offline model: of n words that were heard n - `k` may be said.

    A word is heard in every `frames_of_a_word` frames of the utterance. `words` gives the number of tokens of each
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
        ends = sum(self.words([*committed, *said])[: max(0, self._heard(draft, source) - self.k)])
        return min(len(said), max(0, ends - len(committed))), after

    def why(self, draft: Draft, source: Source, state: Told, n: int) -> str:
        """How many words were heard."""
        if n < self.accept(draft, source, state)[0]:
            return ""
        heard = self._heard(draft, source)
        return f"{heard} words were heard: {max(0, heard - self.k)} may be said (wait-{self.k})"

    def _heard(self, draft: Draft, source: Source) -> int:
        """Words in the sound, by its length."""
        return source.frames // self.frames_of_a_word
