"""AlignAtt (Papi, Turchi, Negri, arXiv 2305.11408): a token is safe when it looks away from the newest frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.decoder.attention import Head
from speechattn.policy import Source
from speechattn.search import Draft

__all__ = ["AlignAtt", "focus", "median_filter", "standardise"]


def standardise(weights: Tensor) -> Tensor:
    """Each frame's weights over the tokens, with mean 0 and deviation 1: frames that every token looks at drop out.

    `weights` [N, R, T]. With few rows the plain z-score is useless (one row: 0/0; two rows: every frame becomes +1 or
    -1 and the peak is lost), so the head's deviation over all frames, divided by the number of rows, is added to each
    frame's own; a single row has nothing to be compared with and stays as it is.
    """
    rows = weights.shape[1]
    if rows < 2:
        return weights
    centred = weights - weights.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    overall = centred.square().mean((1, 2), keepdim=True).sqrt()
    return centred / (deviation + overall / rows).clamp(min=torch.finfo(weights.dtype).tiny)


def median_filter(weights: Tensor, width: int) -> Tensor:
    """Median over `width` neighbouring frames [..., T], edges reflected; rows shorter than the width stay.

    The least and the greatest of half of them and two more are none: they go, and the next frame comes, until one is
    left. On a CPU that takes a tenth of the time of sorting each window. ValueError for an even width.
    """
    frames = weights.shape[-1]
    if width <= 1 or frames <= width // 2:
        return weights
    if width % 2 == 0:
        raise ValueError(f"the median of {width} frames is none of them: an odd width is needed")
    padded = F.pad(weights, [width // 2] * 2, mode="reflect")
    rest = [padded[..., i : i + frames] for i in range(width)]
    some, rest = rest[: width // 2 + 2], rest[width // 2 + 2 :]
    while len(some) > 1:
        for i in range(1, len(some)):
            some[0], some[i] = torch.minimum(some[0], some[i]), torch.maximum(some[0], some[i])
        for i in range(1, len(some) - 1):
            some[i], some[-1] = torch.minimum(some[i], some[-1]), torch.maximum(some[i], some[-1])
        some, rest = [*some[1:-1], *rest[:1]], rest[1:]
    return some[0]


def focus(
    draft: Draft, heads: tuple[Head, ...], *, drop_last: int, normalise: bool, median: int, before: int = 0
) -> Tensor:  # fmt: skip
    """Where the decoder looked when it said each token [U, T]: mean over `heads`, less the last `drop_last` frames.

    With `before` the rows of so many tokens before the draft come first.
    """
    weights = draft.alignment(heads)
    weights = weights[..., : max(weights.shape[-1] - drop_last, 1)]
    first = weights.shape[1] - 1 - len(draft.tokens) - before
    weights = (standardise(weights) if normalise else weights)[:, first:-1]
    return median_filter(weights, median).mean(0)


@dataclass(frozen=True)
class AlignAtt:
    """Commit tokens up to the first whose attention peaks in the last `frame_threshold` frames.

    In a pause there is no word that more sound could change, and `pause_threshold` frames are enough. Elsewhere a token
    with a probability below `doubt` has three times the threshold: a sound that was not understood is waited for.
    `rewind_threshold` stops at a token that looks that many frames behind the one before it (None: it may, as
    translation reorders). `drop_last` frames are not looked at: some models park attention there.
    """

    heads: tuple[Head, ...]
    frame_threshold: int = 25
    pause_threshold: int = 5
    drop_last: int = 0
    normalise: bool = True
    median: int = 7
    rewind_threshold: int | None = 200
    doubt: float = 0.0

    @classmethod
    def whisper(cls, alignment_heads: tuple[Head, ...], frame_threshold: int = 25) -> AlignAtt:
        """Alignment heads, z-score over tokens, median filter; frames of 20 ms (Simul-Whisper, arXiv 2406.10052)."""
        return cls(alignment_heads, frame_threshold)

    @classmethod
    def fbk(cls, layer: int, heads: int, frame_threshold: int = 4) -> AlignAtt:
        """Mean of the heads of one layer, last frame dropped, no normalisation; frames of 40 ms in the paper."""
        every = tuple((layer, head) for head in range(heads))
        return cls(
            every, frame_threshold, frame_threshold, drop_last=1, normalise=False, median=1, rewind_threshold=None
        )

    def initial(self) -> None:
        """Nothing to remember."""

    def accept(self, draft: Draft, source: Source, state: None) -> tuple[int, None]:
        """Tokens before the first that looks too late or jumps back too far."""
        if source.finished or not len(draft.tokens):
            return len(draft.tokens), None
        peak, frames = self.peaks(draft)
        unsafe = peak >= frames - self._thresholds(draft, source)
        if self.rewind_threshold is not None:
            unsafe[1:] |= peak[1:] < peak[:-1] - self.rewind_threshold
        return int(unsafe.nonzero()[0, 0]) if unsafe.any() else len(peak), None

    def why(self, draft: Draft, source: Source, state: None, n: int) -> str:
        """Which frame it looks at."""
        peak, frames = self.peaks(draft)
        here, threshold = int(peak[n]), int(self._thresholds(draft, source)[n])
        if here >= frames - threshold:
            return f"looks at frame {here}, within {threshold} of the newest {frames}"
        back = int(peak[n - 1]) - here if n else 0
        if self.rewind_threshold is not None and back > self.rewind_threshold:
            return f"looks at frame {here}, {back} behind the token before it (more than {self.rewind_threshold})"
        return ""

    def peaks(self, draft: Draft, before: int = 0) -> tuple[Tensor, int]:
        """The frame at which each token looks, of so many `before` the draft and of those in it; and the frames."""
        where = focus(
            draft, self.heads, drop_last=self.drop_last, normalise=self.normalise, median=self.median, before=before
        )
        return where.argmax(-1), where.shape[-1]

    def _thresholds(self, draft: Draft, source: Source) -> Tensor:
        """Frames at the end that each token [U] must not look at."""
        if source.paused:
            return torch.full_like(draft.tokens, min(self.frame_threshold, self.pause_threshold))
        return torch.where(draft.log_probs.exp() < self.doubt, 3, 1) * self.frame_threshold
