"""The transducer's loss (Graves, arXiv 1211.3711): minus the log-probability of all alignments of the labels.

An alignment is a path through the lattice of frames t and labels said u: a blank goes on to the next frame, a label
stays in it, and the last step is a blank of the last frame behind the last label.

    u = 2   o -blank-> o -blank-> end        alpha[t, u] = alpha[t-1, u] + blank[t-1, u]
            |          |                                   (+) alpha[t, u-1] + label[t, u-1]
    u = 1   o -------> o                     log P = alpha[T-1, U] + blank[T-1, U]
            | label    |
    u = 0   o -------> o
           t = 0      t = 1                  (+) is the logarithm of a sum of exponentials
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Arcs", "Occupancy", "arcs", "banded", "bands", "expanded", "lattice_loss", "occupancy", "simple_arcs",
           "transducer_loss"]  # fmt: skip


class Arcs(NamedTuple):
    """Log-probabilities of a lattice: `blank` [B, T, U + 1], and `label` [B, T, U] of the next label."""

    blank: Tensor
    label: Tensor


class Occupancy(NamedTuple):
    """Posterior probability of each arc, in the shapes of `Arcs`, and the log-probability of the labels [B]."""

    blank: Tensor
    label: Tensor
    total: Tensor


def transducer_loss(scores: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor, *, blank: int = 0) -> Tensor:
    """Scores [B, T, U + 1, V] of a joint network, normalised or not -> minus log P of `labels` [B, U], as [B].

    `frames` [B] and `lengths` [B] say how much of each row counts. torchaudio's kernel (forward and backward in one
    pass, nothing stored beside the gradient), but for the rows that are `beyond` it `lattice_loss`: a batch with some
    of each is taken apart, which copies the scores. Without frames there is no alignment: infinite, and zero where
    there are no labels either.
    """
    rest = beyond(scores, frames, lengths)
    if bool(rest.all()):
        return plain_loss(scores, labels, frames, lengths, blank)
    if not bool(rest.any()):
        return kernel_loss(scores, labels, frames, lengths, blank)
    ways = ((plain_loss, rest.nonzero()[:, 0]), (kernel_loss, (~rest).nonzero()[:, 0]))
    found = [loss(scores[at], labels[at], frames[at], lengths[at], blank) for loss, at in ways]
    return torch.cat(found)[torch.cat([at for _, at in ways]).argsort()]


def beyond(scores: Tensor, frames: Tensor, lengths: Tensor) -> Tensor:
    """Rows [B] that torchaudio's kernel cannot do: float64, without frames, of one path where it is `astray` there."""
    if scores.dtype == torch.float64:
        return torch.ones_like(frames, dtype=torch.bool)
    return (frames < 2) | (lengths < 1) if astray(scores) else frames < 1


def astray(scores: Tensor) -> bool:
    """torchaudio's kernel of this device gives no loss for rows of one frame or of no label, but any number.

    So does that for CUDA, seen with version 2.11.0 on an H100: 1.4e-45 in place of 6.27. That for the CPU is right.
    """
    return scores.is_cuda


def plain_loss(scores: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """By `lattice_loss`, of what the longest row has of frames and labels, in float32 or float64."""
    scores, labels = within(scores, labels, frames, lengths)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return lattice_loss(arcs(scores.log_softmax(-1, wide), labels, blank=blank), frames, lengths)


def kernel_loss(scores: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """By torchaudio, in float32."""
    from torchaudio.functional import rnnt_loss

    scores, labels = within(scores, labels, frames, lengths)
    loss: Tensor = rnnt_loss(
        scores.float().contiguous(), labels.int(), frames.int(), lengths.int(), blank=blank, reduction="none"
    )
    return loss


def within(scores: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As many frames and labels as the longest rows have; 0 is what pads the labels."""
    most, longest = (int(x.max()) if len(x) else 0 for x in (frames, lengths))
    there = torch.arange(longest, device=labels.device) < lengths[:, None]
    return scores[:, :most, : longest + 1], torch.where(there, labels[:, :longest], 0)


def arcs(log_probs: Tensor, labels: Tensor, *, blank: int = 0) -> Arcs:
    """What the labels [B, U] use of log-probabilities [B, T, U + 1, V]."""
    b, t, u = log_probs.shape[0], log_probs.shape[1], labels.shape[1]
    index = labels[:, None, :, None].expand(b, t, u, 1)
    return Arcs(log_probs[..., blank], log_probs[:, :, :u].gather(3, index)[..., 0])


def lattice_loss(lattice: Arcs, frames: Tensor, lengths: Tensor) -> Tensor:
    """Minus the log-probability of all paths [B]: the reference, in any type, differentiable once."""
    loss: Tensor = Lattice.apply(lattice.blank, lattice.label, frames, lengths)
    return loss


class Lattice(torch.autograd.Function):
    """The derivative of log P by the log-probability of an arc is that arc's posterior probability."""

    @staticmethod
    def forward(ctx: Any, blank: Tensor, label: Tensor, frames: Tensor, lengths: Tensor) -> Tensor:
        """All arcs' posteriors at once: they are the gradient."""
        found = occupancy(Arcs(blank, label), frames, lengths)
        ctx.save_for_backward(found.blank, found.label)
        return -found.total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Minus them."""
        blank, label = ctx.saved_tensors
        scale = -grads[0][:, None, None]
        return blank * scale, label * scale, None, None


def occupancy(lattice: Arcs, frames: Tensor, lengths: Tensor) -> Occupancy:
    """Posterior probability of each arc: exp(alpha + arc + beta behind it - log P); zero where no path is."""
    blank, label = lattice
    b, t, n = blank.shape
    if not t or not b:
        total = torch.where(lengths > 0, -torch.inf, 0.0).to(blank.dtype)
        return Occupancy(torch.zeros_like(blank), torch.zeros_like(label), total)
    at, u = torch.arange(t, device=blank.device)[:, None], torch.arange(n, device=blank.device)
    inside = (at < frames[:, None, None]) & (u <= lengths[:, None, None])
    blank = blank.masked_fill(~inside, -torch.inf)
    label = F.pad(label, [0, 1], value=-torch.inf).masked_fill(~inside | (u >= lengths[:, None, None]), -torch.inf)
    down, up = skewed(blank), skewed(label)
    alpha, beta = forward_scores(down, up), backward_scores(down, up, frames, lengths)
    last = (frames + lengths - 1).clamp(min=0)[:, None, None]
    total = (alpha + down).gather(1, last.expand(b, 1, n))[:, 0].gather(1, lengths[:, None])[:, 0]
    total = torch.where(frames > 0, total, torch.where(lengths > 0, -torch.inf, 0.0))
    base = alpha - torch.where(total > -torch.inf, total, torch.inf)[:, None, None]
    after_blank, after_label = beta[:, 1:], F.pad(beta[:, 1:, 1:], [0, 1], value=-torch.inf)
    blank, label = (unskewed((base + x + y).exp(), t) for x, y in ((down, after_blank), (up, after_label)))
    return Occupancy(blank, label[..., :-1], total)


def skewed(x: Tensor) -> Tensor:
    """[B, T, N] -> [B, T + N - 1, N]: row t + u has what stood at (t, u), so that a row depends on the one before."""
    b, t, n = x.shape
    wide = F.pad(x.transpose(1, 2), [0, n], value=-torch.inf)  # each row of u moves by one more than the one before
    return wide.reshape(b, n * (t + n))[:, : n * (t + n - 1)].view(b, n, t + n - 1).transpose(1, 2)


def unskewed(x: Tensor, frames: int) -> Tensor:
    """The way back: [B, T + N - 1, N] -> [B, T, N]."""
    b, _, n = x.shape
    row = torch.arange(frames, device=x.device)[:, None] + torch.arange(n, device=x.device)
    return x.gather(1, row.expand(b, frames, n))


def forward_scores(down: Tensor, up: Tensor) -> Tensor:
    """alpha: the log-probability of all ways to a node, over anti-diagonals [B, T + U, U + 1]."""
    row = torch.full_like(down[:, 0], -torch.inf)
    row[:, 0] = 0
    rows = [row]
    for d in range(1, down.shape[1]):
        moved = F.pad((row + up[:, d - 1])[:, :-1], [1, 0], value=-torch.inf)
        row = torch.logaddexp(row + down[:, d - 1], moved)
        rows.append(row)
    return torch.stack(rows, 1)


def backward_scores(down: Tensor, up: Tensor, frames: Tensor, lengths: Tensor) -> Tensor:
    """beta: that of all ways from a node to the end, which lies behind the last frame [B, T + U + 1, U + 1]."""
    u = torch.arange(down.shape[2], device=down.device)
    last, end = u == lengths[:, None], (frames + lengths)[:, None]
    row = torch.full_like(down[:, 0], -torch.inf)
    rows = []
    for d in range(down.shape[1], -1, -1):
        if d < down.shape[1]:
            moved = F.pad(row[:, 1:], [0, 1], value=-torch.inf)
            row = torch.logaddexp(row + down[:, d], moved + up[:, d])
        row = torch.where(last & (end == d), 0, row)
        rows.append(row)
    return torch.stack(rows[::-1], 1)


def simple_arcs(frames: Tensor, labels_scores: Tensor, labels: Tensor, *, blank: int = 0) -> Arcs:
    """The lattice of a joint network that only adds: frames [B, T, V] + labels_scores [B, U + 1, V].

    Normalised without any tensor of T * U * V: the sum of exponentials of sums is a product of matrices
    (arXiv 2206.13236).
    """
    most, least = frames.amax(-1, keepdim=True).detach(), labels_scores.amax(-1, keepdim=True).detach()
    sums = (frames - most).exp() @ (labels_scores - least).exp().transpose(1, 2)
    norm = sums.clamp(min=torch.finfo(sums.dtype).tiny).log() + most + least.transpose(1, 2)
    u = labels.shape[1]
    mine = labels_scores[:, :u].gather(2, labels[..., None])[..., 0]
    theirs = frames.gather(2, labels[:, None].expand(-1, frames.shape[1], -1))
    only = frames[..., blank, None] + labels_scores[:, None, :, blank]
    return Arcs(only - norm, theirs + mine[:, None] - norm[:, :, :u])


def bands(found: Occupancy, frames: Tensor, lengths: Tensor, width: int) -> Tensor:
    """For each frame the first of `width` neighbouring u that hold most of the probability [B, T].

    They begin at 0, end at the last label, never go back, and overlap, so that a path leads through
    (arXiv 2206.13236). All of them, from 0, where `width` reaches over all.
    """
    mass = found.blank + F.pad(found.label, [0, 1])
    t, n = mass.shape[1:]
    if width >= n or not t:
        return frames.new_zeros(mass.shape[:2])
    begin = F.pad(mass, [0, width - 1]).unfold(2, width, 1).sum(-1).argmax(-1)
    at = torch.arange(t, device=mass.device)
    final = (lengths - width + 1).clamp(min=0)[:, None]
    begin = torch.where(at >= frames[:, None] - 1, final, torch.minimum(begin, final))
    steps = width - 1  # no farther from one frame to the next, or their bands would not overlap
    # Not so late that a later band is out of reach, then never back, then not beyond what frame 0 can reach.
    needed = (begin - steps * at).flip(1).cummax(1).values.flip(1) + steps * at
    begin = torch.maximum(begin, needed).cummax(1).values
    return torch.minimum(torch.minimum(begin, steps * at), final)


def banded(x: Tensor, begin: Tensor, width: int) -> Tensor:
    """Entries of labels [B, U + 1, D] -> those of each frame's band [B, T, width, D]; the last one, beyond the end."""
    at = (begin[..., None] + torch.arange(width, device=x.device)).clamp(max=x.shape[1] - 1)
    return x[torch.arange(len(x), device=x.device)[:, None, None], at]


def expanded(log_probs: Tensor, labels: Tensor, begin: Tensor, *, blank: int = 0) -> Arcs:
    """Log-probabilities in bands [B, T, width, V] -> the lattice, in which nothing leads outside of the bands."""
    b, t, width, _ = log_probs.shape
    n = labels.shape[1] + 1
    at = begin[..., None] + torch.arange(width, device=begin.device)
    token = F.pad(labels, [0, 1], value=blank)[torch.arange(b, device=at.device)[:, None, None], at.clamp(max=n - 1)]
    index = at.where(at < n, n)  # what is beyond the end goes to a column that is cut off
    nothing = log_probs.new_full((b, t, n + 1), -torch.inf)
    blanks = nothing.scatter(2, index, log_probs[..., blank])
    said = nothing.scatter(2, index, log_probs.gather(3, token[..., None])[..., 0])
    return Arcs(blanks[..., :n], said[..., : n - 1])
