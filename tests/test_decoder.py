"""Soft cross attention, the attention decoder, and greedy search with a guess."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechattn import tree
from speechattn.cross.soft import Soft
from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Frames, Memory
from speechattn.search.greedy import Greedy

DIM, HEADS = 8, 2


def decoder(depth: int = 2, vocab: int = 20) -> AttentionDecoder:
    made = AttentionDecoder(vocab, 40, DIM, HEADS, depth, cross=lambda: Soft(DIM, HEADS)).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made.requires_grad_(False)


def memory(lengths: list[int]) -> Memory:
    values = torch.randn(len(lengths), max(lengths), DIM, dtype=torch.double)
    return Memory.of(Frames.from_lengths(values, torch.tensor(lengths)))


def test_soft_is_multi_head_attention() -> None:
    soft, oracle = Soft(DIM, HEADS).double(), torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat([soft.query.weight, soft.key.weight, soft.value.weight]))
        oracle.in_proj_bias.copy_(torch.cat([soft.query.bias, soft.key.bias, soft.value.bias]))
        oracle.out_proj.load_state_dict(soft.out.state_dict())
    heard, query = memory([5, 3]), torch.randn(2, 4, DIM, dtype=torch.double)
    seen, _ = soft.attend(query, soft.read(heard))
    x = heard.frames
    context, weights = oracle(query, x.values, x.values, key_padding_mask=~x.mask, average_attn_weights=False)
    torch.testing.assert_close(seen.context, context, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen.weights, weights, rtol=0, atol=1e-12)
    assert seen.alignment is seen.weights
    assert not seen.waiting.any()


def test_soft_row_without_a_frame_sees_nothing_and_nan_does_not_leak() -> None:
    soft = Soft(DIM, HEADS).double()
    values = torch.randn(2, 3, DIM, dtype=torch.double)
    values[1] = float("nan")
    seen, _ = soft.attend(
        torch.randn(2, 2, DIM, dtype=torch.double),
        soft.read(Memory.of(Frames.of(values, torch.tensor([[True] * 3, [False] * 3])))),
    )
    assert torch.isfinite(seen.context).all()
    assert seen.weights[1].abs().sum() == 0


def test_memory_read_before_stands_behind() -> None:
    net = decoder()
    whole = memory([9])
    front = Memory.of(whole.frames[:4])
    tokens = torch.tensor([[1, 2, 3]])
    one, _, _ = net.step(tokens, net.start(whole))
    two, _, _ = net.step(tokens, net.start(front, behind=net.start(whole)))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(cuts=st.sets(st.integers(1, 11)))
def test_reading_tokens_in_pieces_equals_reading_them_at_once(cuts: set[int]) -> None:
    torch.manual_seed(0)
    net, heard = decoder(), memory([6, 4])
    tokens = torch.randint(20, (2, 12))
    heads = ((1, 0), (0, 1))
    whole, seen, _ = net.step(tokens, net.start(heard), heads=heads)
    state, parts, rows = net.start(heard), [], []
    edges = [0, *sorted(cuts), 12]
    for a, b in itertools.pairwise(edges):
        y, w, state = net.step(tokens[:, a:b], state, heads=heads)
        parts.append(y)
        rows.append(w)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat(rows, 2), seen, rtol=0, atol=1e-10)


def test_a_row_does_not_know_its_batch() -> None:
    net, heard = decoder(), memory([6, 3])
    tokens = torch.randint(20, (2, 5))
    both, _, _ = net.step(tokens, net.start(heard))
    alone = Memory.of(Frames(heard.frames.values[1:, :3], heard.frames.mask[1:, :3]))
    one, _, _ = net.step(tokens[1:], net.start(alone))
    torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-12)


def test_rows_of_different_age_share_a_batch() -> None:
    net, heard = decoder(), memory([6, 6])
    tokens = torch.randint(20, (2, 6))
    rows = [Memory.of(Frames(heard.frames.values[i : i + 1], heard.frames.mask[i : i + 1])) for i in (0, 1)]
    _, _, long = net.step(tokens[:1, :4], net.start(rows[0]))
    _, _, short = net.step(tokens[1:, :2], net.start(rows[1]))
    expected, _, _ = net.step(tokens[1:, 4:], short)
    y, _, _ = net.step(tokens[:, 4:], tree.concat([long, short]))
    torch.testing.assert_close(y[1:], expected, rtol=0, atol=1e-12)


def test_too_many_tokens_are_refused_with_the_numbers() -> None:
    net = decoder()
    with pytest.raises(ValueError, match=r"41 tokens .* 40"):
        net.step(torch.zeros(1, 41, dtype=torch.long), net.start(memory([3])))


def naive_greedy(
    net: AttentionDecoder, heard: Memory, prompt: list[int], end: int, never: set[int], most: int
) -> list[int]:
    """Read everything again for every token."""
    said: list[int] = []
    while len(said) < most:
        hidden, _, _ = net.step(torch.tensor([prompt + said]), net.start(heard))
        scores = net.logits(hidden[0, -1])
        scores[end + 1 :] = -torch.inf
        scores[list(never)] = -torch.inf
        token = int(scores.argmax())
        if token == end:
            break
        said.append(token)
    return said


@settings(max_examples=30, deadline=None)
@example(seed=3, guess=[17, 4, 11], right=0)
@given(seed=st.integers(0, 10**6), guess=st.lists(st.integers(0, 17), max_size=12), right=st.integers(0, 10))
def test_a_guess_changes_nothing_but_time(seed: int, guess: list[int], right: int) -> None:
    torch.manual_seed(seed)
    net, heard, end = decoder(), memory([7]), 17
    search = Greedy(net, end, suppress=[3])
    heads = ((0, 0), (1, 1))
    expected = naive_greedy(net, heard, [18, 1], end, {3}, 9)
    plain = search.draft(heard, [18, 1], [], heads=heads, max_tokens=9)
    assert plain.tokens.tolist() == expected
    other = search.draft(heard, [18, 1], [], heads=heads, max_tokens=9, guess=expected[:right] + guess)
    assert other.tokens.tolist() == expected
    assert other.ended == plain.ended
    torch.testing.assert_close(other.weights, plain.weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(other.log_probs, plain.log_probs, rtol=0, atol=1e-6)
    assert plain.weights.shape == (2, 2 + len(expected), 7)


def test_committed_tokens_are_kept_and_their_word_is_not_continued() -> None:
    torch.manual_seed(5)
    net, heard, end = decoder(), memory([7]), 17
    free = Greedy(net, end).draft(heard, [18], [4], max_tokens=6).tokens.tolist()
    assert free
    held = Greedy(net, end, suppress_next=free[:1]).draft(heard, [18], [4], max_tokens=6).tokens.tolist()
    assert held[:1] != free[:1]
    begun = Greedy(net, end, suppress_next=free[:1]).draft(heard, [18, 4], [], max_tokens=6).tokens.tolist()
    assert begun == free
