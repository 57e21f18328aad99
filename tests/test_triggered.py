"""Triggered attention: against a search in plain Python, enumeration, CTC alone; what it may hear, pieces, rows."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechattn import tree
from speechattn.decoder.attention import AttentionDecoder, DecoderState
from speechattn.decoder.ctc import CTC
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer, load_model
from speechattn.score.wer import word_errors
from speechattn.search.beam import Beam, Hypothesis, Search
from speechattn.search.ctc import CTCPrefixBeam
from speechattn.search.triggered import TriggeredBeam

pytestmark = pytest.mark.usefixtures("precise")
DIM, VOCAB, END = 8, 4, 3
Text = tuple[int, ...]


def parts(vocab: int = VOCAB, *, context: int = 30, sharp: float = 0.9) -> tuple[CTC, AttentionDecoder]:
    decoder = AttentionDecoder.usual(vocab, DIM, 2, 2, 12, context=context).eval()
    head = CTC(DIM, vocab)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=sharp)
    return head.requires_grad_(False), decoder.requires_grad_(False)


def triggered(head: CTC, decoder: AttentionDecoder, size: int, **options: Any) -> TriggeredBeam:
    end = decoder.vocab - 1
    return TriggeredBeam(head, decoder, size, sos=end, eos=end, **options)


def utterances(lengths: list[int], *, holes: bool = False) -> Frames:
    """Frames whose invalid ones are not numbers."""
    x = torch.randn(len(lengths), max(lengths, default=0), DIM)
    mask = torch.arange(x.shape[1]) < torch.tensor(lengths, dtype=torch.long)[:, None]
    mask = mask & (torch.rand(mask.shape) < 0.7) if holes else mask
    return Frames(torch.where(mask[..., None], x, math.nan), mask)


def same(a: list[Hypothesis], b: list[Hypothesis], tolerance: float = 1e-9) -> None:
    assert [x.tokens for x in a] == [x.tokens for x in b]
    assert [x.spans for x in a] == [x.spans for x in b]
    for x, y in zip(a, b, strict=True):
        assert x.score == pytest.approx(y.score, abs=tolerance)
        assert x.log_probs == pytest.approx(y.log_probs, abs=tolerance)


def pieces(search: Search, x: Frames, cuts: list[int]) -> Beam:
    """The beam behind steps that end at the cuts."""
    beam = search.start(x)
    for a, b in itertools.pairwise([0, *sorted(cuts), x.mask.shape[1]]):
        beam = search.step(x[a:b], beam)
    return beam


def follows(decoder: AttentionDecoder, x: Tensor, text: Text, heard: list[int]) -> Tensor:
    """Log-probabilities [V] of what follows a text, of which each token, and `sos`, is read over so many frames."""
    cache = None
    for token, frames in zip([decoder.vocab - 1, *text], heard, strict=True):
        there = torch.ones(1, len(x[:frames]), dtype=torch.bool)
        begun = decoder.start(Memory.of(Frames(x[None, :frames], there)))
        state = DecoderState(cache or begun.cache, begun.cross, begun.place)
        hidden, _, state = decoder.step(torch.tensor([[token]]), state)
        cache = state.cache
    return decoder.logits(hidden[0, -1]).log_softmax(-1)


def simple(head: CTC, decoder: AttentionDecoder, x: Tensor, size: int, ahead: int, weight: float) -> dict[Text, float]:
    """The search over [T, D] with prefixes in a dictionary.

    A prefix has four worths: all paths that end in blank and in a label, the best path that ends in either. What the
    decoder gives to it is kept with the frames that were there for each label.
    """
    beam: dict[Text, tuple[float, ...]] = {(): (0.0, -math.inf, 0.0, -math.inf)}
    given: dict[Text, tuple[float, list[int]]] = {(): (0.0, [])}
    logs = head(Frames(x[None], torch.ones(1, len(x), dtype=torch.bool))).values[0].tolist()
    for t, frame in enumerate(logs):
        new, said = grown(beam, frame)
        before = dict(given)
        for text in said:
            worth, heard = before[text[:-1]]
            heard = [*heard, t + ahead + 1]
            given[text] = worth + float(follows(decoder, x, text[:-1], heard)[text[-1]]), heard
        rank = {text: weight * np.logaddexp(*new[text][:2]) + (1 - weight) * given[text][0] for text in new}
        beam = {text: new[text] for text in sorted(new, key=rank.__getitem__, reverse=True)[:size]}
    found = {}
    for text in beam:
        worth, heard = given[text]
        worth += float(follows(decoder, x, text, [*heard, len(x)])[-1])
        found[text] = weight * float(np.logaddexp(*beam[text][:2])) + (1 - weight) * worth
    return found


def grown(beam: dict[Text, tuple[float, ...]], frame: list[float]) -> tuple[dict[Text, tuple[float, ...]], list[Text]]:
    """The prefixes behind a frame, and those whose last label is said in it."""
    new, said = {}, []
    for text, (blank, label, best_blank, best_label) in beam.items():
        stay = frame[text[-1]] if text else -math.inf
        entry = best_entry = -math.inf
        if text and text[:-1] in beam:
            entry, best_entry = entries(beam[text[:-1]], text[-2:-1] == text[-1:])
        silent = max(best_blank, best_label) + frame[0]
        if best_entry > best_label and best_entry + stay > silent:
            said.append(text)
        new[text] = (float(np.logaddexp(blank, label)) + frame[0], float(np.logaddexp(label, entry)) + stay, silent,
                     max(best_label, best_entry) + stay)  # fmt: skip
    for text, worth in beam.items():
        for token in range(1, len(frame)):
            if (*text, token) not in beam:
                entry, best_entry = entries(worth, text[-1:] == (token,))
                new[*text, token] = (-math.inf, entry + frame[token], -math.inf, best_entry + frame[token])
                said.append((*text, token))
    return new, said


def entries(worth: tuple[float, ...], again: bool) -> tuple[float, float]:
    """All paths, and the best one, behind which a label may begin."""
    blank, label, best_blank, best_label = worth
    return (blank, best_blank) if again else (float(np.logaddexp(blank, label)), max(best_blank, best_label))


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1, 3, 7]), ahead=st.integers(0, 4),
       weight=st.sampled_from([0.2, 0.5, 0.9]))  # fmt: skip
def test_as_in_plain_python(seed: int, size: int, ahead: int, weight: float) -> None:
    torch.manual_seed(seed)
    head, decoder = parts()
    x = utterances([6])
    found = triggered(head, decoder, size, ahead=ahead, weight=weight).decode(x)[0]
    wanted = simple(head, decoder, x.values[0], size, ahead, weight)
    assert {h.tokens: h.score for h in found} == pytest.approx(wanted, abs=1e-9)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


def test_who_hears_all_gives_what_the_decoder_gives() -> None:
    head, decoder = parts()
    x = utterances([4])
    search, alone = triggered(head, decoder, 200, ahead=9, weight=0.4), CTCPrefixBeam(200, compiled=False)
    found = search.decode(x)[0]
    ctc = {h.tokens: h.score for h in alone.decode(head(x))[0]}
    assert {h.tokens for h in found} == ctc.keys()
    assert len(found) > 50
    for h in found:
        text = torch.tensor([h.tokens], dtype=torch.long)
        wanted = decoder.log_prob(Memory.of(x), text, torch.tensor([len(h.tokens)]), sos=END, eos=END)
        assert h.score == pytest.approx(0.4 * ctc[h.tokens] + 0.6 * float(wanted), abs=1e-9)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 14), min_size=1, max_size=3), holes=st.booleans())
def test_with_all_weight_it_is_ctc(seed: int, lengths: list[int], holes: bool) -> None:
    torch.manual_seed(seed)
    head, decoder = parts(7)
    x = utterances(lengths, holes=holes)
    a = triggered(head, decoder, 5, weight=1.0, ahead=3).decode(x)
    for mine, theirs in zip(a, CTCPrefixBeam(5, compiled=False).decode(head(x)), strict=True):
        same(mine, theirs)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 14), max_size=5), ahead=st.integers(0, 16),
       lengths=st.lists(st.integers(0, 14), min_size=1, max_size=3))  # fmt: skip
def test_pieces_and_rows(seed: int, cuts: list[int], ahead: int, lengths: list[int]) -> None:
    torch.manual_seed(seed)
    head, decoder = parts(6)
    x = utterances(lengths, holes=True)
    search = triggered(head, decoder, 4, ahead=ahead)
    together = search.hypotheses(search.finish(pieces(search, x, [min(c, x.mask.shape[1]) for c in cuts])))
    for row, found in enumerate(together):
        same(found, search.decode(Frames(x.values[row : row + 1], x.mask[row : row + 1]).front())[0])


def test_rows_that_join_and_part() -> None:
    head, decoder = parts(6)
    search = triggered(head, decoder, 4, ahead=3)
    x = utterances([17, 17])
    wanted = search.decode(x)
    late = search.step(x[:9], search.start(x))
    first, second = tree.split(late)
    first = search.step(Frames(x.values[:1, 9:12], x.mask[:1, 9:12]), first)
    young = search.start(x[:0])
    both = tree.concat([first, tree.select(young, [1]), second])
    rest = Frames.cat([x[12:], x[:0].pad(5)])
    three = Frames.from_lengths(
        torch.stack([rest.values[0], x.values[1, :10], x.values[1, 7:]]), torch.tensor([5, 0, 10])
    )
    three = Frames.of(torch.where(torch.arange(3)[:, None, None] == 2, x.values[1, 7:], three.values),
                      torch.stack([three.mask[0], three.mask[1], torch.arange(10) >= 2]))  # fmt: skip
    found = search.hypotheses(search.finish(search.step(three, both)))
    same(found[0], wanted[0])
    same(found[2], wanted[1])
    same(found[1], search.decode(x[:0])[1])


def spoken(texts: list[int], *, silence: int) -> Tensor:
    """Frames [1, T, D] whose first features are CTC's, certain of `texts` (0: nothing), then of nothing."""
    x = torch.randn(1, len(texts) + silence, DIM)
    x[..., :VOCAB] = 0
    for t, token in enumerate([*texts, *[0] * silence]):
        x[0, t, token] = 60 if t >= len(texts) else 2.5
    return x


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_nothing_behind_the_trigger_is_heard(ahead: int) -> None:
    head, decoder = parts()
    head.head.weight.copy_(torch.eye(VOCAB, DIM))
    head.head.bias.zero_()
    search = triggered(head, decoder, 6, ahead=ahead)
    x = spoken([1, 0, 2, 2, 0, 1], silence=9)
    end = 6 + ahead  # the first frame that nobody asked about

    def scores(x: Tensor) -> dict[Text, float]:
        frames = Frames(x, torch.ones(x.shape[:2], dtype=torch.bool))
        found = search.hypotheses(search.step(frames, search.start(frames)))[0]
        return {h.tokens: h.score for h in found}

    wanted = scores(x)
    assert len(wanted) == 6
    later, now = x.clone(), x.clone()
    later[:, end:, VOCAB:] += 3
    now[:, end - 1 : end, VOCAB:] += 3
    assert scores(later) == pytest.approx(wanted, abs=1e-12)
    assert scores(now) != pytest.approx(wanted, abs=1e-6)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 6), weight=st.sampled_from([0.3, 0.8]))
def test_who_is_not_asked_had_no_chance(seed: int, size: int, weight: float) -> None:
    torch.manual_seed(seed)
    head, decoder = parts(6)
    x = utterances([12, 9])
    search = triggered(head, decoder, size, ahead=2, weight=weight)
    needed = search._needed

    def everyone(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        need, moved, parent = needed(*args)
        return torch.ones_like(need), moved, parent

    wanted = search.decode(x)
    search._needed = everyone  # type: ignore[method-assign]
    for mine, theirs in zip(search.decode(x), wanted, strict=True):
        same(mine, theirs)


def test_answers_go_to_those_who_asked() -> None:
    head, decoder = parts(6)
    search, x = triggered(head, decoder, 4, ahead=0), utterances([8, 8])
    beam = search.step(x, search.start(x))
    listeners, heard = beam.state.lm.states
    state = search._with(beam, listeners).state
    still, first = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.long)
    every = search._asked(state, ~still, still, first, heard.cross).lm.ahead
    need = torch.tensor([[False, False, True, False], [False, True, False, True]])
    some = search._asked(state, need, still, first, heard.cross).lm.ahead
    torch.testing.assert_close(some, every.masked_fill(~need[..., None], -math.inf))


def test_in_silence_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    head, decoder = parts()
    head.head.weight.copy_(torch.eye(VOCAB, DIM))
    head.head.bias.zero_()
    search = triggered(head, decoder, 6, ahead=1)
    x = spoken([1, 0, 2], silence=9)
    listened, calls = search._listen, []
    monkeypatch.setattr(search, "_listen", lambda *args: calls.append(1) or listened(*args))
    search.decode(Frames(x, torch.ones(x.shape[:2], dtype=torch.bool)))
    assert 1 <= len(calls) <= 4  # the frames of speech, and the end


def test_spans_and_log_probs_are_those_of_ctc() -> None:
    head, decoder = parts(6)
    x = utterances([15, 11])
    search, alone = triggered(head, decoder, 6, weight=0.95), CTCPrefixBeam(400, candidates=None, compiled=False)
    for mine, theirs in zip(search.decode(x), alone.decode(head(x)), strict=True):
        known = {h.tokens: h for h in theirs}
        best = mine[0]
        assert len(best.tokens) > 2
        assert (best.spans, best.log_probs) == (known[best.tokens].spans, known[best.tokens].log_probs)
    beam = search.start_at(x[:0], torch.tensor([100, 0]))
    moved = search.hypotheses(search.finish(search.step(x, beam)))[0][0]
    still = search.decode(x)[0][0]
    assert moved.spans == tuple((a + 100, b + 100) for a, b in still.spans)


def test_what_is_committed_is_forgotten_and_remembered() -> None:
    head, decoder = parts(6, sharp=3.0)
    x = utterances([30, 30])
    search = triggered(head, decoder, 4, ahead=2)
    beam = search.step(x[:16], search.start(x))
    n = beam.agreed() * torch.tensor([1, 0])
    assert int(n[0]) >= 2
    loose = search.hypotheses(search.finish(search.step(x[16:], tree.clone(beam))))
    kept = search.hypotheses(search.finish(search.step(x[16:], search.commit(beam, n))))
    same(kept[1], loose[1])
    same(kept[0], [Hypothesis(h.tokens[n[0] :], h.score, h.log_probs[n[0] :], h.spans[n[0] :]) for h in loose[0]])
    wrong = search.step(x[:16], search.start(x))
    only = search.commit(wrong, wrong.said.length[:, 0])
    assert [h.tokens for h in search.hypotheses(only)[0]][:1] == [()]
    assert len(search.hypotheses(search.finish(search.step(x[16:], only)))[0]) == 4


def test_no_frames_no_rows_no_room() -> None:
    head, decoder = parts(context=4)
    search = triggered(head, decoder, 3)
    ((only,),) = search.decode(utterances([0]))
    end = float(decoder.log_prob(Memory.of(utterances([0])), torch.zeros(1, 0).long(), torch.tensor([0]), sos=3, eos=3))
    assert (only.tokens, only.spans, only.score) == ((), (), pytest.approx(0.7 * end))
    assert search.decode(utterances([])) == []
    x = utterances([40])
    beam = search.step(x, search.start(x))
    assert float(search.room(beam)) == 0.0
    found = search.hypotheses(search.finish(beam))[0]
    assert max(len(h.tokens) for h in found) == 3
    assert float(search.room(search.start(x))) == 1.0
    with pytest.raises(ValueError, match="a say"):
        triggered(head, decoder, 3, weight=0.0)
    with pytest.raises(ValueError, match="ahead"):
        triggered(head, decoder, 3, ahead=-1)


@pytest.mark.parametrize("ahead", [0, 6])
def test_it_recognises(ahead: int) -> None:
    torch.set_default_dtype(torch.float32)
    folder = Path(__file__).parent / "digits"
    lines = [line for line in json.loads((folder / "transcripts.json").read_text("utf-8")) if not line["rare"]]
    model = load_model(folder)
    assert isinstance(model, Recognizer)
    sounds = [torch.from_numpy(soundfile.read(folder / line["file"], dtype="float32")[0]) for line in lines]
    lengths = torch.tensor([len(samples) for samples in sounds])
    with torch.inference_mode():
        x = model.listening(Frames.from_lengths(torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True), lengths))
    end = model.tokenizer.end
    assert end is not None
    assert len(lines) == 12
    search = TriggeredBeam(model.heads["ctc"], model.heads["attention"], 4, sos=end, eos=end, ahead=ahead)
    said = [model.tokenizer.decode(row[0].tokens) for row in search.decode(x)]
    assert word_errors([line["text"] for line in lines], said, normalise="none").rate <= 0.06
