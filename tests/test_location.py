"""Attention relative to where it was: Gaussians that move on, and filters of the last alignment."""

from __future__ import annotations

from math import exp, pi, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn import tree
from speechattn.cross.location import Alignment, DynamicConvolution, Mixture, MixtureAttention, beta_binomial
from speechattn.cross.soft import Soft
from speechattn.decoder.attention import AttentionDecoder, sinusoids
from speechattn.frames import Frames, Memory
from speechattn.model.config import build

pytestmark = pytest.mark.usefixtures("precise")

DIM, HEADS = 8, 2


def mixture() -> MixtureAttention:
    return lively(MixtureAttention(DIM, HEADS, components=3, inner=6, width=2.0))


def convolution() -> DynamicConvolution:
    return lively(DynamicConvolution(DIM, HEADS, filters=3, reach=4, ahead=3, inner=6))


KINDS = [mixture, convolution]


def lively(module: Any) -> Any:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
        else:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return module.double().eval()


def memory(lengths: list[int]) -> Memory:
    values = torch.randn(len(lengths), max(lengths), DIM)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    values[~mask] = torch.nan
    return Memory.of(Frames.of(values, mask))


def one_by_one(layer: Any, query: Tensor, read: Any) -> tuple[Tensor, Tensor, Any]:
    """Contexts, weights and the last place, token by token."""
    place, contexts, weights = layer.place(query), [], []
    for u in range(query.shape[1]):
        seen, place = layer.attend(query[:, u : u + 1], read, place)
        contexts.append(seen.context)
        weights.append(seen.weights)
    return torch.cat(contexts, 1), torch.cat(weights, 2), place


@pytest.mark.parametrize("make", KINDS)
def test_tokens_at_once_are_tokens_one_by_one(make: Any) -> None:
    layer, read, query = make(), None, torch.randn(4, 6, DIM)
    read = layer.read(memory([9, 5]))
    seen, place = layer.attend(query, read, layer.place(query))
    contexts, weights, last = one_by_one(layer, query, read)
    torch.testing.assert_close(seen.context, contexts, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen.weights, weights, rtol=0, atol=1e-12)
    for a, b in zip(tree.leaves(place), tree.leaves(last), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert seen.alignment is seen.weights
    assert not seen.waiting.any()
    nobody, same = layer.attend(query[:, :0], read, place)
    assert nobody.weights.shape == (4, HEADS, 0, 9)
    torch.testing.assert_close(tree.leaves(same)[0], tree.leaves(place)[0], rtol=0, atol=0)


@pytest.mark.parametrize("make", KINDS)
def test_what_is_not_there_has_no_weight_and_a_row_does_not_know_its_batch(make: Any) -> None:
    layer, heard, query = make(), memory([9, 5, 0]), torch.randn(3, 4, DIM)
    seen, _ = layer.attend(query, layer.read(heard), layer.place(query))
    assert not seen.weights.masked_select(~heard.frames.mask[:, None, None]).any()
    assert seen.context.isfinite().all()
    alone = Memory.of(Frames(heard.frames.values[1:2, :5], heard.frames.mask[1:2, :5]))
    one, _ = layer.attend(query[1:2], layer.read(alone), layer.place(query[1:2]))
    torch.testing.assert_close(one.context, seen.context[1:2], rtol=0, atol=1e-12)
    three = query.repeat_interleave(2, 0)
    beam, _ = layer.attend(three, layer.read(heard), layer.place(three))
    torch.testing.assert_close(beam.context, seen.context.repeat_interleave(2, 0), rtol=0, atol=1e-12)


def test_gaussians_are_those_of_the_definition() -> None:
    layer, heard, query = mixture(), memory([7, 4]), torch.randn(2, 3, DIM)
    seen, place = layer.attend(query, layer.read(heard), layer.place(query))
    given = layer.last(layer.hidden(query).tanh()).view(2, 3, HEADS, 3, 3)
    for b, frames in enumerate((7, 4)):
        for h in range(HEADS):
            means = [-1.0] * 3
            for u in range(3):
                share = given[b, u, h, 0].softmax(0).tolist()
                means = [m + s for m, s in zip(means, nn.functional.softplus(given[b, u, h, 1]).tolist(), strict=True)]
                width = nn.functional.softplus(given[b, u, h, 2]).tolist()
                for j in range(frames):
                    expected = sum(w / sqrt(2 * pi * s * s) * exp(-((j - m) ** 2) / (2 * s * s))
                                   for w, m, s in zip(share, means, width, strict=True))  # fmt: skip
                    assert seen.weights[b, h, u, j].item() == pytest.approx(expected, abs=1e-12)
            assert place.means[b, h].tolist() == pytest.approx(means)


def test_gaussians_begin_as_the_paper_says_and_only_move_on() -> None:
    layer = MixtureAttention(64, 4)
    query = torch.randn(2, 9, 64)
    _, means, width = layer.mixture(query, layer.place(query))
    steps = means.diff(dim=2, prepend=torch.full((2, 4, 1, 5), -1.0))
    assert (steps > 0).all()
    torch.testing.assert_close(steps, torch.ones_like(steps), rtol=0, atol=0.2)
    torch.testing.assert_close(width, torch.full_like(width, 10.0), rtol=0, atol=0.3)
    assert not torch.equal(steps[..., 0], steps[..., 1])  # or they could never come apart
    _, means, _ = mixture().mixture(3 * torch.randn(2, 50, DIM), mixture().place(torch.randn(2, 1)))
    assert (means.diff(dim=2) > 0).all()
    wide = Memory.of(Frames(torch.randn(1, 400, DIM), torch.ones(1, 400, dtype=torch.bool)))
    layer, query = mixture(), torch.randn(1, 3, DIM)
    seen, _ = layer.attend(query, layer.read(wide), Mixture(torch.full((1, HEADS, 3), 200.0)))
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones(1, HEADS, 3), rtol=0, atol=0.02)


def test_the_prior_moves_on_by_one_frame() -> None:
    for n in (3, 10):
        p = beta_binomial(n, 1 / n, 1 - 1 / n)
        torch.testing.assert_close(p.sum(), torch.ones(()), rtol=0, atol=1e-12)
        torch.testing.assert_close((p * torch.arange(n + 1)).sum(), torch.ones(()), rtol=0, atol=1e-12)
    assert beta_binomial(10, 0.1, 0.9)[:3].tolist() == pytest.approx([0.740022897, 0.074749788, 0.04157432], abs=1e-8)
    layer = DynamicConvolution(DIM, HEADS)
    assert layer.prior[:, 0].tolist() == pytest.approx([*beta_binomial(10, 0.1, 0.9).flip(0).tolist(), *[0] * 10])
    with torch.no_grad():
        layer.score.zero_()
    last = torch.zeros(1, HEADS, 60)
    last[..., 20] = 1.0
    moved = layer.moved(last, torch.zeros(1, HEADS, 21, 8), torch.ones(1, 1, 60, dtype=torch.bool))
    shift = (moved * torch.arange(60)).sum(-1) - 20
    torch.testing.assert_close(shift, torch.ones(1, HEADS), rtol=0, atol=2e-3)  # the floor has a share


def test_filters_are_those_of_the_definition() -> None:
    layer, heard, query = convolution(), memory([7, 4]), torch.randn(2, 3, DIM)
    seen, _ = layer.attend(query, layer.read(heard), layer.place(query))
    dynamic = layer.last(layer.hidden(query).tanh()).view(2, 3, HEADS, 9, 3)
    prior = beta_binomial(3, 1 / 3, 2 / 3)
    for b, frames in enumerate((7, 4)):
        for h in range(HEADS):
            last = torch.zeros(frames)
            last[0] = 1.0
            for u in range(3):
                scores = []
                for j in range(frames):
                    around = [(i, last[j + i - 4]) for i in range(9) if 0 <= j + i - 4 < frames]
                    filters = torch.cat([layer.static[h], dynamic[b, u, h]], 1)
                    f = sum((x * filters[i] for i, x in around), torch.zeros(6))
                    p = sum(prior[d] * last[j - d] for d in range(4) if j - d >= 0)
                    hidden = (f @ layer.mixed[h] + layer.shift[h, 0]).tanh()
                    scores.append(hidden @ layer.score[h, :, 0] + torch.as_tensor(p).clamp(min=1e-6).log())
                last = torch.stack(scores).softmax(0)
                torch.testing.assert_close(seen.weights[b, h, u, :frames], last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", KINDS)
def test_who_begins_one_frame_later_looks_one_frame_later(make: Any) -> None:
    layer, query = make(), torch.randn(1, 2, DIM)
    read = layer.read(memory([60]))
    seen = []
    for at in (25, 26):
        if isinstance(layer, MixtureAttention):
            place: Any = Mixture(torch.full((1, HEADS, 3), float(at)) + torch.tensor([-1.0, 0.0, 1.3]))
        else:
            place = Alignment(nn.functional.one_hot(torch.tensor([[at] * HEADS]), at + 1).double())
        seen.append(layer.attend(query, read, place)[0].weights)
    first = [weights[:, :, :1] for weights in seen]  # the floor of the prior is everywhere, also at both ends
    torch.testing.assert_close(first[1][..., 1:], first[0][..., :-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[1][..., 1:], seen[0][..., :-1], rtol=0, atol=1e-4)
    assert seen[0].amax() > 0.1


@pytest.mark.parametrize("make", KINDS)
def test_gradients_reach_everything_and_are_right(make: Any) -> None:
    layer, mask = make(), torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    values, query = torch.randn(1, 6, DIM, requires_grad=True), torch.randn(1, 3, DIM, requires_grad=True)

    def look(values: Tensor, query: Tensor) -> Tensor:
        seen, _ = layer.attend(query, layer.read(Memory.of(Frames.of(values, mask))), layer.place(query))
        return seen.context  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(look, (values, query))
    for name, grad in zip(dict(layer.named_parameters()), torch.autograd.grad(
            look(values, query).square().sum(), list(layer.parameters())), strict=True):  # fmt: skip
        assert grad.isfinite().all()
        assert grad.any(), name


def decoder(make: Any) -> AttentionDecoder:
    made = AttentionDecoder(20, 40, DIM, HEADS, 2, cross=lambda dim, heads: make()).double().eval()
    for parameter in made.embed.parameters():
        nn.init.normal_(parameter)
    return made.requires_grad_(False)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 8), st.integers(1, 4), st.integers(0, 99))
def test_frames_that_come_while_tokens_are_said(make: Any, early: int, tokens: int, seed: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    net, heard, said = decoder(make), memory([9]), torch.randint(20, (1, 6))
    state = net.start(Memory.of(heard.frames[:early]))
    _, _, state = net.step(said[:, :tokens], state)  # the place is shorter than what is read later
    state = type(state)(state.cache, net.read(Memory.of(heard.frames[early:]), state.cross), state.place)
    found, _, later = net.step(said[:, tokens:], state)
    assert found.isfinite().all()
    whole = type(state)(state.cache, net.start(heard).cross, state.place)
    expected, _, _ = net.step(said[:, tokens:], whole)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    other = net.start(memory([4]))  # of another age and length, in one batch
    both = tree.concat([state, other])
    torch.testing.assert_close(both.length, torch.tensor([tokens, 0]))
    if tokens < 6:
        next_of = torch.cat([said[:, tokens : tokens + 1], torch.tensor([[3]])])
        together, _, after = net.step(next_of, both)
        torch.testing.assert_close(together[:1], net.step(next_of[:1], state)[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(together[1:], net.step(next_of[1:], other)[0], rtol=0, atol=1e-12)
        assert tree.split(after)[0].length.item() == tokens + 1
    assert later.length.item() == 6


def test_they_are_chosen_in_a_configuration_and_refuse_nonsense() -> None:
    for name, options in (("MixtureAttention", {"components": 2}), ("DynamicConvolution", {"filters": 4})):
        net = build({"class_path": "speechattn.decoder.attention.AttentionDecoder", "init_args": {
            "vocab": 20, "context": 40, "dim": DIM, "heads": HEADS, "depth": 1, "cross": {
                "class_path": f"speechattn.cross.location.{name}", "init_args": options}}}, "here")  # fmt: skip
        hidden, _, _ = net.step(torch.randint(20, (2, 3)), net.start(memory([5, 3])))
        assert hidden.isfinite().all()
    for wrong, said in ((lambda: MixtureAttention(8, 2, components=0), "0 components"),
                        (lambda: MixtureAttention(8, 3), "do not divide"),
                        (lambda: DynamicConvolution(8, 2, reach=3), "reaches no further")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            wrong()


class Copier(nn.Module):
    """Says the symbol of each frame; it knows the last symbol, and (`timed`) the number of the token and the frame."""

    def __init__(self, cross: Any, *, timed: bool) -> None:
        super().__init__()
        self.frames, self.said = nn.Embedding(5, 16), nn.Embedding(5, 16)
        self.cross, self.timed, self.out = cross, timed, nn.Linear(16, 5)

    def forward(self, said: Tensor) -> Tensor:
        """`said` [B, U] -> scores [B, U, V]."""
        x, query = self.frames(said), self.said(said.roll(1, 1))
        if self.timed:
            x, query = (y + sinusoids(said.shape[1], 16) for y in (x, query))
        read = self.cross.read(Memory.of(Frames(x, torch.ones_like(said, dtype=torch.bool))))
        scores: Tensor = self.out(self.cross.attend(query, read, self.cross.place(query))[0].context)
        return scores


@pytest.mark.parametrize("kind", ["mixture", "convolution", "soft"])
def test_ten_times_the_length_is_read_as_well_and_not_by_content(kind: str) -> None:
    torch.set_default_dtype(torch.float32)
    made = {"mixture": lambda: MixtureAttention(16, 1, components=1, inner=4, width=1.0),
            "convolution": lambda: DynamicConvolution(16, 1, inner=16), "soft": lambda: Soft(16, 2)}  # fmt: skip
    net = Copier(made[kind](), timed=kind == "soft")
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for _ in range(120):
        said = torch.randint(5, (16, 8))
        loss = nn.functional.cross_entropy(net(said).mT, said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = {}
    for length in (8, 80):
        said = torch.randint(5, (8, length))
        with torch.no_grad():
            right[length] = (net(said).argmax(-1) == said).double().mean().item()
    assert right[8] > 0.95
    if kind == "mixture":  # an error of its steps adds up where nothing tells it what it hears
        cross, query = net.cross, net.said(said)
        _, means, width = cross.mixture(query, cross.place(query))
        assert (means[:, :, -1] - 79).abs().max() < 0.06 * 80
        assert width.max() < 1.0
    else:
        assert right[80] > 0.9 if kind == "convolution" else right[80] < 0.6
