"""LocalAgreement-n (Liu et al., Interspeech 2020; Polak et al., arXiv 2204.06028)."""

from __future__ import annotations

from dataclasses import dataclass

from speechattn.decoder.attention import Head
from speechattn.policy import Source
from speechattn.search import Draft

__all__ = ["Drafts", "LocalAgreement"]

Drafts = tuple[tuple[int, tuple[int, ...]], ...]  # the last drafts: tokens committed before each, and its tokens


@dataclass(frozen=True)
class LocalAgreement:
    """Commit the longest prefix on which the last `n` drafts agree; nothing before there are so many."""

    n: int = 2
    heads: tuple[Head, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"LocalAgreement needs at least 1 draft to agree, not {self.n}")

    def initial(self) -> Drafts:
        """No drafts yet."""
        return ()

    def accept(self, draft: Draft, source: Source, state: Drafts) -> tuple[int, Drafts]:
        """The common prefix, counted from the committed text on."""
        said = tuple(draft.tokens.tolist())
        state = (*state, (draft.first, said))[-self.n :]
        if source.finished:
            return len(said), ()
        if len(state) < self.n:
            return 0, state
        futures = [tokens[draft.first - first :] for first, tokens in state]
        shortest = min(map(len, futures))
        agreed = next((i for i in range(shortest) if len({tokens[i] for tokens in futures}) > 1), shortest)
        return agreed, state

    def why(self, draft: Draft, source: Source, state: Drafts, n: int) -> str:
        """Who disagrees."""
        drafts = [*state, (draft.first, tuple(draft.tokens.tolist()))][-self.n :]
        if len(drafts) < self.n:
            return f"draft {len(drafts)} of the {self.n} that must agree"
        futures = [tokens[draft.first - first :] for first, tokens in drafts]
        if any(len(tokens) <= n for tokens in futures):
            return f"not all of the last {self.n} drafts are so long"
        return f"the last {self.n} drafts disagree" if len({tokens[n] for tokens in futures}) > 1 else ""
