"""Sinks and massive activations: planted ones are found and nothing else, whatever stands in the padding."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from speechattn.multimodal.causal import Inspected
from speechattn.multimodal.decorrelation import decorrelation
from speechattn.multimodal.layout import BOS, KINDS, LIPS, MARK, NOTHING, PROMPT, SINK, SOUND, TEXT
from speechattn.multimodal.sinks import GROUPS, Thresholds, attention, grouped, hidden
from speechattn.multimodal.sinks_report import Report, Tally, frequent

ROW = [BOS, MARK, *[SOUND] * 12, MARK, MARK, *[LIPS] * 6, MARK, PROMPT, PROMPT, *[TEXT] * 9]
N, H, D = 4, 3, 32
PLACE, FEATURES = 7, (5, 19)


def kinds_of(*lengths: int) -> Tensor:
    """Rows of a usual layout, cut off."""
    rows = [torch.tensor(ROW[:length]) for length in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NOTHING)


def usual(seed: int, kinds: Tensor) -> Inspected:
    """Chance: states and causal weights without any sink."""
    generator = torch.Generator().manual_seed(seed)
    rows, places = kinds.shape
    states = tuple(torch.randn(rows, places, D, generator=generator) for _ in range(N + 1))
    weights = tuple(looks(torch.randn(rows, H, places, places, generator=generator)) for _ in range(N))
    return Inspected(states, weights, kinds != NOTHING)


def looks(scores: Tensor) -> Tensor:
    """Causal attention."""
    causal = torch.ones(scores.shape[-2:]).tril().bool()
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def planted(seed: int, kinds: Tensor) -> Inspected:
    """The same with BOS's state at another place, large in two features, and attention on both; from layer 1 on."""
    inspected, generator = usual(seed, kinds), torch.Generator().manual_seed(seed + 1)
    for state in inspected.states[1:]:
        state[:, 0, list(FEATURES)] = torch.tensor([3000.0, -1500.0])
        state[:, PLACE] = state[:, 0]
    scores = [torch.randn(weights.shape, generator=generator) for weights in inspected.weights or ()]
    for score in scores:
        score[..., [0, PLACE]] += 5
    return Inspected(inspected.states, tuple(map(looks, scores)), inspected.mask)


def report_of(inspected: Inspected, kinds: Tensor, **thresholds: float) -> Report:
    tally = Tally(Thresholds(**thresholds))  # type: ignore[arg-type]
    tally.add(inspected, kinds)
    return tally.result()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_a_planted_sink_is_found_and_bos_and_nothing_else(seed: int) -> None:
    kinds = kinds_of(len(ROW), 24)
    inspected, thresholds = planted(seed, kinds), Thresholds()
    seen = attention(inspected, thresholds)
    for layer in range(N):
        assert seen.sinks[layer].nonzero().tolist() == [[0, 0], [0, PLACE], [1, 0], [1, PLACE]]
        for head in range(H):
            assert seen.head_sinks[layer, :, head].nonzero().tolist() == [[0, 0], [0, PLACE], [1, 0], [1, PLACE]]
    for number, state in enumerate(inspected.states):
        found = hidden(state, inspected.mask, thresholds).massive.nonzero().tolist()
        there = [[b, s, d] for b in (0, 1) for s in (0, PLACE) for d in FEATURES]
        assert found == (there if number else [])
    report = report_of(inspected, kinds)
    assert report.sink_places == {PLACE: 2}
    for one in report.layers:
        assert {name: n for name, n in one.sinks.items() if n} == {"BOS": 1, "sound": 1}
        assert [{name: n for name, n in head.items() if n} for head in one.head_sinks] == [{"BOS": 1, "sound": 1}] * H
    for state in report.states[1:]:
        assert state.massive_features == dict.fromkeys(FEATURES, 4)
        assert state.massive_places == {0: 2, PLACE: 2}
        assert {name: n for name, n in state.massive.items() if n} == {"BOS": 2, "sound": 2}
        assert (state.overlap, state.alike, state.sink_cosine2) == (1, 1, pytest.approx(1))
        assert state.features["BOS"][:2] == state.features["sinks"][:2] == FEATURES
        assert state.ratio["BOS"] == pytest.approx(state.ratio["sinks"])
        assert state.ratio["BOS"] > 1000 > 20 > state.ratio["others"]
        assert state.largest == 3000
    assert not report.states[0].massive_features
    said = report.summary()
    assert "BOS is a sink in 100 % of 2 sequences; intermediate sinks: sound, at most 1.00 a sequence" in said
    assert "massive activations behind layers 1 to 4 at BOS, sound" in said
    assert "BOS and intermediate sinks share feature indices there (5, 19, " in said


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, len(ROW)))
def test_without_planting_nothing_is_found(seed: int, length: int) -> None:
    kinds = kinds_of(len(ROW), length)
    report = report_of(usual(seed, kinds), kinds)
    assert not report.sink_places
    assert not any(any(layer.sinks.values()) or any(layer.share.values()) for layer in report.layers)
    assert not any(state.massive_features for state in report.states)
    assert {*report.states[0].ratio} == {"BOS", *(["others"] if len(ROW) > 1 else [])}
    assert all((state.overlap, state.alike, state.sink_cosine2) == (None, None, None) for state in report.states)
    said = report.summary()
    assert "BOS is a sink in 0 % of 2 sequences; no intermediate sinks; no massive activations." in said
    assert "share" not in said


def test_attention_received_by_hand() -> None:
    kinds = kinds_of(14, 11)
    inspected = usual(3, kinds)
    seen = attention(inspected, Thresholds(queries=3, received=0.12, even=1.1))
    assert inspected.weights is not None
    for n, weights in enumerate(inspected.weights):
        for b, length in enumerate((14, 11)):
            for j in range(14):
                later = [i for i in range(j + 1, length)]
                assert bool(seen.judged[b, j]) == (len(later) >= 3)
                got = [sum(float(weights[b, h, i, j]) for i in later) / max(len(later), 1) for h in range(H)]
                got = got if len(later) >= 3 else [0.0] * H
                assert seen.received[n, b, :, j].tolist() == pytest.approx(got, abs=1e-6)
                even = sum(1 / (i + 1) for i in later) / max(len(later), 1)
                assert bool(seen.sinks[n, b, j]) == (sum(got) / H > 0.12 and sum(got) / H >= 1.1 * even > 0)
                assert seen.head_sinks[n, b, :, j].tolist() == [x > 0.12 and x >= 1.1 * even > 0 for x in got]
                lies = [float(weights[b, h, i, j]) for h in range(H) for i in range(max(j, 1), length)]
                share = sum(lies) / (H * (length - 1)) if seen.sinks[n, b, j] else 0.0
                assert float(seen.share[n, b, j]) == pytest.approx(share, abs=1e-6)
    assert 0 < seen.sinks.sum() < seen.sinks.numel()
    report = report_of(inspected, kinds, queries=3, received=0.12, even=1.1)
    for n, layer in enumerate(report.layers):
        for kind in (BOS, MARK, SOUND):
            at = kinds == kind
            got = seen.received[n].mean(1)[at & seen.judged].mean()
            assert layer.received[KINDS[kind]] == pytest.approx(float(got), abs=1e-6)
            assert layer.share[KINDS[kind]] == pytest.approx(float(seen.share[n][at].sum()) / 2, abs=1e-6)
            assert layer.sinks[KINDS[kind]] == int(seen.sinks[n][at].sum()) / 2
            heads = [head[KINDS[kind]] for head in layer.head_sinks]
            assert heads == [int(seen.head_sinks[n, :, h][at].sum()) / 2 for h in range(H)]


def test_even_attention_in_a_short_sequence_is_no_sink() -> None:
    kinds = kinds_of(9)
    inspected = Inspected(usual(0, kinds).states, (looks(torch.zeros(1, H, 9, 9)),) * N, kinds != NOTHING)
    assert attention(inspected, Thresholds()).received[0, 0, :, 0].min() > 0.2
    assert not attention(inspected, Thresholds()).sinks.any()
    assert attention(inspected, Thresholds(even=0)).sinks[:, 0].nonzero()[:, 1].tolist() == [0] * N


def test_rows_that_give_less_than_everything_away_count_so() -> None:
    """With softmax-off-by-one the shares fall with what is given."""
    kinds = kinds_of(20)
    inspected = planted(0, kinds)
    half = Inspected(inspected.states, tuple(w / 2 for w in inspected.weights or ()), inspected.mask)
    whole, fewer = (attention(x, Thresholds(received=0.1, even=1)) for x in (inspected, half))
    assert torch.equal(whole.sinks, fewer.sinks)
    torch.testing.assert_close(fewer.share, whole.share / 2)


def test_padding_and_batches_do_not_matter() -> None:
    kinds = kinds_of(len(ROW), 24, 1)
    inspected = planted(1, kinds)
    assert inspected.weights is not None
    apart_, together, padded = Tally(), Tally(), Tally()
    together.add(inspected, kinds)
    for b, length in enumerate((len(ROW), 24, 1)):
        one = Inspected(
            tuple(state[b : b + 1, :length] for state in inspected.states),
            tuple(w[b : b + 1, :, :length, :length] for w in inspected.weights), inspected.mask[b : b + 1, :length],
        )  # fmt: skip
        apart_.add(one, kinds[b : b + 1, :length])
    wide = F.pad(kinds, [0, 4])
    valid = wide != NOTHING
    states = tuple(F.pad(x, [0, 0, 0, 4]).masked_fill(~valid[..., None], torch.nan) for x in inspected.states)
    both = (valid[:, None, :, None] & valid[:, None, None]).expand(-1, H, -1, -1)
    weights = tuple(F.pad(w, [0, 4, 0, 4]).masked_fill(~both, torch.nan) for w in inspected.weights)
    padded.add(Inspected(states, weights, valid), wide)
    expected = together.result().to_json()
    assert rounded(apart_.result().to_json()) == rounded(padded.result().to_json()) == rounded(expected)
    assert "NaN" not in json.dumps(expected)


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def test_figures_of_states_by_hand() -> None:
    kinds = torch.tensor([[BOS, MARK, SOUND, SOUND], [BOS, MARK, SOUND, NOTHING]])
    state = torch.tensor([
        [[10.0, 0.0], [3.0, 4.0], [0.0, -2.0], [1.0, 0.0]],
        [[1.0, 1.0], [2.0, 2.0], [-4.0, 4.0], [torch.nan, torch.inf]],
    ])  # fmt: skip
    weights = looks(torch.zeros(2, 1, 4, 4))
    report = report_of(Inspected((state, state), (weights,), kinds != NOTHING), kinds, absolute=3.5, relative=2)
    one = report.states[1]
    # Magnitudes of row 0: 0 0 0 1 2 3 4 10, the lower median is 1; of row 1: 1 1 2 2 4 4, the lower median is 2.
    assert one.median == 1.5
    assert one.largest == 10
    assert one.ratio == {"BOS": pytest.approx((10 + 0.5) / 2), "others": pytest.approx((4 + 2) / 2)}
    assert one.massive == {"BOS": 0.5, "mark": 0.5, "sound": 1.0}
    assert one.massive_features == {0: 2, 1: 2}
    assert one.massive_places == {0: 1, 1: 1, 2: 1}
    cosines = {"mark": (0.6 + 1) / 2, "sound": (0 + 1 + 0) / 3}
    assert one.cosine == {"BOS": pytest.approx(1), **{name: pytest.approx(x) for name, x in cosines.items()}}
    assert one.cosine2["mark"] == pytest.approx((0.36 + 1) / 2)
    assert one.features == {"BOS": (0, 1), "others": (1, 0)}
    assert report.places == {"BOS": 1, "mark": 1, "sound": 1.5}
    assert (report.sequences, report.dim) == (2, 2)


def test_cosines_agree_with_the_loss() -> None:
    kinds = kinds_of(23)
    inspected = usual(5, kinds)
    report = report_of(inspected, kinds)
    names = ("mark", "sound", "lips", "prompt")
    means = [
        sum(state.cosine2[name] * report.places[name] for name in names if name in report.places)
        / sum(report.places[name] for name in names if name in report.places)
        for state in report.states[1:-1]
    ]
    counts = (kinds >= MARK) & (kinds <= PROMPT)
    assert decorrelation(inspected.states, counts).item() == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_groups_of_places() -> None:
    kinds = torch.tensor([[BOS, SINK, MARK, SOUND, TEXT, NOTHING]])
    sinks = torch.zeros(2, 1, 6, dtype=torch.bool)
    sinks[0, 0, [0, 1, 2]] = True
    sinks[1, 0, 4] = True
    found = dict(zip(GROUPS, grouped(sinks, kinds), strict=True))
    assert {name: mask[0].nonzero()[:, 0].tolist() for name, mask in found.items()} == {
        "BOS": [0], "dedicated": [1], "sinks": [2, 4], "others": [3],
    }  # fmt: skip


def test_sinks_that_were_made_to_be_are_not_intermediate() -> None:
    kinds = kinds_of(len(ROW))
    kinds[0, PLACE] = SINK
    report = report_of(planted(0, kinds), kinds)
    assert report.layers[0].sinks["sink"] == 1
    assert not report.sink_places
    assert "no intermediate sinks" in report.summary()
    assert {"BOS", "others", "dedicated"} == {*report.states[1].ratio}


def test_sequences_without_sinks_do_not_thin_figures_of_sinks_out() -> None:
    kinds, tally = kinds_of(len(ROW)), Tally()
    alone = report_of(planted(0, kinds), kinds)
    tally.add(planted(0, kinds), kinds)
    tally.add(usual(1, kinds), kinds)
    both = tally.result()
    assert both.layers[1].sinks["sound"] == 0.5
    for one, state in zip(alone.states, both.states, strict=True):
        assert state.ratio["sinks"] == pytest.approx(one.ratio["sinks"])
        assert state.alike == one.alike
        assert state.sink_cosine2 == pytest.approx(one.sink_cosine2)
        assert state.largest >= one.largest
    assert both.example == alone.example


def test_the_most_frequent_come_first() -> None:
    assert [*frequent({3: 1, 1: 5, 2: 0, 0: 1}).items()] == [(1, 5), (0, 1), (3, 1)]


def test_other_features_are_not_shared() -> None:
    kinds = kinds_of(len(ROW))
    inspected = planted(0, kinds)
    for state in inspected.states[1:]:
        state[:, PLACE] = torch.randn(D)
        state[:, PLACE, [1, 2, 3]] = 2000.0
    report = report_of(inspected, kinds)
    assert {*report.states[2].features["sinks"]} == {1, 2, 3}
    assert report.states[2].overlap == 0
    assert report.states[2].alike == 0
    assert "BOS and intermediate sinks do not share feature indices" in report.summary()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    kinds = kinds_of(len(ROW))
    inspected = planted(0, kinds)
    narrow = Inspected(
        tuple(x.to(dtype) for x in inspected.states), tuple(w.to(dtype) for w in inspected.weights or ()),
        inspected.mask,
    )  # fmt: skip
    found, expected = report_of(narrow, kinds), report_of(inspected, kinds)
    assert found.sink_places == expected.sink_places
    assert found.states[2].massive_features == expected.states[2].massive_features
    assert found.states[2].ratio["BOS"] == pytest.approx(expected.states[2].ratio["BOS"], rel=0.02)


def test_states_whose_median_is_zero_are_finite() -> None:
    kinds = kinds_of(12)
    inspected = usual(0, kinds)
    for state in inspected.states:
        state[..., 1:] = 0
    report = report_of(inspected, kinds)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["states"][0]["ratio"] == {"BOS": 0, "others": 0}


def test_json_has_names_and_thresholds() -> None:
    kinds = kinds_of(len(ROW))
    said = json.loads(json.dumps(report_of(planted(0, kinds), kinds).to_json(), allow_nan=False))
    assert said["thresholds"] == {
        "received": 0.2, "even": 2, "queries": 8, "absolute": 100, "relative": 1000, "alike": 0.9, "top": 3,
    }  # fmt: skip
    assert len(said["layers"]) == N
    assert len(said["states"]) == N + 1
    assert said["example"]["kinds"] == [KINDS[kind] for kind in ROW]
    assert said["example"]["received"][0][-8:] == [None] * 8
    assert said["example"]["received"][0][PLACE] > 0.2
    assert said["states"][1]["massive_features"] == {"5": 2, "19": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"received": 1.5}, "received 1.5: at most 1"), ({"received": -0.1}, "received -0.1: at least 0"),
        ({"queries": 0}, "queries 0: at least 1"), ({"top": 0}, "top 0: at least 1"),
        ({"alike": 2}, "alike 2: at most 1"), ({"relative": float("nan")}, "relative nan: at least 0"),
    ],
)  # fmt: skip
def test_thresholds_that_are_none(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Thresholds(**given)  # type: ignore[arg-type]


def test_what_cannot_be_judged() -> None:
    kinds = kinds_of(12)
    inspected = usual(0, kinds)
    with pytest.raises(ValueError, match="inspect the model with weights=True"):
        Tally().add(Inspected(inspected.states, None, inspected.mask), kinds)
    with pytest.raises(ValueError, match="wanted one for each place"):
        Tally().add(inspected, F.pad(kinds[:, :-1], [0, 1]))
    with pytest.raises(ValueError, match="begins with BOS"):
        Tally().add(inspected, kinds.clamp(min=MARK))
    with pytest.raises(ValueError, match="nothing was added"):
        Tally().result()
