"""The kernel that serves policies: what it says is what all weights say, and all weights are never there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from speechattn_kernels.common import recorded, unable
from speechattn_kernels.policy import forward, gradients, naive, policy, seen
from speechattn_kernels.policy.shipped import flops, shipped
from torch import Tensor

from speechattn.cross import soft
from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Frames, Memory
from speechattn.policy import Source
from speechattn.policy.align_att import AlignAtt, standardise
from speechattn.search import Draft

NAMES = ("context", "mean", "each", "dq", "dk", "dv")


def inputs(
    rows: int, beam: int, heads: int, groups: int, tokens: int, frames: int, features: int, *,
    device: torch.device, dtype: torch.dtype = torch.float32, sharp: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v as linear layers leave them, and valid; of several rows the last has no valid frame.

    What is not valid is NaN in memory.
    """
    q = torch.randn(rows * beam, tokens, heads, features) * sharp
    k, v = (torch.randn(rows, frames, groups, features) for _ in "kv")
    valid = torch.rand(rows, frames) > 0.2
    valid[1:][-1:] = False
    k[~valid], v[~valid] = torch.nan, torch.nan
    q, k, v = (x.to(device, dtype).transpose(1, 2).requires_grad_() for x in (q, k, v))
    return q, k, v, valid.to(device)


def all_of(op: Any, given: tuple[Tensor, ...], heads: tuple[int, ...], newest: int) -> tuple[Tensor, ...]:
    """What `op` returns, and the gradients of its context."""
    found = op(*given, heads=heads, newest=newest)
    if not given[0].requires_grad:
        return found  # type: ignore[no-any-return]
    torch.manual_seed(3)
    wanted = torch.randn(found[0].shape).to(found[0])
    return *found, *torch.autograd.grad(found[0], given[:3], wanted)


def agree(
    given: tuple[Tensor, ...], heads: tuple[int, ...], newest: int, *, rms: float, most: float, least: float = 0.1
) -> None:
    """Kernel and naive: the error, relative to the root mean square and to the largest, but at least to `least`.

    Where one frame is all there is, scores have no gradient but for rounding, which keys get times the queries.
    """
    found, expected = all_of(policy, given, heads, newest), all_of(naive.policy, given, heads, newest)
    for name, x, y in zip(NAMES, found, expected, strict=False):
        assert x.shape == y.shape, name
        assert x.dtype == y.dtype, name
        assert torch.isfinite(x).all(), name
        if x.numel():
            error, size = (x - y).detach().double(), y.detach().double()
            assert float(error.square().mean().sqrt()) <= rms * (float(size.square().mean().sqrt()) + least), name
            assert float(error.abs().max()) <= most * (float(size.abs().max()) + least), name


# rows, beam, heads, groups, tokens, frames, features
SHAPES = [
    (1, 1, 1, 1, 1, 100, 64),  # one token: the frames are shared among programs and merged
    (2, 1, 4, 2, 3, 33, 32),
    (2, 3, 2, 1, 4, 17, 48),  # three hypotheses, whose heads share one memory
    (1, 2, 1, 1, 10, 20, 80),  # more rows than a tile has
    (2, 1, 1, 1, 2, 20, 128),
    (1, 1, 1, 1, 17, 20, 256),
    (1, 1, 2, 2, 2, 1, 33),
    (3, 1, 2, 1, 2, 0, 32),  # no frames
    (1, 1, 2, 2, 0, 9, 32),  # no tokens
    (0, 1, 2, 2, 2, 9, 32),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_the_naive_one(shape: Any, device: torch.device) -> None:
    heads = tuple(range(shape[2]))[::-1]
    agree(inputs(*shape, device=device), heads, (shape[4] + 1) // 2, rms=2e-6, most=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], (1, 1, 1, 1, 17, 40, 256)], ids=str)
def test_half_precision(shape: Any, dtype: torch.dtype, device: torch.device) -> None:
    if reason := unable(torch.empty(0, dtype=dtype, device=device)):
        pytest.skip(reason)
    rms = 1e-2 if dtype == torch.bfloat16 else 2e-3
    agree(inputs(*shape, device=device, dtype=dtype), (0,), 1, rms=rms, most=3 * rms)


@pytest.mark.parametrize("programs", [1, 2])
def test_shares_of_several_tiles(programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are many tokens: five tiles of frames in one share, or in a share of three and one of two."""
    monkeypatch.setattr(forward, "PROGRAMS", programs)
    assert forward.splits(1, 150, 32)[0] == programs
    agree(inputs(1, 1, 1, 1, 2, 150, 33, device=device, sharp=4.0), (0,), 1, rms=1e-5, most=1e-4)


@settings(deadline=None, max_examples=6)
@example(rows=1, beam=2, group=3, groups=1, tokens=9, frames=40, features=64, asked=3, newest=8, sharp=30.0)
@given(
    rows=st.integers(0, 2), beam=st.integers(1, 2), group=st.integers(1, 2), groups=st.integers(1, 2),
    tokens=st.integers(0, 6), frames=st.integers(0, 70), features=st.integers(32, 70), asked=st.integers(0, 4),
    newest=st.integers(0, 6), sharp=st.sampled_from([0.1, 1.0, 30.0]),
)  # fmt: skip
def test_any_shape(
    rows: int, beam: int, group: int, groups: int, tokens: int, frames: int, features: int, asked: int, newest: int,
    sharp: float,
) -> None:  # fmt: skip
    torch.manual_seed(rows + frames)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = inputs(rows, beam, group * groups, groups, tokens, frames, features, device=device, sharp=sharp)
    heads = tuple(torch.randint(group * groups, (asked,)).tolist())
    agree(given, heads, min(newest, tokens), rms=2e-5, most=1e-4, least=0.1 * max(sharp, 1.0))


def test_naive_is_softmax_attention_and_its_gradient_right() -> None:
    q, k, v, valid = inputs(2, 2, 4, 2, 3, 6, 5, device=torch.device("cpu"))
    q, k, v = (x.detach().nan_to_num().double().requires_grad_() for x in (q, k, v))
    context, mean, each = naive.policy(q, k, v, valid, heads=(3, 1), newest=2)
    for row in range(4):
        for head in range(4):
            there = valid[row // 2]
            keys, values = (x[row // 2, head // 2][there] for x in (k, v))
            found = (q[row, head] @ keys.T / 5**0.5).softmax(-1)
            torch.testing.assert_close(context[row, head], found @ values)
            if head in (3, 1):
                torch.testing.assert_close(each[row, (3, 1).index(head)][:, there], found[-2:])
                assert not each[row, :, :, ~there].any()
    torch.testing.assert_close(mean[:, -2:], each.mean(1))
    assert torch.autograd.gradcheck(lambda *x: naive.policy(*x, valid, heads=(), newest=0)[0], (q, k, v))


def entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-30).log()).sum(-1)


@pytest.mark.parametrize(("tokens", "peak"), [(1, 0.0), (6, 0.0), (6, 1.0), (6, 3.0)])
def test_what_policies_take_from_the_rows_is_what_all_weights_give(
    tokens: int, peak: float, device: torch.device
) -> None:
    """Without ties, on random attention and where all heads have a peak: at 1 and 3 about 0.7 and 1 of their mass."""
    q, k, v, valid = (x.detach() for x in inputs(1, 2, 4, 4, tokens, 90, 32, device=device))
    where = torch.tensor([80, 3, 20, 33, 60, 88], device=device)[:tokens]
    k = k.where(k.isfinite(), torch.randn_like(k))
    valid[:, where] = True
    given = (q if not peak else 0.3 * q + peak * k[:, :, where]), k, v.nan_to_num(), valid
    heads = (2, 0, 3)
    _, mean, each = policy(*given, heads=heads, newest=tokens)
    whole = naive.weights(given[0].double(), given[1].double(), given[3])[:, list(heads)]
    assert not peak or bool((whole.mean(1).argmax(-1) == where).all())
    two = whole.mean(1).topk(2).values
    assert (two[..., 0] - two[..., 1]).min() > 1e-4  # no ties
    assert torch.equal(mean.argmax(-1), whole.mean(1).argmax(-1))  # AlignAtt
    for n in (1, 4, 30):  # EDAtt
        torch.testing.assert_close(mean[..., -n:].sum(-1).double(), whole.mean(1)[..., -n:].sum(-1), rtol=0, atol=2e-5)
    torch.testing.assert_close(mean.norm(dim=-1).double(), whole.mean(1).norm(dim=-1), rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy(mean).double(), entropy(whole.mean(1)), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean.sum(-1), torch.ones_like(mean[..., 0]), rtol=0, atol=1e-5)
    for row in range(2):  # AlignAtt.whisper: standardised over tokens
        x, y = standardise(each[row]), standardise(whole[row])
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-3)
        x, y = (rows[row].cpu().float() for rows in (each, whole))
        names = tuple((0, head) for head in heads)
        said, now = (torch.arange(tokens - 1), torch.zeros(tokens - 1)), Source(90, 0.02, finished=False)
        drafts = [Draft(*said, rows, names, 0, False) for rows in (x, y)]
        counts = [AlignAtt.whisper(names, 9).accept(draft, now, None)[0] for draft in drafts]
        assert counts[0] == counts[1]


def test_the_newest_rows_are_those_of_the_last_tokens(device: torch.device) -> None:
    given = tuple(x.detach() for x in inputs(1, 2, 3, 3, 7, 50, 32, device=device))
    _, mean, each = policy(*given, heads=(1,), newest=3)
    torch.testing.assert_close(each[:, 0], mean[:, -3:], rtol=0, atol=0)
    context, nobody, none = policy(*given, heads=(), newest=3)
    assert not nobody.any()
    assert none.shape == (2, 0, 3, 50)
    torch.testing.assert_close(context, policy(*given, heads=(2, 2), newest=0)[0], rtol=0, atol=0)


def test_any_strides(device: torch.device) -> None:
    q, k, v, valid = (x.detach() for x in inputs(2, 1, 2, 2, 3, 70, 32, device=device))
    expected = policy(q, k, v, valid, heads=(1,), newest=1)
    one = q.contiguous(), k.contiguous(), v.mT.contiguous().mT, valid.T.contiguous().T
    for x, y in zip(policy(*one, heads=(1,), newest=1), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    wide = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), valid[:1].expand(2, -1)
    agree((q, *wide), (0,), 1, rms=2e-6, most=1e-5)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    q, k, v, valid = inputs(2, 1, 2, 2, 3, 4, 32, device=device)
    wide = torch.zeros(2, 2, 3, 257, device=device)
    for wrong, heads, newest, words in (
        ((q, k, v[..., :3, :], valid), (), 0, "values"), ((q, k, v, valid[:1]), (), 0, "valid"),
        ((q[..., :8], k, v, valid), (), 0, "queries"), ((q[:1], k, v, valid), (), 0, "divide"),
        ((q[:, :1], k, v, valid), (), 0, "divide"), ((q, k[:0], v[:0], valid[:0]), (), 0, "divide"),
        ((wide, wide, wide, valid[:, :3]), (), 0, "257"), ((q, k, v, valid), (0, 2), 0, "heads"),
        ((q, k, v, valid), (-1,), 0, "heads"), ((q, k, v, valid), (0,), 4, "newest"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            policy(*wrong, heads=heads, newest=newest)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of opcheck
def test_torch_sees_through_the_op(device: torch.device) -> None:
    given = inputs(1, 1, 2, 1, 3, 7, 32, device=device)
    torch.library.opcheck(seen.op, (*given, [1, 0], 2))
    context, _, _, sums = (x.detach() for x in seen(*given, [1, 0], 2))
    torch.library.opcheck(gradients.op, (torch.randn_like(context), *(x.detach() for x in given), context, sums))

    def f(*x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return policy(*x, heads=(1, 0), newest=2)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    one, two = (all_of(lambda *x, heads, newest, g=g: g(*x), given, (), 0) for g in (f, compiled))
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert [x.requires_grad for x in compiled(*given)] == [True, False, False]
    program = torch.export.export(Wrapped(), tuple(x.detach() for x in given))
    for x, y in zip(program.module()(*(x.detach() for x in given)), one, strict=False):
        torch.testing.assert_close(x, y.detach(), rtol=0, atol=0)


class Wrapped(torch.nn.Module):
    """The op as a module."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return policy(q, k, v, valid, heads=(1, 0), newest=2)


def test_few_tokens_share_the_frames_and_many_need_no_second_pass() -> None:
    for programs, frames in ((1, 1500), (8, 3000), (20, 1500), (300, 1500), (1, 0), (1, 1), (0, 10)):
        parts, share = forward.splits(programs, frames, 64)
        assert share % 64 == 0
        assert (parts - 1) * share < max(frames, 1) <= parts * share
        assert programs * parts <= max(programs, 2 * forward.PROGRAMS)
    assert forward.splits(8, 1500, 64)[0] == 24
    assert forward.splits(300, 1500, 64)[0] == 1


def test_no_tensor_of_all_weights_exists() -> None:
    """Of 448 tokens and 20 heads; sizes of what the kernels are given, and of what is returned."""
    q, k = (torch.empty(1, 20, n, 64, dtype=torch.bfloat16, device="meta") for n in (448, 1500))
    valid = torch.empty(1, 1500, dtype=torch.bool, device="meta")
    with recorded() as launches:
        context, mean, each, sums = seen(q, k, k, valid, [1, 4], 3)
        gradients(context, q, k, k, valid, context, sums)
    names = [one.kernel.__name__.split("_")[1] for one in launches]
    assert names == ["look", "merge", "rows", "tokens", "frames"]
    sizes = [x.numel() for one in launches for x in one.args.values() if isinstance(x, Tensor)]
    assert max(sizes) == 1500 * 20 * 64  # the keys; all weights would be 7 times as many as both
    assert (mean.numel(), each.numel()) == (448 * 1500, 2 * 3 * 1500)


def test_what_is_shipped_can_be_recorded() -> None:
    for name, default, call in shipped():
        with recorded() as launches:
            call()
        assert launches, name
        assert not default or "D=64" in name
        assert sum(map(flops, launches)) > 0
    q, k = (torch.empty(1, 2, n, 64, device="meta") for n in (5, 9))
    with recorded() as launches:
        seen(q, k, k, torch.empty(1, 9, dtype=torch.bool, device="meta"), [1], 2)
    assert [flops(one) for one in launches] == [2.0 * 2 * 5 * 2 * 9 * 64, 2.0 * 5 * 9 * 64]


def decoder(device: torch.device) -> AttentionDecoder:
    made = AttentionDecoder(20, 40, 64, 2, 2).eval().to(device)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


def test_a_decoder_with_the_kernel_says_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and asked rows [B, N, U, T], with two hypotheses of each recording, one of which has no frame."""
    net = decoder(device)
    mask = torch.tensor([[True] * 40, [True] * 9 + [False] * 31, [False] * 40], device=device)
    memory = Memory.of(Frames.of(torch.randn(3, 40, 64, device=device), mask))
    tokens = torch.randint(20, (6, 5), device=device)
    heads = ((1, 1), (0, 0), (1, 0))
    asked = []

    def counted(*given: Tensor, heads: list[int], newest: int) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(list(heads))
        return policy(*given, heads=heads, newest=newest)

    found = {}
    for name, serving in (("kernel", lambda q: counted), ("torch", lambda q: None)):
        monkeypatch.setattr(soft, "serving", serving)
        with torch.no_grad():
            found[name] = net.step(tokens, net.start(memory, beam=2), heads=heads)[:2]
    assert asked == [[0], [1, 0]]
    for x, y in zip(found["kernel"], found["torch"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


def test_who_takes_the_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, without a gradient, and if Triton is there; never by itself in the interpreter."""
    q = torch.zeros(1, 2, 1, 64, device=device)
    with torch.no_grad():
        assert (soft.serving(q) is not None) == (device.type == "cuda")
        assert soft.serving(q.double()) is None
        assert soft.serving(torch.zeros(1, 1, 1, 300, device=device)) is None
        monkeypatch.setattr(soft, "installed", lambda: False)
        assert soft.serving(q) is None
    monkeypatch.undo()
    assert soft.serving(q) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("tokens", [1, 30, 448])
def test_real_sizes(tokens: int, features: int, dtype: torch.dtype, device: torch.device) -> None:
    rms = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    agree(inputs(2, 2, 4, 2, tokens, 1500, features, device=device, dtype=dtype), (3, 0), min(tokens, 9),
          rms=rms, most=10 * rms)  # fmt: skip


@pytest.mark.gpu
def test_training_on_a_gpu_has_no_nan_where_a_row_has_no_frame(device: torch.device) -> None:
    """By torch's fused attention, as no head is asked for."""
    net = decoder(device).train().requires_grad_(True)
    mask = torch.tensor([[True] * 40, [False] * 40], device=device)
    memory = Memory.of(Frames.of(torch.randn(2, 40, 64, device=device), mask))
    tokens = torch.randint(20, (2, 5), device=device)
    one, _, _ = net.step(tokens, net.start(memory))
    two, _, _ = net.step(tokens, net.start(memory), heads=((0, 0), (1, 0)))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    grads = [torch.autograd.grad(y.square().sum(), list(net.parameters()), allow_unused=True) for y in (one, two)]
    for x, y in zip(*grads, strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
