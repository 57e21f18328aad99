"""Monotonic segmental attention (arXiv 2210.14742): where each label ends is a part of what the model says.

p(a, t | x) = prod_s p(t_s | t_(s-1), a_(s-1), x) p(a_s | frames of (t_(s-1), t_s], last labels); behind the last label
no segment ends any more, and what is left of the frames says that the text ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.cross.segmental import SegmentAttention, Segments
from speechattn.cross.soft import SoftState
from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Frames, Memory
from speechattn.linear import dropped, run

__all__ = ["Found", "LengthModel", "NeuralLength", "NoLength", "Segmental", "StaticLength"]

NONE = -torch.inf


class LengthModel(nn.Module):
    """When a segment ends: frame by frame, the log-weights of going on and of ending in this frame.

    A distance is the number of frames that the segment would have. Those above `reach` count as `reach`.
    """

    reach: int

    def forward(self, x: Tensor, last: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Frames [..., D], labels before the segment [...], distances [...] -> going on [...], ending [..., V or 1]."""
        raise NotImplementedError

    def unlike(self, dim: int, vocab: int) -> str:
        """Of what it is, where it does not fit frames of so many features and so many labels; else nothing."""
        return ""

    def observe(self, labels: Tensor, lengths: Tensor) -> None:
        """Learn without gradients from segments [N] of these `lengths` [N] that say `labels` [N]."""


class NeuralLength(LengthModel):
    """A Bernoulli draw in every frame: p(t) = s_t * product of 1 - s before t, s by a network with one hidden layer.

    It sees the frame, the label before the segment and the distance. Law: the sum over all ends in a number of frames
    is 1 minus the product of 1 - s over these.
    """

    def __init__(self, dim: int, vocab: int, inner: int = 64, *, reach: int = 25) -> None:
        super().__init__()
        if reach < 1:
            raise ValueError(f"distances up to {reach} frames: at least 1 is needed")
        self.reach = reach
        self.frame = nn.Linear(dim, inner)
        self.label = nn.Embedding(vocab, inner)
        self.distance = nn.Embedding(reach, inner)
        self.out = nn.Linear(inner, 1)

    def unlike(self, dim: int, vocab: int) -> str:
        mine = self.frame.in_features, self.label.num_embeddings
        return "" if mine == (dim, vocab) else f"{mine[0]} features and {mine[1]} labels"

    def forward(self, x: Tensor, last: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        place = self.distance(distance.clamp(1, self.reach) - 1)
        logit = self.out((run(self.frame, x) + self.label(last) + place).tanh())
        return F.logsigmoid(-logit[..., 0]), F.logsigmoid(logit)


class StaticLength(LengthModel):
    """exp(-scale * |length - mean of the label|): what is not normalised, and does not look at the frames.

    The means are those of the alignments that it was trained with; a label that was not seen has the mean of all.
    """

    count: Tensor
    total: Tensor

    def __init__(self, vocab: int, *, scale: float = 0.1, reach: int = 25) -> None:
        super().__init__()
        if reach < 1 or not scale >= 0:
            raise ValueError(f"distances up to {reach} frames, scale {scale}: wanted 1 or more, 0 or more")
        self.scale, self.reach = scale, reach
        self.register_buffer("count", torch.zeros(vocab, dtype=torch.long))  # which no cast makes less exact
        self.register_buffer("total", torch.zeros(vocab, dtype=torch.long))

    def unlike(self, dim: int, vocab: int) -> str:
        return "" if len(self.count) == vocab else f"{len(self.count)} labels"

    def means(self) -> Tensor:
        """The mean length of each label [V]."""
        count, total = self.count.double(), self.total.double()
        all_of_them = total.sum() / count.sum().clamp(min=1)
        return torch.where(count > 0, total / count.clamp(min=1), all_of_them)

    def forward(self, x: Tensor, last: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        away = (distance.clamp(1, self.reach)[..., None] - self.means()).abs()
        return x.new_zeros(distance.shape), -self.scale * away.to(x.dtype)

    def observe(self, labels: Tensor, lengths: Tensor) -> None:
        self.count.index_add_(0, labels, torch.ones_like(lengths))
        self.total.index_add_(0, labels, lengths.clamp(max=self.reach))


class NoLength(LengthModel):
    """All lengths alike; for comparison."""

    reach = 1

    def forward(self, x: Tensor, last: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        none = x.new_zeros(distance.shape)
        return none, none[..., None]


class Found(NamedTuple):
    """The best segmentations of texts: their `score` [B], and where labels end, `ends` [B, U]."""

    score: Tensor
    ends: Tensor


class Segmental(nn.Module):
    """The head: an attention decoder whose tokens look at their segments (`SegmentAttention`), and a length model.

    The decoder has one layer, and reads the last `history` tokens, the start among them. So what a token asks for
    depends on those alone, which makes the search for segments exact, and texts of any length are like short ones.
    Law: for texts that fit into the history it is the decoder itself. A deeper decoder is refused: what its second
    layer asks for would depend on all segments before.

    Frames are counted as far as they are valid. A segment has at least one.
    """

    def __init__(self, decoder: AttentionDecoder, length: LengthModel, *, history: int = 4) -> None:
        super().__init__()
        cross = [layer.cross for layer in decoder.layers]
        if len(cross) != 1 or not isinstance(cross[0], SegmentAttention):
            raise ValueError(
                f"a decoder of {len(cross)} layers with {', '.join(sorted({type(c).__name__ for c in cross}))}: wanted "
                "one layer with SegmentAttention, so that what a token asks for depends on the tokens alone"
            )
        if decoder.memory_positions is not None:
            raise ValueError("memory positions in a segmental decoder: what a segment says must not depend on the time")
        if wrong := length.unlike(decoder.dim, decoder.vocab):
            raise ValueError(
                f"the length model is of {wrong}; the decoder has {decoder.dim} features, {decoder.vocab} labels"
            )
        if not 1 <= history <= decoder.context:
            raise ValueError(f"a history of {history} tokens: wanted 1 to {decoder.context}, the decoder's context")
        self.decoder, self.length, self.history = decoder, length, history

    @property
    def cross(self) -> SegmentAttention:
        """The decoder's attention to the frames."""
        cross = self.decoder.layers[0].cross
        assert isinstance(cross, SegmentAttention)
        return cross

    def asked(self, tokens: Tensor) -> Tensor:
        """What each of the tokens [B, U], the start among them, asks for, behind its history [B, U, D]."""
        if tokens.shape[1] <= self.history:
            return self._asked(tokens)
        first = self._asked(tokens[:, : self.history])
        windows = tokens.unfold(1, self.history, 1)[:, 1:]
        rest = self._asked(windows.flatten(0, 1))[:, -1]
        return torch.cat([first, rest.view(*windows.shape[:2], -1)], 1)

    def asked_last(self, recent: Tensor, count: Tensor) -> Tensor:
        """Of hypotheses [N] the last entry of `asked` [N, D]: the first `count` [N] of `recent` [N, history] count."""
        return self._asked(recent)[torch.arange(len(count), device=count.device), count - 1]

    def _asked(self, tokens: Tensor) -> Tensor:
        """Of tokens [N, U] that are all of the history."""
        decoder, layer = self.decoder, self.decoder.layers[0]
        x = decoder.embed(tokens) * decoder.scale + decoder.positions[: tokens.shape[1]]
        x = dropped(x, decoder.dropout) if self.training else x
        normal = Frames(layer.self_norm(x), torch.ones_like(tokens, dtype=torch.bool))
        y, _ = layer.self_attention.step(normal, layer.self_attention.init_state(normal))
        return x + y.values

    def logits(self, asked: Tensor, read: SoftState, place: Segments) -> Tensor:
        """Scores of the labels [B * K, U, V] that `asked` [B * K, U, D] finds in the segments of `place`."""
        layer, drop = self.decoder.layers[0], self.decoder.dropout if self.training else 0.0
        seen, _ = self.cross.attend(layer.cross_norm(asked), read, place)
        x = asked + dropped(seen.context, drop)
        x = x + dropped(run(layer.ff, layer.ff_norm(x)), drop)
        return self.decoder.logits(self.decoder.norm(x))

    def log_probs(self, asked: Tensor, read: SoftState, place: Segments) -> Tensor:
        """The same, normalised."""
        scores = self.logits(asked, read, place)
        return scores.log_softmax(-1, torch.promote_types(scores.dtype, torch.float32))

    def losses(
        self, memory: Memory, targets: Tensor, lengths: Tensor, ends: Tensor, *, sos: int, eos: int,
        smoothing: float = 0.1, emit: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """-log p(text, segments) of each utterance [B]: of the first `lengths` [B] labels of `targets` [B, U].

        They end at `ends` [B, U], which grow. The labels' part is smoothed (arXiv 1512.00567, section 7); that of the
        length model counts `emit` times.
        """
        x = memory.frames.front()
        at = torch.arange(targets.shape[1] + 1, device=targets.device)
        behind = at[:-1] >= lengths[:, None]
        tokens = F.pad(targets.masked_fill(behind, eos), [1, 0], value=sos)
        ends = torch.where(behind, x.lengths[:, None], ends)
        whole = torch.cat([ends, x.lengths[:, None]], 1)
        scores = self.logits(self.asked(tokens), self.cross.read(Memory.of(x)), Segments.until(whole))
        wanted = F.pad(tokens[:, 1:], [0, 1], value=eos)
        each = F.cross_entropy(scores.mT, wanted, reduction="none", label_smoothing=smoothing)
        said = each.masked_fill(at > lengths[:, None], 0.0).sum(1)
        if self.training:
            sizes = whole[:, :-1] - F.pad(whole[:, :-2], [1, 0])[:, : targets.shape[1]]
            self.length.observe(targets[~behind], sizes[~behind])
        return said - emit * self.log_lengths(x, tokens, lengths, ends)

    def log_lengths(self, x: Frames, tokens: Tensor, lengths: Tensor, ends: Tensor) -> Tensor:
        """log p(segments | labels) [B], of frames whose valid ones come first, and `tokens` [B, U + 1] with a start."""
        frames = x.mask.shape[1]
        none = frames + 1  # labels that do not count end behind everything
        at = torch.arange(ends.shape[1], device=ends.device)
        ends = ends.masked_fill(at >= lengths[:, None], none).contiguous()
        time = torch.arange(frames + 1, device=ends.device).expand(len(ends), -1).contiguous()
        number = torch.searchsorted(ends, time, right=True)  # labels that have ended before each frame
        begun = F.pad(ends, [1, 0]).gather(1, number)[:, :-1]
        wait, end = self.length(x.values, tokens.gather(1, number)[:, :-1], time[:, 1:] - begun)
        label = F.pad(tokens, [0, 1]).gather(1, number[:, :-1] + 1)
        end = end.expand(*wait.shape, -1)
        end = end.gather(2, label.clamp(max=end.shape[2] - 1)[..., None])[..., 0]
        each = torch.where(number[:, 1:] > number[:, :-1], end, wait)
        return each.masked_fill(~x.mask, 0.0).sum(1)

    @torch.no_grad()
    def best_segmentation(self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int) -> Found:
        """Where the first `lengths` [B] labels of `targets` [B, U] end most probably, by the model as it is now.

        Exact: the maximum over all segmentations. With fewer frames than labels there is none: the score is -inf.
        """
        x = memory.frames.front()
        best = self._first(x)
        tables, origins = [best], []
        for weights in self._weights(x, targets, lengths, sos, eos):
            best, origin = (best[:, :, None] + weights).max(1)
            tables.append(best)
            origins.append(origin)
        rows = torch.arange(len(lengths), device=lengths.device)
        total = torch.stack(tables, 1)[rows, lengths] + self._finals(x, targets, lengths, sos, eos)
        score, end = total.max(1)
        ends = torch.zeros_like(targets)
        for s in reversed(range(targets.shape[1])):
            counts = s < lengths
            ends[:, s] = end.where(counts, 0)
            end = torch.where(counts, origins[s][rows, end], end)
        return Found(score, ends)

    @torch.no_grad()
    def log_prob(self, memory: Memory, targets: Tensor, lengths: Tensor, *, sos: int, eos: int) -> Tensor:
        """log p(text) [B]: the sum over all segmentations."""
        x = memory.frames.front()
        total = self._first(x)
        tables = [total]
        for weights in self._weights(x, targets, lengths, sos, eos):
            total = (total[:, :, None] + weights).logsumexp(1)
            tables.append(total)
        rows = torch.arange(len(lengths), device=lengths.device)
        return (torch.stack(tables, 1)[rows, lengths] + self._finals(x, targets, lengths, sos, eos)).logsumexp(1)

    def _first(self, x: Frames) -> Tensor:
        """Before the first label the boundary is 0 [B, T + 1]."""
        table = x.values.new_full((len(x.mask), x.mask.shape[1] + 1), NONE)
        table[:, 0] = 0
        return table

    def _passed(self, x: Frames, last: Tensor) -> tuple[Tensor, Tensor]:
        """Behind each boundary and the label `last` [B]: log-weights of going on up to each boundary, and of ending.

        -> [B, T + 1, T + 1], from boundary to boundary, and [B, T, reach, V or 1], in a frame at a distance.
        """
        rows, frames = x.mask.shape
        reach = min(self.length.reach, max(frames, 1))
        distance = torch.arange(1, reach + 1, device=last.device).expand(rows, frames, reach)
        wide = x.values[:, :, None].expand(-1, -1, reach, -1)
        wait, end = self.length(wide, last[:, None, None].expand_as(distance), distance)
        at = torch.arange(frames + 1, device=last.device)
        away = (at[None, :-1] - at[:, None] + 1).clamp(1, reach) - 1  # of frame j behind boundary i
        each = wait[:, at[:-1].expand_as(away), away].masked_fill(at[None, :-1] < at[:, None], 0.0)
        return F.pad(each.cumsum(2), [1, 0]), end

    def _weights(self, x: Frames, targets: Tensor, lengths: Tensor, sos: int, eos: int) -> Iterator[Tensor]:
        """For label after label, the log-weights of its segments [B, T + 1, T + 1], from boundary to boundary."""
        frames, count = x.mask.shape[1], targets.shape[1]
        behind = torch.arange(count, device=targets.device) >= lengths[:, None]
        tokens = F.pad(targets.masked_fill(behind, eos), [1, 0], value=sos)
        asked, windows = self.asked(tokens), self._windows(x)
        at = torch.arange(frames + 1, device=targets.device)
        size = at[None] - at[:, None]  # of the segment from i to j
        impossible = (size < 1) | (at > x.lengths[:, None])[:, None]
        frame = (at - 1).clamp(min=0).expand_as(size)
        for s in range(count):
            passed, end = self._passed(x, tokens[:, s])
            label = tokens[:, s + 1]
            if not frames:
                yield passed + NONE
                continue
            said = self._said(asked[:, s], label, windows, frames)
            index = label.clamp(max=end.shape[3] - 1)[:, None, None, None]
            end = end.gather(3, index.expand(*end.shape[:3], 1))[..., 0]
            weights = passed[:, :, frame[0]] + end[:, frame, size.clamp(1, end.shape[2]) - 1]
            yield (weights + said[:, frame, size.clamp(1, said.shape[2]) - 1]).masked_fill(impossible, NONE)

    def _windows(self, x: Frames) -> SoftState:
        """What can be seen of each end: rows of [B * T, ...] frames."""
        boundary, frames = self.cross.boundary, x.mask.shape[1]
        back = frames if boundary.back is None else min(boundary.back, frames)
        read = self.cross.read(Memory.of(x))
        space = [back, boundary.ahead]
        size = back + boundary.ahead

        def windows(y: Tensor) -> Tensor:  # [B, H, T, D] -> [B * T, H, W, D]
            near = F.pad(y, [0, 0, *space]).unfold(2, size, 1)[:, :, 1 : frames + 1]
            return near.permute(0, 2, 1, 4, 3).flatten(0, 1)

        mask = F.pad(read.mask, space).unfold(1, size, 1)[:, 1 : frames + 1].flatten(0, 1)
        return SoftState(windows(read.key), windows(read.value), mask)

    def _said(self, asked: Tensor, label: Tensor, windows: SoftState, frames: int) -> Tensor:
        """log p(label [B]) for the segments that end with each frame, by their size [B, T, reach]; asked [B, D]."""
        boundary, rows = self.cross.boundary, len(asked)
        most = frames if boundary.reach is None else min(boundary.reach, frames)
        size = torch.arange(1, most + 1, device=label.device)
        back = windows.mask.shape[1] - boundary.ahead
        end = torch.arange(1, frames + 1, device=label.device).clamp(max=back).repeat(rows)[:, None].expand(-1, most)
        asked = asked[:, None, None].expand(-1, frames, most, -1).flatten(0, 1)
        scores = self.log_probs(asked, windows, Segments(end - size, end))
        wanted = label[:, None, None].expand(-1, frames, most).reshape(-1, most, 1)
        return scores.gather(2, wanted).view(rows, frames, most)

    def _finals(self, x: Frames, targets: Tensor, lengths: Tensor, sos: int, eos: int) -> Tensor:
        """log p(no segment ends, then the text does) behind the last label at each boundary [B, T + 1]."""
        behind = torch.arange(targets.shape[1], device=targets.device) >= lengths[:, None]
        tokens = F.pad(targets.masked_fill(behind, eos), [1, 0], value=sos)
        rows = torch.arange(len(lengths), device=lengths.device)
        passed, _ = self._passed(x, tokens[rows, lengths])
        start = torch.arange(x.mask.shape[1] + 1, device=lengths.device).expand(len(lengths), -1)
        end = x.lengths[:, None].expand_as(start)
        asked = self.asked(tokens)[rows, lengths][:, None].expand(-1, start.shape[1], -1)
        said = self.log_probs(asked, self.cross.read(Memory.of(x)), Segments(start, end))[..., eos]
        waited = passed.gather(2, end[..., None])[..., 0]
        return (waited + said).masked_fill(start > end, NONE)
