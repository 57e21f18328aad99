"""What reaches the top of several layers: attention rollout and attention flow (Abnar & Zuidema, arXiv 2005.00928)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechattn.errors import InputError

__all__ = ["flow", "rollout"]

MOST = 48  # frames of a flow, which is as many maximum flows as it has pairs
UNIT = 1 << 28  # capacities are whole numbers: 1 is so many
Array = np.ndarray[Any, np.dtype[Any]]


def mixing(weights: Sequence[Tensor], residual: float) -> list[Tensor]:
    """Each layer [B, H, T, T] as one matrix [B, T, T] with rows that sum to 1: the mean of its heads, and the residual.

    A share `residual` is the frame itself; a frame that looks nowhere is itself alone. ValueError for layers of
    different lengths, and for a share that is none.
    """
    if not weights or len({w.shape[-2:] for w in weights}) > 1 or weights[0].shape[-1] != weights[0].shape[-2]:
        sizes = ", ".join("x".join(map(str, w.shape[-2:])) for w in weights)
        raise ValueError(f"layers of {sizes or 'nothing'}: wanted frames by frames, as many in each layer")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual {residual}: wanted a share from 0 to 1")
    own = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    found = []
    for layer in weights:
        mean = layer.mean(1)
        rows = mean.sum(-1, keepdim=True)
        mean = torch.where(rows > 0, mean / rows.clamp(min=torch.finfo(rows.dtype).tiny), own)
        found.append((1 - residual) * mean + residual * own)
    return found


def rollout(weights: Sequence[Tensor], *, residual: float = 0.5) -> Tensor:
    """How much of each input frame is in each frame at the top [B, T, T]: the product of the layers' matrices (eq. 1).

    `weights` [B, H, T, T] of each layer, the lowest first; of layers one above the other, never side by side in one
    block. Rows sum to 1.
    """
    layers = mixing(weights, residual)
    product = layers[0]
    for layer in layers[1:]:
        product = layer @ product
    return product


def flow(weights: Sequence[Tensor], *, residual: float = 0.5) -> Tensor:
    """The most that can flow from each frame at the top down to each input frame [B, T, T] (section 4).

    Layers are pipes whose capacities are the matrices of `rollout`. T * T maximum flows: ValueError beyond 48 frames.
    InputError without scipy.
    """
    layers = torch.stack(mixing(weights, residual), 1).double().cpu().numpy()  # [B, L, T, T]
    if layers.shape[-1] > MOST:
        raise ValueError(f"{layers.shape[-1]} frames: a flow of more than {MOST} takes too long; average some first")
    found = torch.from_numpy(np.stack([flows(row) for row in layers]) if len(layers) else layers[:, 0])
    return found.to(weights[0])


def flows(layers: Array) -> Array:
    """Of one utterance: capacities [L, T, T], the lowest layer first -> [T, T]."""
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow
    except ImportError as error:
        raise InputError("attention flow needs scipy: pip install 'speechattn[plot]'") from error
    depth, frames = layers.shape[:2]
    above, below = np.meshgrid(np.arange(frames), np.arange(frames), indexing="ij")
    source = np.concatenate([(above + level * frames).ravel() for level in range(depth)])
    target = np.concatenate([(below + (level + 1) * frames).ravel() for level in range(depth)])
    size = (depth + 1) * frames  # level 0 is the top
    capacity = np.rint(layers[::-1].reshape(-1) * UNIT).astype(np.int32)
    graph = csr_array((capacity, (source, target)), shape=(size, size))
    found = np.empty((frames, frames))
    for top in range(frames):
        for bottom in range(frames):
            found[top, bottom] = maximum_flow(graph, top, depth * frames + bottom).flow_value / UNIT
    return found
