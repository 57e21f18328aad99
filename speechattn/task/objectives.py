"""What the parts of a model are told in training: one loss for each utterance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.decoder.transducer import Transducer
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer

__all__ = ["AttentionObjective", "CTCObjective", "Heard", "Objective", "Said", "TransducerObjective", "head_of"]

Head = TypeVar("Head", bound=nn.Module)


@dataclass(frozen=True)
class Heard:
    """What the model made of a batch: `sound` [B, N], `features` [B, T', F], encoder `frames` [B, T, D].

    `layers` are the encoder layers that an objective asked for, each [B, T'', D].
    """

    sound: Frames
    features: Frames
    frames: Frames
    layers: Mapping[int, Frames] = field(default_factory=dict)


@dataclass(frozen=True)
class Said:
    """What should come out: `tokens` [B, U], of which the first `lengths` [B] count.

    `source` is the same of what was said in the language of the sound, where `tokens` are a translation.
    """

    tokens: Tensor
    lengths: Tensor
    source: Said | None = None


class Objective(nn.Module, ABC):
    """A loss for each utterance, `weight` times in the sum. `layers` names the encoder layers it wants to see.

    Its own parameters, if it has any, are trained and are no part of the model that is exported.
    """

    def __init__(self, name: str, weight: float, layers: tuple[int, ...] = ()) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight {weight} of {name}: wanted 0 or more")
        self.name, self.weight, self.layers = name, weight, layers

    def fit(self, model: Recognizer) -> None:
        """Called once, before training: ModelError where the model lacks what is needed."""
        return

    @abstractmethod
    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        """Loss of each utterance [B]."""


def head_of(model: Recognizer, name: str, kind: type[Head]) -> Head:
    """That head of the model; ModelError where there is none of this kind."""
    head = dict(model.heads).get(name)
    if not isinstance(head, kind):
        raise ModelError(f"an objective needs the head {name} ({kind.__name__}); there are {', '.join(model.heads)}")
    return head


class CTCObjective(Objective):
    """-log p(text) by the head `ctc` (or another of this kind)."""

    def __init__(self, weight: float = 1.0, head: str = "ctc") -> None:
        super().__init__(head, weight)

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.name, CTC)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        return head_of(model, self.name, CTC).losses(heard.frames, said.tokens, said.lengths)


class AttentionObjective(Objective):
    """Cross entropy of the next token by the head `attention`, with label smoothing (arXiv 1512.00567, section 7)."""

    def __init__(self, weight: float = 1.0, smoothing: float = 0.1) -> None:
        super().__init__("attention", weight)
        self.smoothing = smoothing

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.name, AttentionDecoder)
        if model.tokenizer.end is None:
            raise ModelError("an attention head needs <sos/eos> as the last of the tokens")

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        end = model.tokenizer.end
        assert end is not None
        return head_of(model, self.name, AttentionDecoder).losses(
            Memory.of(heard.frames), said.tokens, said.lengths, sos=end, eos=end, smoothing=self.smoothing
        )


class TransducerObjective(Objective):
    """-log p(text) by the head `transducer`, over the whole lattice."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__("transducer", weight)

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.name, Transducer)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        return head_of(model, self.name, Transducer).loss(heard.frames, said.tokens, said.lengths)
