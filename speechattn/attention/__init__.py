"""Self-attention: who may see whom, where they stand, and how it is computed.

`pattern` says who may see whom, `position` how distance counts, `attend` computes it by the first backend that can,
and `self_attention.SelfAttention` is the stream made of them.
"""

from speechattn.attention.attend import BACKENDS, attend
from speechattn.attention.pattern import Blocks, Pattern, Span, draw
from speechattn.attention.position import Alibi, Bucketed, Position, Relative, Rotary
from speechattn.attention.self_attention import SelfAttention, set_backend, set_span

__all__ = ["BACKENDS", "Alibi", "Blocks", "Bucketed", "Pattern", "Position", "Relative", "Rotary", "SelfAttention",
           "Span", "attend", "draw", "set_backend", "set_span"]  # fmt: skip
