"""A speech language model that reads and writes in turns: pieces are one masked pass, with and without a window."""

from __future__ import annotations

import random
from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn import tree
from speechattn.decoder.groups import Grouped, Wait
from speechattn.encoder.layers import Stack
from speechattn.frames import Frames
from speechattn.multimodal.llama import Llama
from speechattn.multimodal.speech_llm import Pooled, Side, Stacked
from speechattn.multimodal.turns_llm import TurnsLLM, TurnsLLMState

pytestmark = pytest.mark.usefixtures("precise")

DIM, HEADS, VOCAB, END = 8, 2, 7, 6
HEAR, SEE, FIRST = 3, 2, 4
WINDOWS = [None, (1, 2), (0, 3), (3, 1)]


def model_of(window: tuple[int, int] | None = None, **options: Any) -> TurnsLLM:
    sides = {"sound": Stacked(HEAR, DIM, every=2, inner=6), "lips": Pooled(SEE, DIM, every=3, inner=6)}
    lm = Llama(VOCAB, DIM, HEADS, 2, inner=10, key_heads=1, base=50.0)
    usual = {"schedule": Wait(2), "prompt": (2, 5), "positions": Grouped(FIRST), "window": window}
    made = TurnsLLM(lm, **{**usual, **sides, **options})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.6)
    return made.eval()


def source_of(model: TurnsLLM, x: Tensor) -> list[tuple[Tensor, int]]:
    """Tokens of frames [T, F] with the frame that completes each; those that only the end completes with T + 1."""
    made, at, frames = [], 0, len(x)
    for rank, (side, every, mean) in enumerate([(model.sound, 2, False), (model.lips, 3, True)]):
        assert side is not None
        own, at = x[:, at : at + side.width], at + side.width
        for t in range(0, frames, every):
            group = own[t : t + every]
            if not group[0].any():
                continue
            missing = torch.zeros(every - len(group), side.width)
            there = group[group.any(1)]
            made.append(
                (side.project(there.mean(0) if mean else torch.cat([group, missing]).flatten()),
                 t + every if t + every <= frames else frames + 1, rank)
            )  # fmt: skip
    return [(token, when) for token, when, _ in sorted(made, key=lambda each: each[1:])]


def circled(x: Tensor, place: int, base: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.tensor([place * base ** (-i / half) for i in range(half)])
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([z.real, z.imag])


def norm(x: Tensor, layer: nn.RMSNorm) -> Tensor:
    assert layer.eps is not None
    return x / (x.square().mean() + layer.eps).sqrt() * layer.weight


def kept(n: int, window: tuple[int, int] | None) -> list[int]:
    """Which of the first n source tokens are in the cache, in the order of their places."""
    sinks, recent = window or (0, 10**6)
    return [r for r in range(n) if r < sinks or r >= n - recent]


def oracle(model: TurnsLLM, x: Tensor, tokens: list[int], read: list[int]) -> tuple[Tensor, Tensor]:
    """One key at a time: source [T, F], tokens written behind `read` frames -> all but BOS and prompt."""
    assert model.opening is not None
    lm, made = model.lm, source_of(model, x)
    source, width = [model.opening, *(token for token, _ in made)], DIM // HEADS
    target = [lm.embed_tokens.weight[i] for i in (*model.prompt, *tokens)]
    heard = [1] * len(model.prompt) + [1 + sum(at <= r for _, at in made) for r in read]
    for layer in lm.layers:
        own, new = layer.self_attn, list[Tensor]()
        hidden = [norm(y, layer.input_layernorm) for y in (*source, *target)]
        k, v = [own.k_proj.weight @ h for h in hidden], [own.v_proj.weight @ h for h in hidden]
        for i, (y, h) in enumerate(zip((*source, *target), hidden, strict=True)):
            u = i - len(source)
            cache = kept(i + 1 if u < 0 else heard[u], model.window)
            keys = [(r, place) for place, r in enumerate(cache)]
            keys += [(len(source) + j, FIRST + j) for j in range(u + 1)]
            place = keys[-1][1]  # its own
            said = []
            for head in range(HEADS):
                q = circled((own.q_proj.weight @ h)[head * width :][:width], place, 50.0)
                scores = torch.stack([circled(k[r], p, 50.0) @ q / sqrt(width) for r, p in keys])
                said.append(scores.softmax(0) @ torch.stack([v[r] for r, _ in keys]))
            y = y + own.o_proj.weight @ torch.cat(said)
            h, mlp = norm(y, layer.post_attention_layernorm), layer.mlp
            gate = mlp.gate_proj.weight @ h
            new.append(y + mlp.down_proj.weight @ (gate * gate.sigmoid() * (mlp.up_proj.weight @ h)))
        source, target = new[: len(source)], new[len(source) :]
    first, second = source[1:], target[len(model.prompt) :]
    return tuple(  # type: ignore[return-value]
        torch.stack([norm(y, lm.norm) for y in ys]) if ys else torch.zeros(0, DIM) for ys in (first, second)
    )


def drawn(chance: random.Random, frames: int) -> Tensor:
    """A row of frames with both senses, or without one here and there, or everywhere."""
    x = torch.randn(frames, HEAR + SEE)
    kind = chance.choice(["both", "deaf", "blind", "patches"])
    if kind == "deaf":
        x[:, :HEAR] = 0
    if kind == "blind":
        x[:, HEAR:] = 0
    if kind == "patches":
        x[torch.rand(frames) < 0.3, :HEAR] = 0
        x[torch.rand(frames) < 0.3, HEAR:] = 0
    return x


class Row:
    """A source, a text, and in what order both are fed: r(ead), w(rite) and once, behind the last frame, e(nd)."""

    def __init__(self, chance: random.Random) -> None:
        frames, tokens = chance.randint(0, 11), chance.randint(0, 4)
        self.x, self.text = drawn(chance, frames), [chance.randrange(VOCAB) for _ in range(tokens)]
        order = list("r" * frames + "w" * tokens)
        chance.shuffle(order)
        behind = max((i + 1 for i, c in enumerate(order) if c == "r"), default=0)
        order.insert(chance.randint(behind, len(order)), "e")
        self.order = "".join(order)
        self.read = [len(order[:i]) - order[:i].count("w") for i, c in enumerate(order) if c == "w"]


def batch(rows: list[Row]) -> tuple[Frames, Tensor, Tensor]:
    frames, tokens = (max(len(x) for x in xs) for xs in ([r.x for r in rows], [r.text for r in rows]))
    x = Frames.from_lengths(torch.stack([torch.cat([r.x, torch.full((frames - len(r.x), HEAR + SEE), torch.nan)])
                                         for r in rows]), torch.tensor([len(r.x) for r in rows]))  # fmt: skip
    text = torch.tensor([r.text + [0] * (tokens - len(r.text)) for r in rows]).long().view(len(rows), tokens)
    read = torch.tensor([r.read + [99] * (tokens - len(r.read)) for r in rows]).long().view(len(rows), tokens)
    return x, text, read


def stepped(model: TurnsLLM, rows: list[Row], chance: random.Random) -> list[tuple[Tensor, Tensor]]:
    """Each row goes on in its own order, in random pieces, sometimes not at all."""
    x, text, _ = batch(rows)
    state, done = model.start(len(rows)), [0] * len(rows)
    out = [(list[Tensor](), list[Tensor]()) for _ in rows]
    at = torch.arange(len(rows))[:, None]
    while any(n < len(row.order) for n, row in zip(done, rows, strict=True)):
        kind, most = chance.choice("rrwwe"), chance.randint(1, 5)
        mask, picked = torch.zeros(len(rows), most + 1, dtype=torch.bool), torch.zeros(len(rows), most + 1).long()
        for i, row in enumerate(rows):
            piece = row.order[done[i] :][:most] if chance.random() < 0.8 else ""
            n = len(piece) - len(piece.lstrip(kind))
            mask[i, :n], picked[i, :n] = True, row.order[: done[i]].count(kind) + torch.arange(n)
            done[i] += n
        if kind == "e":
            state = tree.where(mask.any(1), model.finish(state), state)
        elif kind == "r" and x.mask.shape[1]:
            y, state = model.read(Frames.of(x.values[at, picked], mask), state)
            for i in range(len(rows)):
                out[i][0].append(y.values[i, y.mask[i]])
        elif kind == "w" and text.shape[1]:
            hidden, state = model.write(Frames.of(text[at, picked], mask), state)
            for i in range(len(rows)):
                out[i][1].append(hidden[i, mask[i]])
        if chance.random() < 0.3:
            state = tree.concat(tree.split(state))
    return [(torch.cat([torch.zeros(0, DIM), *a]), torch.cat([torch.zeros(0, DIM), *b])) for a, b in out]


@pytest.mark.parametrize("window", WINDOWS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=1)
def test_any_order_in_any_pieces_is_one_pass_in_values_and_gradients(window: Any, seed: int) -> None:
    torch.manual_seed(seed)
    chance, model = random.Random(seed), model_of(window)
    rows = [Row(chance) for _ in range(3)]
    heard, hidden = model(*batch(rows))
    alone = [oracle(model, row.x, row.text, row.read) for row in rows]
    masked = [(heard.values[i, heard.mask[i]], hidden[i, : len(row.text)]) for i, row in enumerate(rows)]
    streamed = stepped(model, rows, chance)
    weights = [(torch.randn_like(a), torch.randn_like(b)) for a, b in alone]
    gradients = []
    for found in (alone, masked, streamed):
        total = 0 * next(model.parameters()).sum()
        for (a, b), (c, d), (v, w), (e, _) in zip(found, alone, weights, streamed, strict=True):
            assert len(a) == len(c) or (a is e and len(c) - len(a) <= 2)  # `finish` does not say what it made
            torch.testing.assert_close(a, c[: len(a)], rtol=0, atol=1e-9)
            torch.testing.assert_close(b, d, rtol=0, atol=1e-9)
            total = total + (b * w).sum() + (a * v[: len(a)])[: len(e)].sum()
        own = list(model.parameters())
        gradients.append(torch.autograd.grad(total, own, materialize_grads=True, allow_unused=True))
    for other in gradients[1:]:
        for one, wanted in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(one, wanted, rtol=0, atol=1e-9 * max(1.0, float(wanted.abs().max())))


def test_the_order_of_the_senses() -> None:
    """The drawing of the docstring, of 7 frames."""
    assert [at for _, at in source_of(model_of(), torch.ones(7, HEAR + SEE))] == [2, 3, 4, 6, 6, 8, 8]
    model, x = model_of(), Frames.of(torch.randn(1, 7, HEAR + SEE), torch.ones(1, 7, dtype=torch.bool))
    _, state = model.read(x, model.start(1))
    assert state.source.places.values[state.source.places.mask].tolist() == [0, 2, 3, 4, 6, 6]
    assert [buffer.length.item() for buffer in state.waiting] == [1, 1]
    after = model.finish(state)
    assert after.source.places.values[0].tolist() == [0, 2, 3, 4, 6, 6, 7, 7]
    assert after.tokens.item() == 8
    again = model.finish(after)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again), tree.leaves(after), strict=True))


def fed(model: TurnsLLM, x: Tensor, pieces: int) -> TurnsLLMState:
    state, there = model.start(1), torch.ones(1, len(x), dtype=torch.bool)
    whole = Frames(x[None], there)
    for at in range(0, len(x), pieces):
        _, state = model.read(whole[at : at + pieces], state)
    return state


@torch.no_grad()
def test_a_window_changes_nothing_while_the_source_is_short_and_bounds_the_state_when_it_is_long() -> None:
    x, token = torch.randn(1000, HEAR + SEE), Frames(torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool))
    bounded = model_of((2, 8))
    free = model_of()
    free.load_state_dict(bounded.state_dict())
    short = [model.write(token, fed(model, x[:11], 4))[0] for model in (bounded, free)]  # BOS, 5 and 3: 9
    torch.testing.assert_close(short[0], short[1], rtol=0, atol=1e-12)
    longer = [model.write(token, fed(model, x[:15], 4))[0] for model in (bounded, free)]
    assert (longer[0] - longer[1]).abs().max() > 1e-4
    sizes = [sum(leaf.numel() for leaf in tree.leaves(fed(bounded, x[:n], 10))) for n in (30, 200, 1000)]
    assert sizes[0] == sizes[1] == sizes[2]
    state = fed(bounded, x, 10)
    assert state.source.places.mask.sum().item() == 10
    assert state.tokens.item() == 1 + 500 + 333
    _, wanted = oracle(bounded, x[:100], [1], [100])
    torch.testing.assert_close(bounded.write(token, fed(bounded, x[:100], 7))[0][0], wanted, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="forgotten"):
        bounded.write(token, state, read=torch.tensor([[999 - 1]]))


@pytest.mark.parametrize("window", [None, (1, 2)])
def test_losses_are_cross_entropies_of_what_the_schedule_lets_a_token_see(window: Any) -> None:
    """Also of frames that only the end makes a token: of 7 frames who wants 9 sees that token, who wants 7 does not."""
    model, texts, lengths = model_of(window, schedule=Wait(3, 2)), torch.tensor([[1, 2, 4], [3, 9, 9]]), [3, 1]
    frames = torch.tensor([7, 4])
    x = Frames.from_lengths(torch.randn(2, 7, HEAR + SEE), frames)
    found = model.losses(x, texts, torch.tensor(lengths), sos=0, eos=END, smoothing=0.0)
    for row, n in enumerate(lengths):
        text = texts[row, :n].tolist()
        _, hidden = oracle(model, x.values[row, : frames[row]], [0, *text], [3, 5, 7, 9][: n + 1])
        assert model.lm.lm_head is not None
        each = (hidden @ model.lm.lm_head.weight.T).log_softmax(-1)
        wanted = -sum(each[i, token] for i, token in enumerate([*text, END]))
        torch.testing.assert_close(found[row], wanted, rtol=0, atol=1e-9)


def test_one_sense_alone_may_be_zero() -> None:
    model = model_of(lips=None)
    x = Frames.from_lengths(torch.zeros(2, 5, HEAR), torch.tensor([5, 2]))
    heard, _ = model(x, torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long))
    assert heard.lengths.tolist() == [3, 1]
    assert model.finish(model.read(x, model.start(2))[1]).tokens.tolist() == [4, 2]
    assert model.vocab == VOCAB


def test_what_it_cannot_be() -> None:
    lm = Llama(VOCAB, DIM, HEADS, 1)
    sound = Stacked(HEAR, DIM, every=2)
    with pytest.raises(ValueError, match="wanted one of both"):
        TurnsLLM(lm, schedule=Wait(1))
    with pytest.raises(ValueError, match="here"):
        TurnsLLM(Llama(VOCAB, DIM, HEADS, 1, window=(1, 2)), schedule=Wait(1), sound=sound)
    with pytest.raises(ValueError, match="1 or more recent"):
        TurnsLLM(lm, schedule=Wait(1), sound=sound, window=(1, 0))
    with pytest.raises(ValueError, match="belong to no other"):
        TurnsLLM(lm, schedule=Wait(1), sound=Side(Stack(3, 2), HEAR, 9, DIM, 8, norm=False))
    model = model_of()
    with pytest.raises(ValueError, match=r"reads 3 \+ 2"):
        model.read(Frames.of(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)), model.start(1))
