"""Terms in a stream: presence chunk by chunk, on the frames so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speechattn import tree
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.stream.contract import flush
from speechattn.terms.bank import Bank, Found
from speechattn.terms.retriever import Retriever, Running
from speechattn.terms.text import Term

__all__ = ["Spotter"]


class Spotter:
    """Listens to one utterance after the other, each with the terms of `bank`, which is a session's own.

    Law: after any frames `odds` are those of the retriever for all frames since the utterance began, however these were
    cut, and whenever terms were added or removed. What is kept is bounded: running sums for each token, and the last
    `most_frames` of the retriever's own frames, by which terms that come later are judged: of what was said before
    these they know nothing.
    """

    def __init__(self, bank: Bank, *, most_frames: int = 375) -> None:
        if not isinstance(bank.matcher, Retriever):
            raise InputError(f"{type(bank.matcher).__name__} reads whole utterances: a stream needs a Retriever")
        self.bank, self.retriever, self.most_frames = bank, bank.matcher, most_frames
        self.forget()

    def forget(self) -> None:
        """The next frame begins an utterance."""
        self.waiting: Frames | None = None  # fewer frames than the retriever reads at once
        self.stream: Any = None
        self.kept: Frames | None = None
        self.state: Running = self.retriever.start(1, self.bank.embedding)

    @torch.no_grad()
    def hear(self, x: Frames) -> None:
        """More frames of the encoder [1, T, F], all of them valid."""
        if not bool(x.mask.all()):
            raise ValueError("a spotter hears valid frames")
        like = self.retriever.out.weight  # a model may compute elsewhere, or otherwise
        x = Frames(x.values.to(like), x.mask.to(like.device))
        x = x if self.waiting is None else Frames.cat([self.waiting, x])
        block = self.retriever.frames.plan().block or 1
        whole = x.mask.shape[1] // block * block
        self.waiting = x[whole:]
        if self.stream is None:
            self.stream = self.retriever.frames.init_state(x)
        if not whole:
            return
        y, self.stream = self.retriever.frames.step(x[:whole], self.stream)
        self.state = self.retriever.step(y, self.state, self.bank.embedding)
        self.kept = (y if self.kept is None else Frames.cat([self.kept, y]))[-self.most_frames :]

    @torch.no_grad()
    def odds(self) -> Tensor:
        """Log-odds of each term [N] on the frames so far."""
        state = self.state
        if self.waiting is not None:
            rest = flush(self.waiting, self.retriever.frames)
            y, _ = self.retriever.frames.step(rest, tree.clone(self.stream))
            state = self.retriever.step(y, state, self.bank.embedding)
        return self.retriever.judged(state, self.bank.embedding)[0]

    def found(self, *, top_k: int = 10, threshold: float = 0.0) -> list[Found]:
        """The terms that were probably said so far."""
        return self.bank.found(self.odds(), top_k=top_k, threshold=threshold)

    @torch.no_grad()
    def add(self, terms: Sequence[Term]) -> None:
        """From now on these terms, too, also for what was heard of this utterance."""
        self.bank.add(terms)
        late = self.bank.embedding.select(range(len(self.bank) - len(terms), len(self.bank)))
        state = self.retriever.start(1, late)
        if self.kept is not None:
            state = self.retriever.step(self.kept, state, late)
        self.state = joined(self.state, state)

    def remove(self, sources: Sequence[str]) -> None:
        """From now on without these terms."""
        old, terms = self.bank.embedding, self.bank.terms
        self.bank.remove(sources)
        kept = [i for i, term in enumerate(terms) if term in self.bank.terms]
        at = old.tokens(torch.tensor(kept, dtype=torch.long))
        self.state = Running(*(x[..., at] for x in (self.state.most, self.state.total, self.state.value)))


def joined(a: Running, b: Running) -> Running:
    """The tokens of both."""
    return Running(*(torch.cat([getattr(a, k), getattr(b, k)], -1) for k in ("most", "total", "value")))
