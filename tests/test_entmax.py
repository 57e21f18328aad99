"""Alpha-entmax, its gradients, and the self-attention made of it."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import D, lively
from torch import Tensor

from speechattn import tree
from speechattn.attention import Alibi, Blocks, Bucketed, Pattern, Relative, Rotary, SelfAttention, Span
from speechattn.attention.entmax import Entmax, Softmax, entmax
from speechattn.attention.sparse import SparseSelfAttention
from speechattn.decoder.attention import AttentionDecoder
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.model.config import build
from speechattn.stream import Residual, Serial
from speechattn.testing import check_export, check_stream, oracle, random_frames
from speechattn.testing.attention import distance, score

pytestmark = pytest.mark.usefixtures("precise")


def bisected(z: Tensor, alpha: float) -> Tensor:
    """z [..., T] -> alpha-entmax, by halving the interval of the threshold: the definition."""
    if alpha == 1:
        return z.softmax(-1)
    z = (alpha - 1) * z
    high = z.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(60):
        middle = (low + high) / 2
        heavy = ((z - middle).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    return (z - low).clamp(min=0) ** (1 / (alpha - 1))


@pytest.mark.parametrize(("z", "alpha", "p"), [
    ((-2, 0, 0.5), 2.0, (0, 0.25, 0.75)),
    ((-2, 0, 0.5), 1.5, (0, 0.326007, 0.673993)),
    ((-1, 0, 0.5), 1.33, (0.045982, 0.327632, 0.626386)),
    ((1, 0.5, 0, -1), 1.25, (0.549876, 0.293634, 0.139483, 0.017007)),
    ((1, 0.5, 0, -1), 1.5, (0.624198, 0.291667, 0.084136, 0)),
    ((1, 0.5, 0, -1), 2.0, (0.75, 0.25, 0, 0)),
])  # fmt: skip
def test_golden(z: tuple[float, ...], alpha: float, p: tuple[float, ...]) -> None:
    found = entmax(torch.tensor(z), alpha)
    torch.testing.assert_close(found, torch.tensor(p), rtol=0, atol=1e-6)
    assert (found == 0).tolist() == [x == 0 for x in p]


def test_golden_gradient_of_alpha() -> None:
    alpha = torch.tensor(1.33, requires_grad=True)
    p = entmax(torch.tensor([-1, 0, 0.5]), alpha)
    found = [torch.autograd.grad(x, alpha, retain_graph=True)[0].item() for x in p]
    assert found == pytest.approx([-0.256168, -0.011402, 0.267570], abs=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1 + 1e-7, 1.001, 1.02, 1.1, 1.25, 1.5, 1.75, 1.9, 2.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_newton_finds_what_halving_finds(alpha: float, spread: float) -> None:
    for frames in (1, 2, 60, 400):
        z = spread * torch.randn(8, frames)
        expected = bisected(z, 1.0 if alpha < 1.001 else alpha)
        limit = 1e-9 if alpha >= 1.001 or alpha == 1 else 1e-4
        torch.testing.assert_close(entmax(z, alpha), expected, rtol=0, atol=limit)
        torch.testing.assert_close(entmax(z.float(), alpha).double(), expected, rtol=0, atol=max(limit, 3e-5))
    z = -(2.0 ** -torch.arange(60.0))  # where Newton's method has to drop the keys one by one
    torch.testing.assert_close(entmax(z, alpha).sum(), torch.ones(()), rtol=0, atol=1e-12)
    torch.testing.assert_close(entmax(z, max(alpha, 1.001)), bisected(z, max(alpha, 1.001)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_the_entmax_package_says_the_same(alpha: float) -> None:
    package = pytest.importorskip("entmax")
    z = torch.randn(4, 30, requires_grad=True)
    heads = torch.full((4, 1), alpha, requires_grad=True)
    weights = torch.randn(4, 30)
    theirs = package.entmax_bisect(z, heads, n_iter=60)
    mine = entmax(z, heads)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    wanted = torch.autograd.grad((theirs * weights).sum(), [z, heads])
    for a, b in zip(torch.autograd.grad((mine * weights).sum(), [z, heads]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    exact = {1.5: package.entmax15, 2.0: package.sparsemax}.get(alpha)
    if exact:
        torch.testing.assert_close(mine, exact(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.001, 1.0199, 1.0201, 1.2, 1.5, 1.8, 1.999])
def test_gradcheck_of_scores_and_of_alpha_by_head(alpha: float) -> None:
    z = torch.randn(2, 3, 2, 5, requires_grad=True)
    heads = (alpha + torch.tensor([-5e-4, 0.0, 5e-4]))[:, None, None].requires_grad_()
    mask = torch.rand(2, 1, 2, 5) > 0.3
    assert torch.autograd.gradcheck(lambda z, heads: entmax(z, heads, mask), (z, heads), eps=1e-7, atol=1e-5)


def test_gradients_have_gradients() -> None:
    z, alpha = torch.randn(3, 4, requires_grad=True), torch.tensor(1.4, requires_grad=True)
    assert torch.autograd.gradgradcheck(entmax, (z, alpha), atol=1e-5)


def test_at_alpha_one_values_and_gradients_are_those_of_the_limit() -> None:
    z = torch.randn(4, 7, requires_grad=True)
    alpha, near = torch.tensor(1.0, requires_grad=True), torch.tensor(1 + 1e-5, requires_grad=True)
    weights = torch.randn(4, 7)
    torch.testing.assert_close(entmax(z, alpha), z.softmax(-1), rtol=0, atol=1e-9)
    to_z, to_alpha = torch.autograd.grad((entmax(z, alpha) * weights).sum(), [z, alpha])
    (expected,) = torch.autograd.grad((z.softmax(-1) * weights).sum(), z)
    torch.testing.assert_close(to_z, expected, rtol=0, atol=1e-9)
    rise = ((bisected(z, 1.0001) - z.softmax(-1)) * weights).sum() / 1e-4
    torch.testing.assert_close(to_alpha, rise, rtol=0, atol=2e-3)
    (beside,) = torch.autograd.grad((entmax(z, near) * weights).sum(), near)
    torch.testing.assert_close(to_alpha, beside, rtol=0, atol=1e-3)
    single = torch.tensor(1.0, requires_grad=True, dtype=torch.float32)
    (found,) = torch.autograd.grad((entmax(z.detach().float(), single) * weights.float()).sum(), single)
    torch.testing.assert_close(found.double(), to_alpha, rtol=1e-4, atol=1e-5)


rows = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=9)


@settings(max_examples=80, deadline=None)
@given(rows, st.floats(1, 2), st.floats(-30, 30), st.randoms(use_true_random=False))
def test_it_is_a_distribution_that_knows_neither_order_nor_shift(z: list[float], alpha: float, shift: float,
                                                                 draw: object) -> None:  # fmt: skip
    scores = torch.tensor(z, dtype=torch.float64)
    p = entmax(scores, alpha)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12)
    order = list(range(len(z)))
    draw.shuffle(order)  # type: ignore[attr-defined]
    torch.testing.assert_close(entmax(scores[order], alpha), p[order], rtol=0, atol=1e-9)
    torch.testing.assert_close(entmax(scores + shift, alpha), p, rtol=0, atol=1e-9)
    assert (p.diff()[scores.diff() > 0] >= 0).all()  # a higher score is worth no less
    more = entmax(scores, min(2.0, alpha + 0.3))
    assert not more[p == 0].any()  # the support shrinks with alpha


def test_what_is_masked_gets_nothing_and_nobody_nan() -> None:
    z = torch.randn(2, 3, 4, 6)
    z[..., 2] = torch.nan
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]).bool()[:, None, None]
    for kind in (Entmax(3), Entmax(3, 1.0), Entmax(3, 2.0), Softmax(3)):
        leaf = z.clone().requires_grad_()
        p = kind(leaf, mask)
        assert not p.masked_select(~mask).any()
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, 4), rtol=0, atol=1e-12)
        assert (p[1, ..., 3] == 1).all()
        none = kind(leaf, mask & False)
        assert not none.any()
        for grad in torch.autograd.grad((p.square() + none).sum(), [leaf, *kind.parameters()]):
            assert grad.isfinite().all()
    assert entmax(torch.zeros(2, 0), 1.5).shape == (2, 0)
    alone = entmax(z[..., :2], 1.5)
    torch.testing.assert_close(entmax(z, 1.5, torch.tensor([1, 1, 0, 0, 0, 0]).bool())[..., :2], alone, rtol=0,
                               atol=1e-12)  # fmt: skip


def test_each_head_has_its_alpha_which_is_learned() -> None:
    kind = Entmax(3)
    assert kind.alpha.tolist() == [1.5, 1.5, 1.5]
    with torch.no_grad():
        kind.a.copy_(torch.tensor([-30.0, 0.0, 30.0]))
    z, mask = torch.randn(2, 3, 4, 6), torch.ones(6, dtype=torch.bool)
    p = kind(z, mask)
    for head, alpha in enumerate((1.0, 1.5, 2.0)):
        torch.testing.assert_close(p[:, head], bisected(z[:, head], alpha), rtol=0, atol=1e-9)
    p[..., 0].sum().backward()
    assert kind.a.grad is not None
    assert kind.a.grad[1] != 0
    assert not list(Entmax(3, 1.5).parameters())
    assert Entmax(3, 1.25).alpha.tolist() == [1.25] * 3


def test_alpha_out_of_range_is_refused() -> None:
    for wrong in (0.5, 2.1):
        with pytest.raises(ValueError, match=f"alpha {wrong}"):
            Entmax(2, wrong)
        with pytest.raises(ValueError, match="wanted 1 to 2"):
            entmax(torch.zeros(3), wrong)


def test_half_precision_is_near() -> None:
    z = 3 * torch.randn(4, 50)
    for dtype in (torch.bfloat16, torch.float16):
        p = entmax(z.to(dtype), 1.5)
        assert p.dtype == dtype
        torch.testing.assert_close(p.double(), bisected(z.to(dtype).double(), 1.5), rtol=0.01, atol=0.001)


@oracle.register
def by_definition(stream: SparseSelfAttention, x: Frames) -> Frames:
    """One query, one head at a time; the threshold by halving."""
    values = x.values.where(x.mask[..., None], 0.0)
    normal = values if stream.norm is None else stream.norm(values)
    width, kept = stream.dim // stream.heads, stream.dim * stream.key_heads // stream.heads
    rows = (slice(stream.dim), slice(stream.dim, stream.dim + kept), slice(stream.dim + kept, None))
    q, k, v = ((normal @ stream.qkv.weight[r].T + stream.qkv.bias[r]).unflatten(-1, (-1, width)) for r in rows)
    y, alphas = torch.zeros_like(q), stream.normaliser.alpha.tolist()
    for b, mask in enumerate(x.mask.tolist()):
        order = [j for j, there in enumerate(mask) if there]
        for i in range(len(mask)):
            seen = [(j, d) for j in order if (d := distance(stream.span, i, j, order)) is not None]
            for h in range(stream.heads if seen else 0):
                g = h * stream.key_heads // stream.heads
                z = torch.stack([score(stream.position, q[b, i, h], k[b, j, g], h, d) for j, d in seen])
                y[b, i, h] = bisected(z, alphas[h]) @ v[b, [j for j, _ in seen], g]
    return Frames.of(stream.out(y.flatten(2)), x.mask)


def attention(span: Pattern, **options: object) -> SparseSelfAttention:
    return SparseSelfAttention(D, 2, span, **options)  # type: ignore[arg-type]


SPANS = [
    lambda: attention(Span.full(), position=Relative(D, 2)),
    lambda: attention(Span.causal(), position=Bucketed(D, 2, buckets=8, farthest=16)),
    lambda: attention(Span.sliding(4, 2), position=Rotary(D, 2), norm=torch.nn.LayerNorm(D)),
    lambda: attention(Span.chunked(6, 4, right=3), position=Relative(D, 2)),
    lambda: attention(Span.chunked(None, 3, right=2), position=Alibi(D, 2), key_heads=1),
    lambda: attention(Span(5, 4, 2, 2, 3), position=Alibi(D, 2), alpha=2.0),
    lambda: attention(Span.sliding(3, sinks=2), position=Relative(D, 2)),
    lambda: attention(Blocks(6, tuple(tuple((i + j) % 3 != 1 for j in range(6)) for i in range(6)))),
]


@pytest.mark.parametrize("number", range(len(SPANS)))
def test_laws_of_sparse_self_attention(number: int) -> None:
    stream = lively(SPANS[number]())
    check_stream(stream, random_frames([11, 0, 6], D), seed=number)
    if number == 5:  # with everything at once
        block = stream.plan().block or 9
        check_export(stream, random_frames([3 * block, 2 * block], D))


@pytest.mark.parametrize("span", [Span.full(), Span(5, 4, 2), Span(3, 2, 1, 1, 2), Span.causal()])
@pytest.mark.parametrize("group", [1, 2])
def test_with_an_alpha_of_one_it_is_softmax_attention(span: Span, group: int) -> None:
    if group > 1 and span.right:
        span = Span(4, 2)
    soft = lively(SelfAttention(D, 2, span, position=Relative(D * group, 2), key_heads=1, group=group))
    sparse = attention(span, position=Relative(D * group, 2), key_heads=1, group=group, alpha=1.0).eval()
    sparse.load_state_dict(soft.state_dict())
    x = random_frames([21, 8], D)
    torch.testing.assert_close(sparse(x).values, soft(x).values, rtol=0, atol=1e-8)


def test_memory_is_that_of_the_windows() -> None:
    layer = attention(Span(16, 8), position=Relative(D, 2)).float().train()
    sizes: list[int] = []

    def packed(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    for frames in (512, 1024):
        x = Frames(torch.randn(1, frames, D, dtype=torch.float32), torch.ones(1, frames, dtype=torch.bool))
        with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x):
            layer(x)
        assert max(sizes) <= frames * 2 * 24  # heads and keys of a window
    state = layer.init_state(x)
    bytes_of = []
    for _ in range(3):
        for at in range(0, 80, 8):
            _, state = layer.step(x[at : at + 8], state)
        bytes_of.append(sum(leaf.nbytes for leaf in tree.leaves(state)))
    assert len(set(bytes_of)) == 1


def test_support_is_counted_as_the_definition_counts() -> None:
    for span in (Span(4, 2, 1), Span(3, 1, 0, 1, 2), Span.full()):
        layer = lively(attention(span))
        with torch.no_grad():
            layer.normaliser.a.copy_(torch.tensor([-30.0, 2.0]))
        x = random_frames([13, 6], D)
        found = layer.support(x)
        keys, visible, queries = torch.zeros(2), 0, 0
        q, k, _ = layer.qkv(x.values).unflatten(-1, (6, D // 2)).split(2, -2)
        for b, n in enumerate(x.lengths.tolist()):
            for i in range(n):
                seen = [j for j in range(n) if distance(span, i, j, list(range(n))) is not None]
                visible, queries = visible + len(seen), queries + 1
                for h, alpha in enumerate(layer.normaliser.alpha.tolist()):
                    keys[h] += (bisected(k[b, seen, h] @ q[b, i, h] / sqrt(D // 2), alpha) > 0).sum()
        torch.testing.assert_close(found.keys, keys / queries, rtol=0, atol=1e-9)
        assert found.visible.item() == pytest.approx(visible / queries)
        assert found.keys[0] == pytest.approx(found.visible.item())
        assert found.keys[1] < found.keys[0]


def test_it_is_chosen_in_a_configuration() -> None:
    spec = {"class_path": "speechattn.encoder.Conformer", "init_args": {
        "mels": D, "dim": D, "depth": 1, "heads": 2, "inner": 12, "kernel": 3,
        "span": {"class_path": "speechattn.attention.pattern.Span", "init_args": {"left": 4, "chunk": 2}},
        "attention": {"class_path": "speechattn.attention.sparse.SparseSelfAttention"},
    }}  # fmt: skip
    encoder = lively(build(spec, "here"))
    assert [type(m) for m in encoder.modules() if isinstance(m, SelfAttention)] == [SparseSelfAttention]
    x = random_frames([26, 19], D)
    torch.testing.assert_close(encoder(x).values, oracle(encoder, x).values, rtol=0, atol=1e-9)
    spec["init_args"]["attention"]["init_args"] = {"alpha": 3.0}  # type: ignore[index]
    with pytest.raises(ModelError, match=r"alpha 3\.0: wanted 1"):
        build(spec, "here")


def cross(normaliser: object) -> AttentionDecoder:
    """A decoder as a configuration describes it."""
    found: AttentionDecoder = build({"class_path": "speechattn.decoder.attention.AttentionDecoder", "init_args": {
        "vocab": 20, "context": 40, "dim": D, "heads": 2, "depth": 2,
        "cross": {"class_path": "speechattn.cross.soft.Soft", "init_args": {"normaliser": normaliser}},
    }}, "here")  # fmt: skip
    return found.eval()


def part(name: str, **options: object) -> dict[str, object]:
    return {"class_path": f"speechattn.attention.entmax.{name}", "init_args": options}


def heard() -> Memory:
    return Memory.of(random_frames([9, 5], D))


def test_a_decoder_with_entmax_in_its_cross_attention_is_built_from_a_configuration() -> None:
    net, memory, tokens = cross(part("Entmax")), heard(), torch.randint(20, (6, 4))
    for name, parameter in net.named_parameters():
        torch.nn.init.normal_(parameter, std=0.9 if "cross" in name else 0.7)
    alphas = [layer.cross.normaliser.alpha for layer in net.layers]  # type: ignore[attr-defined]
    assert [a.shape for a in alphas] == [(2,), (2,)]
    whole, seen, _ = net.step(tokens, net.start(memory, beam=3), heads=[(0, 0), (0, 1)])
    torch.testing.assert_close(seen.sum(-1), torch.ones(6, 2, 4), rtol=0, atol=1e-12)
    assert (seen[:3] == 0).any()
    assert not seen[3:, ..., 5:].any()
    state, parts = net.start(memory, beam=3), []
    for u in range(4):
        y, _, state = net.step(tokens[:, u : u + 1], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    layer = net.layers[0].cross
    query, read = torch.randn(2, 3, D), layer.read(memory)
    found, _ = layer.attend(query, read, ())
    for b, n in enumerate((9, 5)):
        for h in range(2):
            q = layer.query(query[b]).unflatten(-1, (2, -1))[:, h] / sqrt(D // 2)  # type: ignore[attr-defined]
            expected = bisected(q @ read.key[b, h, :n].T, alphas[0][h].item())
            torch.testing.assert_close(found.weights[b, h, :, :n], expected, rtol=0, atol=1e-10)
    net.losses(memory, tokens[:2], torch.tensor([4, 2]), sos=18, eos=19).sum().backward()
    for layer in net.layers:
        assert layer.cross.normaliser.a.grad.abs().sum() > 0  # type: ignore[attr-defined]


def test_softmax_as_a_normaliser_is_the_default() -> None:
    plain, named, one = cross(None), cross(part("Softmax")), cross(part("Entmax", alpha=1.0))
    tokens, memory = torch.randint(20, (2, 4)), heard()
    expected, _, _ = plain.step(tokens, plain.start(memory))
    for net in (named, one):
        net.load_state_dict(plain.state_dict())
        found, _, _ = net.step(tokens, net.start(memory))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    with pytest.raises(ModelError, match="alpha 0"):
        cross(part("Entmax", alpha=0.5))


def test_on_a_copy_task_alphas_spread_and_the_support_shrinks() -> None:
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float32)
    frames, dim, symbols = 16, 16, 5
    layers = [Residual(SparseSelfAttention(dim, 4, Span.full(), position=Relative(dim, 4))) for _ in range(2)]
    embed, net, out = torch.nn.Embedding(symbols, dim), Serial(*layers), torch.nn.Linear(dim, symbols)
    alphas = [layer.first.normaliser.a for layer in layers]  # type: ignore[attr-defined]
    others = [p for part in (embed, net, out) for p in part.parameters() if all(p is not a for a in alphas)]
    optimizer = torch.optim.Adam([{"params": others}, {"params": alphas, "lr": 0.1}], 0.02)
    for _ in range(80):
        said = torch.randint(symbols, (16, frames))
        x = Frames(embed(said), torch.ones(16, frames, dtype=torch.bool))
        loss = torch.nn.functional.cross_entropy(out(net(x).values[:, 3:]).mT, said[:, :-3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = [layer.first.support(x) for layer in layers]  # type: ignore[attr-defined]
    assert loss < 0.1
    assert torch.cat([s.alpha for s in found]).std() > 0.05
    assert torch.cat([s.keys for s in found]).mean() < 0.7 * frames
