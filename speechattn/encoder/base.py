"""What all encoders share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from speechattn.attention.position import Position
from speechattn.frames import Frames
from speechattn.stream import Serial, Stream

__all__ = ["Encoder", "PositionMaker"]

PositionMaker = Callable[[int, int], Position]  # from width and heads


class Encoder(Serial):
    """Features [B, T, mels] -> frames [B, T / factor, dim]: `subsample`, then `layers`, then `norm`."""

    subsample: Stream
    layers: Serial
    norm: Stream
    revise: int = 0  # frames of a chunk that a listener reads again with the next one

    def __init__(self, subsample: Stream, layers: Sequence[Stream], norm: Stream, *, dim: int) -> None:
        super().__init__(subsample=subsample, layers=Serial(*layers), norm=norm)
        self.dim = dim

    def listening(self, front_end: Stream) -> Stream:
        """Samples [B, N] -> frames [B, T, dim], behind a `front_end`: what a live session steps."""
        return Serial(front_end=front_end, encoder=self)

    def heard(self, x: Frames) -> Frames:
        """What a listener would hear of the whole of these features, for training: `forward`, or what is read again."""
        frames: Frames = self(x)
        return frames

    def intermediate(self, x: Frames, layers: Sequence[int]) -> tuple[Frames, list[Frames]]:
        """As `forward`, and what the given layers (from 0) say, each without its delay.

        For intermediate CTC (arXiv 2102.03216) and distillation. ValueError for a layer that there is none of.
        """
        depth = len(self.layers.members)
        if any(not 0 <= layer < depth for layer in layers):
            raise ValueError(f"layers {list(layers)}: there are 0 to {depth - 1}")
        x, seen = self.subsample(x), list[Frames]()
        for layer in self.layers.members:
            x = layer(x)
            seen.append(x)
        return self.norm(x), [seen[layer] for layer in layers]


def made(position: PositionMaker | None, dim: int, heads: int) -> Position | None:
    """A position for one layer."""
    return None if position is None else position(dim, heads)
