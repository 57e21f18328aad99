"""Tokens of sound and lips, in the order in which they are complete."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechattn.frames import Frames
from speechattn.multimodal.speech_llm import Side, senses
from speechattn.stream import Buffer, Plan

__all__ = ["all_tokens", "apart", "every", "next_tokens"]


def next_tokens(
    sides: Sequence[Side], x: Frames, waiting: Sequence[Buffer], heard: Tensor, *, whole: bool
) -> tuple[Frames, Tensor, tuple[Buffer, ...]]:
    """Frames [B, T, D] behind `heard` [B] others, the last of which are `waiting` for each of the `sides`.

    -> tokens [B, N, D], how many frames were there when each was complete [B, N], and what waits now. Tokens of too few
    frames are made only if they need not be `whole`.
    """
    parts, left = [], []
    for i, (side, held) in enumerate(zip(sides, waiting, strict=True)):
        both = held.append(x.values, x.mask)
        frames = Frames.of(both.values, both.mask).front()
        used = frames.lengths // every(side) * every(side) if whole else frames.lengths
        tokens, at = pieces(side, senses(frames, sides)[i], used)
        at = (heard - held.length)[:, None] + at
        parts.append((tokens, at.minimum((heard + x.lengths)[:, None])))
        left.append(rest(frames, used, every(side) - 1))
    return *merged(parts), tuple(left)


def all_tokens(sides: Sequence[Side], x: Frames) -> tuple[Frames, Tensor]:
    """The same of whole utterances, in front [B, T, D]; tokens of too few frames are complete behind the end: T + 1."""
    parts = [pieces(*each, x.lengths) for each in zip(sides, senses(x, sides), strict=True)]
    return merged([(tokens, at.minimum(x.lengths[:, None] + 1)) for tokens, at in parts])


def apart(plan: Plan) -> bool:
    """One output for each block, of its own frames alone."""
    alone = plan.latency == 0 and plan.left == 0
    return plan.block is not None and alone and plan.ratio * plan.block == 1


def every(side: Side) -> int:
    """Frames of a token."""
    return side.compress.plan().block or 1


def pieces(side: Side, x: Frames, used: Tensor) -> tuple[Frames, Tensor]:
    """The first `used` [B] of frames [B, T, width] -> tokens [B, N, D], and how many frames [N] each is made with."""
    there = x.mask & (torch.arange(x.mask.shape[1], device=used.device) < used[:, None])
    tokens = side(Frames.of(x.values, there))
    return tokens, every(side) * torch.arange(1, tokens.mask.shape[1] + 1, device=used.device)


def rest(x: Frames, used: Tensor, room: int) -> Buffer:
    """What is behind the first `used` [B] of frames [B, T, D] that are in front; there is `room` for it."""
    at = x.lengths[:, None] - room + torch.arange(room, device=used.device)
    rows = torch.arange(len(at), device=used.device)[:, None]
    left = Frames.of(x.pad(1).values[rows, at.clamp(min=0)], at >= used[:, None])
    return Buffer(left.values, left.mask)


def merged(parts: Sequence[tuple[Frames, Tensor]]) -> tuple[Frames, Tensor]:
    """Tokens [B, N, D] of the senses in the order of the frames [B, N] with which they were complete."""
    x, at = Frames.cat([tokens for tokens, _ in parts]), torch.cat([at for _, at in parts], 1)
    late = at.masked_fill(~x.mask, torch.iinfo(at.dtype).max)
    order = late.argsort(dim=1, stable=True)[:, : int(x.lengths.max()) if len(x.mask) else 0]
    rows = torch.arange(len(order), device=order.device)[:, None]
    return Frames.of(x.values[rows, order], x.mask[rows, order]), at[rows, order]
