"""Training of a segmental head: where labels end is given by an alignment, at last by the head itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from speechattn.decoder.cass_nat import spans_of
from speechattn.decoder.ctc import CTC
from speechattn.decoder.segmental import Segmental
from speechattn.frames import Memory
from speechattn.model import Recognizer
from speechattn.task.objectives import Heard, Objective, Said, ending, head_of

__all__ = ["Alignment", "CTCAlignment", "LinearAlignment", "OwnAlignment", "SegmentalObjective", "linear"]


def linear(lengths: Tensor, frames: Tensor, tokens: int) -> Tensor:
    """Ends [B, U] of `lengths` [B] labels that share `frames` [B] frames evenly, for U `tokens`; 0 behind them."""
    at = torch.arange(1, tokens + 1, device=lengths.device)
    ends = at * frames[:, None] // lengths[:, None].clamp(min=1)
    return ends.masked_fill(at > lengths[:, None], 0)


class Alignment(nn.Module, ABC):
    """Where the labels of known texts end."""

    def fit(self, model: Recognizer) -> None:
        """ModelError where the model lacks what is needed."""
        return

    @abstractmethod
    def ends(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        """The frames behind the labels [B, U], which grow, for texts with no more labels than there are frames."""


class LinearAlignment(Alignment):
    """All labels of an utterance are alike long: what one begins with who knows nothing (arXiv 2103.16710)."""

    def ends(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        return linear(said.lengths, heard.frames.lengths, said.tokens.shape[1])


class CTCAlignment(Alignment):
    """`late` frames behind the last one in which the CTC `head` says a label, on the best path of the text.

    As it is now: train it with a `CTCObjective`. Labels end before the next one begins. A text that CTC has too few
    frames for is aligned linearly.
    """

    def __init__(self, head: str = "ctc", late: int = 0) -> None:
        super().__init__()
        if late < 0:
            raise ValueError(f"late {late}: wanted 0 or more frames")
        self.head, self.late = head, late

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.head, CTC)

    @torch.no_grad()
    def ends(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        head, tokens = head_of(model, self.head, CTC), said.tokens
        spans = spans_of(head(heard.frames), tokens, said.lengths, blank=head.blank)
        frames = heard.frames.lengths[:, None]
        at = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        nexts = torch.cat([spans.first[:, 1:], frames], 1)[:, : len(at)].where(at < said.lengths[:, None], frames)
        ends = (spans.last + self.late).minimum(nexts).masked_fill(at > said.lengths[:, None], 0)
        evenly = linear(said.lengths, frames[:, 0], tokens.shape[1])
        return ends.where((spans.length == said.lengths)[:, None], evenly)


class OwnAlignment(Alignment):
    """Where the segmental head itself, as it is now, ends the labels best; in the first `after` batches as `first`.

    The best segments stand for all (arXiv 2103.16710). It costs what all segments of an utterance cost.
    """

    seen: Tensor  # training batches so far: a part of the checkpoint

    def __init__(self, first: Alignment, after: int = 200) -> None:
        super().__init__()
        if after < 0:
            raise ValueError(f"after {after}: wanted 0 or more batches")
        self.first, self.after = first, after
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def fit(self, model: Recognizer) -> None:
        self.first.fit(model)
        head_of(model, "segmental", Segmental)

    def ends(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        own = int(self.seen) >= self.after
        if self.training:
            self.seen += 1
        if not own:
            return self.first.ends(model, heard, said)
        head, end = head_of(model, "segmental", Segmental), ending(model)
        training = head.training
        head.eval()
        found = head.best_segmentation(Memory.of(heard.frames), said.tokens, said.lengths, sos=end, eos=end)
        head.train(training)
        return found.ends


class SegmentalObjective(Objective):
    """-log p(text, segments) by the head `segmental`, of the segments that an `alignment` gives (arXiv 2210.14742).

    The labels' part has label smoothing (arXiv 1512.00567, section 7); that of the length model counts `emit` times.
    """

    def __init__(self, alignment: Alignment, weight: float = 1.0, smoothing: float = 0.1, emit: float = 1.0) -> None:
        super().__init__("segmental", weight)
        if not emit >= 0:
            raise ValueError(f"emit {emit}: wanted 0 or more")
        self.alignment, self.smoothing, self.emit = alignment, smoothing, emit

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.name, Segmental)
        ending(model)
        self.alignment.fit(model)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        head, end, lost = head_of(model, self.name, Segmental), ending(model), self.impossible(heard, said)
        said = Said(said.tokens, said.lengths.masked_fill(lost, 0), said.source)
        ends = self.alignment.ends(model, heard, said)
        each = head.losses(
            Memory.of(heard.frames), said.tokens, said.lengths, ends, sos=end, eos=end,
            smoothing=self.smoothing, emit=self.emit,
        )  # fmt: skip
        return each.masked_fill(lost, 0.0)

    def impossible(self, heard: Heard, said: Said) -> Tensor:
        return said.lengths > heard.frames.lengths
