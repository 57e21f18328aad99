"""What a training step is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from speechattn.audio.resample import Samples
from speechattn.frames import Frames

__all__ = ["Batch", "collate"]


class Batch:
    """Utterances: `sound` samples [B, N], what is said, its translation where every one has one, ids, seconds [B].

    Not to be changed. Not a dataclass on purpose: Lightning (bf16-true, FSDP) and torch's FSDP would look into one and
    round the samples to half precision before any feature is computed.
    """

    __slots__ = ("durations_s", "ids", "sound", "texts", "translations")

    def __init__(
        self, *, sound: Frames, texts: tuple[str, ...], translations: tuple[str, ...] | None, ids: tuple[str, ...],
        durations_s: Tensor,
    ) -> None:  # fmt: skip
        self.sound, self.texts, self.translations, self.ids = sound, texts, translations, ids
        self.durations_s = durations_s

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        seconds = float(self.durations_s.sum())
        return f"Batch({len(self)} utterances, {seconds:.1f} s, samples {list(self.sound.values.shape)})"

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same on a device; Lightning calls this."""
        x = self.sound
        sound = Frames(x.values.to(device, non_blocking=non_blocking), x.mask.to(device, non_blocking=non_blocking))
        durations = self.durations_s.to(device, non_blocking=non_blocking)
        return Batch(sound=sound, texts=self.texts, translations=self.translations, ids=self.ids, durations_s=durations)

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU reads by itself; the data loader calls this."""
        sound = Frames(self.sound.values.pin_memory(), self.sound.mask.pin_memory())
        durations = self.durations_s.pin_memory()
        return Batch(sound=sound, texts=self.texts, translations=self.translations, ids=self.ids, durations_s=durations)


def collate(
    samples: Sequence[Samples], *, texts: Sequence[str], translations: Sequence[str | None], ids: Sequence[str],
    rate: int = 16000,
) -> Batch:  # fmt: skip
    """Samples [N] of each utterance, padded with zeros at the end."""
    lengths = torch.tensor([len(x) for x in samples])
    values = np.zeros((len(samples), max(map(len, samples), default=0)), np.float32)
    for row, x in zip(values, samples, strict=True):
        row[: len(x)] = x
    mask = torch.arange(values.shape[1]) < lengths[:, None]
    whole = tuple(text for text in translations if text is not None)
    return Batch(
        sound=Frames(torch.from_numpy(values), mask), texts=tuple(texts), ids=tuple(ids), durations_s=lengths / rate,
        translations=whole if whole and len(whole) == len(translations) else None,
    )  # fmt: skip
