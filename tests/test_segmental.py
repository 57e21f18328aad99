"""Segmental attention: what a token sees, what segments cost, which are the best, and how a head learns from them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objectives import DIM, heard_by, model_of, said_in, sound
from torch import Tensor, nn

from speechattn.cross.segmental import Around, AtFrame, Boundary, SegmentAttention, Segments, Within
from speechattn.cross.soft import Soft
from speechattn.decoder.attention import AttentionDecoder, learned, sinusoids
from speechattn.decoder.ctc import CTC
from speechattn.decoder.segmental import LengthModel, NeuralLength, NoLength, Segmental, StaticLength
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer
from speechattn.search.segmental import SegmentalBeam, TimeSynchronousBeam
from speechattn.task.objectives import Heard, Said
from speechattn.task.segmental import CTCAlignment, LinearAlignment, OwnAlignment, SegmentalObjective, linear
from speechattn.testing import random_frames

pytestmark = pytest.mark.usefixtures("precise")
D, VOCAB, END = 8, 4, 3
BOUNDARIES: dict[str, Boundary] = {
    "hard": AtFrame(), "window": Around(2, 1), "segment": Within(), "wide": Within(left=1, right=2),
    "clamped": Within(2), "clamped and wide": Within(3, left=1, right=1),
}  # fmt: skip


def length_model(kind: str) -> LengthModel:
    if kind == "neural":
        return NeuralLength(D, VOCAB, 6, reach=3)
    if kind == "none":
        return NoLength()
    model = StaticLength(VOCAB, scale=0.3, reach=5)
    model.observe(torch.tensor([1, 1, 2]), torch.tensor([2, 3, 1]))
    return model


def head_of(boundary: Boundary, length: str = "neural", *, history: int = 3, std: float = 0.7) -> Segmental:
    cross = partial(SegmentAttention, boundary=boundary)
    decoder = AttentionDecoder(VOCAB, 12, D, 2, 1, cross=cross, output=nn.Linear(D, VOCAB))
    head = Segmental(decoder, length_model(length), history=history).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=std)
    return head.requires_grad_(False)


def holed(lengths: list[int], seed: int = 0) -> Frames:
    """Random frames, of which some in between are not there."""
    x = random_frames([n + 3 for n in lengths], D, seed=seed)
    order = torch.rand(x.mask.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~x.mask, 2).argsort(1)
    mask = torch.zeros_like(x.mask)
    for b, n in enumerate(lengths):
        mask[b, order[b, :n]] = True
    return Frames.of(x.values, mask)


def means(boundary: str, start: int, end: int) -> range:
    """The frames of a segment, written once more."""
    return {
        "hard": range(end - 1, end), "window": range(end - 3, end + 1), "segment": range(start, end),
        "wide": range(start - 1, end + 2), "clamped": range(max(start, end - 2), end),
        "clamped and wide": range(max(start, end - 3) - 1, end + 1),
    }[boundary]  # fmt: skip


def block(x: Tensor, seen: range) -> Memory:
    """Of one row [T, D], the frames that are seen."""
    mask = torch.zeros(1, len(x), dtype=torch.bool)
    mask[0, [t for t in seen if 0 <= t < len(x)]] = True
    return Memory.of(Frames(x[None], mask))


@pytest.mark.parametrize("name", list(BOUNDARIES))
@torch.no_grad()
def test_it_is_full_attention_with_a_block_mask(name: str) -> None:
    attention, full = SegmentAttention(D, 2, boundary=BOUNDARIES[name]).requires_grad_(False), Soft(D, 2)
    full.load_state_dict(attention.state_dict())
    x, beam, tokens = holed([9, 5, 0]), 2, 4
    query = torch.randn(3 * beam, tokens, D)
    ends = torch.sort(torch.randint(0, 10, (3 * beam, tokens)), 1).values
    place = Segments.until(ends.minimum(x.lengths.repeat_interleave(beam)[:, None]))
    found, rest = attention.attend(query, attention.read(Memory.of(x)), place)
    assert rest.end.shape == (3 * beam, 0)
    for i in range(3 * beam):
        valid = x.mask[i // beam].nonzero()[:, 0]
        for u in range(tokens):
            seen = means(name, int(place.start[i, u]), int(place.end[i, u]))
            memory = block(x.values[i // beam][valid], seen)
            wanted, _ = full.attend(query[i : i + 1, u : u + 1], full.read(memory), ())
            torch.testing.assert_close(found.context[i, u], wanted.context[0, 0])
            torch.testing.assert_close(found.weights[i, :, u][:, valid], wanted.weights[0, :, 0])
            assert float(found.weights[i, :, u].sum()) == pytest.approx(2 if bool(memory.frames.mask.any()) else 0)


def test_at_once_is_one_by_one_and_somebody_must_say_where() -> None:
    attention = SegmentAttention(D, 2, boundary=Within()).eval()
    x, query = random_frames([9, 7], D), torch.randn(2, 3, D)
    read, place = attention.read(Memory.of(x)), Segments.until(torch.tensor([[2, 5, 6], [1, 3, 7]]))
    whole, _ = attention.attend(query, read, place)
    for u in range(3):
        one, place = attention.attend(query[:, u : u + 1], read, place)
        torch.testing.assert_close(one.context[:, 0], whole.context[:, u])
    with pytest.raises(ValueError, match="must be told where"):
        attention.attend(query, read, attention.place(query))
    place = Segments(*(torch.zeros(0, 3, dtype=torch.long) for _ in range(2)))
    nobody, _ = attention.attend(query[:0], attention.read(Memory.of(Frames(x.values[:0], x.mask[:0]))), place)
    assert nobody.context.shape[0] == 0


def test_what_is_refused() -> None:
    for wrong in (lambda: Around(-1), lambda: Within(0), lambda: Within(right=-1), lambda: NeuralLength(D, 3, reach=0),
                  lambda: StaticLength(3, scale=-1.0)):  # fmt: skip
        with pytest.raises(ValueError, match=r"wanted|possible|needed"):
            wrong()
    soft = AttentionDecoder.soft(VOCAB, 12, D, 2, 1)
    deep = AttentionDecoder(VOCAB, 12, D, 2, 2, cross=partial(SegmentAttention, boundary=AtFrame()))
    for decoder in (soft, deep):
        with pytest.raises(ValueError, match="one layer with SegmentAttention"):
            Segmental(decoder, NoLength())
    with pytest.raises(ValueError, match="history of 13"):
        head_of(AtFrame(), history=13)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), frames=st.integers(0, 12), last=st.integers(0, VOCAB - 1))
def test_the_neural_length_model_sums_to_what_has_ended(seed: int, frames: int, last: int) -> None:
    torch.manual_seed(seed)
    model = NeuralLength(D, VOCAB, 6, reach=5)
    wait, end = model(torch.randn(frames, D), torch.full((frames,), last), torch.arange(1, frames + 1))
    survived = torch.cat([torch.zeros(1), wait.cumsum(0)])
    total = (survived[:-1] + end[:, 0]).exp().sum()
    ended = 1 - (1 - end[:, 0].exp()).prod()
    torch.testing.assert_close(total, ended)


def test_a_static_length_is_that_of_the_label() -> None:
    model = StaticLength(VOCAB, scale=0.5, reach=6)
    model.observe(torch.tensor([1, 1, 2]), torch.tensor([2, 3, 40]))
    assert model.means().tolist() == pytest.approx([11 / 3, 2.5, 6.0, 11 / 3])
    wait, end = model(torch.zeros(2, D), torch.zeros(2).long(), torch.tensor([4, 90]))
    assert wait.tolist() == [0, 0]
    assert end[:, 1].tolist() == pytest.approx([-0.75, -1.75])


def slow(head: Segmental, name: str, x: Tensor, text: list[int], ends: list[int]) -> float:
    """log p(text, segments) of one row [T, D], label by label and frame by frame."""
    decoder, full, total, before = head.decoder, Soft(D, 2), 0.0, 0
    full.load_state_dict(head.cross.state_dict())
    full.requires_grad_(False)
    layer = decoder.layers[0]
    mine, layer.cross = layer.cross, full
    history = [END]
    for label, end in zip([*text, END], [*ends, len(x)], strict=True):
        window = torch.tensor([history[-head.history :]])
        hidden, _, _ = decoder.step(window, decoder.start(block(x, means(name, before, end))))
        total += float(decoder.logits(hidden[0, -1]).log_softmax(-1)[label])
        for t in range(before, end):
            wait, stop = head.length(x[t], torch.tensor(history[-1]), torch.tensor(t - before + 1))
            stops = t == end - 1 and len(history) <= len(text)
            total += float(stop.expand(VOCAB)[label]) if stops else float(wait)
        history.append(label)
        before = end
    layer.cross = mine
    return total


@settings(deadline=None, max_examples=10)
@given(name=st.sampled_from(list(BOUNDARIES)), length=st.sampled_from(["neural", "static", "none"]),
       seed=st.integers(0, 999), history=st.integers(1, 6))  # fmt: skip
def test_the_loss_is_the_probability_of_labels_and_segments(name: str, length: str, seed: int, history: int) -> None:
    torch.manual_seed(seed)
    head, x = head_of(BOUNDARIES[name], length, history=history), holed([9, 6, 4, 0], seed)
    targets, lengths = torch.randint(0, 3, (4, 4)), torch.tensor([4, 2, 0, 0])
    ends = torch.tensor([[1, 4, 6, 9], [2, 5, 0, 0], [7, 7, 7, 7], [1, 1, 1, 1]])
    losses = head.losses(Memory.of(x), targets, lengths, ends, sos=END, eos=END, smoothing=0.0)
    half, none = (
        head.losses(Memory.of(x), targets, lengths, ends, sos=END, eos=END, smoothing=0.0, emit=n) for n in (0.5, 0.0)
    )
    torch.testing.assert_close(half, (losses + none) / 2)
    for b, n in enumerate(lengths.tolist()):
        frames = x.values[b][x.mask[b]]
        wanted = slow(head, name, frames, targets[b, :n].tolist(), ends[b, :n].tolist())
        assert float(losses[b]) == pytest.approx(-wanted, abs=1e-9)


def test_texts_that_fit_are_the_decoder_itself() -> None:
    head = head_of(Within(), history=6)
    x, place = random_frames([9, 7], D), Segments.until(torch.tensor([[2, 5, 6], [1, 3, 7]]))
    tokens = torch.tensor([[END, 1, 2], [END, 0, 0]])
    state = head.decoder.start(Memory.of(x))
    hidden, _, _ = head.decoder.step(tokens, type(state)(state.cache, state.cross, (place,)))
    found = head.logits(head.asked(tokens), head.cross.read(Memory.of(x)), place)
    torch.testing.assert_close(found, head.decoder.logits(hidden))
    short = head_of(Within(), history=3)
    text = torch.randint(0, VOCAB, (2, 7))
    asked = short.asked(text)
    for u in range(7):
        torch.testing.assert_close(asked[:, u], short.asked(text[:, max(0, u - 2) : u + 1])[:, -1])


@settings(deadline=None, max_examples=6)
@given(name=st.sampled_from(list(BOUNDARIES)), length=st.sampled_from(["neural", "static", "none"]),
       seed=st.integers(0, 999), frames=st.integers(3, 8))  # fmt: skip
def test_the_best_segmentation_is_that_of_all(name: str, length: str, seed: int, frames: int) -> None:
    torch.manual_seed(seed)
    head, x = head_of(BOUNDARIES[name], length), holed([frames, 4, 2, 1], seed)
    targets, lengths = torch.randint(0, 3, (4, 3)), torch.tensor([3, 2, 0, 2])
    found = head.best_segmentation(Memory.of(x), targets, lengths, sos=END, eos=END)
    total = head.log_prob(Memory.of(x), targets, lengths, sos=END, eos=END)
    for b, n in enumerate(lengths.tolist()):
        row, text = x.values[b][x.mask[b]], targets[b, :n].tolist()
        every = {
            ends: slow(head, name, row, text, list(ends)) for ends in combinations(range(1, len(row) + 1), n)
        }  # fmt: skip
        if not every:
            assert float(found.score[b]) == float(total[b]) == -math.inf
            continue
        best = max(every, key=lambda ends: every[ends])
        assert float(found.score[b]) == pytest.approx(every[best], abs=1e-9)
        assert tuple(found.ends[b, :n].tolist()) == best
        assert float(total[b]) == pytest.approx(float(torch.tensor([*every.values()]).logsumexp(0)), abs=1e-9)


def test_nobody_and_nothing() -> None:
    head = head_of(Within(2))
    nobody = Frames(torch.zeros(0, 5, D), torch.zeros(0, 5, dtype=torch.bool))
    text, none = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    assert head.losses(Memory.of(nobody), text, none, text, sos=END, eos=END).shape == (0,)
    assert head.best_segmentation(Memory.of(nobody), text, none, sos=END, eos=END).ends.shape == (0, 2)
    silent = random_frames([0], D)
    text, none = torch.ones(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    found = head.best_segmentation(Memory.of(silent), text, none, sos=END, eos=END)
    loss = head.losses(Memory.of(silent), text, none, text, sos=END, eos=END, smoothing=0.0)
    torch.testing.assert_close(found.score, -loss)
    assert float(head.best_segmentation(Memory.of(silent), text, none + 1, sos=END, eos=END).score) == -math.inf


def test_a_gradient_reaches_everything() -> None:
    head = head_of(Within(3, left=1)).train().requires_grad_(True)
    x = Frames.from_lengths(torch.randn(2, 9, D, requires_grad=True), torch.tensor([9, 4]))
    x.values.retain_grad()
    ends = torch.tensor([[2, 5, 9], [4, 0, 0]])
    losses = head.losses(Memory.of(x), torch.randint(0, 3, (2, 3)), torch.tensor([3, 1]), ends, sos=END, eos=END)
    losses.sum().backward()
    assert bool(x.values.grad.isfinite().all())  # type: ignore[union-attr]
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.abs().sum() > 0) or name.endswith(("qkv.bias", "key.bias")), name


def test_positions_of_frames_continue_and_begin_anew() -> None:
    plain = AttentionDecoder(VOCAB, 12, D, 2, 2)
    decoder = AttentionDecoder(VOCAB, 12, D, 2, 2, memory_positions=sinusoids, memory_context=10)
    decoder.load_state_dict(plain.state_dict())
    x, tokens = holed([9, 6]), torch.randint(0, VOCAB, (2, 4))
    table = sinusoids(10, D)
    moved = x.values.clone()
    for b in range(2):
        valid = x.mask[b].nonzero()[:, 0]
        moved[b, valid] += table[: len(valid)]
    wanted, _, _ = plain.step(tokens, plain.start(Memory.of(Frames(moved, x.mask))))
    whole, _, _ = decoder.step(tokens, decoder.start(Memory.of(x)))
    torch.testing.assert_close(whole, wanted)
    state = decoder.start(Memory.of(x[:4]))
    cross = decoder.read(Memory.of(x[5:]), decoder.read(Memory.of(x[4:5]), state.cross))
    found, _, _ = decoder.step(tokens, replace(state, cross=cross))
    torch.testing.assert_close(found, wanted)
    different, _, _ = plain.step(tokens, plain.start(Memory.of(x)))
    assert not torch.allclose(different, wanted)
    with pytest.raises(ValueError, match="11 frames do not fit"):
        decoder.start(Memory.of(random_frames([11], D)))
    trained = AttentionDecoder(VOCAB, 12, D, 2, 1, memory_positions=learned)
    assert "memory_positions" in dict(trained.named_parameters())
    cross_of = partial(SegmentAttention, boundary=AtFrame())
    timed = AttentionDecoder(VOCAB, 12, D, 2, 1, cross=cross_of, memory_positions=learned)
    with pytest.raises(ValueError, match="must not depend on the time"):
        Segmental(timed, NoLength())


def recognizer() -> Recognizer:
    torch.set_default_dtype(torch.float32)
    model = model_of("ctc", "attention")
    cross = partial(SegmentAttention, boundary=Within(6))
    decoder = AttentionDecoder(9, 12, DIM, 2, 1, cross=cross, output=nn.Linear(DIM, 9))
    model.heads["segmental"] = Segmental(decoder, NeuralLength(DIM, 9, 8))
    return model


def aligned(path: list[int], x: Frames) -> CTC:
    """A CTC head that says the path [T] in every row."""

    class Fixed(CTC):
        def step(self, x: Frames, state: object) -> tuple[Frames, object]:
            said = nn.functional.one_hot(torch.tensor(path), 9).float() * 9
            return Frames.of(said.log_softmax(-1).expand(len(x.mask), -1, -1)[:, : x.mask.shape[1]], x.mask), state

    return Fixed(DIM, 9)


def test_alignments() -> None:
    assert linear(torch.tensor([3, 1, 0, 2]), torch.tensor([10, 5, 4, 2]), 3).tolist() == [
        [3, 6, 10], [5, 0, 0], [0, 0, 0], [1, 2, 0],
    ]  # fmt: skip
    model = recognizer()
    x = Frames.from_lengths(torch.randn(4, 10, DIM), torch.tensor([10, 10, 2, 10]))
    heard = Heard(x, x, x)
    said = Said(torch.tensor([[2, 3, 3], [2, 5, 5], [3, 3, 3], [5, 5, 5]]), torch.tensor([3, 1, 2, 0]))
    model.heads["ctc"] = aligned([0, 2, 2, 3, 0, 0, 3, 3, 0, 0], x)
    early, late = CTCAlignment().ends(model, heard, said), CTCAlignment(late=2).ends(model, heard, said)
    assert early.tolist() == [[3, 4, 8], [3, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert late.tolist() == [[3, 6, 10], [5, 0, 0], [1, 2, 0], [0, 0, 0]]
    own = OwnAlignment(CTCAlignment(), after=2)
    own.fit(model)
    head = model.heads["segmental"]
    first = [own.ends(model, heard, said).tolist() for _ in range(2)]
    assert first == [early.tolist()] * 2
    head.train()
    mine = own.ends(model, heard, said)
    assert head.training
    assert torch.equal(mine, head.eval().best_segmentation(Memory.of(x), said.tokens, said.lengths, sos=8, eos=8).ends)
    assert int(own.seen) == 3
    assert int(own.eval().state_dict()["seen"]) == 3
    with pytest.raises(ModelError, match="needs the head ctc"):
        CTCAlignment().fit(model_of("attention"))
    for wrong in (lambda: CTCAlignment(late=-1), lambda: OwnAlignment(LinearAlignment(), -1),
                  lambda: SegmentalObjective(LinearAlignment(), emit=-1.0)):  # fmt: skip
        with pytest.raises(ValueError, match="wanted 0 or more"):
            wrong()


def test_the_objective_of_an_utterance_is_its_own() -> None:
    model = recognizer().double().eval()
    objective = SegmentalObjective(CTCAlignment()).double().eval()
    objective.fit(model)
    x = sound()
    x = Frames(x.values.double(), x.mask)
    said, heard = said_in("abba", "", "fade", "c" * 60), heard_by(model, x=x)
    together = objective.losses(model, heard, said).detach()
    assert objective.impossible(heard, said).tolist() == [False, False, False, True]
    assert float(together[3]) == 0
    for b, text in enumerate(("abba", "", "fade")):
        one = Frames(x.values[b : b + 1], x.mask[b : b + 1]).front()
        alone = objective.losses(model, heard_by(model, x=one), said_in(text))
        torch.testing.assert_close(alone[0].detach(), together[b])
    model.train()
    objective.losses(model, heard_by(model, x=x), said).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.heads["segmental"].parameters())
    assert all(p.grad is None for p in model.heads["ctc"].parameters())


def test_it_learns_where_labels_are() -> None:
    """Synthetic: labels are bursts of their own vector, of random length, with rests between them."""
    torch.set_default_dtype(torch.float32)
    model = recognizer()
    head = model.heads["segmental"]
    objective = SegmentalObjective(OwnAlignment(LinearAlignment(), after=15), smoothing=0.0)
    objective.fit(model)
    signs = torch.randn(9, DIM)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)

    def batch(rows: int, count: int, seed: int) -> tuple[Frames, Said, Tensor]:
        dice = torch.Generator().manual_seed(seed)
        text = torch.randint(1, 4, (rows, count), generator=dice)
        sizes = torch.randint(2, 4, (rows, count), generator=dice)
        rests = torch.randint(1, 4, (rows, count), generator=dice)
        ends = (sizes + rests).cumsum(1)
        x = 0.3 * torch.randn(rows, int(ends.max()) + 2, DIM, generator=dice)
        for b in range(rows):
            for end, size, v in zip(ends[b].tolist(), sizes[b].tolist(), text[b].tolist(), strict=True):
                x[b, end - size : end] += signs[v]
        return Frames.from_lengths(x, ends[:, -1] + 2), Said(text, torch.full((rows,), count)), ends

    for step in range(130):
        x, said, _ = batch(8, 2 + step % 2, step)
        loss = objective.losses(model, Heard(x, x, x), said).sum() / said.lengths.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    x, said, ends = batch(4, 20, 1000)  # several times as long as any before
    for kind in (SegmentalBeam, TimeSynchronousBeam):
        found = kind(head, 4, sos=8, eos=8).decode(x)
        wrong = sum(row[0].tokens != tuple(text) for row, text in zip(found, said.tokens.tolist(), strict=True))
        assert wrong <= 1
        for row, text, end in zip(found, said.tokens.tolist(), ends, strict=True):
            if row[0].tokens == tuple(text):
                assert float((torch.tensor([last for _, last in row[0].spans]) - end).abs().float().mean()) < 2
