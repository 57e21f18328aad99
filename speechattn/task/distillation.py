"""Distillation: what a teacher says of the same sound is a target, beside the text."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.attention.pattern import Span
from speechattn.attention.self_attention import Spanned, set_span
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer, load_model
from speechattn.task.objectives import Heard, Objective, Said, ending, head_of

__all__ = ["AttentionDistillation", "CTCDistillation", "Distillation", "DualModeDistillation", "divergence"]


def divergence(theirs: Tensor, mine: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of scores [B, N, V], summed over the places in `mask` [B, N] -> [B].

    Both are softened by the temperature, and gradients kept at their size by its square (arXiv 1503.02531, section 2).
    """
    exact = torch.promote_types(mine.dtype, torch.float32)
    p, q = ((scores.to(exact) / temperature).log_softmax(-1) for scores in (theirs, mine))
    each = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return each.masked_fill(~mask, 0.0).sum(1) * temperature**2


class Distillation(Objective):
    """A student that agrees with the model in the folder `teacher`, which hears the whole utterance, not augmented.

    The teacher has the same tokens; it is not trained, and is a part of no checkpoint. Law: a student that is the
    teacher has loss and gradient 0.
    """

    def __init__(self, head: str, weight: float, teacher: str, temperature: float = 1.0) -> None:
        super().__init__(f"{head}_distillation", weight, heads=(head,))
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: wanted more than 0")
        self.folder, self.temperature = teacher, temperature
        self.teachers: tuple[Recognizer, ...] = ()  # in a tuple: no part of the task's weights

    def fit(self, model: Recognizer) -> None:
        teacher = load_model(Path(self.folder))
        if not isinstance(teacher, Recognizer):
            raise ModelError(f"{self.folder}: a teacher is a model folder with an encoder and heads")
        if teacher.tokenizer.pieces != model.tokenizer.pieces:
            raise ModelError(f"{self.folder}: the teacher has other tokens than the model that it teaches")
        if teacher.sample_rate != model.sample_rate:
            raise ModelError(f"{self.folder}: the teacher hears {teacher.sample_rate} Hz, not {model.sample_rate}")
        self.teachers = (teacher.eval().requires_grad_(False),)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        place = heard.frames.values.device
        teacher = self.teachers[0].to(place)
        with torch.no_grad(), torch.autocast(place.type, enabled=False):
            frames = teacher.listening(heard.sound)
        return self.apart(teacher, frames, model, heard, said)

    @abstractmethod
    def apart(self, teacher: Recognizer, frames: Frames, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        """How far the model is from the teacher, whose encoder says `frames`, in each utterance [B]."""


class CTCDistillation(Distillation):
    """Frame by frame, by the head `ctc` (or `source`) of both, whose frames are equally long."""

    def __init__(self, weight: float, teacher: str, head: str = "ctc", temperature: float = 1.0) -> None:
        super().__init__(head, weight, teacher, temperature)
        self.head = head

    def fit(self, model: Recognizer) -> None:
        super().fit(model)
        for one in (model, self.teachers[0]):
            head_of(one, self.head, CTC)
        theirs, mine = (round(1000 * one.frame_s, 3) for one in (self.teachers[0], model))
        if theirs != mine:
            raise ModelError(f"{self.folder}: frames of the teacher last {theirs:g} ms, those of the model {mine:g} ms")

    def apart(self, teacher: Recognizer, frames: Frames, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        return frame_by_frame(head_of(teacher, self.head, CTC), frames, head_of(model, self.head, CTC), heard.frames,
                              self.temperature)  # fmt: skip


class AttentionDistillation(Distillation):
    """Token by token behind the true text, by the head `attention` of both."""

    def __init__(self, weight: float, teacher: str, temperature: float = 1.0) -> None:
        super().__init__("attention", weight, teacher, temperature)

    def fit(self, model: Recognizer) -> None:
        super().fit(model)
        ending(model)
        for one in (model, self.teachers[0]):
            head_of(one, "attention", AttentionDecoder)

    def apart(self, teacher: Recognizer, frames: Frames, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        with torch.no_grad():
            theirs, _ = forced(teacher, frames, said)
        mine, counts = forced(model, heard.frames, said)
        return divergence(theirs, mine, counts, self.temperature)


class DualModeDistillation(Objective):
    """What the model says when it hears the whole utterance teaches what it says in the span of the step.

    Dual mode (arXiv 2010.06030, section 3.3): one set of weights, frame by frame by its CTC head; nothing flows back
    into the teaching pass. A step that hears everything costs nothing; such steps train the teacher, so draw them, too
    (`DynamicChunks`).
    """

    def __init__(self, weight: float, head: str = "ctc", temperature: float = 1.0) -> None:
        super().__init__(f"{head}_dual_mode", weight, heads=(head,))
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: wanted more than 0")
        self.head, self.temperature = head, temperature

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.head, CTC)
        if not any(isinstance(module, Spanned) for module in model.encoder.modules()):
            raise ModelError("dual mode needs an encoder whose attention has a span")

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        head, spans = head_of(model, self.head, CTC), [m for m in model.encoder.modules() if isinstance(m, Spanned)]
        before = [module.span for module in spans]
        set_span(model.encoder, Span.full())
        try:
            if [module.span for module in spans] == before:
                return heard.frames.values.new_zeros(len(said.lengths))
            with torch.no_grad():
                frames = model.encoder(heard.features)
        finally:
            for module, span in zip(spans, before, strict=True):
                module.span = span
        return frame_by_frame(head, frames, head, heard.frames, self.temperature)


def frame_by_frame(theirs: CTC, frames: Frames, mine: CTC, heard: Frames, temperature: float) -> Tensor:
    """`divergence` of two CTC heads [B]; a frame at the end that one encoder lacks does not count."""
    with torch.no_grad():
        target = theirs(frames).values
    n = min(target.shape[1], heard.mask.shape[1])
    mask = frames.mask[:, :n] & heard.mask[:, :n]
    return divergence(target[:, :n], mine(heard).values[:, :n], mask, temperature)


def forced(model: Recognizer, frames: Frames, said: Said) -> tuple[Tensor, Tensor]:
    """Scores [B, U + 1, V] behind the true tokens, and which of them count."""
    head, end = head_of(model, "attention", AttentionDecoder), ending(model)
    scores, _, counts, _ = head.forced(
        head.start(Memory.of(frames, finished=True)), said.tokens, said.lengths, sos=end, eos=end
    )
    return scores, counts
