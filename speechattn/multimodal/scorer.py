"""A speech language model as a part of a label-synchronous beam."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from speechattn.frames import Frames
from speechattn.multimodal.layout import laid
from speechattn.multimodal.speech_llm import SpeechLLM
from speechattn.search.beam import Beam
from speechattn.search.joint import JointBeam
from speechattn.search.language_model import folded, picked, unfolded
from speechattn.tree import node

__all__ = ["SpeechLLMBeam", "SpeechLLMScorer", "SpeechLLMState"]


@node
class SpeechLLMState:
    """The language model's `cache` of each hypothesis, and the embedding that it reads `next` [B, K, D]."""

    cache: Any
    next: Tensor


class SpeechLLMScorer:
    """Log-probabilities of the next token behind a whole utterance, which is read once for all hypotheses.

    Law: as many tokens one by one, with the cache, as the model says in one pass.
    """

    partial = False

    def __init__(self, model: SpeechLLM) -> None:
        self.model = model

    def start(self, x: Frames) -> SpeechLLMState:
        rows = len(x.mask)
        nothing = self.model.marks.new_zeros(rows, 1, self.model.lm.dim)
        return SpeechLLMState(folded(self.model.lm.start(rows), 1), nothing)

    def read(self, x: Frames, state: SpeechLLMState) -> SpeechLLMState:
        """The whole utterance at once, before anything is said: text would stand between its parts."""
        whole = laid(self.model.before(x)).x
        last = whole.lengths - 1
        rows = torch.arange(len(last), device=last.device)
        before = torch.arange(whole.mask.shape[1], device=last.device) < last[:, None]
        _, cache = self.model.lm.extend(Frames.of(whole.values, before), self.model.lm.start(len(last)))
        one = SpeechLLMState(folded(cache, 1), whole.values[rows, last][:, None])
        return self.select(one, torch.zeros_like(state.next[..., 0], dtype=torch.long))

    def score(self, state: SpeechLLMState, candidates: Tensor | None = None) -> tuple[Tensor, SpeechLLMState]:
        rows, beam, dim = state.next.shape
        x = state.next.reshape(rows * beam, 1, dim)
        there = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        hidden, cache = self.model.lm.extend(Frames(x, there), unfolded(state.cache, beam))
        scores = self.model.lm.logits(hidden[:, 0])
        scores = scores.log_softmax(-1, torch.promote_types(scores.dtype, torch.float32))
        return scores.view(rows, beam, -1), replace(state, cache=folded(cache, beam))

    def extend(self, state: SpeechLLMState, parents: Tensor, tokens: Tensor) -> SpeechLLMState:
        return replace(self.select(state, parents), next=self.model.lm.embed(tokens))

    def select(self, state: SpeechLLMState, parents: Tensor) -> SpeechLLMState:
        at = parents[..., None].expand(-1, -1, state.next.shape[2])
        return SpeechLLMState(picked(state.cache, parents, state.next.shape[1]), state.next.gather(1, at))


class SpeechLLMBeam(JointBeam):
    """A `JointBeam` for models in which no head hears where nobody speaks: nobody does as far as a session knows.

    So an utterance lasts until the sound ends, or is too long.
    """

    hears = True

    def waited(self, beam: Beam) -> Tensor:
        return torch.zeros_like(beam.frames)
