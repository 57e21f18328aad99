"""Source and target in one Transformer: positions by group, masks of schedules, caches that are fed in turns."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import sqrt

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn import tree
from speechattn.decoder.decoder_only import DecoderOnly, Layer
from speechattn.decoder.groups import Grouped, Interleaved, Positions, Wait, group_ids, group_mask, reads
from speechattn.frames import Frames

pytestmark = pytest.mark.usefixtures("precise")

DIM, HEADS, VOCAB, FEATURES = 8, 2, 7, 3
KINDS = [Grouped(), Grouped(5), Interleaved()]


def model_of(positions: Positions | None = None, *, key_heads: int | None = None) -> DecoderOnly:
    made = DecoderOnly(VOCAB, DIM, HEADS, 2, schedule=Wait(2), source=nn.Linear(FEATURES, DIM), inner=12,
                       key_heads=key_heads, positions=positions)  # fmt: skip
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.6)
    return made.eval()


def circled(x: Tensor, place: int, base: float = 10000.0) -> Tensor:
    """A vector [.., D] as complex numbers, of which number i turns by place * base ** (-2 i / D)."""
    half = x.shape[-1] // 2
    angle = torch.tensor([place * base ** (-i / half) for i in range(half)])
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([z.real, z.imag], -1)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def looked(layer: Layer, x: list[Tensor], places: list[int], target: list[bool]) -> list[Tensor]:
    """One layer over what came, in the order in which it came; one thing and one head at a time."""
    width, outs = DIM // HEADS, []
    projected = [norm(layer.norm, each) @ layer.qkv.weight.T + layer.qkv.bias for each in x]
    keys = layer.key_heads * width
    for i, own in enumerate(projected):
        said = []
        for head in range(HEADS):
            shared = head // (HEADS // layer.key_heads) * width
            q = circled(own[head * width : (head + 1) * width], places[i])
            seen = [j for j in range(i + 1) if target[i] or not target[j]]
            at = DIM + shared
            k = torch.stack([circled(projected[j][at : at + width], places[j]) for j in seen])
            v = torch.stack([projected[j][at + keys : at + keys + width] for j in seen])
            weights = (k @ q / sqrt(width)).exp()
            said.append(weights / weights.sum() @ v)
        y = x[i] + layer.out.weight @ torch.cat(said) + layer.out.bias
        inner = layer.ff.widen.weight @ norm(layer.ff.norm, y) + layer.ff.widen.bias
        outs.append(y + layer.ff.narrow.weight @ (inner * inner.sigmoid()) + layer.ff.narrow.bias)
    return outs


def oracle(model: DecoderOnly, source: Tensor, tokens: list[int], order: str) -> tuple[Tensor, Tensor]:
    """`order` is a string of r (the next of `source` [T, F] is read) and w (the next of the tokens is written)."""
    x, places, target, read, written = list[Tensor](), list[int](), [c == "w" for c in order], 0, 0
    assert isinstance(model.source, nn.Linear)
    for c in order:
        together = isinstance(model.positions, Interleaved)
        if c == "r":
            x.append(model.source.weight @ source[read] + model.source.bias)
            places.append(read + written if together else read)
            read += 1
        else:
            x.append(model.embed.weight[tokens[written]])
            first = model.positions.first if isinstance(model.positions, Grouped) else 0
            places.append(read + written if together else first + written)
            written += 1
    for layer in model.layers:
        x = looked(layer, x, places, target)
    y = [norm(model.norm, each) for each in x]
    parts = [[each for each, t in zip(y, target, strict=True) if t is kind] for kind in (False, True)]
    heard, said = (torch.stack(part) if part else torch.zeros(0, DIM) for part in parts)
    return heard, said


def orders(frames: int, tokens: int, chance: random.Random) -> str:
    order = list("r" * frames + "w" * tokens)
    chance.shuffle(order)
    return "".join(order)


def reads_of(order: str) -> list[int]:
    return [order[:i].count("r") for i, c in enumerate(order) if c == "w"]


@dataclass
class Rows:
    """A batch of utterances, each with an order of its own."""

    source: Frames
    tokens: Tensor
    orders: list[str]

    @classmethod
    def drawn(cls, chance: random.Random, rows: int = 2) -> Rows:
        frames = [chance.randint(0, 6) for _ in range(rows)]
        tokens = [chance.randint(0 if row else 1, 5) for row in range(rows)]
        values = torch.randn(rows, max(frames), FEATURES)
        texts = torch.randint(VOCAB, (rows, max(tokens)))
        made = [orders(f, t, chance) for f, t in zip(frames, tokens, strict=True)]
        values[torch.arange(max(frames)) >= torch.tensor(frames)[:, None]] = torch.nan
        return cls(Frames.from_lengths(values, torch.tensor(frames)), texts, made)

    @property
    def read(self) -> Tensor:
        most = self.tokens.shape[1]
        return torch.tensor([reads_of(o) + [o.count("r")] * (most - o.count("w")) for o in self.orders])


def stepped(model: DecoderOnly, batch: Rows, chance: random.Random) -> tuple[list[Tensor], list[Tensor]]:
    """Rows go on, each in its own order, in random pieces, sometimes not at all -> what was heard and said, by row."""
    n = len(batch.orders)
    state, done = model.start(n), [0] * n
    heard: list[list[Tensor]] = [[] for _ in range(n)]
    said: list[list[Tensor]] = [[] for _ in range(n)]
    while any(at < len(order) for at, order in zip(done, batch.orders, strict=True)):
        kind, most = chance.choice("rw"), chance.randint(1, 3)
        width = most + chance.randint(0, 1)  # invalid ones at the end
        mask, picked = torch.zeros(n, width, dtype=torch.bool), torch.zeros(n, width, dtype=torch.long)
        for row, order in enumerate(batch.orders):
            piece = order[done[row] : done[row] + most] if chance.random() < 0.8 else ""
            length = len(piece) - len(piece.lstrip(kind))
            at = order[: done[row]].count(kind)
            mask[row, :length], picked[row, :length] = True, torch.arange(at, at + length)
            done[row] += length
        rows = torch.arange(n)[:, None]
        if kind == "r":
            if batch.source.values.shape[1]:
                y, state = model.read(Frames.of(batch.source.values[rows, picked], mask), state)
                assert not y.values[~mask].any()
                for row in range(n):
                    heard[row].append(y.values[row, mask[row]])
        else:
            hidden, state = model.write(Frames.of(batch.tokens[rows, picked], mask), state)
            for row in range(n):
                said[row].append(hidden[row, mask[row]])
        if chance.random() < 0.3:  # rows are taken apart, and joined again
            state = tree.concat(tree.split(state))
    return [torch.cat([torch.zeros(0, DIM), *x]) for x in heard], [torch.cat([torch.zeros(0, DIM), *x]) for x in said]


@pytest.mark.parametrize("key_heads", [2, 1])
@pytest.mark.parametrize("positions", KINDS, ids=str)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=0)
def test_streaming_is_the_masked_pass_in_values_and_gradients(positions: Positions, key_heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    chance, model = random.Random(seed), model_of(positions, key_heads=key_heads)
    batch = Rows.drawn(chance)
    source, hidden = model(batch.source, batch.tokens, batch.read)
    streamed = stepped(model, batch, chance)
    alone = [
        oracle(model, values, tokens, order)
        for values, tokens, order in zip(batch.source.values, batch.tokens.tolist(), batch.orders, strict=True)
    ]
    masked = [(source[row, : o.count("r")], hidden[row, : o.count("w")]) for row, o in enumerate(batch.orders)]
    weights = [(torch.randn_like(a), torch.randn_like(b)) for a, b in alone]
    gradients = []
    for found in (alone, masked, list(zip(*streamed, strict=True))):
        total = sum(((x * w).sum() for pair, by in zip(found, weights, strict=True)
                     for x, w in zip(pair, by, strict=True)), torch.zeros(()))  # fmt: skip
        weighed = list(model.parameters())
        gradients.append(torch.autograd.grad(total, weighed, allow_unused=True, materialize_grads=True))
        for pair, wanted in zip(found, alone, strict=True):
            for x, y in zip(pair, wanted, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
    for other in gradients[1:]:
        for x, y in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-9 * max(1.0, float(y.abs().max())))


def test_what_was_made_of_the_source_does_not_depend_on_the_schedule_but_where_positions_are_shared() -> None:
    """Bit by bit, caches too: nothing is ever encoded again."""
    source, tokens = (
        Frames.of(torch.randn(1, 5, FEATURES), torch.ones(1, 5, dtype=torch.bool)),
        torch.tensor([[1, 2, 3]]),
    )
    for positions in KINDS:
        model, found = model_of(positions), []
        for order in ("rrrrrwww", "wwwrrrrr", "rwrrwrwr"):
            state, heard, said = model.start(1), list[Tensor](), 0
            for at in range(8):
                if order[at] == "r":
                    i = order[:at].count("r")
                    y, state = model.read(source[i : i + 1], state)
                    heard.append(y.values)
                else:
                    _, state = model.write(Frames.of(tokens[:, said : said + 1], source.mask[:, :1]), state)
                    said += 1
            found.append([torch.cat(heard, 1), *(cache.values for cache in state.source)])
        same = [torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True)]
        assert all(same) if isinstance(positions, Grouped) else not any(same)


def test_golden_schedules_places_and_masks() -> None:
    assert reads(Wait(8, 4), torch.tensor([30, 13]), 5).tolist() == [[8, 12, 16, 20, 24], [8, 12, 13, 13, 13]]
    read = reads(Wait(2), torch.tensor([4]), 3)
    assert group_ids(read, 4, Grouped(5)).tolist() == [[0, 1, 2, 3, 5, 6, 7]]
    assert group_ids(read, 4, Interleaved()).tolist() == [[0, 1, 3, 5, 2, 4, 6]]
    seen = "\n".join("        " + "".join(".#"[cell] for cell in row) for row in group_mask(read, 4)[0].int().tolist())
    assert seen in (group_mask.__doc__ or "")
    with pytest.raises(ValueError, match="wait for -1 frames, then for 1"):
        Wait(-1)
    with pytest.raises(ValueError, match="do not divide"):
        DecoderOnly(VOCAB, 9, 2, 1, schedule=Wait(1))


@pytest.mark.parametrize("positions", KINDS, ids=str)
def test_losses_are_cross_entropies_of_what_the_schedule_lets_a_token_see(positions: Positions) -> None:
    """Also where the text ends before the source, and the other way round."""
    model, texts = model_of(positions), torch.tensor([[1, 2, 3, 9], [4, -5, 99, 7], [2, 2, 2, 2]])
    frames, lengths, orders_ = [3, 6, 0], [3, 1, 4], ["rrwrwww", "rrwrwrrr", "wwwww"]
    source = Frames.from_lengths(torch.randn(3, 6, FEATURES), torch.tensor(frames))
    found = model.losses(source, texts, torch.tensor(lengths), sos=0, eos=6, smoothing=0.0)
    for row, n in enumerate(lengths):
        text = texts[row, :n].tolist()
        _, hidden = oracle(model, source.values[row], [0, *text], orders_[row])
        scores = hidden @ model.output.weight.T + model.output.bias
        log_probs = scores - scores.exp().sum(-1, keepdim=True).log()
        wanted = -sum(log_probs[i, token] for i, token in enumerate([*text, 6]))
        torch.testing.assert_close(found[row], wanted, rtol=0, atol=1e-9)


def test_tokens_are_taken_back_and_read_under_a_limit() -> None:
    model = model_of()
    source = Frames.from_lengths(torch.randn(2, 6, FEATURES), torch.tensor([6, 4]))
    tokens, there = torch.tensor([[1, 2, 3, 4], [5, 6, 1, 2]]), torch.ones(2, 4, dtype=torch.bool)
    read = torch.tensor([[1, 3, 3, 6], [0, 2, 4, 4]])
    _, wanted = model(source, tokens, read)
    _, state = model.read(source, model.start(2))
    _, begun = model.write(Frames(tokens, there)[:2], state, read=read[:, :2])
    _, other = model.write(Frames(tokens.flip(1), there), begun)
    hidden, after = model.write(Frames(tokens, there)[2:], other.truncate(2), read=read[:, 2:])
    torch.testing.assert_close(hidden, wanted[:, 2:], rtol=0, atol=1e-12)
    assert (after.read.tolist(), after.written.tolist(), other.written.tolist()) == ([6, 4], [4, 4], [6, 6])
