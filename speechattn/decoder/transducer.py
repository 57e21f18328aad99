"""The transducer: encoder frames and the labels said so far -> the next label, or none in this frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention.triton import installed
from speechattn.decoder.predictor import Predictor
from speechattn.decoder.transducer_loss import (
    banded,
    bands,
    expanded,
    lattice_loss,
    occupancy,
    simple_arcs,
    transducer_loss,
)
from speechattn.errors import ModelError
from speechattn.frames import Frames

__all__ = ["FactoredJoint", "FusedLoss", "Joint", "Pruned", "PrunedLoss", "Transducer"]


class Joint(nn.Module):
    """z = W_o tanh(W_a f + W_l g + b): P(next | t, u) is softmax over the vocabulary, blank included (2002.02562).

    The two projections are made once for a frame and once for a label; what remains per pair is `scores`.
    """

    def __init__(self, frames: int, labels: int, inner: int, vocab: int, *, blank: int = 0) -> None:
        super().__init__()
        self.blank = blank
        self.frames = nn.Linear(frames, inner, bias=False)
        self.labels = nn.Linear(labels, inner)
        self.out = nn.Linear(inner, vocab)

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        """Projected frames and labels, broadcast to [..., J] -> what a softmax makes probabilities of [..., V]."""
        z: Tensor = self.out((a + b).tanh())
        return z

    def log_probs(self, a: Tensor, b: Tensor) -> Tensor:
        """Log-probabilities [..., V]."""
        return self.scores(a, b).log_softmax(-1)

    def forward(self, frames: Tensor, labels: Tensor) -> Tensor:
        """frames [B, T, D], labels [B, U + 1, D'] -> `scores` of each pair [B, T, U + 1, V]."""
        return self.scores(self.frames(frames)[:, :, None], self.labels(labels)[:, None])


class FactoredJoint(Joint):
    """Hybrid autoregressive transducer: whether something is said, then what (arXiv 2003.07705).

    P(blank) = sigmoid(z of blank); the other labels share the rest by a softmax of their own. `scores` are
    log-probabilities already.
    """

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        z: Tensor = self.out((a + b).tanh())
        silent = z[..., self.blank, None]
        here = torch.arange(z.shape[-1], device=z.device) == self.blank
        said = z.masked_fill(here, -torch.inf).log_softmax(-1) + F.logsigmoid(-silent)
        return torch.where(here, F.logsigmoid(silent), said)

    def log_probs(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scores(a, b)

    def internal(self, b: Tensor) -> Tensor:
        """Log-probabilities of the next label without any sound, blank impossible: the internal language model.

        A search with an external one subtracts them. `b` are projected labels [..., J].
        """
        z: Tensor = self.out(b.tanh())
        here = torch.arange(z.shape[-1], device=z.device) == self.blank
        return z.masked_fill(here, -torch.inf).log_softmax(-1)


class Transducer(nn.Module):
    """A label encoder and a joint network over encoder frames [B, T, D], whose valid ones are in front."""

    def __init__(self, predictor: Predictor, joint: Joint) -> None:
        super().__init__()
        if predictor.blank != joint.blank:
            raise ValueError(f"blank is {predictor.blank} to the label encoder and {joint.blank} to the joint network")
        self.predictor, self.joint, self.blank = predictor, joint, joint.blank

    def begins(self, x: Frames) -> Tensor:
        """What each frame says behind the start symbol alone: log-probabilities [B, T, V] of x [B, T, D].

        Where blank is best in many frames on end, nobody speaks.
        """
        start = torch.full((1,), self.blank, dtype=torch.long, device=x.mask.device)
        label, _ = self.predictor.step(start, self.predictor.init_state(1))
        return self.joint.log_probs(self.joint.frames(x.values), self.joint.labels(label)[:, None])

    def forward(self, x: Frames, labels: Tensor) -> Tensor:
        """`labels` [B, U] -> scores [B, T, U + 1, V]; what stands behind a row's labels changes only what is behind."""
        scores: Tensor = self.joint(x.values, self.predictor(labels))
        return scores

    def loss(self, x: Frames, labels: Tensor, lengths: Tensor) -> Tensor:
        """Minus the log-probability of the first `lengths` [B] of `labels` [B, U], as [B]."""
        labels = known(labels, lengths, self.blank)
        return transducer_loss(self(x, labels), labels, x.lengths, lengths, blank=self.blank)


def known(labels: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """Whatever pads the labels [B, U] becomes an id."""
    return labels.where(torch.arange(labels.shape[1], device=labels.device) < lengths[:, None], blank)


@dataclass(frozen=True)
class Pruned:
    """Both losses of each row [B]; a task adds the simple one with a small weight, in which the bands are learned."""

    simple: Tensor
    loss: Tensor


class PrunedLoss(nn.Module):
    """The joint network only where it matters: at `width` neighbouring labels of each frame (arXiv 2206.13236).

    Two linear heads, whose scores are added, are a transducer of their own. Its lattice is cheap, and the posterior of
    its arcs says which labels matter: memory is T * width * V instead of T * U * V. Law: with `width` > U the loss is
    the full one, in gradients too; else it is an upper bound. A row of more than (width - 1) labels for each of its
    frames has no way through the bands: its loss is infinite.
    """

    def __init__(self, frames: int, labels: int, vocab: int, *, width: int = 5) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"a band of {width}: at least 2 labels, or no label could ever be said")
        self.width = width
        self.frames, self.labels = nn.Linear(frames, vocab), nn.Linear(labels, vocab)

    def forward(self, transducer: Transducer, x: Frames, labels: Tensor, lengths: Tensor) -> Pruned:
        """`transducer` over `x` [B, T, D] and the first `lengths` [B] of `labels` [B, U]."""
        blank, joint, frames = transducer.blank, transducer.joint, x.lengths
        labels = known(labels, lengths, blank)
        g = transducer.predictor(labels)
        simple = simple_arcs(self.frames(x.values), self.labels(g), labels, blank=blank)
        with torch.no_grad():
            begin = bands(occupancy(simple, frames, lengths), frames, lengths, self.width)
        width = min(self.width, g.shape[1])
        near = banded(joint.labels(g), begin, width)
        log_probs = joint.log_probs(joint.frames(x.values)[:, :, None], near)
        exact = expanded(log_probs, labels, begin, blank=blank)
        return Pruned(lattice_loss(simple, frames, lengths), lattice_loss(exact, frames, lengths))


class FusedLoss(nn.Module):
    """The whole loss in kernels that keep a few numbers for each pair of frame and label, not one for each score.

    Law: it is `Transducer.loss`, gradients too, in float32 and in half precision, in which the scores are not rounded.
    Scores are computed again on the way back: a third more products, for memory of 6 numbers a pair (B, T, U + 1).
    """

    def forward(self, transducer: Transducer, x: Frames, labels: Tensor, lengths: Tensor) -> Tensor:
        """`transducer` over `x` [B, T, D] and the first `lengths` [B] of `labels` [B, U], as [B]."""
        joint, out = transducer.joint, transducer.joint.out
        f = joint.frames(x.values)
        if reason := self.unable(joint) or missing(f):
            raise unfit(reason)
        from speechattn_kernels.rnnt import rnnt

        labels = known(labels, lengths, transducer.blank)
        g = joint.labels(transducer.predictor(labels))
        bias = out.weight.new_zeros(out.out_features) if out.bias is None else out.bias
        loss: Tensor = rnnt(
            f, g.to(f.dtype), out.weight.to(f.dtype), bias.to(f.dtype), labels, x.lengths, lengths,
            blank=transducer.blank,
        )  # fmt: skip
        return loss

    def unable(self, joint: Joint) -> str | None:
        """Why the kernels cannot express a joint network: they know tanh, one linear layer and one softmax."""
        if type(joint).scores is not Joint.scores or type(joint).forward is not Joint.forward:
            return f"the scores of {type(joint).__name__} are not those of one softmax over W tanh(f + g) + b"
        if type(joint.out) is not nn.Linear:
            return f"the last layer is {type(joint.out).__name__}, not linear alone"
        return None


def unfit(reason: str) -> ModelError:
    """What to do where there can be no fused loss."""
    return ModelError(f"the fused loss: {reason}; TransducerObjective and PrunedTransducerObjective do without")


def missing(x: Tensor) -> str | None:
    """Why no kernel can run on `x` here; None if one can."""
    if not installed():
        return "triton is not installed (pip install 'speechattn[kernels]')"
    from speechattn_kernels.common import unable

    why: str | None = unable(x)
    return why
