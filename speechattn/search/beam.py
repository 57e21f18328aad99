"""What every search shares: hypotheses as a state tree, batched over utterances and sessions.

K is the size of the beam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.decoder.attention import Head
from speechattn.frames import Frames
from speechattn.search.draft import Draft
from speechattn.search.phrases import Phrases
from speechattn.tree import node

__all__ = ["Beam", "Hypothesis", "Prefixes", "Search"]


@dataclass(frozen=True)
class Hypothesis:
    """One answer of a search.

    `score` is what the search ranks by: a weighted sum of log-probabilities. For each of the `tokens`, `log_probs` is
    what the model gave to it where it was said, and `spans` its first and last-plus-one frame, counted since the
    stream began.
    """

    tokens: tuple[int, ...]
    score: float
    log_probs: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]


@node
class Prefixes:
    """What the K hypotheses of each row have said and is not committed yet.

    `tokens`, `starts`, `ends` (frames), `log_probs` are [B, K, Cap]; the first `length` [B, K] of them are there,
    the others are zero.
    """

    tokens: Tensor
    starts: Tensor
    ends: Tensor
    log_probs: Tensor
    length: Tensor

    @classmethod
    def empty(cls, like: Tensor, size: int) -> Prefixes:
        """Nothing said by `size` hypotheses of each row of `like` [B, ...], whose type the log-probabilities have."""
        rows = like.shape[0]
        whole = torch.zeros(rows, size, 0, dtype=torch.long, device=like.device)
        length = torch.zeros(rows, size, dtype=torch.long, device=like.device)
        return cls(whole, whole.clone(), whole.clone(), like.new_zeros(rows, size, 0), length)

    def _map(self, f: Any) -> Prefixes:
        return Prefixes(f(self.tokens), f(self.starts), f(self.ends), f(self.log_probs), self.length)

    @staticmethod
    def align(prefixes: Sequence[Prefixes]) -> list[Prefixes]:
        """The same in one capacity."""
        most = max(p.tokens.shape[2] for p in prefixes)
        return [p._map(lambda x: F.pad(x, [0, most - x.shape[2]])) for p in prefixes]

    def select(self, parents: Tensor) -> Prefixes:
        """Hypothesis j of a row becomes what `parents` [B, K'] says it was."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        return replace(self._map(lambda x: x[rows, parents]), length=self.length[rows, parents])

    def append(self, tokens: Tensor, starts: Tensor, ends: Tensor, log_probs: Tensor, grows: Tensor) -> Prefixes:
        """One token [B, K] more for the hypotheses where `grows` [B, K]."""
        said = self
        if not self.tokens.shape[2] or bool((self.length[grows] >= self.tokens.shape[2]).any()):
            room = max(16, self.tokens.shape[2])
            said = self._map(lambda x: F.pad(x, [0, room]))
        at = said.length.clamp(max=said.tokens.shape[2] - 1)[..., None]

        def put(old: Tensor, new: Tensor) -> Tensor:
            now = torch.where(grows, new.to(old.dtype), old.gather(2, at)[..., 0])
            return old.scatter(2, at, now[..., None])

        return Prefixes(
            put(said.tokens, tokens), put(said.starts, starts), put(said.ends, ends), put(said.log_probs, log_probs),
            said.length + grows,
        )  # fmt: skip

    def drop(self, n: Tensor) -> Prefixes:
        """Forget the first `n` [B] tokens of every hypothesis."""
        length = (self.length - n[:, None]).clamp(min=0)
        cap = int(length.max()) if length.numel() else 0
        at = torch.arange(cap, device=n.device) + n[:, None]
        at = at.clamp(max=max(self.tokens.shape[2] - 1, 0))[:, None].expand(*length.shape, cap)
        there = torch.arange(cap, device=n.device) < length[..., None]
        return replace(self._map(lambda x: x.gather(2, at) * there), length=length)


@node
class Beam:
    """The K hypotheses of each row, best first.

    `score` [B, K], -inf where there is none; `frames` [B] counts the valid frames that were read since the stream
    began; `state` is the search's own, a tree with the batch first in every leaf.
    """

    said: Prefixes
    score: Tensor
    frames: Tensor
    state: Any

    def agreed(self, share: float = 1.0) -> Tensor:
        """How many first tokens of the best hypothesis are said by hypotheses with this share of probability [B].

        The probabilities are those that the scores have among the hypotheses of the row; 1 asks every one of them.
        """
        tokens, length = self.said.tokens, self.said.length
        alive = self.score > -torch.inf
        at = torch.arange(tokens.shape[2], device=tokens.device)
        same = (tokens == tokens[:, :1]) & (at < torch.minimum(length, length[:, :1])[..., None])
        same = same.long().cumprod(2).bool()
        if share >= 1:
            enough = (same | ~alive[..., None]).all(1)
        else:
            weight = self.score.masked_fill(~alive, -torch.inf).softmax(1).nan_to_num()
            enough = (same * weight[..., None]).sum(1) >= share
        return enough.sum(1) * alive.any(1)


class Search:
    """Frames of an encoder -> hypotheses.

    Law: for any split of the frames into pieces, `finish` behind the `step`s gives the same hypotheses, and a row
    does not know its batch: frames that are not valid are not there.
    """

    size: int = 1  # hypotheses kept
    phrases: Phrases | None = None  # that are preferred
    peeks: bool = False  # `peek` looks at what is ahead
    prompt: bool = True  # its hypotheses say what was heard so far; else they may lag behind
    heads: tuple[Head, ...] = ()  # whose attention `looks` gives
    reorders: bool = False  # its words need not stand in the order of the sound
    hears: bool = False  # `waited` tells when an utterance is over, because no head of the model hears where it is

    def start(self, x: Frames) -> Beam:
        """Nothing said, for the rows, type and device of `x` [B, T, D]; its frames are not read."""
        raise NotImplementedError

    def start_at(self, x: Frames, heard: Tensor) -> Beam:
        """The same where `heard` [B] frames of the stream went before, which nobody remembers."""
        return replace(self.start(x), frames=heard)

    def bias(self, beam: Beam, root: int | Tensor) -> Beam:
        """The hypotheses of every row, or of row b by `root` [B], go over to another set of `phrases`."""
        raise ValueError(f"{type(self).__name__} takes no phrases")

    def step(self, x: Frames, beam: Beam) -> Beam:
        """Read the next frames [B, T, D]. `beam` is consumed."""
        raise NotImplementedError

    def peek(self, x: Frames, ahead: Frames, beam: Beam) -> Beam:
        """As `step`, with a glimpse of frames [B, T', D] `ahead` that are not read yet: they may come otherwise.

        What is said now may depend on them, and so may what is committed of it; nothing else. Only where it `peeks`.
        """
        return self.step(x, beam)

    def finish(self, beam: Beam) -> Beam:
        """No frame will follow."""
        return beam

    def room(self, beam: Beam) -> Tensor:
        """The share [B] of what can be said before the search must begin anew that is left: all, where it need not."""
        return torch.ones(len(beam.frames), device=beam.frames.device)

    def waited(self, beam: Beam) -> Tensor:
        """Frames [B] since the best hypothesis said something; 0 where it has said nothing. Only where it `hears`."""
        raise ValueError(f"{type(self).__name__} does not hear where nobody speaks")

    def commit(self, beam: Beam, n: Tensor) -> Beam:
        """The first `n` [B] tokens of the best hypothesis are final: forget them, and whoever says otherwise.

        ValueError when the best hypothesis has fewer.
        """
        said = beam.said
        if not bool(n.any()):
            return beam
        if bool((n > said.length[:, 0]).any()):
            raise ValueError(f"commit {n.tolist()} tokens of hypotheses of {said.length[:, 0].tolist()}")
        at = torch.arange(said.tokens.shape[2], device=n.device)
        other = (said.tokens != said.tokens[:, :1]) | (at >= said.length[..., None])
        wrong = (other & (at < n[:, None])[:, None]).any(-1)
        if bool(wrong.any()):
            order = wrong.long().argsort(dim=1, stable=True)  # those that stay keep their order, in front
            beam = self.select(replace(beam, score=beam.score.masked_fill(wrong, -torch.inf)), order)
        return replace(beam, said=beam.said.drop(n))

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        """Hypothesis j of each row becomes what `parents` [B, K] says it was, with all that belongs to it."""
        raise NotImplementedError

    def hypotheses(self, beam: Beam) -> list[list[Hypothesis]]:
        """The answers of each row, best first, as far as they are not committed."""
        said = beam.said
        tokens, starts, ends = said.tokens.tolist(), said.starts.tolist(), said.ends.tolist()
        log_probs, length, scores = said.log_probs.tolist(), said.length.tolist(), beam.score.tolist()
        return [
            [
                Hypothesis(
                    tuple(tokens[b][k][:n]), scores[b][k], tuple(log_probs[b][k][:n]),
                    tuple(zip(starts[b][k][:n], ends[b][k][:n], strict=True)),
                )
                for k, n in enumerate(length[b])
                if scores[b][k] > float("-inf")
            ]
            for b in range(len(length))
        ]  # fmt: skip

    def looks(self, beam: Beam) -> list[Draft]:
        """The best hypothesis of each row, as far as it is not committed, as a policy wants to see it.

        With where `heads` looked, at frames since the search began; `first` counts nothing.
        """
        drafts = []
        for found, frames in zip(self.hypotheses(beam), beam.frames.tolist(), strict=True):
            tokens, log_probs = (found[0].tokens, found[0].log_probs) if found else ((), ())
            weights = torch.zeros(0, len(tokens) + 1, frames)
            drafts.append(Draft(torch.tensor(tokens, dtype=torch.long), torch.tensor(log_probs), weights, (), 0, False))
        return drafts

    @torch.inference_mode()
    def decode(self, x: Frames) -> list[list[Hypothesis]]:
        """The hypotheses of whole utterances."""
        return self.hypotheses(self.finish(self.step(x, self.start(x))))
