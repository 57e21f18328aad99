"""Non-autoregressive search: CTC says how many tokens there are, and where, a CASS-NAT decoder which (2304.07611)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.decoder.cass_nat import CassNatDecoder, Spans
from speechattn.frames import Frames, Memory
from speechattn.search.beam import Beam, Prefixes, Search
from speechattn.stream import Buffer

__all__ = ["CassNat", "sampled", "spans_in"]

NONE = -torch.inf


class CassNat(Search):
    """The texts that the decoder reads along the best CTC path of a whole utterance, and along others like it.

    Error-based sampling: where the best token of CTC has a probability below `threshold`, each further one of the
    `samples` paths takes one of the two best, by their probabilities. The decoder runs over all paths as one batch;
    those that it cannot tell apart, because they differ in tokens and not in spans, it reads once. A path fixes the
    number of tokens and their spans; each token is the most probable one there, but the blank, `eos` and what is in
    `never`. A text's score is the decoder's log-probability of its tokens and the end behind them; the `size` best
    ones are kept. Another decoder judges them in `Rescored`: give it all of them.

    Nothing is said before `finish`. The draws follow from `seed` alone, and each frame has its own, so the law of
    every search holds. With one sample it is the best path.
    """

    def __init__(
        self, head: nn.Module, decoder: CassNatDecoder, size: int = 1, *, eos: int, samples: int = 50,
        threshold: float = 0.7, blank: int = 0, never: Sequence[int] = (), seed: int = 0,
    ) -> None:  # fmt: skip
        if not 1 <= size <= samples:
            raise ValueError(f"a beam of {size} from {samples} samples: wanted 1 to {samples}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"a threshold of {threshold}: it is a probability")
        if eos == blank:
            raise ValueError(f"the end of the text and the blank are both {eos}")
        self.head, self.decoder, self.size, self.eos, self.samples = head, decoder, size, eos, samples
        self.threshold, self.blank, self.seed = threshold, blank, seed
        self.never = torch.tensor(sorted({*never, eos, blank}), dtype=torch.long)

    def start(self, x: Frames) -> Beam:
        score = torch.full((len(x.mask), self.size), NONE, dtype=torch.float64, device=x.mask.device)
        score[:, :1] = 0.0
        heard = Buffer(x.values[:, :0], x.mask[:, :0])
        return Beam(Prefixes.empty(x.values, self.size), score, x.mask[:, :0].sum(1), heard)

    @torch.inference_mode()
    def step(self, x: Frames, beam: Beam) -> Beam:
        x = Frames.of(x.values, x.mask).front()
        return replace(beam, frames=beam.frames + x.lengths, state=beam.state.append(x.values, x.mask))

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        return replace(beam, said=beam.said.select(parents), score=beam.score.gather(1, parents))

    @torch.inference_mode()
    def finish(self, beam: Beam) -> Beam:
        x = Frames(beam.state.values, beam.state.mask).front()
        paths = sampled(self.head(x), self.samples, threshold=self.threshold, blank=self.blank, seed=self.seed)
        spans = distinct(spans_in(paths, blank=self.blank), len(x.mask))
        said, score = self._read(x, spans, (beam.frames - x.lengths)[:, None, None])
        score, order = score.sort(dim=1, descending=True, stable=True)
        said = said.select(order)
        score = score.masked_fill(repeated(said.tokens, said.length), NONE)
        score, order = score.sort(dim=1, descending=True, stable=True)
        room = [0, self.size - score.shape[1]]  # cuts where it is negative
        return replace(beam, said=said.select(F.pad(order, room)), score=F.pad(score, room, value=NONE))

    def _read(self, x: Frames, spans: Spans, origin: Tensor) -> tuple[Prefixes, Tensor]:
        """What is said in B * K `spans` over frames [B, T, D] behind `origin` [B, 1, 1] others; its score [B, K]."""
        scores = self.decoder.logits(Memory.of(x, finished=True), spans)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        total = scores.logsumexp(-1)  # in place of the log-probabilities of all tokens, which may be many
        end = (scores[..., self.eos] - total).gather(1, spans.length[:, None])
        best, tokens = scores.index_fill_(2, self.never.to(scores.device), NONE)[:, :-1].max(-1)
        at = torch.arange(tokens.shape[1], device=tokens.device) < spans.length[:, None]
        log_probs = (best - total[:, :-1]).where(at, 0.0)
        score = log_probs.double().sum(1) + end[:, 0].double()

        def of_rows(values: Tensor) -> Tensor:
            return values.view(len(x.mask), len(values) // max(len(x.mask), 1), *values.shape[1:])

        starts, ends = ((of_rows(edge) + origin) * of_rows(at) for edge in (spans.first, spans.last))
        said = Prefixes(of_rows(tokens * at), starts, ends, of_rows(log_probs), of_rows(spans.length))
        return said, of_rows(score)


def sampled(log_probs: Frames, samples: int, *, threshold: float = 0.7, blank: int = 0, seed: int = 0) -> Tensor:
    """Paths of log-probabilities [B, T, V], the best one first [B, samples, T]; blank where a frame is not valid."""
    top, tokens = log_probs.values.topk(min(2, log_probs.values.shape[2]))
    best, other = top[..., 0], top[..., -1]
    # frame by frame: what is drawn for a frame does not depend on how many follow; on the CPU: nor on the device
    draws = torch.rand(top.shape[1], samples - 1, generator=torch.Generator().manual_seed(seed))
    draws = F.pad(draws, [1, 0], value=1.0).mT.to(top.device)
    doubt = (best.exp() < threshold)[:, None] & (draws < (other - best).sigmoid()[:, None])
    paths = torch.where(doubt, tokens[..., None, :, -1], tokens[..., None, :, 0])
    return paths.where(log_probs.mask[:, None], blank)


def spans_in(paths: Tensor, *, blank: int = 0) -> Spans:
    """The runs of one token in CTC paths [B, S, T], row by row [B * S, U]; zero behind the last one."""
    paths = paths.flatten(0, 1)
    change = paths[:, 1:] != paths[:, :-1]
    starts, stops = (
        F.pad(change, edge, value=True)[:, : paths.shape[1]] & (paths != blank) for edge in ([1, 0], [0, 1])
    )
    length = starts.sum(1)
    most = int(length.max()) if len(length) else 0
    at = torch.arange(paths.shape[1], device=paths.device).expand_as(paths)

    def written(there: Tensor, values: Tensor) -> Tensor:
        """The values that are there, in front; all others fall into a place that is cut off."""
        place = torch.where(there, there.cumsum(1) - 1, most)
        return values.new_zeros(len(paths), most + 1).scatter(1, place, values)[:, :most]

    return Spans(written(starts, at), written(stops, at + 1), length)


def distinct(spans: Spans, rows: int) -> Spans:
    """Those [B * S] that the decoder can tell from the earlier ones of their row [B * K]; the first one fills up."""
    first, last, length = (
        x.view(rows, len(x) // max(rows, 1), *x.shape[1:]) for x in (spans.first, spans.last, spans.length)
    )
    again = repeated(first[..., 1:], length)  # the first token looks from the beginning, wherever it is said
    count = (~again).sum(1, keepdim=True)
    order = again.long().argsort(dim=1, stable=True)[:, : int(count.max()) if rows else 1]
    order = order * (torch.arange(order.shape[1], device=order.device) < count)
    at = torch.arange(rows, device=order.device)[:, None]
    return Spans(*(x[at, order].flatten(0, 1) for x in (first, last, length)))


def repeated(rows: Tensor, length: Tensor) -> Tensor:
    """Whether what a hypothesis has in `rows` [B, K, U], of which `length` [B, K] count, an earlier one has too."""
    same = (rows[:, :, None] == rows[:, None]).all(-1) & (length[:, :, None] == length[:, None])
    return same.tril(-1).any(-1)
