"""The room that a decoder's cache of tokens, and its memory of frames, take in a batch whose rows differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from speechattn.cross.soft import SoftState
from speechattn.decoder.attention import DecoderState
from speechattn.stream import Buffer

__all__ = ["kept", "packed", "tidied", "without"]


def kept(decoder: DecoderState, n: Tensor) -> DecoderState:
    """Only the first `n` [B] tokens that were read are there."""
    mask = decoder.cache[0].past.mask
    return masked(decoder, mask & (mask.cumsum(1) <= n[:, None]))


def without(decoder: DecoderState, there: Tensor) -> DecoderState:
    """Of the last tokens only those that are `there` [B, U]."""
    mask = decoder.cache[0].past.mask
    return masked(decoder, torch.cat([mask[:, : mask.shape[1] - there.shape[1]], there], 1))


def masked(decoder: DecoderState, mask: Tensor) -> DecoderState:
    """With this mask of the tokens [B, N]."""
    return replace(decoder, cache=tuple(replace(c, past=Buffer(c.past.values, mask)) for c in decoder.cache))


def behind(mask: Tensor) -> Tensor | None:
    """The order [B, N'] that brings what `mask` [B, N] says is there to the end of as little room as that needs.

    None where there is no room to spare.
    """
    need, room = int(mask.sum(1).max()), mask.shape[1]
    return None if need == room else mask.byte().argsort(dim=1, stable=True)[:, room - need :]


def tidied(decoder: DecoderState) -> DecoderState:
    """Without the room of tokens that are not there."""
    mask = decoder.cache[0].past.mask
    order = behind(mask)
    if order is None:
        return decoder
    rows = torch.arange(len(order), device=order.device)[:, None]
    there = mask.gather(1, order)
    cache = tuple(replace(c, past=Buffer(c.past.values[rows, order], there)) for c in decoder.cache)
    return replace(decoder, cache=cache)


def packed(cross: tuple[Any, ...]) -> tuple[SoftState, ...]:
    """Without the room of frames that are not there."""
    order = behind(cross[0].mask)
    if order is None:
        return cross
    rows = torch.arange(len(order), device=order.device)[:, None]
    there = cross[0].mask.gather(1, order)

    def picked(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[rows, order].transpose(1, 2)

    return tuple(SoftState(picked(c.key), picked(c.value), there) for c in cross)
