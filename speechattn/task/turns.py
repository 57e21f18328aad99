"""Training of a head that reads and writes in turns."""

from __future__ import annotations

from torch import Tensor

from speechattn.decoder.in_turns import InTurns
from speechattn.errors import ModelError
from speechattn.model import Recognizer
from speechattn.task.objectives import Heard, Objective, Said, ending

__all__ = ["DecoderOnlyObjective"]


class DecoderOnlyObjective(Objective):
    """Cross entropy of the next token by the head `decoder_only`, which sees of the frames what its schedule lets it.

    With label smoothing (arXiv 1512.00567, section 7).
    """

    def __init__(self, weight: float = 1.0, smoothing: float = 0.1) -> None:
        super().__init__("decoder_only", weight)
        self.smoothing = smoothing

    def fit(self, model: Recognizer) -> None:
        self._head(model)
        ending(model)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        head, end = self._head(model), ending(model)
        return head.losses(heard.frames, said.tokens, said.lengths, sos=end, eos=end, smoothing=self.smoothing)

    def _head(self, model: Recognizer) -> InTurns:
        head: object = dict(model.heads).get(self.name)
        if not isinstance(head, InTurns):
            raise ModelError(f"an objective needs the head {self.name}, in turns; there are {', '.join(model.heads)}")
        return head
