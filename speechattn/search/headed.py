"""A search that reads what a head says."""

from __future__ import annotations

from torch import Tensor, nn

from speechattn.frames import Frames
from speechattn.search.beam import Beam, Hypothesis, Search

__all__ = ["Headed"]


class Headed(Search):
    """`search` over `head(x)` in place of x: of CTC's log-probabilities, say."""

    def __init__(self, head: nn.Module, search: Search) -> None:
        self.head, self.inner, self.size = head, search, search.size
        self.phrases, self.prompt = search.phrases, search.prompt

    def start(self, x: Frames) -> Beam:
        return self.inner.start(self.head(x[:0]))

    def start_at(self, x: Frames, heard: Tensor) -> Beam:
        return self.inner.start_at(self.head(x[:0]), heard)

    def bias(self, beam: Beam, root: int | Tensor) -> Beam:
        return self.inner.bias(beam, root)

    def step(self, x: Frames, beam: Beam) -> Beam:
        return self.inner.step(self.head(x), beam)

    def finish(self, beam: Beam) -> Beam:
        return self.inner.finish(beam)

    def room(self, beam: Beam) -> Tensor:
        return self.inner.room(beam)

    def commit(self, beam: Beam, n: Tensor) -> Beam:
        return self.inner.commit(beam, n)

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        return self.inner.select(beam, parents)

    def hypotheses(self, beam: Beam) -> list[list[Hypothesis]]:
        return self.inner.hypotheses(beam)
