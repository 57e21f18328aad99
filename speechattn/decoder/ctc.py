"""Connectionist temporal classification (CTC): the head and its loss, behind an encoder and between its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.frames import Frames
from speechattn.linear import run
from speechattn.stream import Stream

__all__ = ["CTC", "IntermediateCTC", "SelfConditioned"]


class CTC(Stream):
    """Frames [B, T, D] -> log-probabilities [B, T, V] of tokens and blank; frame by frame, so it streams as it is."""

    def __init__(self, dim: int, vocab: int, *, blank: int = 0) -> None:
        super().__init__()
        if not 0 <= blank < vocab:
            raise ValueError(f"blank {blank} of a vocabulary of {vocab}")
        self.head = nn.Linear(dim, vocab)
        self.blank = blank

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        return Frames.of(run(self.head, x.values).log_softmax(-1), x.mask), state

    def loss(self, x: Frames, targets: Tensor, target_lengths: Tensor) -> Tensor:
        """Mean over the batch of `losses`; 0 for a batch of none."""
        losses = self.losses(x, targets, target_lengths)
        return losses.sum() / max(len(losses), 1)

    def losses(self, x: Frames, targets: Tensor, target_lengths: Tensor) -> Tensor:
        """-log p(text) of each utterance [B], from frames [B, T, D], whose valid ones come first, and tokens [B, U].

        The sum over all paths that collapse to the first `target_lengths` [B] tokens. An utterance with fewer frames
        than its text needs (one for each token, one more between equal ones) has loss and gradient 0.
        """
        log_probs = self(Frames.of(x.values, x.mask)).values
        if log_probs.dtype not in (torch.float32, torch.float64):
            log_probs = log_probs.float()
        if not log_probs.numel():
            nothing: Tensor = log_probs.sum((1, 2))  # nobody, or no frame: no text, or too short for it
            return nothing
        return F.ctc_loss(
            log_probs.transpose(0, 1), targets, x.lengths, target_lengths,
            blank=self.blank, reduction="none", zero_infinity=True,
        )  # fmt: skip


class IntermediateCTC(nn.Module):
    """A CTC head also for what layers inside the encoder say (arXiv 2102.03216): its own norm, the head shared.

    In training: (1 - w) * ctc.loss(last layer) + w * `loss`(some layers), w = 0.5. With `languages` the first
    `first` of the layers say only which language it is (arXiv 2302.12829); the texts of the others begin with it.
    """

    def __init__(self, ctc: CTC, *, first: int = 0) -> None:
        super().__init__()
        self.ctc, self.first = ctc, first
        self.norm = nn.LayerNorm(ctc.head.in_features)

    def forward(self, x: Frames) -> Frames:
        """What a layer says [B, T, D] -> log-probabilities [B, T, V]."""
        return self.ctc(self.normal(x))  # type: ignore[no-any-return]

    def normal(self, x: Frames) -> Frames:
        """The same frames, normalised."""
        return Frames.of(self.norm(x.values), x.mask)

    def loss(
        self, layers: Sequence[Frames], targets: Tensor, target_lengths: Tensor, languages: Tensor | None = None
    ) -> Tensor:
        """Mean over `layers` (`Encoder.intermediate` gives them) of the loss of [B, U] tokens; `languages` [B] tokens.

        ValueError where the first layers need languages and there are none, or there are no layers.
        """
        if not layers or (self.first and languages is None):
            raise ValueError(f"{len(layers)} layers, of which {self.first} say the language, of which none was given")
        found = []
        for i, x in enumerate(layers):
            if i < self.first and languages is not None:
                found.append(self.ctc.loss(self.normal(x), languages[:, None], torch.ones_like(languages)))
            else:
                found.append(self.ctc.loss(self.normal(x), targets, target_lengths))
        return torch.stack(found).mean()


class SelfConditioned(Stream):
    """x + Linear(softmax(head(norm(x)))) (arXiv 2104.02724, eq. 11): between two layers, the second one knows it.

    A stream like any layer: it stands in an encoder behind the layers that `IntermediateCTC` listens to, one and the
    same behind each of them. Law: a projection of zeros leaves the plain intermediate CTC.
    """

    def __init__(self, inner: IntermediateCTC) -> None:
        super().__init__()
        self.inner = inner
        head = inner.ctc.head
        self.project = nn.Linear(head.out_features, head.in_features)

    def step(self, x: Frames, state: Any) -> tuple[Frames, Any]:
        posterior = self.inner(x).values.exp()
        return Frames.of(x.values + self.project(posterior), x.mask), state
