"""The plan of an epoch: who is in which batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from speechattn.data.plan import SPREAD, Plan
from speechattn.errors import InputError

durations = st.lists(st.floats(0, 20), min_size=1, max_size=80)


@settings(deadline=None, max_examples=300)
@given(
    durations, st.integers(0, 2**31), st.integers(0, 50), st.floats(20, 200), st.integers(1, 5),
    st.none() | st.integers(1, 9),
)  # fmt: skip
def test_every_utterance_once_over_all_devices(
    seconds: list[float], seed: int, epoch: int, most: float, shares: int, utterances: int | None
) -> None:
    size = np.array(seconds)
    try:
        plan = Plan(size, most, shares=shares, max_utterances=utterances, seed=seed)
    except InputError:
        few = int(min(utterances or len(size), most // max(size.max(), 1e-9)))
        assert len(size) < shares or few < 2 or len(size) < 2 * shares  # nothing was there to split
        return
    batches = plan.epoch(epoch)
    assert len(batches) == len(plan) == len(plan.epoch(epoch + 1))
    assert sorted(i for batch in batches for i in batch) == list(range(len(size)))
    for batch in batches:
        for share in range(shares):
            mine = batch[share::shares]
            assert len(mine)
            assert len(mine) * size[mine].max() <= most * (1 + 1e-6)
            assert len(mine) <= (utterances or len(size))


@settings(deadline=None, max_examples=100)
@given(durations, st.integers(0, 99), st.integers(0, 9))
def test_a_plan_is_a_function_of_seed_and_epoch(seconds: list[float], seed: int, epoch: int) -> None:
    size = np.array(seconds)
    first, again = (Plan(size, 40, seed=seed).epoch(epoch) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    whole = Plan(size, 40, seed=None).epoch(epoch)
    assert list(size[np.concatenate(whole)]) == sorted(seconds, reverse=True)


@settings(deadline=None, max_examples=100)
@given(durations, st.integers(0, 99), st.integers(2, 4))
def test_batches_of_planned_devices_do_not_depend_on_how_many_there_are(
    seconds: list[float], seed: int, shares: int
) -> None:
    assume(len(seconds) >= 2 * shares)
    plan = Plan(np.array(seconds), 40, shares=shares, seed=seed)
    for batch in plan.epoch(3):
        dealt = np.concatenate([batch[share::shares] for share in range(shares)])
        assert sorted(dealt) == sorted(batch)


def test_batches_are_full_and_of_equal_length_and_differ_between_epochs() -> None:
    rng = np.random.default_rng(0)
    size = np.clip(rng.lognormal(1.5, 0.6, 20000), 0.3, 20)
    plan = Plan(size, 200, shares=2, seed=1)
    shares = [batch[s::2] for batch in plan.epoch(0) for s in range(2)]
    padded = sum(len(share) * size[share].max() for share in shares)
    assert size.sum() / padded > 0.93  # 7 % of padding at most
    assert padded / (200 * len(shares)) > 0.85
    for share in shares[:50]:
        assert size[share].max() < SPREAD**2 * 1.2 * size[share].min() or len(share) < 3
    first = {frozenset(batch.tolist()) for batch in plan.epoch(0)}
    assert not first & {frozenset(batch.tolist()) for batch in plan.epoch(1)}
    lengths = [size[batch].mean() for batch in plan.epoch(0)]
    assert abs(np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]) < 0.1  # short and long ones mixed


def test_utterances_of_one_length_meet_anybody() -> None:
    plan = Plan(np.full(100, 2.0), 20, seed=0)
    places = np.array([np.concatenate(plan.epoch(epoch)) for epoch in range(200)])
    assert abs(places.mean(0) - 49.5).max() < 8  # each is anywhere in its turn


def test_what_cannot_be_dealt_is_said() -> None:
    with pytest.raises(InputError, match=r"12\.00 s does not fit into max_seconds=10"):
        Plan(np.array([1.0, 12.0]), 10)
    with pytest.raises(InputError, match="2 utterances cannot be dealt to 3 devices"):
        Plan(np.array([1.0, 2.0]), 10, shares=3)
    with pytest.raises(InputError, match="equally many batches of at most 10 s: raise max_seconds"):
        Plan(np.array([9.0, 9.0, 9.0]), 10, shares=2)
    plan = Plan(np.array([9.0, 9.0, 4.0, 4.0, 4.0, 4.0, 4.0]), 10, shares=2)
    assert sorted(map(len, plan.epoch(0))) == [2, 2, 3]
