"""AlignAtt and LocalAgreement against golden vectors and their laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechattn.policy import Source
from speechattn.policy.align_att import AlignAtt, median_filter, standardise
from speechattn.policy.ed_att import EDAtt
from speechattn.policy.hold import Hold, Told, WaitK
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.search import Draft

ROWS = torch.tensor([
    (0.40, 0.30, 0.10, 0.05, 0.05, 0.10), (0.05, 0.50, 0.20, 0.10, 0.05, 0.10), (0.05, 0.05, 0.50, 0.20, 0.10, 0.10),
    (0.05, 0.05, 0.10, 0.20, 0.40, 0.20), (0.02, 0.03, 0.05, 0.10, 0.20, 0.60),
])  # fmt: skip
READ, END = Source(6, 0.04, finished=False), Source(6, 0.04, finished=True)


def draft(rows: torch.Tensor, tokens: list[int] | None = None, *, first: int = 0, prompt: int = 1) -> Draft:
    """A draft of one head whose tokens look where `rows` [U, T] say; before them `prompt - 1` rows, behind them one."""
    tokens = list(range(len(rows))) if tokens is None else tokens
    frames = rows.shape[1]
    weights = torch.cat([torch.full((prompt - 1, frames), 1 / frames), rows, torch.full((1, frames), 1 / frames)])
    return Draft(torch.tensor(tokens), torch.zeros(len(tokens)), weights[None], ((3, 0),), first, True)


@pytest.mark.parametrize(("threshold", "passed"), [(1, 3), (2, 3), (3, 2)])
def test_fbk_preset_on_the_golden_matrix(threshold: int, passed: int) -> None:
    policy = AlignAtt.fbk(3, 1, threshold)
    assert policy.accept(draft(ROWS), READ, None) == (passed, None)


def test_presets_are_what_their_papers_say() -> None:
    whisper, fbk = AlignAtt.whisper(((1, 2),)), AlignAtt.fbk(3, 8)
    assert (whisper.frame_threshold, whisper.median, whisper.normalise, whisper.drop_last) == (25, 7, True, 0)
    assert (fbk.median, fbk.normalise, fbk.drop_last, fbk.rewind_threshold) == (1, False, 1, None)
    assert fbk.heads == tuple((3, head) for head in range(8))


def test_a_finished_source_commits_everything() -> None:
    assert AlignAtt.fbk(3, 1, 6).accept(draft(ROWS), END, None)[0] == 5
    assert LocalAgreement().accept(draft(ROWS), END, ())[0] == 5


@given(st.lists(st.lists(st.floats(0, 1), min_size=9, max_size=9), min_size=1, max_size=6), st.booleans())
def test_more_caution_never_commits_more(rows: list[list[float]], whisper: bool) -> None:
    proposal = draft(torch.tensor(rows), prompt=3)
    make = (lambda f: AlignAtt.whisper(((3, 0),), f)) if whisper else (lambda f: AlignAtt.fbk(3, 1, f))
    counts = [make(f).accept(proposal, READ, None)[0] for f in range(10)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert all(0 <= n <= len(rows) for n in counts)


def test_pause_needs_less_distance_than_running_speech() -> None:
    rows = torch.zeros(1, 60)
    rows[0, 50] = 1.0
    policy = AlignAtt.whisper(((3, 0),), 25)
    paused = Source(60, 0.02, finished=False, paused=True)
    smooth = torch.nn.functional.avg_pool1d(rows[None], 9, 1, 4)[0]
    assert policy.accept(draft(smooth, prompt=3), Source(60, 0.02, finished=False), None)[0] == 0
    assert policy.accept(draft(smooth, prompt=3), paused, None)[0] == 1


def test_a_doubtful_token_waits_three_times_as_long_but_not_in_a_pause() -> None:
    """Two tokens that look 20 and 12 frames before the end; the first has a probability of 0.5."""
    rows = torch.zeros(2, 60)
    rows[0, 40], rows[1, 48] = 1.0, 1.0
    proposal = replace(draft(rows), log_probs=torch.tensor([0.5, 0.9]).log())
    running, paused = (Source(60, 0.02, finished=False, paused=p) for p in (False, True))
    for threshold, doubt, passed in [(6, 0.4, 2), (6, 0.6, 2), (7, 0.6, 0), (7, 0.4, 2), (7, 0.95, 0), (4, 0.95, 1)]:
        policy = AlignAtt(((3, 0),), threshold, 5, normalise=False, median=1, doubt=doubt)
        assert policy.accept(proposal, running, None)[0] == passed, (threshold, doubt)
        assert policy.accept(proposal, paused, None)[0] == 2
    assert policy.why(proposal, running, None, 1) == "looks at frame 48, within 12 of the newest 60"


def test_a_jump_back_stops_the_whisper_preset_only() -> None:
    rows = torch.zeros(2, 500)
    rows[0, 400:410] = 1.0
    rows[1, 100:110] = 1.0
    proposal = draft(rows, prompt=3)
    assert AlignAtt.whisper(((3, 0),)).accept(proposal, READ, None)[0] == 1
    assert AlignAtt.fbk(3, 1).accept(proposal, READ, None)[0] == 2


@pytest.mark.parametrize("rows", [1, 2, 3, 10])
def test_normalisation_keeps_the_peak_with_few_rows(rows: int) -> None:
    """A bare z-score moves the peak of a sharp diagonal by 18 of 50 frames when there are two rows."""
    frames = 50
    where = torch.linspace(5, 45, rows).round() if rows > 1 else torch.tensor([30.0])
    sharp = (-(torch.arange(frames) - where[:, None]).square() / 8).exp() + 1e-4
    weights = (sharp / sharp.sum(1, keepdim=True))[None]
    peak = standardise(weights)[0].argmax(-1)
    assert torch.isfinite(standardise(weights)).all()
    assert (peak - where).abs().max() <= 2
    if rows == 2:
        bare = (weights - weights.mean(1, keepdim=True)) / weights.std(1, keepdim=True, correction=0)
        assert (bare[0].argmax(-1) - where).abs().max() > 2


def test_normalisation_removes_a_frame_that_every_token_looks_at() -> None:
    weights = torch.eye(6, 20)[None] * 0.3
    weights[..., -1] = 0.7
    assert weights[0].argmax(-1).tolist() == [19] * 6
    assert standardise(weights)[0].argmax(-1).tolist() == list(range(6))


def test_median_filter_against_a_loop() -> None:
    x = torch.rand(3, 11)
    x[0, 3:6] = x[0, 2]
    for width in (3, 5, 7, 9):
        edge = width // 2
        padded = torch.cat([x[:, 1 : edge + 1].flip(-1), x, x[:, -edge - 1 : -1].flip(-1)], -1)
        expected = torch.stack([padded[:, i : i + width].median(-1).values for i in range(11)], -1)
        assert torch.equal(median_filter(x, width), expected)
    assert torch.equal(median_filter(x[:, :3], 7), x[:, :3])
    assert torch.equal(median_filter(x, 1), x)
    with pytest.raises(ValueError, match="odd"):
        median_filter(x, 4)


def test_local_agreement_commits_the_common_prefix() -> None:
    policy, rows = LocalAgreement(), torch.ones(4, 5)
    n, state = policy.accept(draft(rows, [1, 2, 3, 4]), READ, policy.initial())
    assert n == 0
    n, state = policy.accept(draft(rows, [1, 2, 9, 9]), READ, state)
    assert n == 2
    # two tokens were committed: the next draft begins behind them, and the one before is counted from there
    n, state = policy.accept(draft(rows[:3], [9, 9, 5], first=2), READ, state)
    assert n == 2
    n, state = policy.accept(draft(rows[:1], [7], first=4), READ, state)
    assert n == 0


def test_local_agreement_of_three_needs_three() -> None:
    policy, rows = LocalAgreement(3), torch.ones(2, 5)
    state = policy.initial()
    counts = []
    for _ in range(3):
        n, state = policy.accept(draft(rows, [1, 2]), READ, state)
        counts.append(n)
    assert counts == [0, 0, 2]
    with pytest.raises(ValueError, match="at least 1"):
        LocalAgreement(0)


@pytest.mark.parametrize(
    ("power", "alpha", "passed"),
    [(2, 0.6, 3), (2, 0.2, 1), (2, 0.1, 0), (1, 0.12, 1), (1, 0.34, 3), (1, 0.76, 5), (2, 1.2935, 3), (2, 1.3, 5)],
)  # fmt: skip
def test_edatt_on_the_golden_matrix(power: int, alpha: float, passed: int) -> None:
    policy = EDAtt(((3, 0),), alpha, power=power)
    assert policy.accept(draft(ROWS), READ, None) == (passed, None)
    assert policy.accept(draft(ROWS), END, None) == (5, None)


@given(st.lists(st.lists(st.floats(0, 1), min_size=7, max_size=7), min_size=1, max_size=6), st.sampled_from([1, 2]))
def test_edatt_commits_no_more_when_it_is_more_careful(rows: list[list[float]], power: int) -> None:
    counts = [
        EDAtt(((3, 0),), alpha, power=power).accept(draft(torch.tensor(rows), prompt=2), READ, None)[0]
        for alpha in (0.03, 0.1, 0.2, 0.6, 9.0)
    ]
    assert counts == sorted(counts)
    assert counts[-1] == len(rows)


def test_edatt_looks_at_the_mean_of_its_heads() -> None:
    early, late = torch.zeros(1, 6), torch.zeros(1, 6)
    early[0, 0], late[0, 4] = 1.0, 1.0
    one, other = draft(early), draft(late)
    both = Draft(one.tokens, one.log_probs, torch.cat([one.weights, other.weights]), ((0, 0), (0, 1)), 0, True)
    assert EDAtt(((0, 0),)).accept(both, READ, None)[0] == 1
    assert EDAtt(((0, 1),)).accept(both, READ, None)[0] == 0
    assert EDAtt.fbk(0, 2, 0.6).accept(both, READ, None)[0] == 0
    assert EDAtt.fbk(0, 2, 0.8).accept(both, READ, None)[0] == 1
    with pytest.raises(ValueError, match="alpha 0"):
        EDAtt((), 0.0)


def test_hold_keeps_the_last_tokens_back() -> None:
    rows = torch.ones(4, 6)
    assert [Hold(n).accept(draft(rows), READ, None)[0] for n in range(6)] == [4, 3, 2, 1, 0, 0]
    assert Hold(3).accept(draft(rows), END, None)[0] == 4
    with pytest.raises(ValueError, match="-1"):
        Hold(-1)


def pairs(tokens: list[int]) -> list[int]:
    """Words of two tokens each, and a rest."""
    return [2] * (len(tokens) // 2) + [1] * (len(tokens) % 2)


def test_wait_k_counts_words() -> None:
    def heard(frames: int, finished: bool = False) -> Source:
        return Source(frames, 0.02, finished)

    policy, rows = WaitK(2, pairs, 10), torch.ones(7, 5)  # what the draft sees may be less than was heard
    counts = [policy.accept(draft(rows), heard(10 * n + 9), policy.initial())[0] for n in range(7)]
    assert counts == [0, 0, 0, 2, 4, 6, 7]
    assert policy.accept(draft(rows), heard(9, finished=True), policy.initial()) == (7, Told())
    # three of its tokens were committed, of which the third begins a word
    n, state = policy.accept(draft(rows), heard(49), policy.initial())
    assert n == 4
    n, state = policy.accept(draft(rows[:5], [3, 4, 5, 6, 7], first=3), heard(49), state)
    assert (n, state.committed) == (1, (0, 1, 2))
    n, state = policy.accept(draft(rows[:3], [4, 5, 6], first=4), heard(69), state)
    assert (n, state.committed) == (3, (0, 1, 2, 3))
    # a state of its own begins where the session is
    assert policy.accept(draft(rows[:5], first=90), heard(39), policy.initial())[0] == 2
    with pytest.raises(ValueError, match="k -1"):
        WaitK(-1, pairs)
