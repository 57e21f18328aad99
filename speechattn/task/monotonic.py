"""Training of a decoder whose cross attention is monotonic: right tokens, and early enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.cross.latency import Latency
from speechattn.cross.monotonic import Monotonic, Place
from speechattn.decoder.alignment import align
from speechattn.decoder.attention import AttentionDecoder, DecoderState, Head
from speechattn.decoder.ctc import CTC
from speechattn.errors import ModelError
from speechattn.frames import Memory
from speechattn.model import Recognizer
from speechattn.task.objectives import Heard, Objective, Said, crowded, ending, head_of

__all__ = ["ConstrainedObjective", "MonotonicObjective"]


class MonotonicObjective(Objective):
    """Cross entropy of the next token by the head `monotonic`, and `latency` terms of where its heads stop.

    In the first `warmup` batches heads are trained without StableEmit, and without latency terms.
    """

    seen: Tensor  # training batches so far: a part of the checkpoint

    def __init__(
        self, weight: float = 1.0, smoothing: float = 0.1, latency: Sequence[Latency] = (), warmup: int = 0,
        head: str = "monotonic",
    ) -> None:  # fmt: skip
        super().__init__(head, weight)
        if warmup < 0:
            raise ValueError(f"warmup {warmup}: wanted 0 or more")
        self.smoothing, self.warmup = smoothing, warmup
        self.latency = nn.ModuleList(latency)
        self.stable: dict[int, float] = {}  # of each layer, as it was given
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def fit(self, model: Recognizer) -> None:
        decoder = head_of(model, self.name, AttentionDecoder)
        ending(model)
        if not monotonic(decoder):
            raise ModelError(f"{self.name}: none of the decoder's layers has a monotonic cross attention")
        self.stable = {i: layer.stable_emit for i, layer in monotonic(decoder).items()}

    def begin(self, model: Recognizer, heard: Heard, said: Said) -> DecoderState:
        """The decoder before the text; no frames will follow."""
        decoder = head_of(model, self.name, AttentionDecoder)
        return decoder.start(Memory.of(heard.frames, finished=True))

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        decoder, end = head_of(model, self.name, AttentionDecoder), ending(model)
        warm = int(self.seen) >= self.warmup
        for i, layer in monotonic(decoder).items():
            layer.stable_emit = self.stable.get(i, layer.stable_emit) if warm else 0.0
        state = self.begin(model, heard, said)
        forced = decoder.forced(state, said.tokens, said.lengths, sos=end, eos=end, heads=heads(decoder))
        each = F.cross_entropy(forced.scores.mT, forced.tokens, reduction="none", label_smoothing=self.smoothing)
        loss = each.masked_fill(~forced.counts, 0.0).sum(1)
        if warm:
            for term in cast(Sequence[Latency], self.latency):
                loss = loss + term.weight * term(forced.alignment, forced.counts, heard.frames.mask)
        if self.training:
            self.seen += 1
        return loss


class ConstrainedObjective(MonotonicObjective):
    """The same where no token is said later than `delay` frames behind its end by the head `ctc`, in training.

    Delay-constrained training (DeCoT, arXiv 2004.05009) with the best CTC path of the text in place of a hybrid
    system's alignment; it wants a `CTCObjective` beside it, and a `Quantity` term. In the first `warmup` batches there
    is no limit, because the paths mean nothing yet.
    """

    def __init__(
        self, weight: float = 1.0, smoothing: float = 0.1, latency: Sequence[Latency] = (), warmup: int = 0,
        head: str = "monotonic", delay: int = 8,
    ) -> None:  # fmt: skip
        super().__init__(weight, smoothing, latency, warmup, head)
        if delay < 0:
            raise ValueError(f"delay {delay}: wanted 0 or more frames")
        self.delay = delay

    def fit(self, model: Recognizer) -> None:
        super().fit(model)
        head_of(model, "ctc", CTC)

    def begin(self, model: Recognizer, heard: Heard, said: Said) -> DecoderState:
        state = super().begin(model, heard, said)
        if int(self.seen) < self.warmup:
            return state
        limit = self.limits(head_of(model, "ctc", CTC), heard, said)
        place = tuple(replace(x, limit=limit) if isinstance(x, Place) else x for x in state.place)
        return replace(state, place=place)

    def limits(self, ctc: CTC, heard: Heard, said: Said) -> Tensor:
        """The last frame where each token may be said [B, U + 1], counted in valid ones; the end may be anywhere.

        So may the tokens of a text that CTC cannot say in so few frames.
        """
        rows, tokens = said.tokens.shape
        limit = torch.full((rows, tokens + 1), heard.frames.mask.shape[1])
        with torch.no_grad():
            logs, lost = ctc(heard.frames), crowded(heard.frames, said)
        for b in (~lost).nonzero()[:, 0].tolist():
            text = said.tokens[b, : int(said.lengths[b])].tolist()
            for i, span in enumerate(align(logs.values[b][logs.mask[b]].float(), text, blank=ctc.blank)):
                limit[b, i] = span.last - 1 + self.delay
        return limit.to(said.tokens.device)


def monotonic(decoder: AttentionDecoder) -> dict[int, Monotonic]:
    """The layers that have monotonic heads."""
    crosses = ((i, layer.cross) for i, layer in enumerate(decoder.layers))
    return {i: cross for i, cross in crosses if isinstance(cross, Monotonic)}


def heads(decoder: AttentionDecoder) -> list[Head]:
    """Every monotonic head."""
    return [(i, head) for i, layer in monotonic(decoder).items() for head in range(layer.heads)]
