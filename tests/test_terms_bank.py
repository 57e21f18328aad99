"""Banks of terms, terms in streams, and what a trained retriever finds."""

from __future__ import annotations

import json
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_terms import KINDS, made, sound
from torch import Tensor, nn

from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.score.terms import recall_at
from speechattn.stream import Pointwise
from speechattn.terms import (
    Bank,
    Hearing,
    RawRetriever,
    Retriever,
    Spelling,
    Spotter,
    Term,
    VectorIndex,
    contrastive,
    in_batch,
    parse_terms,
    presence_loss,
    read_terms,
    written,
)
from speechattn.terms.retriever import Running

TEXT = "Almaxaquottl\nzeppelin => zepelim\n\n# names\nFrank  Ironstein\nOx => boi\n"
TERMS = [Term("Almaxaquottl"), Term("zeppelin", "zepelim"), Term("Frank Ironstein"), Term("Ox", "boi")]


def test_terms_are_plain_text_with_translations(tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("\ufeff" + TEXT, encoding="utf-8")
    assert read_terms(tmp_path / "terms.txt") == TERMS
    assert parse_terms(written(TERMS).split("\n")) == TERMS
    for line, why in [("a =>", "not a term"), ("=> b", "not a term"), ("a => b => c", "not a term"), ("OX", "twice")]:
        with pytest.raises(InputError, match=rf"mine, line 7: .*{why}"):
            parse_terms([*TEXT.split("\n")[:6], line], where="mine")
    with pytest.raises(InputError, match="No such file"):
        read_terms(tmp_path / "nothing.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_terms(tmp_path / "bytes.txt")


@pytest.mark.parametrize("kind", [*KINDS, VectorIndex])
def test_a_bank_that_was_changed_is_one_that_was_made_at_once(kind: type[Retriever]) -> None:
    model, x = matcher(kind), sound(9, 4)
    bank = Bank(model, TERMS[:1])
    bank.add(TERMS[1:])
    bank.remove(["ZEPPELIN", "almaxaquottl"])
    bank.add([TERMS[1]])
    assert bank.terms == (TERMS[2], TERMS[3], TERMS[1])
    torch.testing.assert_close(bank.odds(x), Bank(model, bank.terms).odds(x), rtol=0, atol=1e-12)
    before = bank.terms, bank.odds(x)
    for change in (lambda: bank.add([Term("new"), Term("ox")]), lambda: bank.add([Term("42")]),
                   lambda: bank.remove(["ox", "nobody"]), lambda: bank.add([Term("new"), Term("New")])):  # fmt: skip
        with pytest.raises(InputError):
            change()
        assert bank.terms == before[0]
        assert torch.equal(bank.odds(x), before[1])
    bank.remove([term.source for term in bank.terms])
    assert len(bank) == 0
    assert bank.odds(x).shape == (2, 0)


def matcher(kind: type[Retriever] | type[VectorIndex]) -> Retriever | VectorIndex:
    """A small one."""
    if issubclass(kind, Retriever):
        return made(kind)
    model = made()
    return VectorIndex(model.frames, model.spelling, 8, window=2).double().eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [*KINDS, VectorIndex])
def test_a_saved_bank_is_text_and_safetensors(kind: type[Retriever], tmp_path: Path) -> None:
    model, x = matcher(kind), sound(9, 4)
    bank = Bank(model, TERMS)
    bank.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"terms.txt", "bank.safetensors"}
    assert (tmp_path / "terms.txt").read_text() == written(TERMS)
    size = struct.unpack("<Q", (tmp_path / "bank.safetensors").read_bytes()[:8])[0]
    assert json.loads((tmp_path / "bank.safetensors").read_bytes()[8 : 8 + size])["__metadata__"].keys() == {"of"}
    again = Bank.load(model, tmp_path)
    assert again.terms == bank.terms
    assert torch.equal(again.odds(x), bank.odds(x))


def test_an_embedding_by_other_weights_is_not_believed(tmp_path: Path) -> None:
    x = sound(9)
    Bank(made(seed=0), TERMS).save(tmp_path)
    other = made(seed=1)
    torch.testing.assert_close(Bank.load(other, tmp_path).odds(x), Bank(other, TERMS).odds(x))
    (tmp_path / "terms.txt").write_text("zeppelin\n")
    assert Bank.load(made(seed=0), tmp_path).terms == (Term("zeppelin"),)
    (tmp_path / "bank.safetensors").write_bytes(b"nonsense")
    assert len(Bank.load(made(seed=0), tmp_path)) == 1
    Bank(made(seed=0), TERMS).save(tmp_path)
    stored = load_file(tmp_path / "bank.safetensors")
    assert stored["query"].dtype == torch.float64


def test_the_file_says_which_terms_an_embedding_is_of(tmp_path: Path) -> None:
    model, x = made(), sound(9)
    Bank(model, TERMS).save(tmp_path)
    (tmp_path / "terms.txt").write_text(written([TERMS[1], TERMS[0], *TERMS[2:]]))
    swapped = Bank.load(model, tmp_path)
    torch.testing.assert_close(swapped.odds(x), Bank(model, swapped.terms).odds(x))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 5), min_size=1, max_size=8), late=st.integers(0, 7), gone=st.integers(0, 7))
def test_a_stream_says_at_every_prefix_what_is_said_offline(
    kind: type[Retriever], cuts: list[int], late: int, gone: int
) -> None:
    model, x = made(kind), sound(sum(cuts) + 1)
    spotter, at = Spotter(Bank(model, TERMS[:3])), 0
    for i, n in enumerate([*cuts, 1]):
        if i == late:
            spotter.add(TERMS[3:])
        if i == gone:
            spotter.remove(["zeppelin"])
        spotter.hear(x[at : at + n])
        at += n
        torch.testing.assert_close(spotter.odds(), Bank(model, spotter.bank.terms).odds(x[:at])[0], rtol=0, atol=1e-9)
    spotter.forget()
    torch.testing.assert_close(spotter.odds(), Bank(model, spotter.bank.terms).odds(x[:0])[0], rtol=0, atol=1e-9)
    spotter.hear(x[:at])
    torch.testing.assert_close(spotter.odds(), Bank(model, spotter.bank.terms).odds(x)[0], rtol=0, atol=1e-9)


def test_what_a_spotter_keeps_is_bounded() -> None:
    model = made()
    spotter = Spotter(Bank(model, TERMS), most_frames=5)
    for i in range(20):
        spotter.hear(sound(6, seed=i))
    assert spotter.kept is not None
    assert spotter.kept.mask.shape[1] == 5
    assert isinstance(spotter.state, Running)
    assert spotter.state.most.shape == (1, 2, len(spotter.bank.embedding.query))
    with pytest.raises(InputError, match="Retriever"):
        Spotter(Bank(matcher(VectorIndex), []))
    with pytest.raises(ValueError, match="valid"):
        spotter.hear(sound(3, 1))


def test_late_terms_are_judged_by_what_was_kept_of_this_utterance() -> None:
    model, x = made(), sound(14)
    spotter = Spotter(Bank(model, TERMS[:2]), most_frames=3)
    spotter.hear(x[:8])
    spotter.hear(x[8:])
    spotter.add(TERMS[2:])
    late = model.embed([term.source for term in TERMS[2:]])
    y, _ = model.frames.step(x, model.frames.init_state(x))
    torch.testing.assert_close(spotter.state.most[..., -len(late.query) :],
                               model.step(y[-3:], model.start(1, late), late).most)  # fmt: skip
    spotter.forget()
    spotter.add([Term("pygmy")])
    torch.testing.assert_close(spotter.odds(), spotter.bank.odds(x[:0])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_of_many_pieces_is_one_of_one(kind: type[Retriever], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(kind), sound(9, 4)
    whole = Bank(model, TERMS).odds(x)
    monkeypatch.setattr("speechattn.terms.bank.PIECE", 1)
    monkeypatch.setattr("speechattn.terms.retriever.PIECE", 3)
    torch.testing.assert_close(Bank(model, TERMS).odds(x), whole, rtol=0, atol=1e-12)
    spotter = Spotter(Bank(model, TERMS))
    for at in range(0, 9, 3):
        spotter.hear(Frames(x.values[:1, at : at + 3], x.mask[:1, at : at + 3]))
    torch.testing.assert_close(spotter.odds(), whole[0], rtol=0, atol=1e-12)


def test_one_bank_is_changed_while_live_and_another_is_not() -> None:
    model, x = made(), sound(8)
    one, two = Spotter(Bank(model, TERMS[:2])), Spotter(Bank(model, TERMS[:2]))
    for spotter in (one, two):
        spotter.hear(x)
    one.add([Term("pygmy")])
    assert [found.term.source for found in two.found(top_k=9)] == [
        found.term.source for found in one.found(top_k=9) if found.term.source != "pygmy"
    ]
    assert len(two.bank) == 2


class Table(nn.Module):
    """Tokens with random vectors."""

    def __init__(self, size: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("table", torch.randn(size, features))

    def tokens(self, text: str) -> list[int]:
        return [int(token) for token in text.split()]

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        table: Tensor = self.table  # type: ignore[assignment]
        return table[ids].masked_fill(~mask[..., None], 0.0), mask


def spoken(table: Tensor, terms: list[str], frames: int, noise: float, generator: torch.Generator) -> Frames:
    """Noise, and in it the vectors of the terms at random places, noisy."""
    x = torch.randn(frames, table.shape[1], generator=generator)
    places = torch.randperm(frames // 4, generator=generator)
    for term, place in zip(terms, places.tolist(), strict=False):
        for i, token in enumerate(term.split()):
            x[4 * place + i] = table[int(token)] + noise * torch.randn(table.shape[1], generator=generator)
    return Frames(x[None], torch.ones(1, frames, dtype=torch.bool))


def test_a_trained_retriever_finds_what_was_said_in_noise() -> None:
    width, steps, generator = 64, 300, torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    words = Table(3000, width)
    table: Tensor = words.table  # type: ignore[assignment]

    def term() -> str:
        size = int(torch.randint(1, 4, (), generator=generator))
        return " ".join(map(str, torch.randint(3000, (size,), generator=generator).tolist()))

    bank = [*dict.fromkeys(term() for _ in range(1000))]
    test = [[bank[3 * i], bank[3 * i + 1]] for i in range(40)]
    places = {text: i for i, text in enumerate(bank)}
    model = RawRetriever(Pointwise(nn.LayerNorm(width), nn.Linear(width, width)), words, width, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        said = [[term() for _ in range(4)] for _ in range(24)]
        x = torch.cat([spoken(table, row, 24, 0.3, generator).values for row in said])
        terms, label = in_batch(said, 100, generator)
        odds = model.odds(Frames(x, torch.ones(x.shape[:2], dtype=torch.bool)), model.embed(terms))
        loss = contrastive(odds, label) + presence_loss(odds, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole = Bank(model.eval(), [Term(text) for text in bank])
    found = torch.cat([whole.odds(spoken(table, row, 60, 0.3, generator)) for row in test])
    each = recall_at(found, [[places[text] for text in row] for row in test], 5)
    assert sum(each) / len(each) > 0.95


def test_the_nearest_are_those_of_the_largest_odds_with_faiss_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = VectorIndex(Hearing(6, 8, stack=2), Spelling(8), 8, window=3, hop=2).eval().requires_grad_(False)
    names = ["".join(random.Random(i).choices("abcdefgh", k=6)) for i in range(50)]
    bank = model.embed(names)
    mask = torch.arange(30) < torch.tensor([[30], [13], [3]])
    x = Frames.of(torch.randn(3, 30, 6), mask)
    expected = model.odds(x, bank).topk(7, dim=1)
    for hidden in (False, True):
        if hidden:
            monkeypatch.setitem(sys.modules, "faiss", None)
        values, places = model.nearest(x, bank, 7)
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(places, expected.indices)
    assert model.nearest(x, bank, 99)[1].shape == (3, 50)
    assert model.nearest(x, model.embed([]), 3)[1].shape == (3, 0)
