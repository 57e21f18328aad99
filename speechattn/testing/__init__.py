"""The laws of streams, as checks that anybody can run on a stream of his own.

`check_stream(stream, x)` runs them all; `oracle` is an independent whole-utterance reference for the parts of this
library, to which `oracle.register` adds those of others; `measure` finds out what `Stream.plan` declares by looking
at which inputs move which outputs.
"""

from speechattn.testing.checks import check_export, check_stream, random_frames, random_pieces, stepped
from speechattn.testing.measure import measure, needed_delay
from speechattn.testing.oracle import oracle

__all__ = ["check_export", "check_stream", "measure", "needed_delay", "oracle", "random_frames", "random_pieces",
           "stepped"]  # fmt: skip
