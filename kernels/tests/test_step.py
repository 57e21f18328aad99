"""The step of live streams: rows of any age against rings that wrap, beside what came before in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechattn_kernels.common import recorded, unable
from speechattn_kernels.step import naive, op, step
from torch import Tensor, nn

from speechattn import tree
from speechattn.attention.pattern import Span
from speechattn.attention.position import Alibi, Bucketed, Relative, Rotary
from speechattn.attention.ring import Ring
from speechattn.attention.self_attention import SelfAttention, set_backend
from speechattn.audio.spectrum import LogMel
from speechattn.decoder.ctc import CTC
from speechattn.encoder import Conformer
from speechattn.frames import Frames
from speechattn.live import Event, Session, StreamSettings
from speechattn.model.recognizer import Recognizer
from speechattn.testing import random_frames, stepped
from speechattn.text.pieces import Pieces

KINDS = ("none", "rows", "table", "both", "turns")
SPANS = {
    "sliding": Span.sliding(5), "chunked": Span.chunked(6, 4), "ahead": Span.chunked(5, 2, right=3),
    "dilated": Span(7, 2, 0, 3), "alone": Span.sliding(0), "far": Span.sliding(40),
}  # fmt: skip


def arguments(span: Span, kind: str, heads: int, dim: int, frames: int, device: torch.device) -> dict[str, Any]:
    """What a step gets besides its tensors of frames."""
    left, chunk = span.left or 0, span.chunk or 1
    columns = left + 2 * chunk - 1 + span.right
    angle = torch.randn(left + late_of(span) + frames, dim // 2)
    found = {
        "rows": torch.randn(heads, dim, columns) * 0.3 if kind in ("rows", "both") else None,
        "table": torch.randn(heads, columns) if kind in ("table", "both") else None,
        "turns": torch.stack([angle.cos(), angle.sin()]) if kind == "turns" else None,
    }
    return {
        "left": left, "chunk": chunk, "right": span.right, "dilation": span.dilation, "late": late_of(span),
        **{name: None if x is None else x.to(device) for name, x in found.items()},
    }  # fmt: skip


def late_of(span: Span) -> int:
    return -(-span.right // (span.chunk or 1)) * (span.chunk or 1)


def pieces(rows: int, heads: int, groups: int, frames: int, dim: int, device: torch.device) -> list[Tensor]:
    """q, k, v and mask, NaN where nothing is."""
    mask = torch.rand(rows, frames) < 0.7
    q = torch.randn(rows, frames, heads, dim).transpose(1, 2)
    kv = torch.randn(rows, frames, 2, groups, dim).masked_fill(~mask[:, :, None, None, None], torch.nan)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind()
    return [x.to(device) for x in (q, k, v, mask)]


def compare(
    span: Span, kind: str, device: torch.device, *, heads: int = 2, groups: int = 1, dim: int = 32, frames: int = 0,
    rows: int = 2, spare: int = 1, steps: int = 3, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5,
) -> None:  # fmt: skip
    """A few steps, rows that begin in different slots: everything that comes out, and what is in the cache."""
    frames = frames or 2 * (span.chunk or 1)
    held = (span.left or 0) + late_of(span)
    cap = held + frames + spare
    cache = torch.full((rows, cap, 2, groups, dim), torch.nan, device=device)
    filled = torch.zeros(rows, held, dtype=torch.bool, device=device)
    at = torch.randint(cap, (rows,), device=device)
    mine, other = [cache.to(dtype), filled, at], [cache.to(dtype).float(), filled, at]
    for _ in range(steps):
        given = pieces(rows, heads, groups, frames, dim, device)
        options = arguments(span, kind, heads, dim, frames, device)
        exact = {n: x.to(dtype).float() if isinstance(x, Tensor) else x for n, x in options.items()}
        low = {n: x.to(dtype) if isinstance(x, Tensor) else x for n, x in options.items()}
        y, *mine[1:] = step(*(x.to(dtype) for x in given[:3]), given[3], *mine, **low)
        z, *other[1:] = naive.step(*(x.to(dtype).float() for x in given[:3]), given[3], *other, **exact)
        assert y.dtype == dtype
        assert torch.equal(mine[1], other[1])
        assert torch.equal(mine[2], other[2])
        torch.testing.assert_close(mine[0].float(), other[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(y.float(), z, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_as_plain_torch(kind: str, device: torch.device) -> None:
    compare(SPANS["ahead"], kind, device, steps=2, groups=2)


@pytest.mark.parametrize("span", ["sliding", "dilated", "alone", "far"])
def test_other_spans(span: str, device: torch.device) -> None:
    compare(SPANS[span], "both", device, rows=1, steps=2)


@pytest.mark.parametrize(("dim", "heads", "groups"), [(64, 4, 2), (40, 2, 2), (160, 1, 1), (256, 1, 1)])
def test_sizes_of_heads(dim: int, heads: int, groups: int, device: torch.device) -> None:
    compare(SPANS["chunked"], "rows", device, dim=dim, heads=heads, groups=groups, rows=1, steps=1)
    compare(SPANS["sliding"], "turns", device, dim=dim, heads=heads, groups=groups, rows=1, steps=1)


def test_more_queries_than_a_tile_and_more_history_than_one(device: torch.device) -> None:
    compare(Span.chunked(70, 4), "both", device, frames=20, rows=1, steps=2, groups=2)
    compare(Span.chunked(70, 4, right=2), "turns", device, frames=20, rows=1, steps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype, device: torch.device) -> None:
    if reason := unable(torch.zeros(1, device=device, dtype=dtype)):
        pytest.skip(reason)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    compare(SPANS["ahead"], "both", device, dtype=dtype, steps=2, tolerance=tolerance)
    compare(SPANS["chunked"], "turns", device, dtype=dtype, steps=1, tolerance=tolerance)


@given(
    st.integers(0, 20), st.integers(1, 5), st.integers(0, 4), st.integers(1, 3), st.sampled_from(KINDS),
    st.integers(1, 3), st.integers(0, 4), st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]),
)  # fmt: skip
@settings(deadline=None, max_examples=5)
def test_any_shape(
    left: int, chunk: int, right: int, dilation: int, kind: str, chunks: int, spare: int, heads: tuple[int, int]
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compare(Span(left, chunk, right, dilation), kind, device, heads=heads[0], groups=heads[1], frames=chunk * chunks,
            rows=1, spare=spare, steps=2)  # fmt: skip


def remembered(q: Tensor, keys: Tensor, values: Tensor, t: int, span: Span) -> Tensor:
    """Frame t [H, D] over all that was ever said in a row [T, G, D], by the pattern's own words; D of 32."""
    seen = span.allowed(torch.tensor(t), torch.arange(len(keys)))
    if not seen.any():
        return torch.zeros_like(q)
    k, v = (x[seen].repeat_interleave(q.shape[0] // x.shape[1], 1).transpose(0, 1) for x in (keys, values))
    return ((q[:, None] @ k.mT / 32**0.5).softmax(-1) @ v)[:, 0]


def test_rows_are_reset_paused_and_moved(device: torch.device) -> None:
    span, rows, heads, groups, chunk = Span(3, 2), 3, 2, 1, 2
    options = arguments(span, "none", heads, 32, chunk, device)
    fresh = [
        torch.zeros(rows, 5, 2, groups, 32, device=device), torch.zeros(rows, 3, dtype=torch.bool, device=device),
        torch.zeros(rows, dtype=torch.long, device=device),
    ]  # fmt: skip
    state, said = tuple(x.clone() for x in fresh), [[torch.zeros(0, groups, 32).double()] * 2 for _ in range(rows)]
    chance = np.random.default_rng(0)
    for _ in range(9):
        q, k, v, _ = pieces(rows, heads, groups, chunk, 32, device)
        k, v, mask = k.nan_to_num(1.0), v.nan_to_num(1.0), torch.ones(rows, chunk, dtype=torch.bool, device=device)
        cache = state[0].clone()
        y, *after = step(q, k, v, mask, cache, *state[1:], **options)
        runs = torch.tensor(chance.random(rows) < 0.8)
        for b in range(rows):
            if runs[b]:
                new = [x[b].transpose(0, 1).cpu().double() for x in (k, v)]
                said[b] = [torch.cat([old, x]) for old, x in zip(said[b], new, strict=True)]
                ends = len(said[b][0])
                for t in range(chunk):
                    wanted = remembered(q[b, :, t].cpu().double(), *said[b], ends - chunk + t, span)
                    torch.testing.assert_close(y[b, :, t].cpu().double(), wanted, rtol=1e-5, atol=1e-5)
        state = tree.where(runs.to(device), (cache, *after), (cache, *state[1:]))  # a pause needs no copy of the slots
        if chance.random() < 0.3:
            b = int(chance.integers(rows))
            state = tree.where(torch.arange(rows, device=device) == b, tuple(fresh), state)
            said[b] = [x[:0] for x in said[b]]
        moved = chance.permutation(rows).tolist()
        state, said = tree.select(state, moved), [said[b] for b in moved]


def test_who_sees_nothing_gets_zeros_and_nothing_is_read_from_what_is_not_there(device: torch.device) -> None:
    options = arguments(Span(3, 2), "both", 2, 32, 2, device)
    q, k, _, mask = pieces(2, 2, 1, 2, 32, device)
    mask, cache = torch.zeros_like(mask), torch.full((2, 6, 2, 1, 32), torch.nan, device=device)
    nothing = torch.full_like(k, torch.nan)
    filled, at = torch.zeros(2, 3, dtype=torch.bool, device=device), torch.tensor([5, 2], device=device)
    y, kept, after = step(q, nothing, nothing, mask, cache, filled, at, **options)
    assert not y.any()
    assert not kept.any()
    assert after.tolist() == [1, 4]
    assert not cache[0, [2, 3]].any()
    assert cache[0, [0, 1, 4, 5]].isnan().all()


def test_nobody_writes_what_somebody_reads(device: torch.device) -> None:
    """History is as it was, whatever order programs run in: the old state gives the same a second time."""
    options = arguments(Span(4, 2, 1), "none", 4, 32, 4, device)
    q, k, v, mask = pieces(2, 4, 2, 4, 32, device)
    mask = torch.ones_like(mask)
    k, v, cache = k.nan_to_num(1.0), v.nan_to_num(1.0), torch.randn(2, 10, 2, 2, 32, device=device)
    filled, at = torch.ones(2, 6, dtype=torch.bool, device=device), torch.tensor([0, 8], device=device)
    before = cache.clone()
    y = step(q, k, v, mask, cache, filled, at, **options)[0]
    for row, held in enumerate([range(6), [8, 9, 0, 1, 2, 3]]):
        assert torch.equal(cache[row, list(held)], before[row, list(held)])
        assert (cache != before)[row].flatten(1).any(1).sum() == 4
    assert torch.equal(y, step(q, k, v, mask, cache, filled, at, **options)[0])


@pytest.mark.parametrize(("change", "words"), [
    ({"chunk": 3}, "chunks of 3"), ({"late": 0, "right": 1}, "late"), ({"left": 9}, "cache"),
    ({"rows": torch.zeros(2, 32, 4)}, "7 distances"), ({"turns": torch.zeros(2, 4, 16)}, "places"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str, device: torch.device) -> None:
    options = {**arguments(Span(4, 2), "none", 2, 32, 2, device), **change}
    q, k, v, mask = pieces(1, 2, 1, 2, 32, device)
    filled, at = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=words):
        step(q, k, v, mask, torch.zeros(1, 6, 2, 1, 32), filled, at, **options)


def test_the_cache_must_be_memory_that_can_be_written(device: torch.device) -> None:
    options = arguments(Span(4, 2), "none", 2, 32, 2, device)
    q, k, v, mask = pieces(1, 2, 1, 2, 32, device)
    filled, at = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="in place"):
        step(q, k, v, mask, torch.zeros(1, 6, 2, 1, 32, dtype=torch.float16), filled, at, **options)
    with pytest.raises(ValueError, match="filled"):
        step(q, k, v, mask, torch.zeros(1, 6, 2, 1, 32), filled[:, :2], at, **options)


def example(device: torch.device) -> tuple[Any, ...]:
    options = arguments(Span(3, 2, 1), "both", 2, 32, 2, device)
    q, k, v, mask = pieces(2, 2, 1, 2, 32, device)
    cache = torch.zeros(2, 8, 2, 1, 32, device=device)
    filled, at = torch.ones(2, 5, dtype=torch.bool, device=device), torch.tensor([3, 7], device=device)
    return (q, k.nan_to_num(), v.nan_to_num(), mask, cache, filled, at, *options.values())


def test_the_op_is_what_it_declares(device: torch.device) -> None:
    torch.library.opcheck(op.op, example(device))
    with recorded() as launches:
        op(*(x.to("meta") if isinstance(x, Tensor) else x for x in example(device)))
    assert launches[0].grid == (1, 2, 2)


def test_compilers_see_through_it(device: torch.device) -> None:
    given = example(device)
    cache = given[4].clone()

    def twice(*x: Any) -> Tensor:
        y, filled, at = op(*x)
        return y + op(*x[:5], filled, at, *x[7:])[0]

    wanted = twice(*given[:4], cache, *given[5:])
    found = torch.compile(twice, fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(found, wanted)
    assert torch.equal(cache, given[4])


LAYERS: dict[str, Callable[[], SelfAttention]] = {
    "sliding": lambda: SelfAttention(16, 2, Span.sliding(4), position=Relative(16, 2)),
    "chunked": lambda: SelfAttention(16, 4, Span.chunked(5, 2), position=Rotary(16, 4), key_heads=2),
    "ahead": lambda: SelfAttention(16, 2, Span.chunked(3, 2, right=1), position=Alibi(16, 2)),
    "dilated": lambda: SelfAttention(16, 2, Span.dilated(4, 2), position=Bucketed(16, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_streaming_is_offline(name: str, device: torch.device) -> None:
    """Beside float64 and the window backend; the laws themselves are checked with plain torch (tests/test_ring.py)."""
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    exact = copy.deepcopy(layer).double().eval()
    layer = layer.to(device).eval()
    set_backend(layer, "triton")
    x = random_frames([11, 6], 16)
    with torch.no_grad():
        wanted = exact(Frames(x.values.double(), x.mask))
        moved = Frames(x.values.to(device), x.mask.to(device))
        assert isinstance(layer.init_state(moved).past, Ring)
        for found in (stepped(layer, moved, seed=1), layer(moved)):
            assert torch.equal(found.mask.cpu(), wanted.mask)
            torch.testing.assert_close(found.values.cpu().double(), wanted.values, rtol=1e-4, atol=1e-4)


def recogniser(device: torch.device) -> Recognizer:
    """Of random weights, which hears something now and then."""
    torch.manual_seed(3)
    letters = Pieces(["<blank>", "▁", *"abcdefgh"])
    encoder = Conformer(20, 32, 1, 2, 32, span=Span.chunked(8, 4), kernel=3)
    model = Recognizer(LogMel(20), encoder, {"ctc": CTC(32, letters.size)}, letters)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5)
    return model.to(device).eval().requires_grad_(False)


def test_a_session_says_the_same(device: torch.device) -> None:
    clip = np.random.default_rng(0).standard_normal(9600).astype(np.float32) * np.sin(np.arange(9600) / 900) ** 2

    def events(backend: str) -> list[Event]:
        often = StreamSettings(patience_s=1.0)
        session = Session(recogniser(device), backend=backend, clock=lambda: 0.0, settings=often)
        return session.feed(clip, 16000) + session.finish()

    mine, other = events("triton"), events("window")
    assert "".join(event.committed for event in other).strip()
    assert [(e.committed, e.unstable, e.audio_s) for e in mine] == [(e.committed, e.unstable, e.audio_s) for e in other]
    for a, b in zip(mine, other, strict=True):
        assert [w.text for w in a.words] == [w.text for w in b.words]
