"""What is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from speechattn_kernels.common import Launch
from speechattn_kernels.policy import gradients, seen

__all__ = ["flops", "shipped"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCTS = {"policy_look_kernel": 2, "policy_rows_kernel": 1, "policy_tokens_kernel": 3, "policy_frames_kernel": 4}


def call(dtype: torch.dtype, features: int, tokens: int, *, back: bool) -> None:
    """One recording of 1500 frames, 8 heads of which 6 are looked at."""
    q = torch.empty(1, tokens, 8, features, dtype=dtype, device="meta").transpose(1, 2)
    k = torch.empty(1, 8, 1500, features, dtype=dtype, device="meta")
    valid = torch.empty(1, 1500, dtype=torch.bool, device="meta")
    context, _, _, sums = seen(q, k, k, valid, list(range(6)), tokens)
    if back:
        gradients(context, q, k, k, valid, context, sums)


def shipped() -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """A name, whether it is a default one, and a call on tensors of the device meta.

    Defaults are the heads of 64 features that decoders have. The gradient of float32 heads of 256 spills.
    """
    for name, dtype in DTYPES.items():
        for features in (32, 64, 80, 128, 256):
            for tokens in (1, 30, 448):
                default = features == 64 and dtype != torch.float16
                yield f"D={features} U={tokens} {name}", default, partial(call, dtype, features, tokens, back=False)
            yield f"backward D={features} {name}", features == 64, partial(call, dtype, features, 30, back=True)


def flops(launch: Launch) -> float:
    """Operations of the products of one launch; where contexts are merged there are none worth counting."""
    args, products = launch.args, PRODUCTS.get(launch.kernel.fn.__name__, 0)
    if not products:
        return 0.0
    many = args["chosen"] if "chosen" in args else args["group"] * args["groups"]
    hypotheses, tokens = args["q"].shape[:2]
    return 2.0 * products * hypotheses * tokens * many * args["frames"] * args["features"]
