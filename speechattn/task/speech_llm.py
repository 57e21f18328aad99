"""What a speech language model is told in training."""

from __future__ import annotations

import torch
from torch import Tensor

from speechattn.model import Recognizer
from speechattn.multimodal.decorrelation import decorrelation
from speechattn.multimodal.layout import LIPS, MARK, PROMPT, SOUND
from speechattn.multimodal.speech_llm import SpeechLLM
from speechattn.task.objectives import Heard, Objective, Said, ending, head_of

__all__ = ["SpeechLLMObjective"]


class SpeechLLMObjective(Objective):
    """-log p(text) by the head `llm`, and `decorrelate` times how much what it reads looks like the beginning.

    That is the mean of cos^2 to the state of BOS over layers, utterances and places before the text (arXiv
    2510.22603); the loss of a step is the cross-entropy for each token + `decorrelate` * that mean.
    """

    def __init__(self, weight: float = 1.0, *, decorrelate: float = 0.0, smoothing: float = 0.0) -> None:
        super().__init__("llm", weight)
        if not decorrelate >= 0:
            raise ValueError(f"decorrelate {decorrelate}: wanted 0 or more")
        self.decorrelate, self.smoothing = decorrelate, smoothing

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.name, SpeechLLM)
        ending(model)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        head = head_of(model, self.name, SpeechLLM)
        found, inside, kinds = head.losses(
            heard.frames, said.tokens, said.lengths, eos=ending(model), smoothing=self.smoothing
        )
        if not self.decorrelate:
            return found
        read = torch.isin(kinds, torch.tensor([MARK, SOUND, LIPS, PROMPT], device=kinds.device))
        alike = decorrelation(inside.states, read)
        tokens = said.lengths.sum() / max(len(said.lengths), 1)  # by which the sum of a step will be divided
        return found + self.decorrelate * tokens * alike
