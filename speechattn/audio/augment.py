"""Masks over features, in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speechattn.frames import Frames

__all__ = ["SpecAugment"]


class SpecAugment(nn.Module):
    """Time and frequency masks over features [B, T, D], in training only (arXiv 1904.08779, without time warping).

    Each of `time_masks` covers 0 to `time_share` of the row's own frames (adaptive width, arXiv 1912.05533), each of
    `frequency_masks` 0 to `frequency_width` features; width and place are uniform. What is masked becomes zero, or
    with `mean` the mean of the row. Frames that are not valid are not counted and not touched.
    """

    def __init__(
        self, *, time_masks: int = 10, time_share: float = 0.05, frequency_masks: int = 2, frequency_width: int = 27,
        mean: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= time_share <= 1 or min(time_masks, frequency_masks, frequency_width) < 0:
            raise ValueError(f"time masks {time_masks} x {time_share}, frequency masks {frequency_masks} x "
                             f"{frequency_width}: wanted no negative number, and a share of at most 1")  # fmt: skip
        self.time_masks, self.time_share = time_masks, time_share
        self.frequency_masks, self.frequency_width, self.mean = frequency_masks, frequency_width, mean

    def forward(self, x: Frames, *, generator: torch.Generator | None = None) -> Frames:
        """The same frames, masked; in `eval()` `x` itself."""
        if not self.training:
            return x
        lengths, features = x.lengths, x.values.shape[2]
        widest = (lengths * self.time_share).long()
        times = self.covered(x.mask.cumsum(1) - 1, lengths, widest, self.time_masks, generator)
        size = torch.full_like(lengths, features)
        places = torch.arange(features, device=lengths.device).expand(len(lengths), -1)
        bins = self.covered(places, size, size.clamp(max=self.frequency_width), self.frequency_masks, generator)
        fill = torch.zeros((), dtype=x.values.dtype, device=x.values.device)
        if self.mean:
            count = (lengths * features).clamp(min=1)[:, None, None]
            fill = x.values.sum((1, 2), keepdim=True) / count
        masked = (times[:, :, None] | bins[:, None]) & x.mask[:, :, None]
        return Frames(torch.where(masked, fill, x.values), x.mask)

    @staticmethod
    def covered(places: Tensor, size: Tensor, widest: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        """Which of `places` [B, N], counted in rows of `size` [B], lie under one of n masks of up to `widest` [B]."""
        where = generator.device if generator is not None else places.device
        chance = torch.rand(2, len(size), n, generator=generator, device=where, dtype=torch.float64).to(places.device)
        width = (chance[0] * (widest[:, None] + 1)).long()
        begin = (chance[1] * (size[:, None] - width + 1)).long()
        inside = (places[:, :, None] >= begin[:, None]) & (places[:, :, None] < (begin + width)[:, None])
        return inside.any(-1)
