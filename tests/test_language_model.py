"""Language models as scorers: token by token they say what they say of the whole text."""

from __future__ import annotations

import random
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speechattn import tree
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.search.kenlm import NGrams, TokenNGramScorer, WordNGramScorer
from speechattn.search.language_model import LanguageModel, LanguageModelScorer, LanguageState
from speechattn.search.scorer import Scorer
from speechattn.text import Pieces

pytestmark = pytest.mark.usefixtures("precise")

V = 6
END = 5


def made(left: int | None = None, tied: bool = True) -> LanguageModel:
    """Two random layers."""
    model = LanguageModel(V, 8, 2, 2, 12, end=END, left=left, tied=tied)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model.eval().requires_grad_(False)


def silence(rows: int) -> Frames:
    return Frames(torch.full((rows, 0, 3), torch.nan), torch.ones(rows, 0, dtype=torch.bool))


def chances(model: LanguageModel, text: list[int]) -> Tensor:
    """Log-probabilities [V] of what follows a text, which is read alone and at once."""
    return model.log_probs(torch.tensor([text], dtype=torch.long))[0, -1]


@pytest.mark.parametrize("left", [None, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_each_text_alone(left: int | None, tied: bool) -> None:
    model = made(left, tied)
    texts = [[1, 2, 3, 4], [2], []]
    tokens = torch.tensor([[1, 2, 3, 4], [2, -1, -1, -1], [-1, -1, -1, -1]])  # what is not there is not looked at
    lengths = torch.tensor([4, 1, 0])
    costs = [-sum(float(chances(model, t[:u])[v]) for u, v in enumerate([*t, END])) for t in texts]
    assert torch.allclose(model.surprise(tokens, lengths)[0], torch.tensor(costs), rtol=0, atol=1e-12)
    assert float(model.loss(tokens, lengths)) == pytest.approx(sum(costs) / 8, abs=1e-12)
    assert model.perplexity(tokens, lengths) == pytest.approx(torch.tensor(sum(costs) / 8).exp().item())
    every = model.log_probs(tokens, lengths)
    assert every.shape == (3, 5, V)
    assert torch.allclose(every[0].exp().sum(-1), torch.ones(5))
    assert not every[1, 2:].any()


def test_tied_weights_are_the_embedding_and_learn() -> None:
    assert len(list(made(tied=True).parameters())) + 1 == len(list(made(tied=False).parameters()))
    torch.manual_seed(1)
    model = LanguageModel(V, 8, 1, 2, 12, end=END)
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3], [2, 3, 1, 2, 3, 1]])
    lengths = torch.tensor([6, 5])
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    before = model.perplexity(tokens, lengths)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(tokens, lengths).backward()
        optimizer.step()
    assert before > 4
    assert model.perplexity(tokens, lengths) < 1.6  # the first token and the end are open


def test_a_limited_model_forgets_and_an_unlimited_one_does_not() -> None:
    text, other = [1, 2, 3, 4, 1, 2, 3], [4, 4, 3, 4, 1, 2, 3]
    limited = made(left=2)
    assert torch.allclose(chances(limited, text), chances(limited, other), rtol=0, atol=1e-12)  # two layers: 4 tokens
    assert not torch.allclose(chances(limited, text), chances(limited, [1, 2, 4, *text[3:]]), rtol=0, atol=1e-6)
    unlimited = made()
    assert not torch.allclose(chances(unlimited, text), chances(unlimited, other), rtol=0, atol=1e-6)


@pytest.mark.parametrize("left", [None, 2])
def test_hypotheses_are_scored_as_whole_texts_whatever_becomes_of_their_rows(left: int | None) -> None:
    model = made(left)
    scorer: Scorer = LanguageModelScorer(model)
    assert not scorer.partial
    pick = random.Random(0)
    said: list[list[list[int]]] = [[[]], [[]]]
    state = scorer.start(silence(2))
    for cycle in range(8):
        state = scorer.read(silence(len(said)), state)
        scores, after = scorer.score(state, None)
        again, state = scorer.score(state, None)  # the state that was given is not consumed
        assert torch.equal(scores, again)
        assert tree.leaves(after)[-1].shape[0] == len(said)
        for b, row in enumerate(said):
            for k, text in enumerate(row):
                assert torch.allclose(scores[b, k], chances(model, text), rtol=0, atol=1e-12)
        parents = [[pick.randrange(len(row)) for _ in range(3)] for row in said]
        new = [[pick.randrange(V) for _ in range(3)] for _ in said]
        state = scorer.extend(state, torch.tensor(parents), torch.tensor(new))
        said = [[[*row[p], t] for p, t in zip(parents[b], new[b], strict=True)] for b, row in enumerate(said)]
        order = [[pick.randrange(3) for _ in range(3)] for _ in said]
        state = scorer.select(state, torch.tensor(order))
        said = [[row[i] for i in order[b]] for b, row in enumerate(said)]
        if cycle == 3:  # another session joins, with as many hypotheses of its own age
            other = scorer.select(scorer.start(silence(1)), torch.zeros(1, 3, dtype=torch.long))
            parts = tree.split(state)
            state, said = tree.concat([parts[1], other, parts[0]]), [said[1], [[], [], []], said[0]]
        if cycle == 6:  # the first leaves
            state, said = tree.select(state, [2, 1]), [said[2], said[1]]


@pytest.mark.parametrize("left", [None, 2])
def test_a_text_goes_on_behind_what_was_said_before(left: int | None) -> None:
    model = made(left)
    scorer = LanguageModelScorer(model)
    contexts = [[1, 2, 3, 4, 2], [], [4], [3, 3, 1]]
    tokens = torch.tensor([[1, 2, 3, 4, 2], [-1] * 5, [4, -1, -1, -1, -1], [3, 3, 1, -1, -1]])
    state = scorer.behind(tokens.clamp(min=0), torch.tensor([5, 0, 1, 3]))
    said: list[int] = []
    for token in [2, 1, 4, 4]:
        scores, state = scorer.score(state)
        for b, context in enumerate(contexts):
            assert torch.allclose(scores[b, 0], chances(model, [*context, *said]), rtol=0, atol=1e-12)
        state = scorer.extend(state, torch.zeros(4, 1, dtype=torch.long), torch.full((4, 1), token))
        said.append(token)
    always = LanguageModelScorer(model, context=[3, 3, 1])
    scores, _ = always.score(always.start(silence(2)))
    assert torch.allclose(scores, chances(model, [3, 3, 1]).expand(2, 1, V), rtol=0, atol=1e-12)
    assert always.score(always.start(silence(0)))[0].shape == (0, 1, V)


def test_memory_is_bounded_where_the_context_is() -> None:
    scorer = LanguageModelScorer(made(left=2))
    state: LanguageState = scorer.start(silence(1))
    zero = torch.zeros(1, 1, dtype=torch.long)
    sizes = []
    for _ in range(6):
        _, state = scorer.score(state)
        state = scorer.extend(state, zero, zero)
        sizes.append(sum(leaf.numel() for leaf in tree.leaves(state)))
    assert len({*sizes}) == 1


def test_the_end_is_a_token() -> None:
    with pytest.raises(ValueError, match="end 6: tokens are 0 to 5"):
        LanguageModel(V, 8, 1, 2, 12, end=V)


GRAMS = {  # log10 p, words, log10 of the backoff
    1: [(-1.7, "<unk>", -0.05), (0, "<s>", -0.4), (-0.9, "</s>", 0), (-0.7, "new", -0.3), (-1.1, "york", -0.25),
        (-1.3, "a", -0.2)],
    2: [(-0.5, "<s> new", -0.15), (-0.3, "new york", -0.1), (-0.8, "york </s>", 0), (-0.6, "york a", -0.12),
        (-1.0, "a new", -0.13), (-0.9, "new <unk>", -0.07)],
    3: [(-0.1, "<s> new york", 0), (-0.2, "new york a", 0), (-0.35, "york a new", 0)],
}  # fmt: skip
PIECES = Pieces(["<blank>", "▁new", "▁york", "▁a", "▁ne", "w", "▁", "a", "▁yo", "rk", "<sos/eos>"])


def ngrams(folder: Path, order: int = 3) -> NGrams:
    """A model by hand, of all orders or of the lower ones."""
    pytest.importorskip("kenlm")
    lines = ["\\data\\", *(f"ngram {n}={len(GRAMS[n])}" for n in range(1, order + 1))]
    for n in range(1, order + 1):
        lines += ["", f"\\{n}-grams:"]
        lines += [f"{p}\t{words}" + (f"\t{backoff}" if n < order else "") for p, words, backoff in GRAMS[n]]
    path = folder / f"{order}.arpa"
    path.write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")
    return NGrams(path)


def scored(scorer: Any, texts: list[list[int]]) -> Tensor:
    """The sum of what a scorer says of each token of texts of one length [B], one row each; the others' too."""
    state = scorer.start(silence(len(texts)))
    total = torch.zeros(len(texts))
    for at, tokens in enumerate(zip(*texts, strict=True)):
        new = torch.tensor(tokens)[:, None]
        every, _ = scorer.score(state, None)
        some, state = scorer.score(scorer.read(silence(len(texts)), state), torch.stack([new, (new + 1) % 11], 2))
        assert torch.equal(every.gather(2, new[..., None])[..., 0], some[..., 0])
        assert torch.equal(every.gather(2, (new[..., None] + 1) % 11)[..., 0], some[..., 1])
        total += some[:, 0, 0]
        state = scorer.extend(state, torch.zeros_like(new), new)
        if at == 2:
            state = tree.concat(tree.split(state))
    return total


@pytest.mark.parametrize("order", [2, 3])
def test_words_of_pieces_are_scored_as_kenlm_scores_the_sentence(tmp_path: Path, order: int) -> None:
    model = ngrams(tmp_path, order)
    assert model.context == order - 1
    scorer: Scorer = WordNGramScorer(model, PIECES, end=10)
    assert scorer.partial
    pick = random.Random(0)
    texts = [[pick.randrange(1, 10) for _ in range(9)] + [10] for _ in range(30)]
    texts += [[1, 2, 3, 1, 2, 4, 5, 8, 9, 10], [6, 7, 1, 2, 3, 6, 7, 4, 5, 10], [5, 5, 6, 6, 6, 6, 6, 6, 6, 10]]
    expected = [model.model.score(PIECES.decode(text), bos=True, eos=True) * log(10) for text in texts]
    assert torch.allclose(
        scored(scorer, texts), torch.tensor(expected), rtol=0, atol=1e-4
    )  # kenlm has single precision


@pytest.mark.parametrize("order", [2, 3])
def test_tokens_are_scored_as_kenlm_scores_the_sentence(tmp_path: Path, order: int) -> None:
    model = ngrams(tmp_path, order)
    names = ["<blank>", "new", "york", "a", "b", "c", "d", "e", "f", "g", "<sos/eos>"]
    scorer: Scorer = TokenNGramScorer(model, names, end=10)
    pick = random.Random(0)
    texts = [[pick.choice([1, 1, 2, 2, 3, 4]) for _ in range(8)] + [10] for _ in range(30)]
    expected = [model.model.score(" ".join(names[t] for t in text[:-1])) * log(10) for text in texts]
    assert torch.allclose(scored(scorer, texts), torch.tensor(expected), rtol=0, atol=1e-4)


def test_a_word_counts_when_it_is_complete(tmp_path: Path) -> None:
    scorer = WordNGramScorer(ngrams(tmp_path), PIECES, end=10)
    state = scorer.start(silence(1))
    zero = torch.zeros(1, 1, dtype=torch.long)
    found = []
    for token in [4, 5, 8, 9, 10]:  # ne w yo rk
        scores, state = scorer.score(state, torch.tensor([[[token, 5]]]))
        assert scores[0, 0, 1] == 0
        found.append(float(scores[0, 0, 0]) / log(10))
        state = scorer.extend(state, zero, torch.tensor([[token]]))
    assert found == pytest.approx([0, 0, -0.5, 0, -0.1 + (-0.1 - 0.8)], abs=1e-6)


def test_a_word_without_end_is_unknown(tmp_path: Path) -> None:
    model = ngrams(tmp_path)
    scorer = WordNGramScorer(model, PIECES, end=10)
    for middle in ([5] * 60, [*[0] * 40, 5]):  # also where the first 32 tokens spell a word that is known
        text = [1, *middle, 2, 10]
        expected = model.model.score(PIECES.decode(text)) * log(10)
        assert float(scored(scorer, [text])) == pytest.approx(expected, abs=1e-4)


def test_hypotheses_of_ngrams_are_selected(tmp_path: Path) -> None:
    model = ngrams(tmp_path)
    for scorer in (
        WordNGramScorer(model, PIECES, end=10),
        TokenNGramScorer(model, [p.strip("▁") for p in PIECES.pieces], end=10),
    ):
        state = scorer.extend(
            scorer.start(silence(2)), torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 2, 3]] * 2)
        )
        one, _ = scorer.score(state, None)
        other, _ = scorer.score(scorer.select(state, torch.tensor([[2, 0, 1], [0, 0, 2]])), None)
        assert torch.equal(other[0], one[0, [2, 0, 1]])
        assert torch.equal(other[1], one[1, [0, 0, 2]])
        assert not torch.equal(one[0, 0], one[0, 1])
        assert scorer.score(scorer.start(silence(0)), None)[0].shape == (0, 1, 11)


def test_a_model_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kenlm")
    with pytest.raises(ModelError, match=r"none.arpa: cannot be read as an n-gram model"):
        NGrams(tmp_path / "none.arpa")
    (tmp_path / "bad.arpa").write_text("hello", encoding="utf-8")
    with pytest.raises(ModelError, match=r"bad.arpa: cannot be read"):
        NGrams(tmp_path / "bad.arpa")
    monkeypatch.setitem(__import__("sys").modules, "kenlm", None)
    with pytest.raises(ModelError, match="pip install kenlm"):
        NGrams(tmp_path / "none.arpa")
