"""CTC as a part of a label-synchronous beam: the probability that the text begins with a prefix.

Watanabe et al., IEEE JSTSP 2017, algorithm 2, in closed form over time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.frames import Frames
from speechattn.tree import node

__all__ = ["CTCPrefixScorer", "CTCPrefixes"]

NONE = -torch.inf
LEAST = -1e3  # log-probabilities are not lower: differences of sums stay finite


@node
class CTCPrefixes:
    """The forward variables of K prefixes of each row, as logarithms.

    `log_probs` [B, T, V] of the frames that were read, of which `mask` [B, T] are there. `label` and `blank` [B, K, T]:
    paths of the frames so far that say the prefix and end in its last label, or in blank. A frame that is not there
    repeats the one before it; those in front have what holds before the first frame.

    `tokens`, `labels`, `blanks` [B, K, U]: of the prefix and of all shorter ones, it being the last of the U, their
    last token (-1: nothing was said, or there is no such prefix) and the forward variables at the last frame. They are
    what the next frames need. `worth` [B, K] is the prefix probability that was given out, `peak` [B, K] the frame
    where the last token most probably begins, -1 for none.
    """

    log_probs: Tensor
    mask: Tensor
    label: Tensor
    blank: Tensor
    tokens: Tensor
    labels: Tensor
    blanks: Tensor
    worth: Tensor
    peak: Tensor

    @property
    def begun(self) -> Tensor:
        """What `blank` is before the first frame [B, K, 1]: the empty prefix is certain."""
        return torch.where(self.tokens[..., -1:] < 0, 0.0, NONE).to(self.blank)

    @property
    def before(self) -> tuple[Tensor, Tensor]:
        """`label` and `blank` one frame earlier."""
        label = F.pad(self.label, [1, 0], value=NONE)[..., :-1]
        return label, torch.cat([self.begun, self.blank], -1)[..., :-1]

    @staticmethod
    def align(states: Sequence[CTCPrefixes]) -> list[CTCPrefixes]:
        """The same with one number of frames and of prefixes, the unused room in front."""
        frames, said = (
            max(sizes) for sizes in zip(*((s.mask.shape[1], s.tokens.shape[2]) for s in states), strict=True)
        )
        return [s._grown(frames - s.mask.shape[1], said - s.tokens.shape[2]) for s in states]

    def _grown(self, frames: int, said: int) -> CTCPrefixes:
        if not frames and not said:
            return self
        return CTCPrefixes(
            F.pad(self.log_probs, [0, 0, frames, 0]), F.pad(self.mask, [frames, 0]),
            F.pad(self.label, [frames, 0], value=NONE),
            torch.cat([self.begun.expand(-1, -1, frames), self.blank], -1),
            F.pad(self.tokens, [said, 0], value=-1), F.pad(self.labels, [said, 0], value=NONE),
            F.pad(self.blanks, [said, 0], value=NONE), self.worth, self.peak,
        )  # fmt: skip

    def trimmed(self) -> CTCPrefixes:
        """Without the frames in front that no row has, and without the prefixes."""
        frames = int((~self.mask.any(0)).long().cumprod(0).sum())
        gone = (self.labels == NONE) & (self.blanks == NONE) & (self.tokens < 0)
        said = int(gone.all(0).all(0).long().cumprod(0).sum()) if gone.numel() else 0
        said = min(said, self.tokens.shape[2] - 1)
        if not frames and not said:
            return self
        return CTCPrefixes(
            self.log_probs[:, frames:].clone(), self.mask[:, frames:].clone(), self.label[..., frames:].clone(),
            self.blank[..., frames:].clone(), self.tokens[..., said:].clone(), self.labels[..., said:].clone(),
            self.blanks[..., said:].clone(), self.worth, self.peak,
        )  # fmt: skip


class CTCPrefixScorer:
    """log psi(h) - log psi(g) of each candidate h = g.c: by how much less probable one more token makes the prefix.

    psi(h) sums over all texts that begin with h; the end `eos` gives the probability of the text g itself. Identity:
    psi(h) = p(h.eos) + sum over c of psi(h.c). `head` makes log-probabilities
    [B, T, V] of frames [B, T, D].

    With phi what g can be behind, psi(h) = sum over t of phi[t-1] x_t(c): candidates need no recursion, and the
    recursion of those that stay, r[t] = (r[t-1] + phi[t-1]) x_t(c), is a running sum of phi[t-1] over the product of
    x(c) before t, times the product up to t; in float64, whose precision the ratios of long products need.

    Frames that are new go on with the recursions of the prefix and of all shorter ones: nothing is approximate.
    """

    partial = True

    def __init__(self, head: Callable[[Frames], Frames], eos: int, *, blank: int = 0) -> None:
        self.head, self.eos, self.blank = head, eos, blank

    def start(self, x: Frames) -> CTCPrefixes:
        log_probs = self._heard(x[:0])
        one = torch.zeros(len(x.mask), 1, dtype=torch.float64, device=x.mask.device)
        track = one.new_zeros(len(one), 1, 0)
        never = torch.full_like(one, NONE)[..., None]
        return CTCPrefixes(
            log_probs, x.mask[:, :0], track, track.clone(), torch.full_like(never, -1, dtype=torch.long), never,
            one[..., None].clone(), one, torch.full_like(one, -1, dtype=torch.long),
        )  # fmt: skip

    def _heard(self, x: Frames) -> Tensor:
        """What the head says [B, T, V], in no less than float32."""
        log_probs = self.head(x).values
        return log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))

    def read(self, x: Frames, state: CTCPrefixes) -> CTCPrefixes:
        state = state.trimmed()
        log_probs = self._heard(x)
        if not log_probs.shape[1]:
            return state
        label, blank, labels, blanks = self._continued(log_probs, x.mask, state)
        return replace(
            state, log_probs=torch.cat([state.log_probs, log_probs], 1), mask=torch.cat([state.mask, x.mask], 1),
            label=torch.cat([state.label, label], -1), blank=torch.cat([state.blank, blank], -1), labels=labels,
            blanks=blanks,
        )  # fmt: skip

    def _continued(self, log_probs: Tensor, mask: Tensor, state: CTCPrefixes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The two tracks over new frames [B, K, N], and at their end the variables of all prefixes [B, K, U]."""
        tokens, label, blank = state.tokens, state.labels, state.blanks
        rest = log_probs[..., self.blank].double().clamp(min=LEAST).masked_fill(~mask, 0.0)
        if tokens.shape[2] == 1:  # nobody has said anything: only blanks are left
            silent = blank + rest.cumsum(1)[:, None]
            return torch.full_like(silent, NONE), silent, label, silent[..., -1:]
        rows, beam, said = tokens.shape
        at = tokens.clamp(min=0).flatten(1)[:, None].expand(-1, mask.shape[1], -1)
        spoken = log_probs.gather(2, at).double().clamp(min=LEAST).view(rows, -1, beam, said)
        spoken = spoken.masked_fill((tokens < 0)[:, None], NONE)
        repeated = F.pad(tokens[..., 1:] == tokens[..., :-1], [1, 0])
        there = mask[..., None, None]
        label_track, blank_track = [], []
        for t in range(mask.shape[1]):
            either = torch.logaddexp(label, blank)
            entered = F.pad(either, [1, 0], value=NONE)[..., :-1]
            entered = torch.where(repeated, F.pad(blank, [1, 0], value=NONE)[..., :-1], entered)
            now = torch.logaddexp(label, entered) + spoken[:, t]
            label, blank = (
                torch.where(there[:, t], now, label),
                torch.where(there[:, t], either + rest[:, t, None, None], blank),
            )
            label_track.append(label[..., -1])
            blank_track.append(blank[..., -1])
        return torch.stack(label_track, -1), torch.stack(blank_track, -1), label, blank

    def score(self, state: CTCPrefixes, candidates: Tensor | None) -> tuple[Tensor, CTCPrefixes]:
        rows, beam, frames = state.label.shape
        last = state.tokens[..., -1]
        label, blank = state.before
        either = torch.logaddexp(label, blank)
        vocab = state.log_probs.shape[2]
        if candidates is None:
            every = max(vocab, self.eos + 1)
            candidates = torch.arange(every, device=last.device).expand(rows, beam, -1)
            chances = F.pad(state.log_probs.exp() * state.mask[..., None], [0, every - vocab])
            found = summed(either, lambda w: w.to(chances.dtype) @ chances)
        else:
            at = candidates.clamp(0, vocab - 1)
            chances = state.log_probs.gather(2, at.flatten(1)[:, None].expand(-1, frames, -1)).exp()
            chances = (chances * state.mask[..., None]).view(rows, frames, beam, candidates.shape[2])
            found = summed(either, lambda w: (chances * w.to(chances.dtype).mT[..., None]).sum(1))
        again = summed(blank, lambda w: (self._chances(state, last) * w).sum(-1, keepdim=True))
        found = torch.where(candidates == last[..., None], again, found)
        found = found.masked_fill((candidates == self.blank) | (candidates >= vocab), NONE)
        whole = torch.logaddexp(state.labels[..., -1:], state.blanks[..., -1:])
        found = torch.where(candidates == self.eos, whole, found)
        worth = state.worth[..., None]
        return (found - worth).masked_fill(worth == NONE, NONE), state

    def _chances(self, state: CTCPrefixes, tokens: Tensor) -> Tensor:
        """Probabilities of one token [B, K] of each hypothesis over time [B, K, T]; zero where no frame is."""
        at = tokens.clamp(0, state.log_probs.shape[2] - 1)[:, None].expand(-1, state.mask.shape[1], -1)
        return (state.log_probs.gather(2, at).exp() * state.mask[..., None]).mT.double()

    def extend(self, state: CTCPrefixes, parents: Tensor, tokens: Tensor) -> CTCPrefixes:
        state = self.select(state, parents)
        there = state.mask[:, None]
        rest = state.log_probs[..., self.blank].double().clamp(min=LEAST).masked_fill(~state.mask, 0.0)[:, None]
        at = tokens.clamp(0, state.log_probs.shape[2] - 1)[:, None].expand(-1, state.mask.shape[1], -1)
        spoken = state.log_probs.gather(2, at).mT.double().clamp(min=LEAST).masked_fill(~there, 0.0)
        label, blank = state.before
        phi = torch.where((tokens == state.tokens[..., -1])[..., None], blank, torch.logaddexp(label, blank))
        starts = (phi + spoken).masked_fill(~there, NONE)
        label = running(phi.masked_fill(~there, NONE), spoken)
        blank = running(F.pad(label, [1, 0], value=NONE)[..., :-1].masked_fill(~there, NONE), rest)
        peak = torch.full_like(tokens, -1)
        if state.mask.shape[1]:
            peak = (state.mask.cumsum(1) - 1).gather(1, starts.argmax(-1))
        never = torch.full_like(state.worth, NONE)
        return CTCPrefixes(
            state.log_probs, state.mask, label, blank, torch.cat([state.tokens, tokens[..., None]], -1),
            torch.cat([state.labels, (label[..., -1] if label.shape[-1] else never)[..., None]], -1),
            torch.cat([state.blanks, (blank[..., -1] if blank.shape[-1] else never)[..., None]], -1),
            starts.logsumexp(-1), peak,
        )  # fmt: skip

    def select(self, state: CTCPrefixes, parents: Tensor) -> CTCPrefixes:
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        fields = ("label", "blank", "tokens", "labels", "blanks", "worth", "peak")
        label, blank, tokens, labels, blanks, worth, peak = (getattr(state, name)[rows, parents] for name in fields)
        return CTCPrefixes(state.log_probs, state.mask, label, blank, tokens, labels, blanks, worth, peak)

    def when(self, state: CTCPrefixes) -> Tensor:
        """The frame, counted since `start`, where the last token of each hypothesis most probably begins [B, K]."""
        return state.peak


def summed(log: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The logarithm of what `total` makes of exp(`log`) [B, K, T], kept in range: -> [B, K, C]."""
    if not log.shape[-1]:
        return torch.full((*log.shape[:2], 1), NONE, dtype=log.dtype, device=log.device)
    most = log.amax(-1, keepdim=True)
    most = most.masked_fill(most == NONE, 0.0)
    return total((log - most).exp()).to(log).log() + most


def running(entered: Tensor, stay: Tensor) -> Tensor:
    """r[t] = (r[t-1] + entered[t]) * exp(stay[t]), all as logarithms [..., T], from nothing."""
    sums = stay.cumsum(-1)
    return sums + (entered - (sums - stay)).logcumsumexp(-1)
