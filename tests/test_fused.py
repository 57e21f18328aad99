"""The fused dense backend against the reference."""

from __future__ import annotations

import pytest
import torch

from speechattn.attention.attend import BACKENDS, attend, choose
from speechattn.attention.pattern import Blocks, Pattern, Span
from speechattn.attention.position import Alibi, Bucketed, Position, Relative, Rotary

PATTERNS: list[Pattern] = [
    Span.full(), Span(None, None, dilation=3), Span.causal(), Span.sliding(3), Span.sliding(2, 1), Span.chunked(4, 4),
    Span.chunked(None, 4, right=2), Span.dilated(6, 2), Blocks(4, ((True, False, False), (True, True, False),
                                                                   (False, False, False))),
]  # fmt: skip
POSITIONS = [None, Relative, Rotary, Alibi, Bucketed]


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("groups", [4, 2])
def test_numbers_and_gradients_are_those_of_the_reference(
    pattern: Pattern, kind: type[Position] | None, groups: int
) -> None:
    frames, history = 12, 0 if isinstance(pattern, Blocks) or getattr(pattern, "chunk", None) is None else 8
    if isinstance(pattern, Span) and pattern.left is not None:
        history = pattern.left
    keys = history + frames + pattern.right
    q, k, v = (torch.randn(3, h, n, 8, dtype=torch.float64) for h, n in ((4, frames), (groups, keys), (groups, keys)))
    valid = torch.rand(3, keys) < 0.6
    valid[1] = False
    valid[2] = True
    position = None if kind is None else kind(32, 4).double()
    if position is not None:
        for parameter in position.parameters():
            torch.nn.init.normal_(parameter)
    found = []
    for backend in ("fused", "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*inputs, pattern=pattern, valid=valid, position=position, backend=backend)
        grown = [*inputs, *(() if position is None else position.parameters())]
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        found.append([y, *(x.grad if x.grad is not None else torch.zeros_like(x) for x in grown)])
        if position is not None:
            position.zero_grad()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert (found[0][0][1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types_stay_finite_where_nothing_is_seen(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 4, 6, 8).to(dtype) * 9 for _ in range(3))
    valid = torch.tensor([[True] * 6, [False] * 6])
    for position in (None, Alibi(32, 4)):
        for pattern in (Span.full(), Span.causal()):
            y = attend(q, k, v, pattern=pattern, valid=valid, position=position, backend="fused")
            assert y.dtype == dtype
            assert y.isfinite().all()
            assert (y[1] == 0).all()


def test_it_is_taken_where_no_band_is_bounded_and_refuses_sinks() -> None:
    q = torch.randn(1, 2, 4, 8)
    assert choose(q, Span.full(), None, "auto") is BACKENDS["fused"]
    assert choose(q, Span.causal(), None, "auto") is BACKENDS["fused"]
    with pytest.raises(ValueError, match="fused cannot do this: sinks"):
        choose(q, Span.sliding(4, sinks=1), None, "fused")
