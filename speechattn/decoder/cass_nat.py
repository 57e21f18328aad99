"""CASS-NAT: all tokens at once, each from the frames where CTC says it (Fan et al., TASLP 2023, arXiv 2304.07611)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.pattern import Span
from speechattn.attention.softmax import mixed
from speechattn.cross.soft import Soft, SoftState
from speechattn.decoder.alignment import align
from speechattn.decoder.attention import sinusoids
from speechattn.decoder.ctc import CTC
from speechattn.encoder.layers import feed_forward, self_attention
from speechattn.encoder.transformer import TransformerBlock
from speechattn.errors import InputError
from speechattn.frames import Frames, Memory
from speechattn.stream import Residual
from speechattn.tree import node

__all__ = ["Aligned", "CassNatDecoder", "Spans", "TokenAcousticExtractor", "spans_of"]


@node
class Spans:
    """Where the tokens of texts are said: their first and last-plus-one frames [N, U], of which `length` [N] count.

    Only valid frames are counted. What stands behind the `length` means nothing.
    """

    first: Tensor
    last: Tensor
    length: Tensor

    def bounds(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Begin and end [N, U + 1] of what each token of texts over `frames` [N] frames, and then the end, looks at.

        A token looks as far as the next one begins, the first one from the beginning, the last one to the end. So
        the parts of a row are a partition of its frames; the part of the end of the text is empty, or all when there
        is no token. Behind it all parts are empty.

            path     -  -  a  a  -  b  -  b  -
            part     a  a  a  a  a  b  b  b' b'      b' is the second b, the end of the text has none
        """
        at = torch.arange(self.first.shape[1] + 2, device=frames.device)
        at_token = at < self.length[:, None]
        edges = torch.where(at_token, F.pad(self.first, [0, 2]), frames[:, None]).masked_fill(at == 0, 0)
        return edges[:, :-1], edges[:, 1:]


def spans_of(log_probs: Frames, targets: Tensor, lengths: Tensor, *, blank: int = 0) -> Spans:
    """The best CTC paths of log-probabilities [B, T, V] that say the first `lengths` [N] tokens of `targets` [N, U].

    Row b * K + k of the N = B * K texts is aligned with row b. A text that its frames are too few for, or with a
    token that CTC does not know, gets no spans: its length is 0.
    """
    firsts, lasts = torch.zeros_like(targets), torch.zeros_like(targets)
    found = torch.zeros_like(lengths)
    texts, beam = targets.tolist(), len(targets) // max(len(log_probs.mask), 1)
    for i, n in enumerate(lengths.tolist()):
        row = i // beam
        try:
            spans = align(log_probs.values[row, log_probs.mask[row]], texts[i][:n], blank=blank)
        except InputError:
            continue
        if spans:
            edges = torch.tensor([(span.first, span.last) for span in spans], device=targets.device)
            firsts[i, :n], lasts[i, :n] = edges.unbind(1)
            found[i] = n
    return Spans(firsts, lasts, found)


class SpanAttention(Soft):
    """Soft attention of which each query sees its own frames; one that sees none gets the context of zeros."""

    def look(self, query: Tensor, state: SoftState, seen: Tensor) -> Tensor:
        """`query` [B, N, D] at the frames that are `seen` [B, N, T] -> [B, N, D]."""
        q = self._split(self.query(query)) / (query.shape[-1] // self.heads) ** 0.5
        context = mixed(q @ state.key.mT, state.value, seen[:, None])
        out: Tensor = self.out(context.transpose(1, 2).flatten(2))
        return out


class TokenAcousticExtractor(nn.Module):
    """A vector for each token of an alignment, and for the end: sines of its position look at the token's frames.

    Law: it depends on the frames of the token's part (`Spans.bounds`), on `expand` frames at either side of that, and
    on nothing else.
    """

    def __init__(self, dim: int, heads: int, inner: int, *, expand: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if expand < 0:
            raise ValueError(f"parts that are wider by {expand} frames: at least 0 is needed")
        self.dim, self.expand, self.dropout = dim, expand, dropout
        self.norm = nn.LayerNorm(dim)
        self.cross = SpanAttention(dim, heads)
        self.ff = feed_forward(dim, inner, activation=nn.ReLU, dropout=dropout)

    def seen(self, mask: Tensor, spans: Spans) -> Tensor:
        """Which frames of `mask` [B, T] the N = B * K texts look at [B, K, U + 1, T]."""
        rows = len(mask)
        beam = len(spans.length) // max(rows, 1)
        begin, end = spans.bounds(mask.sum(1).repeat_interleave(beam))
        begin, end = (edge.view(rows, beam, spans.first.shape[1] + 1, 1) for edge in (begin, end))
        at = (mask.cumsum(1) - 1)[:, None, None]
        return (at >= begin - self.expand) & (at < end + self.expand) & mask[:, None, None]

    def forward(self, memory: Memory, spans: Spans) -> Frames:
        """Frames [B, T, D], and K alignments of each row -> [B * K, U + 1, D]."""
        x, places = memory.frames, spans.first.shape[1] + 1
        seen = self.seen(x.mask, spans)
        query = sinusoids(places, self.dim).to(x.values)
        query = F.dropout(query, self.dropout) if self.training and self.dropout else query
        queries = self.norm(query).expand(*seen.shape[:3], -1).flatten(1, 2)
        context = self.cross.look(queries, self.cross.read(memory), seen.flatten(1, 2))
        context = F.dropout(context, self.dropout) if self.training and self.dropout else context
        there = torch.arange(places, device=seen.device) <= spans.length[:, None]
        told: Frames = self.ff(Frames.finite(query + context.view(len(there), places, self.dim), there))
        return told


class MixedBlock(nn.Module):
    """Every token looks at all tokens, then at all frames; then feed-forward. Each behind its norm, and added."""

    def __init__(self, dim: int, heads: int, inner: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Residual(self_attention(dim, heads, Span.full(), dropout=dropout))
        self.norm, self.cross, self.dropout = nn.LayerNorm(dim), Soft(dim, heads), dropout
        self.ff = feed_forward(dim, inner, activation=nn.ReLU, dropout=dropout)

    def forward(self, x: Frames, memory: Memory) -> Frames:
        """`x` [B * K, U, D] over frames [B, T, D]."""
        x = self.attention(x)
        seen, _ = self.cross.attend(self.norm(x.values), self.cross.read(memory), ())
        context = F.dropout(seen.context, self.dropout) if self.training and self.dropout else seen.context
        y: Frames = self.ff(Frames.finite(x.values + context, x.mask))
        return y


class CassNatDecoder(nn.Module):
    """Log-probabilities of all tokens of a text and its end in one pass, from frames and an alignment.

    The alignment says how many tokens there are, and where; which ones is decided here. `alone` blocks in which the
    acoustic vectors of the tokens look at each other follow the extractor, and then `both` blocks in which they look
    at the frames as well. It is trained with its `loss` and that of the CTC head, of about the same weight.

    Law: a row does not know its batch, and frames that are not valid are not there.
    """

    def __init__(
        self, vocab: int, dim: int, heads: int, *, alone: int = 3, both: int = 3, inner: int | None = None,
        expand: int = 1, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        inner = inner or 4 * dim
        self.extractor = TokenAcousticExtractor(dim, heads, inner, expand=expand, dropout=dropout)
        self.alone = nn.ModuleList(
            TransformerBlock(dim, heads, inner, Span.full(), position=None, dropout=dropout) for _ in range(alone)
        )
        self.both = nn.ModuleList(MixedBlock(dim, heads, inner, dropout=dropout) for _ in range(both))
        self.norm, self.output = nn.LayerNorm(dim), nn.Linear(dim, vocab)

    def forward(self, memory: Memory, spans: Spans) -> Tensor:
        """Frames [B, T, D], and K alignments of each row -> [B * K, U + 1, V]; what is behind the end means nothing."""
        scores = self.logits(memory, spans)
        return scores.log_softmax(-1, torch.promote_types(scores.dtype, torch.float32))

    def logits(self, memory: Memory, spans: Spans) -> Tensor:
        """The same, unnormalised."""
        memory = Memory.of(Frames.of(memory.frames.values, memory.frames.mask))
        x = self.extractor(memory, spans)
        for block in self.alone:
            x = block(x)
        for block in self.both:
            x = block(x, memory)
        scores: Tensor = self.output(self.norm(x.values))
        return scores

    def loss(
        self, memory: Memory, targets: Tensor, lengths: Tensor, spans: Spans, *, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """Mean over the batch of `losses`; 0 for a batch of none."""
        losses = self.losses(memory, targets, lengths, spans, eos=eos, smoothing=smoothing)
        return losses.sum() / max(len(losses), 1)

    def losses(
        self, memory: Memory, targets: Tensor, lengths: Tensor, spans: Spans, *, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """Cross-entropy of each row's text [B, U] and its end [B], summed over the first `lengths` [B] tokens.

        A share `smoothing` of the wanted distribution is uniform over the vocabulary (arXiv 1512.00567, section 7). A
        text that has no spans has loss and gradient 0, as in CTC. ValueError for spans of another number of tokens.
        """
        lost = unaligned(spans, lengths)
        wanted, counts = ended(targets, lengths, eos)
        scores = self.logits(memory, spans)
        each = F.cross_entropy(scores.mT, wanted, reduction="none", label_smoothing=smoothing)
        return each.masked_fill(~counts | lost[:, None], 0.0).sum(1)

    def log_prob(self, memory: Memory, targets: Tensor, lengths: Tensor, spans: Spans, *, eos: int) -> Tensor:
        """Of texts and their ends [B * K], K texts for each memory; -inf for one that has no spans."""
        lost = unaligned(spans, lengths)
        wanted, counts = ended(targets, lengths, eos)
        found: Tensor = self(memory, spans).gather(2, wanted[..., None])[..., 0].masked_fill(~counts, 0.0).sum(1)
        return found.masked_fill(lost, -torch.inf)


def ended(targets: Tensor, lengths: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """Texts [N, U] and the end behind their first `lengths` [N] tokens [N, U + 1], and what of it counts."""
    at = torch.arange(targets.shape[1] + 1, device=targets.device)
    return F.pad(targets, [0, 1]).where(at < lengths[:, None], eos), at <= lengths[:, None]


def unaligned(spans: Spans, lengths: Tensor) -> Tensor:
    """Which texts have tokens [N] and no spans for them."""
    lost = (spans.length == 0) & (lengths > 0)
    if bool(((spans.length != lengths) & ~lost).any()):
        raise ValueError(f"spans of {spans.length.tolist()} tokens for texts of {lengths.tolist()}")
    return lost


class Aligned:
    """`decoder` over the alignments of `ctc`: trained and asked as an `AttentionDecoder` is, but that needs no `sos`.

    So it is a judge of the hypotheses of other searches too (`search.rescoring`). It owns nothing, and is no module.
    """

    def __init__(self, decoder: CassNatDecoder, ctc: CTC) -> None:
        self.decoder, self.ctc = decoder, ctc

    def spans(self, memory: Memory, targets: Tensor, lengths: Tensor) -> Spans:
        """Those of K texts for each memory, from what CTC says now."""
        with torch.no_grad():
            log_probs = self.ctc(Frames.of(memory.frames.values, memory.frames.mask))
        return spans_of(log_probs, targets, lengths, blank=self.ctc.blank)

    def loss(
        self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """As the decoder's; the loss of CTC is not in it."""
        spans = self.spans(memory, targets, lengths)
        return self.decoder.loss(memory, targets, lengths, spans, eos=eos, smoothing=smoothing)

    def losses(
        self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """As the decoder's [B]."""
        spans = self.spans(memory, targets, lengths)
        return self.decoder.losses(memory, targets, lengths, spans, eos=eos, smoothing=smoothing)

    def log_prob(self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int) -> Tensor:
        """As the decoder's [B * K]."""
        spans = self.spans(memory, targets, lengths)
        return self.decoder.log_prob(memory, targets, lengths, spans, eos=eos)
