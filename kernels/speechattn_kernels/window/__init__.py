"""Attention in a window of keys that moves with the queries: forward, backward, every relative position."""

from speechattn_kernels.window.op import window

__all__ = ["window"]
