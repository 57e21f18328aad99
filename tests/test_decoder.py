"""Soft cross attention, the attention decoder, and greedy search with a guess."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechattn import tree
from speechattn.attention.entmax import Entmax
from speechattn.cross.expected import Form, doubling, fused
from speechattn.cross.location import DynamicConvolution, MixtureAttention
from speechattn.cross.monotonic import HardMonotonic, MoChA
from speechattn.cross.segmental import SegmentAttention, Segments, Within
from speechattn.cross.soft import Resting, Soft
from speechattn.cross.sources import Flat, Hierarchical, Sources
from speechattn.decoder.attention import AttentionDecoder, sinusoids
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.model.config import build
from speechattn.pretrained.espnet.decoder import load_decoder
from speechattn.search.attention import AttentionScorer
from speechattn.search.greedy import Greedy

DIM, HEADS = 8, 2


def decoder(depth: int = 2, vocab: int = 20) -> AttentionDecoder:
    made = AttentionDecoder(vocab, 40, DIM, HEADS, depth).double().eval()
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
    seen, _ = soft.attend(query, soft.read(heard), ())
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
        (),
    )
    assert torch.isfinite(seen.context).all()
    assert seen.weights[1].abs().sum() == 0


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("kind", [
    Soft, Flat, Hierarchical, MixtureAttention, DynamicConvolution, HardMonotonic, partial(MoChA, chunk_heads=2),
    partial(SegmentAttention, boundary=Within(3)), partial(Soft, normaliser=Entmax), partial(Resting, rest=3),
])  # fmt: skip
def test_whoever_asks_for_heads_gets_these_and_the_same_context(kind: Any, beam: int) -> None:
    cross = kind(DIM, HEADS).double().eval()
    heard: Any = memory([5, 3, 1])
    heard.frames.values[2], heard.frames.mask[2] = 0.0, False
    heard = Sources((heard, memory([2, 4, 1]))) if isinstance(cross, (Flat, Hierarchical)) else heard
    query, read = torch.randn(3 * beam, 4, DIM, dtype=torch.double), cross.read(heard)
    place = cross.place(query)
    if isinstance(cross, SegmentAttention):
        place = Segments.until(torch.tensor([[1, 2, 4, 5]]).expand(3 * beam, -1))
    every, _ = cross.attend(query, read, place)
    for heads in ((), (1,), (1, 0)):
        seen, _ = cross.attend(query, read, place, heads=heads)
        torch.testing.assert_close(seen.context, every.context, rtol=0, atol=1e-12)
        torch.testing.assert_close(seen.alignment, every.alignment[:, list(heads)], rtol=0, atol=1e-12)
        assert torch.equal(seen.waiting, every.waiting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_without_weights_is_that_with_weights(dtype: torch.dtype) -> None:
    """Values and gradients, and zeros in the row without a frame."""
    soft, heard = Soft(DIM, HEADS).to(dtype), memory([50, 31, 50])
    x = Frames.of(heard.frames.values.to(dtype), heard.frames.mask & torch.tensor([[True], [True], [False]]))
    query, near = torch.randn(3, 4, DIM, dtype=dtype), 2e-6 if dtype == torch.float32 else 0.05
    found = []
    for heads in ((), (0, 1)):
        context = soft.attend(query, soft.read(Memory.of(x)), (), heads=heads)[0].context
        found.append((context, *torch.autograd.grad(context.square().sum(), list(soft.parameters()))))
        assert torch.equal(context[2], soft.out.bias.expand(4, -1))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=near, atol=near * 10)


def test_places_of_rest_are_frames_that_nobody_sees() -> None:
    """As many frames as their weight says, behind the memory; a row without a frame sees them alone."""
    soft, resting = Soft(DIM, HEADS).double(), Resting(DIM, HEADS, rest=3, weight=2.0).double()
    resting.load_state_dict(soft.state_dict(), strict=False)
    heard, rest = memory([5, 2, 1]), torch.randn(1, 3, DIM, dtype=torch.double)
    heard.frames.values[2], heard.frames.mask[2] = 0.0, False
    places = soft.read(Memory.of(Frames(rest, torch.ones(1, 3, dtype=torch.bool))))
    resting.rest_key.data, resting.rest_value.data = places.key[0], places.value[0]
    query = torch.randn(3, 4, DIM, dtype=torch.double)
    twice = soft.read(heard).then(places, 0).then(places, 0)
    every, seen = soft.attend(query, twice, ())[0], resting.attend(query, resting.read(heard), ())[0]
    torch.testing.assert_close(seen.context, every.context)
    torch.testing.assert_close(seen.weights, every.weights[..., :5])
    for rest_, weight in ((0, 1.0), (1, 0.0)):
        with pytest.raises(ValueError, match="wanted at least 1"):
            Resting(DIM, HEADS, rest=rest_, weight=weight)


def test_an_opening_is_a_prompt_that_hears_nothing() -> None:
    made = AttentionDecoder(20, 12, DIM, HEADS, 2, opening=2, cross=partial(Resting, rest=3)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    plain = AttentionDecoder(20, 12, DIM, HEADS, 2, cross=partial(Resting, rest=3)).double()
    plain.load_state_dict({name: t for name, t in made.state_dict().items() if name != "opening"})
    assert made.opening is not None
    plain.embed.weight.data[:2] = made.opening.data
    x, tokens = memory([5, 3]), torch.randint(2, 20, (2, 6))
    nothing = plain.start(Memory.of(x.frames[:0]))
    _, _, begun = plain.step(torch.tensor([[0, 1]]).expand(2, -1), nothing)
    wanted, looks, _ = plain.step(tokens, replace(begun, cross=plain.start(x).cross), heads=[(1, 0)])
    state, parts, seen = made.start(x), [], []
    assert state.length.tolist() == [2, 2]
    for piece in tokens.split([1, 3, 2], 1):
        hidden, look, state = made.step(piece, state, heads=[(1, 0)])
        parts.append(hidden)
        seen.append(look)
    torch.testing.assert_close(torch.cat(parts, 1), wanted)
    torch.testing.assert_close(torch.cat(seen, 2), looks)
    torch.testing.assert_close(made.step(tokens, made.start(x, beam=1))[0], wanted)
    with pytest.raises(ValueError, match="do not fit"):
        made.step(torch.randint(2, 20, (2, 5)), state)
    hidden, _, _ = made.step(tokens.repeat_interleave(3, 0), made.start(x, beam=3))
    torch.testing.assert_close(hidden, wanted.repeat_interleave(3, 0))
    with pytest.raises(ValueError, match="remembers where it stands"):
        AttentionDecoder(20, 12, DIM, HEADS, 2, opening=1, cross=DynamicConvolution).double().start(memory([2]))


@pytest.mark.parametrize("form", [doubling, fused])
def test_a_configuration_names_who_computes_expected_alignments(form: Form) -> None:
    name = f"speechattn.cross.expected.{form.__name__}"  # type: ignore[attr-defined]
    part = {"class_path": "speechattn.cross.monotonic.HardMonotonic", "init_args": {"dim": 8, "heads": 2, "form": name}}
    assert build(part, "here").form is form


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


def test_rows_come_in_the_order_of_the_pairs() -> None:
    net, heard, tokens = decoder(), memory([6, 4]), torch.randint(20, (2, 3))
    pairs = ((1, 1), (0, 0), (1, 0), (0, 1), (1, 1))
    _, seen, _ = net.step(tokens, net.start(heard), heads=pairs)
    for i, pair in enumerate(pairs):
        _, one, _ = net.step(tokens, net.start(heard), heads=(pair,))
        torch.testing.assert_close(seen[:, i : i + 1], one, rtol=0, atol=1e-12)


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


def usual(vocab: int = 20) -> AttentionDecoder:
    """Sinusoids, ReLU, an output layer."""
    made = AttentionDecoder.usual(vocab, DIM, HEADS, 2, 12, context=40).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made.requires_grad_(False)


def espnet_decoder(vocab: int, dim: int, depth: int = 2, inner: int = 12) -> tuple[Any, AttentionDecoder]:
    """ESPnet's Transformer decoder with random weights, its table of positions as exact as ours, and ours with them."""
    module = pytest.importorskip("espnet2.asr.decoder.transformer_decoder")
    theirs = module.TransformerDecoder(vocab, dim, attention_heads=HEADS, linear_units=inner, num_blocks=depth).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.double()
    mine = load_decoder(dict(theirs.state_dict()), HEADS)
    theirs.embed[1].pe = mine.positions[None]
    return theirs, mine


def test_espnets_weights_give_espnets_scores() -> None:
    theirs, mine = espnet_decoder(20, DIM)
    heard, lengths = memory([6, 4]), torch.tensor([5, 3])
    targets = torch.randint(19, (2, 5))
    tokens = torch.cat([torch.full((2, 1), 19), targets], 1)
    expected, _ = theirs(heard.frames.values, torch.tensor([6, 4]), tokens, lengths + 1)
    scores, _, counts, _ = mine.forced(mine.start(heard), targets, lengths, sos=19, eos=19)
    torch.testing.assert_close(scores[counts], expected[counts], rtol=0, atol=1e-10)
    last, _ = theirs.batch_score(tokens[:, :4], [None, None], heard.frames.values)  # which knows of no padding
    alone = Memory.of(Frames(heard.frames.values, torch.ones_like(heard.frames.mask)))
    hidden, _, _ = mine.step(tokens[:, :4], mine.start(alone))
    torch.testing.assert_close(mine.logits(hidden[:, -1]).log_softmax(-1), last, rtol=0, atol=1e-10)


def test_tensors_that_do_not_fit_are_named() -> None:
    theirs, _ = espnet_decoder(20, DIM)
    tensors = dict(theirs.state_dict())
    with pytest.raises(ModelError, match=r"here.pth: tensors do not fit .* 1 unknown \(decoders.0.norm7.weight\)"):
        load_decoder(tensors | {"decoders.0.norm7.weight": torch.zeros(3)}, HEADS, source="here.pth")
    with pytest.raises(ModelError, match="is this a Transformer decoder"):
        load_decoder({"decoders.0.norm1.weight": torch.zeros(3)}, HEADS)


def test_sinusoids_turn_with_the_position() -> None:
    table = sinusoids(50, 6).double()
    assert table.shape == (50, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    torch.testing.assert_close(table[:, 2], (torch.arange(50).double() / 10000 ** (2 / 6)).sin(), rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:, 1], torch.arange(50).double().cos(), rtol=0, atol=1e-6)


def test_the_loss_is_smoothed_cross_entropy_of_the_text_and_its_end() -> None:
    net, heard = usual(), memory([6, 4])
    targets, lengths = torch.randint(19, (2, 5)), torch.tensor([5, 2])
    targets[1, 2:] = -1  # padding is never read
    found = net.losses(heard, targets, lengths, sos=18, eos=19, smoothing=0.1)
    for row, n in enumerate(lengths.tolist()):
        text = targets[row, :n].tolist()
        alone = Memory.of(Frames(heard.frames.values[row : row + 1], heard.frames.mask[row : row + 1]))
        hidden, _, _ = net.step(torch.tensor([[18, *text]]), net.start(alone))
        log_probs = net.logits(hidden[0]).log_softmax(-1)
        wanted = 0.1 / 20 * torch.ones_like(log_probs)
        wanted[torch.arange(n + 1), torch.tensor([*text, 19])] += 0.9
        assert found[row].item() == pytest.approx(-(wanted * log_probs).sum().item())
    torch.testing.assert_close(net.loss(heard, targets, lengths, sos=18, eos=19), found.mean())
    nobody = Memory.of(Frames(heard.frames.values[:0], heard.frames.mask[:0]))
    assert net.loss(nobody, targets[:0], lengths[:0], sos=18, eos=19) == 0
    empty = net.losses(heard, targets[:, :0], torch.tensor([0, 0]), sos=18, eos=19, smoothing=0.0)
    assert empty.shape == (2,)


def test_the_loss_teaches_and_dropout_is_for_training_alone() -> None:
    torch.manual_seed(3)
    net = AttentionDecoder.soft(6, 9, DIM, HEADS, 1, inner=12, dropout=0.2)
    heard = Memory.of(Frames(torch.randn(2, 4, DIM), torch.ones(2, 4, dtype=torch.bool)))
    targets, lengths = torch.tensor([[1, 2, 3], [3, 1, 0]]), torch.tensor([3, 2])
    first, second = (net.losses(heard, targets, lengths, sos=5, eos=5) for _ in range(2))
    assert not torch.equal(first, second)
    net.eval()
    first, second = (net.losses(heard, targets, lengths, sos=5, eos=5) for _ in range(2))
    assert torch.equal(first, second)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        net.losses(heard, targets, lengths, sos=5, eos=5, smoothing=0.0).sum().backward()
        optimizer.step()
    assert net.losses(heard, targets, lengths, sos=5, eos=5, smoothing=0.0).max() < 0.5


def test_one_memory_serves_many_hypotheses() -> None:
    net, heard = usual(), memory([6, 4])
    tokens = torch.randint(20, (6, 5))
    hidden, seen, _ = net.step(tokens, net.start(heard, beam=3), heads=((1, 0), (0, 1)))
    copied = Memory.of(Frames(heard.frames.values.repeat_interleave(3, 0), heard.frames.mask.repeat_interleave(3, 0)))
    expected, rows, _ = net.step(tokens, net.start(copied), heads=((1, 0), (0, 1)))
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen, rows, rtol=0, atol=1e-12)


def test_a_memory_grows_and_memories_of_different_length_share_a_batch() -> None:
    net, heard = usual(), memory([9])
    tokens = torch.randint(20, (1, 3))
    expected, _, _ = net.step(tokens, net.start(heard))
    begun = net.start(Memory.of(heard.frames[:2]))
    cross = begun.cross
    for a, b in ((2, 2), (2, 7), (7, 9)):
        cross = net.read(Memory.of(heard.frames[a:b]), cross)
    grown, _, _ = net.step(tokens, type(begun)(begun.cache, cross, begun.place))
    torch.testing.assert_close(grown, expected, rtol=0, atol=1e-12)
    both = tree.concat([type(begun)(begun.cache, cross, begun.place), begun])
    found, _, _ = net.step(tokens.expand(2, -1), both)
    short, _, _ = net.step(tokens, begun)
    torch.testing.assert_close(found, torch.cat([expected, short]), rtol=0, atol=1e-12)
    assert tree.split(both.cross[0])[1].trimmed().mask.shape[1] == 2


def test_hypotheses_are_scored_as_texts_and_move_with_their_caches() -> None:
    net, heard = usual(), memory([7, 5])
    scorer = AttentionScorer(net, 18, 19)
    state = scorer.read(heard.frames, scorer.start(heard.frames))
    state = scorer.select(state, torch.zeros(2, 3, dtype=torch.long))
    said = [[[18] for _ in range(3)] for _ in range(2)]
    for _ in range(4):
        scores, after = scorer.score(state, None)
        again, _ = scorer.score(state, None)  # a state that was scored is not spent
        torch.testing.assert_close(again, scores, rtol=0, atol=0)
        for b in range(2):
            row = Memory.of(Frames(heard.frames.values[b : b + 1], heard.frames.mask[b : b + 1]))
            for k in range(3):
                hidden, _, _ = net.step(torch.tensor([said[b][k]]), net.start(row))
                torch.testing.assert_close(scores[b, k], net.logits(hidden[0, -1]).log_softmax(-1), rtol=0, atol=1e-10)
        parents, tokens = torch.randint(3, (2, 3)), torch.randint(18, (2, 3))
        state = scorer.extend(after, parents, tokens)
        said = [[[*said[b][parents[b, k]], int(tokens[b, k])] for k in range(3)] for b in range(2)]
