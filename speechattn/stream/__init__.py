"""Streams: the same function of a sequence, whole or in pieces."""

from speechattn.stream.contract import Buffer, Plan, Planned, Spent, Stream, flush, seconds
from speechattn.stream.packing import packed
from speechattn.stream.parallel import Join, Pair, Parallel, Residual
from speechattn.stream.serial import Serial
from speechattn.stream.simple import Delay, Pointwise, Sliding

__all__ = ["Buffer", "Delay", "Join", "Pair", "Parallel", "Plan", "Planned", "Pointwise", "Residual", "Serial",
           "Sliding", "Spent", "Stream", "flush", "packed", "seconds"]  # fmt: skip
