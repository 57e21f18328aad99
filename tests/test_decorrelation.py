"""The decorrelation loss: its limits, what it ignores, its gradient, and a loop that says the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.frames import Frames
from speechattn.multimodal.decorrelation import decorrelation, to_first
from speechattn.multimodal.llama import Llama


def drawn(seed: int, rows: int, places: int, dim: int, layers: int) -> tuple[list[Tensor], Tensor]:
    """States of so many layers behind the embeddings, and which places count."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(rows, places, dim, dtype=torch.float64, generator=generator) for _ in range(layers + 1)]
    return states, torch.rand(rows, places, generator=generator) < 0.6


def by_hand(states: list[Tensor], mask: Tensor) -> list[float]:
    """The definition, in loops over numbers."""
    rows = []
    for b in range(len(mask)):
        found = []
        for layer in range(1, len(states) - 1):
            first = states[layer][b, 0].tolist()
            for s in range(1, mask.shape[1]):
                if mask[b, s]:
                    here = states[layer][b, s].tolist()
                    dot = sum(x * y for x, y in zip(first, here, strict=True))
                    found.append(dot**2 / (sum(x * x for x in first) * sum(y * y for y in here)))
        rows.append(sum(found) / len(found) if found else 0.0)
    return rows


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(2, 4))
def test_it_is_the_loop(seed: int, rows: int, places: int, dim: int, layers: int) -> None:
    states, mask = drawn(seed, rows, places, dim, layers)
    expected = torch.tensor(by_hand(states, mask), dtype=torch.float64)
    torch.testing.assert_close(decorrelation(states, mask), expected, rtol=0, atol=1e-12)


def test_a_known_number() -> None:
    bos = torch.tensor([1.0, 0.0])
    half, equal, across = torch.tensor([1.0, 1.0]), torch.tensor([-3.0, 0.0]), torch.tensor([0.0, 2.0])
    first, second = torch.stack([bos, half, equal, across])[None], torch.stack([half, half, bos, across])[None]
    other = torch.full_like(first, 7.0)  # embeddings and last layer: all alike
    places = torch.tensor([[True, True, True, True]])
    assert decorrelation([other, first, other], places).item() == pytest.approx((0.5 + 1 + 0) / 3)
    assert decorrelation([other, first, second, other], places).item() == pytest.approx((1.5 + 2) / 6)
    assert decorrelation([other, first, other], torch.tensor([[False, True, False, True]])).item() == pytest.approx(
        0.25
    )


def test_the_limits() -> None:
    orthogonal = torch.eye(6, dtype=torch.float64)[None, :5].repeat(3, 1, 1)
    places = torch.ones(3, 5, dtype=torch.bool)
    assert decorrelation([orthogonal] * 4, places).tolist() == [0, 0, 0]
    equal = torch.randn(3, 1, 6, dtype=torch.float64).expand(3, 5, 6)
    torch.testing.assert_close(decorrelation([equal] * 4, places), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(decorrelation([-equal] * 4, places), torch.ones(3, dtype=torch.float64))


def test_no_size_of_any_state_matters() -> None:
    states, mask = drawn(1, 3, 7, 5, 4)
    sizes = [10 ** (8 * torch.rand(3, 7, 1, dtype=torch.float64) - 4) for _ in states]
    scaled = [state * size for state, size in zip(states, sizes, strict=True)]
    torch.testing.assert_close(decorrelation(scaled, mask), decorrelation(states, mask), rtol=1e-12, atol=0)


def test_massive_activations_in_half_precision() -> None:
    states, mask = drawn(2, 2, 6, 8, 3)
    states = [state.clone() for state in states]
    for state in states:
        state[:, [0, 3], 5] = 4000.0
    narrow = [state.half().requires_grad_() for state in states]
    found = decorrelation(narrow, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), decorrelation([x.double() for x in narrow], mask), rtol=1e-5, atol=1e-6)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert all(x.grad is None or x.grad.isfinite().all() for x in narrow)


def test_first_and_last_states_do_not_count() -> None:
    states, mask = drawn(3, 2, 6, 4, 3)
    nan = torch.full_like(states[0], torch.nan)
    assert torch.equal(decorrelation([nan, *states[1:-1], nan], mask), decorrelation(states, mask))
    for layer in (1, 2):
        changed = [torch.randn_like(state) if i == layer else state for i, state in enumerate(states)]
        assert not torch.allclose(decorrelation(changed, mask), decorrelation(states, mask))


def test_bos_is_no_place_and_others_that_do_not_count_may_be_anything() -> None:
    states, mask = drawn(4, 3, 6, 4, 3)
    mask[:, 0], mask[:, 1] = True, True
    without = mask.clone()
    without[:, 0] = False
    assert torch.equal(decorrelation(states, mask), decorrelation(states, without))
    assert mask[:, 0].all()  # it is the caller's
    broken = [state.masked_fill(~mask[..., None], torch.nan).requires_grad_() for state in states]
    found = decorrelation(broken, mask)
    assert torch.equal(found, decorrelation(states, mask))
    found.sum().backward()  # type: ignore[no-untyped-call]
    for state in broken[1:-1]:
        assert state.grad is not None
        assert state.grad.isfinite().all()
        assert not state.grad[~mask].any()


def test_padding_does_not_matter() -> None:
    states, mask = drawn(5, 2, 6, 4, 3)
    padded = [F.pad(state, [0, 0, 0, 3], value=torch.nan) for state in states]
    torch.testing.assert_close(decorrelation(padded, F.pad(mask, [0, 3])), decorrelation(states, mask))


@pytest.mark.parametrize("places", [1, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan])
def test_rows_without_places_are_zero_and_have_finite_gradients(places: int, value: float) -> None:
    states = [torch.full((2, places, 3), value, requires_grad=True) for _ in range(4)]
    mask = torch.zeros(2, places, dtype=torch.bool)
    mask[1, 0] = True
    found = decorrelation(states, mask)
    assert found.tolist() == [0, 0]
    found.sum().backward()  # type: ignore[no-untyped-call]
    for state in states[1:-1]:
        assert state.grad is not None
        assert not state.grad.any()


def test_states_of_zeros_are_finite() -> None:
    states = [torch.zeros(1, 4, 3, requires_grad=True) for _ in range(3)]
    found = decorrelation(states, torch.ones(1, 4, dtype=torch.bool))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert found.item() == 0
    assert states[1].grad is not None
    assert states[1].grad.isfinite().all()


def test_rows_do_not_know_their_batch() -> None:
    states, mask = drawn(6, 4, 6, 4, 3)
    alone = [decorrelation([state[b : b + 1] for state in states], mask[b : b + 1]) for b in range(4)]
    torch.testing.assert_close(torch.cat(alone), decorrelation(states, mask))


def test_gradients_reach_bos_and_places() -> None:
    states, mask = drawn(7, 2, 4, 3, 3)
    mask[:, 1] = True
    given = [state.requires_grad_() for state in states]
    assert torch.autograd.gradcheck(lambda *x: decorrelation(x, mask), given)
    decorrelation(given, mask).sum().backward()  # type: ignore[no-untyped-call]
    for state in given[1:-1]:
        assert state.grad is not None
        assert state.grad[:, 0].abs().amax(-1).gt(0).all()
        assert torch.equal(state.grad[:, 1:].abs().amax(-1) > 0, mask[:, 1:])
    assert given[0].grad is None or not given[0].grad.any()
    assert given[-1].grad is None or not given[-1].grad.any()


def test_steps_down_the_gradient_part_the_states() -> None:
    states, mask = drawn(8, 3, 8, 16, 3)
    mask[:, 1] = True
    base = [(state[:, :1] + 0.1 * state).detach().requires_grad_() for state in states]
    before = decorrelation(base, mask).mean()
    optimizer = torch.optim.SGD(base, lr=100.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss = decorrelation(base, mask).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert before > 0.8
    assert loss < 0.1 * before


def learned(weight: float) -> tuple[float, float]:
    """A small language model copies what it hears for 200 steps -> cross entropy of new words, mean cos^2."""
    torch.manual_seed(0)
    lm, heard = Llama(12, 32, 4, 3), nn.Linear(12, 32)
    marks = nn.Parameter(0.02 * torch.randn(4, 32))
    optimizer = torch.optim.AdamW([*lm.parameters(), *heard.parameters(), marks], 3e-3)
    counts = torch.arange(12).expand(16, -1) < 8  # BOS, mark, 4 words heard, mark, prompt, 4 words said
    for _ in range(200):
        words = torch.randint(12, (16, 4))
        bos, first, last, prompt = marks[:, None, None].expand(4, 16, 1, 32)
        x = torch.cat([bos, first, heard(F.one_hot(words, 12).float()), last, prompt, lm.embed(words)], 1)
        hidden, inside = lm.inspect(Frames(x, torch.ones(16, 12, dtype=torch.bool)), weights=False)
        entropy = F.cross_entropy(lm.logits(hidden[:, 7:-1]).mT, words)
        alike = decorrelation(inside.states, counts).mean()
        optimizer.zero_grad()
        (entropy + weight * alike).backward()
        optimizer.step()
    return entropy.item(), alike.item()


def test_a_language_model_learns_as_well_and_is_less_like_bos() -> None:
    (usual, alike), (found, apart) = learned(0.0), learned(1.0)
    assert usual < 0.1  # by chance log(12)
    assert found < 0.1
    assert apart < alike / 10


def test_one_layer_has_nothing_between() -> None:
    states, mask = drawn(9, 1, 3, 2, 1)
    with pytest.raises(ValueError, match="1 layer: no layer lies between the embeddings and the last one"):
        decorrelation(states, mask)


def test_cosines_to_the_first_place() -> None:
    state = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [3.0, 3.0], [torch.nan, 1.0]]])
    mask = torch.tensor([[True, True, True, True, False]])
    torch.testing.assert_close(to_first(state, mask), torch.tensor([[1.0, 1.0, -1.0, 0.5**0.5, 0.0]]))
