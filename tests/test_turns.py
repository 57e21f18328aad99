"""The search, the objective and the page of a head that reads and writes in turns."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn import tree
from speechattn.attention import Span
from speechattn.audio.spectrum import LogMel
from speechattn.decoder.ctc import CTC
from speechattn.decoder.decoder_only import DecoderOnly, GroupState
from speechattn.decoder.groups import Grouped, Wait
from speechattn.encoder import Conformer
from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames
from speechattn.model import Recognizer
from speechattn.model.config import build
from speechattn.search.turns import Turns
from speechattn.task.objectives import Heard, Said
from speechattn.task.turns import DecoderOnlyObjective
from speechattn.text.pieces import Pieces

pytestmark = pytest.mark.usefixtures("precise")

FEATURES = 3


class Moody(DecoderOnly):
    """It changes its mind about the end of the text, which it likes, with every frame that it has read."""

    def write(self, tokens: Frames, state: GroupState, *, read: Tensor | None = None) -> tuple[Tensor, GroupState]:
        assert read is not None
        hidden, after = super().write(tokens, state, read=read)
        return hidden + mood(read), after

    def forward(self, source: Frames, tokens: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        heard, hidden = super().forward(source, tokens, read)
        return heard, hidden + mood(read)


def mood(read: Tensor) -> Tensor:
    """Of the number of frames [B, U] -> [B, U, 8]."""
    return 2 * torch.sin(read[..., None] * torch.arange(1.0, 9.0))


def drawn(kind: type[DecoderOnly] = DecoderOnly) -> DecoderOnly:
    made = kind(7, 8, 2, 2, schedule=Wait(2), source=nn.Linear(FEATURES, 8), inner=12)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.6)
    if kind is Moody:
        nn.init.constant_(made.output.bias[6:], 4.0)
    return made.eval()


def walked(model: DecoderOnly, source: Tensor, most: float, never: int) -> list[int]:
    """The search by its definition: every token by a masked pass over all that was said, without a cache."""
    frames, said, read, turn = len(source), list[int](), list[int](), 0
    finished = False
    whole = Frames(source[None], torch.ones(1, frames, dtype=torch.bool))
    while True:
        needed = int(model.schedule.needed(torch.tensor(turn)))
        if needed > frames or turn >= int(frames * most):
            finished = True
        if finished and len(said) >= int(frames * most):
            return said
        now = torch.tensor([[*read, min(needed, frames)]])
        scores = model.logits(model(whole, torch.tensor([[0, *said]]), now)[1])[0, -1]
        scores[never] = -torch.inf
        best, turn = int(scores.argmax()), turn + 1
        if best == 6 and finished:
            return said
        if best != 6:
            said, read = [*said, best], [*read, min(needed, frames)]


@pytest.mark.parametrize("kind", [DecoderOnly, Moody])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_search_says_what_masked_passes_say_for_any_split_and_company(kind: type[DecoderOnly], seed: int) -> None:
    torch.manual_seed(seed)
    chance, model = random.Random(seed), drawn(kind)
    model.schedule = Wait(chance.randint(0, 4), chance.randint(0, 2))
    lengths = [chance.randint(0, 9) for _ in range(3)]
    source = Frames.from_lengths(torch.randn(3, max(lengths), FEATURES), torch.tensor(lengths))
    search = Turns(model, sos=0, eos=6, never=[3, 6], most=1.5)
    beam, at = search.start(source), [0, 0, 0]
    while at != lengths:
        size = [min(chance.randint(0, 3), n - i) for i, n in zip(at, lengths, strict=True)]
        mask = torch.arange(4) < torch.tensor(size)[:, None]
        which = (torch.tensor(at)[:, None] + torch.arange(4)).clamp(max=max(lengths) - 1)
        beam = search.step(Frames.of(source.values[torch.arange(3)[:, None], which], mask), beam)
        at = [i + n for i, n in zip(at, size, strict=True)]
        beam = tree.concat(tree.split(beam)) if chance.random() < 0.3 else beam
    beam = search.finish(beam)
    whole = search.decode(source)
    for row, n in enumerate(lengths):
        wanted = walked(model, source.values[row, :n], 1.5, 3)
        (one,), (two,) = search.hypotheses(beam)[row], whole[row]
        assert list(one.tokens) == list(two.tokens) == wanted
        assert one.spans == two.spans
        assert all(a < b for a, b in one.spans)


def test_a_search_forgets_what_is_committed_and_hears_no_more_than_it_may() -> None:
    model = drawn()
    source = Frames.of(torch.randn(1, 9, FEATURES), torch.ones(1, 9, dtype=torch.bool))
    search = Turns(model, sos=0, eos=6, memory=6)
    beam = search.start_at(source, torch.tensor([100]))
    beam = search.step(source[:5], beam)
    said = search.hypotheses(beam)[0][0]
    assert len(said.tokens) > 1
    assert said.spans[0] == (100, 102)
    beam = search.commit(beam, torch.tensor([1]))
    assert search.hypotheses(beam)[0][0].tokens == said.tokens[1:]
    torch.testing.assert_close(search.room(beam), torch.tensor([1 / 6]), check_dtype=False)
    beam = search.step(source[5:], beam)
    assert (search.room(beam).tolist(), beam.frames.tolist(), beam.state.heard.tolist()) == ([0.0], [109], [6])
    with pytest.raises(ValueError, match="memory 0"):
        Turns(model, sos=0, eos=6, memory=0)


def pairs(rows: int, chance: torch.Generator) -> tuple[Frames, Tensor, Tensor]:
    """Sources of numbers from 1 to 5, and texts whose token u is made of frames u and u + 1."""
    lengths = torch.randint(3, 9, (rows,), generator=chance)
    x = Frames.from_lengths(torch.randint(1, 6, (rows, 8), generator=chance), lengths)
    return x, (x.values + F.pad(x.values[:, 1:], [0, 1])) % 5 + 1, lengths


def test_it_learns_to_translate_with_a_schedule_that_reads_enough() -> None:
    right = []
    for first, steps in ((2, 200), (1, 100)):
        torch.manual_seed(0)
        chance = torch.Generator().manual_seed(1)
        model = DecoderOnly(6, 32, 2, 2, schedule=Wait(first), source=nn.Embedding(6, 32), inner=64).float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(steps):
            source, texts, lengths = pairs(48, chance)
            loss = model.losses(source, texts, lengths, sos=0, eos=0, smoothing=0.0).sum() / (lengths + 1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        source, texts, lengths = pairs(100, chance)
        found = Turns(model.eval(), sos=0, eos=0).decode(source)
        wanted = [tuple(row[:n]) for row, n in zip(texts.tolist(), lengths.tolist(), strict=True)]
        right.append(sum(one.tokens == text for (one,), text in zip(found, wanted, strict=True)))
    assert right[0] >= 90  # of 100
    assert right[1] <= 10


def test_a_model_with_this_head_is_trained_and_searched() -> None:
    pieces = Pieces(["<blank>", "▁", *"abcdef", "<sos/eos>"])
    config = {"class_path": "speechattn.decoder.decoder_only.DecoderOnly", "init_args": {
        "vocab": 9, "dim": 16, "heads": 2, "depth": 1, "positions": {"class_path": "speechattn.decoder.groups.Grouped"},
        "schedule": {"class_path": "speechattn.decoder.groups.Wait", "init_args": {"first": 4, "every": 2}},
    }}  # fmt: skip
    head = build(config, "here")
    assert (head.schedule, head.positions) == (Wait(4, 2), Grouped())
    encoder = Conformer(8, 16, 1, 2, 24, span=Span(16, 4), kernel=5, conv_right=None)
    model = Recognizer(
        LogMel(8, rate=8000, window=200, hop=80), encoder, {"decoder_only": head}, pieces, sample_rate=8000
    )
    x = Frames.from_lengths(torch.randn(2, 7, 16), torch.tensor([7, 5]))
    said = Said(torch.tensor([[2, 3, 4], [5, 1, 1]]), torch.tensor([3, 1]))
    objective = DecoderOnlyObjective(smoothing=0.2)
    objective.fit(model)
    losses = objective.losses(model, Heard(x, x, x), said)
    torch.testing.assert_close(losses, head.losses(x, said.tokens, said.lengths, sos=8, eos=8, smoothing=0.2))
    assert not objective.impossible(Heard(x, x, x), said).any()
    search = model.search()
    assert isinstance(search, Turns)
    assert search.never.tolist() == sorted(pieces.special - {8})
    with pytest.raises(InputError, match="search turns takes no phrases"):
        model.search(phrases=["abba"])
    with pytest.raises(ModelError, match="decoder_only"):
        objective.fit(without(model))


def without(model: Recognizer) -> Recognizer:
    return Recognizer(model.front_end, model.encoder, {"ctc": CTC(16, 9)}, model.tokenizer, sample_rate=8000)


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    text = (Path(__file__).parents[1] / "docs" / "group-positions.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/group-positions.md", "exec"), names)
    assert capsys.readouterr().out == "".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL))
