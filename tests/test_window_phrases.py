"""Phrases and terms where windows of sound are read again and again: the greedy draft, its prompt, sessions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_aligned import END, HEADS, NEVER, VOCAB, aligned, decoder, utterances
from test_live_terms import DIGITS, MARC, Scripted, text

from speechattn import tree
from speechattn.cli.main import main
from speechattn.decoder.attention import AttentionDecoder
from speechattn.errors import InputError
from speechattn.frames import Frames, Memory
from speechattn.live import Session, Settings, Terms
from speechattn.live.preferred import PROMPT, Preferred
from speechattn.pretrained.whisper import WhisperModel
from speechattn.search import Draft
from speechattn.search.greedy import Greedy
from speechattn.search.leaning import Leaning
from speechattn.search.loops import loop_start
from speechattn.search.phrases import Phrases
from speechattn.terms import Bank, Term

BEGINS = range(4, VOCAB)
RATE = 16000


def book(phrases: Sequence[Sequence[int]], bonus: float) -> Phrases:
    return Phrases(phrases, bonus=bonus, vocab=VOCAB, begins=BEGINS)


def drafted(made: AttentionDecoder, x: Frames, phrases: Phrases | None, **more: Any) -> Draft:
    leaning = None if phrases is None else Leaning(phrases, phrases.root)
    greedy = Greedy(made, END, suppress=NEVER)
    return greedy.draft(Memory.of(x), [END], [], heads=HEADS, max_tokens=58, leaning=leaning, **more)


TOKENS = st.lists(st.integers(1, END - 1), min_size=1, max_size=4)
SETS = st.lists(TOKENS, min_size=1, max_size=5)


@pytest.mark.usefixtures("precise")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), phrases=SETS, bonus=st.sampled_from([0.5, 2.0, 5.0]), data=st.data())
def test_a_guess_changes_the_time_and_never_the_result(
    seed: int, phrases: list[list[int]], bonus: float, data: st.DataObject
) -> None:
    made, x = decoder(seed), utterances(1, 12, holes=False)
    free = drafted(made, x, book(phrases, bonus))
    said = free.tokens.tolist()
    cut = data.draw(st.integers(0, len(said)))
    guess = [*said[:cut], *data.draw(st.lists(st.integers(1, END - 1), max_size=6))]
    again = drafted(made, x, book(phrases, bonus), guess=guess)
    assert again.tokens.tolist() == said
    torch.testing.assert_close(again.log_probs, free.log_probs)
    torch.testing.assert_close(again.weights, free.weights)
    assert free.weights.shape[1] == 1 + len(said)


@pytest.mark.usefixtures("precise")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), phrases=SETS, bonus=st.sampled_from([0.5, 2.0, 5.0]))
def test_it_says_what_the_search_over_a_growing_memory_says_of_all_of_it(
    seed: int, phrases: list[list[int]], bonus: float
) -> None:
    made, x = decoder(seed), utterances(2, 12, holes=False)
    search = aligned(made, most=9.0, spare=30, back=99, reach=99, never_next=(), phrases=book(phrases, bonus))
    for b, [mine] in enumerate(search.decode(x)):
        said = drafted(made, tree.select(x, [b]), book(phrases, bonus)).tokens.tolist()
        if loop_start(said) is None:  # where one stops may depend on what is taken back later
            assert list(mine.tokens) == said
            probable = drafted(made, tree.select(x, [b]), book(phrases, bonus)).log_probs.tolist()
            assert list(mine.log_probs) == pytest.approx(probable, abs=1e-6)


@pytest.mark.usefixtures("precise")
def test_what_may_not_stand_first_does_not_where_a_phrase_was_taken_back() -> None:
    taken = 0
    for seed in range(40):
        made, x = decoder(seed), utterances(1, 12, holes=False)
        first = [*drafted(made, x, None).tokens.tolist()[:1], END][:1]
        greedy = Greedy(made, END, suppress=NEVER, suppress_first=first)
        plain = greedy.draft(Memory.of(x), [END], [], max_tokens=20)
        others = [token for token in BEGINS if token not in [*plain.tokens.tolist()[:1], END]]
        leaning = Leaning(
            phrases := book([[token, *NEVER] for token in others], 4.0), phrases.root
        )  # which nobody says
        said = greedy.draft(Memory.of(x), [END], [], max_tokens=20, leaning=leaning)
        taken += 0 in leaning.barred.values()
        assert [*said.tokens.tolist(), END][0] not in first
        assert len(said.log_probs) == len(said.tokens)
        assert [*plain.tokens.tolist(), END][0] not in first
    assert taken > 5


def test_without_phrases_nothing_changes() -> None:
    for seed in range(5):
        made, x = decoder(seed), utterances(1, 12, holes=False)
        plain, empty = drafted(made, x, None), drafted(made, x, book([], 4.0))
        assert plain.tokens.tolist() == empty.tokens.tolist()
        assert torch.equal(plain.log_probs, empty.log_probs)
        assert torch.equal(plain.weights, empty.weights)


def test_a_phrase_that_is_nearly_said_is_said() -> None:
    changed = 0
    for seed in range(8):
        made, x = decoder(seed), utterances(1, 12, holes=False)
        said = drafted(made, x, None).tokens.tolist()
        wanted = [[token, other] for token in BEGINS for other in BEGINS if token != END != other]
        found = drafted(made, x, book(wanted[:20], 3.0)).tokens.tolist()
        pairs = {*pairwise(found)} - {*pairwise(said)}
        changed += any([*pair] in wanted[:20] for pair in pairs)
    assert changed >= 2


def heard(model: WhisperModel, **given: Any) -> tuple[str, Session]:
    phrases = given.pop("phrases", None)
    session = Session(model, **given)
    if phrases is not None:
        session.prefer(phrases)
    samples = np.pad(soundfile.read(MARC, dtype="float32")[0], [RATE // 2, RATE])
    events = [event for at in range(0, len(samples), 8000) for event in session.feed(samples[at : at + 8000], RATE)]
    return text(events + session.finish()), session


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank(Scripted({"Marc": 8, "Late": 10**6}, 384).eval(), [Term("Marc"), Term("Late")])


def test_whisper_prefers_phrases_and_terms(tiny: WhisperModel, bank: Bank) -> None:
    plain, session = heard(tiny)
    assert plain == "Please call mark."
    assert session.hits() == []
    assert session.terms() is None
    said, session = heard(tiny, phrases=["Marc"], settings=Settings(bonus=12.0))
    assert said.rstrip(".") == "Please call Marc"
    ((start, end),) = session.hits()[0].spans
    assert 0.9 < end < 1.8
    assert start < end
    said, session = heard(tiny, terms=Terms(bank), settings=Settings(bonus=12.0))
    assert said.rstrip(".") == "Please call Marc"
    (use,) = session.terms() or []
    assert (use.term, use.retrieved, len(use.said), use.missed) == ("Marc", 1, 1, 0)
    assert heard(tiny, phrases=["Marc"], settings=Settings(bonus=0.1))[0] == plain
    assert heard(tiny, phrases=["zeppelin"], settings=Settings(bonus=2.0))[0] == plain


def test_a_prompt_instead(tiny: WhisperModel, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, prompt = list[list[int]](), tiny.prompt
    monkeypatch.setattr(tiny, "prompt", lambda memory, context: seen.append([*context]) or prompt(memory, context))
    heard(tiny, terms=Terms(bank), phrases=["Erin Brockovich"], settings=Settings(prompted=True))
    texts = {tiny.tokenizer.decode(tokens) for tokens in seen}
    assert " Erin Brockovich, Marc" in texts
    assert not any("Late" in one for one in texts)
    assert heard(tiny, phrases=["Marc"], settings=Settings(prompted=True, bonus=50.0))[0].startswith("Please call")
    long = Preferred(tiny.phrases(1.0), tiny.tokenizer)
    long.prefer([f"name {i}" for i in range(200)])
    assert 90 < len(long.prompt()) <= PROMPT


def test_a_window_is_looked_at_by_itself_and_a_phrase_goes_on_behind_committed_text(tiny: WhisperModel) -> None:
    terms = Terms(Bank(Scripted({"Marc": 8}, 4).eval(), [Term("Marc")]))
    mine = Preferred(tiny.phrases(4.0), tiny.tokenizer, terms=terms)
    frames = Frames(torch.zeros(1, 6, 4), torch.ones(1, 6, dtype=torch.bool))
    mine.look(frames)
    mine.look(frames)
    assert mine.prompt() == []
    mine.look(Frames.cat([frames, frames]))
    assert tiny.tokenizer.decode(mine.prompt()) == " Marc"
    mine.look(frames)
    assert mine.prompt() == []
    mine.prefer(["Erin Brockovich"])
    behind, afresh = mine.leaning(tiny.tokenizer.encode(" call Erin")), mine.leaning(tiny.tokenizer.encode(" call"))
    assert behind is not None
    assert afresh is not None
    token = tiny.tokenizer.encode(" Brockovich")[0]
    assert behind.choose(0, -1.0, lambda ids: [-5.0 if one == token else -99.0 for one in ids]) == (token, -5.0)
    assert afresh.choose(0, -1.0, lambda ids: [-5.0 if one == token else -99.0 for one in ids]) == (0, -1.0)


def test_who_cannot_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from fake import FakeModel

    with pytest.raises(InputError, match="prefers no phrases"):
        Session(FakeModel([0.5])).prefer(["a"])
    names = tmp_path / "names.txt"
    names.write_text("Marc\n", encoding="utf-8")
    for options, wrong in (
        (["--model", "tiny.en", "--prompt-phrases"], "goes with --hotwords-file or --terms"),
        (["--model", str(DIGITS), "--hotwords-file", str(names), "--prompt-phrases"], "which streams"),
        (["--model", "tiny.en", "--hotwords-score", "2"], "--hotwords-score needs --hotwords-file or --terms"),
    ):
        assert main(["transcribe", str(MARC), *options]) == 2
        assert wrong in capsys.readouterr().err


def test_the_command_takes_them(tiny: WhisperModel, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Marc\n", encoding="utf-8")
    given = ["--model", "tiny.en", "--hotwords-file", str(names)]
    assert main(["transcribe", str(MARC), *given, "--hotwords-score", "14"]) == 0
    assert "Marc" in capsys.readouterr().out
    assert main(["transcribe", str(MARC), *given, "--prompt-phrases"]) == 0
    assert "call" in capsys.readouterr().out
