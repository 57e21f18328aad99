"""What a training step is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from speechattn import tree
from speechattn.audio.clip import EVERY, Clip
from speechattn.audio.resample import Samples
from speechattn.audio.vision import Image
from speechattn.frames import Frames

__all__ = ["Batch", "collate"]


class Batch:
    """Utterances: `sound` samples [B, N], what is said, its translation where every one has one, ids, seconds [B].

    Where one has pictures the sound is a `Clip`, in which those of the others are invalid.

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
        seen = f", lips {list(self.sound.lips.values.shape)}" if isinstance(self.sound, Clip) else ""
        return f"Batch({len(self)} utterances, {seconds:.1f} s, samples {list(self.sound.values.shape)}{seen})"

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same on a device; Lightning calls this."""
        sound = tree.map(lambda leaf: leaf.to(device, non_blocking=non_blocking), self.sound)
        durations = self.durations_s.to(device, non_blocking=non_blocking)
        return Batch(sound=sound, texts=self.texts, translations=self.translations, ids=self.ids, durations_s=durations)

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU reads by itself; the data loader calls this."""
        sound = tree.map(Tensor.pin_memory, self.sound)
        durations = self.durations_s.pin_memory()
        return Batch(sound=sound, texts=self.texts, translations=self.translations, ids=self.ids, durations_s=durations)


def collate(
    samples: Sequence[Samples], *, texts: Sequence[str], translations: Sequence[str | None], ids: Sequence[str],
    rate: int = 16000, lips: Sequence[Image | None] = (),
) -> Batch:  # fmt: skip
    """Samples [N] of each utterance, padded with zeros at the end; and pictures [T, S, S] where there are any.

    A picture for each 640 samples: those beyond the longest utterance are left out.
    """
    lengths = torch.tensor([len(x) for x in samples])
    values = np.zeros((len(samples), max(map(len, samples), default=0)), np.float32)
    for row, x in zip(values, samples, strict=True):
        row[: len(x)] = x
    mask = torch.arange(values.shape[1]) < lengths[:, None]
    sound = Frames(torch.from_numpy(values), mask)
    whole = tuple(text for text in translations if text is not None)
    return Batch(
        sound=seen(sound, lips) if any(x is not None for x in lips) else sound, texts=tuple(texts), ids=tuple(ids),
        durations_s=lengths / rate, translations=whole if whole and len(whole) == len(translations) else None,
    )  # fmt: skip


def seen(sound: Frames, lips: Sequence[Image | None]) -> Clip:
    """Sound [B, N] and the pictures [T, S, S] of each row; all of one size."""
    size = next(x.shape[1:] for x in lips if x is not None)
    values = np.zeros((len(lips), -(-sound.mask.shape[1] // EVERY), *size), np.uint8)
    there = np.zeros(values.shape[:2], bool)
    for row, mask, x in zip(values, there, lips, strict=True):
        if x is not None:
            n = min(len(x), len(row))
            row[:n], mask[:n] = x[:n], True
    place = sound.mask.device
    frames = Frames(torch.from_numpy(values).to(place), torch.from_numpy(there).to(place))
    return Clip(sound.values, sound.mask, frames)
