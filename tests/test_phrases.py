"""Phrase biasing: what it gives is what an exhaustive search for the phrases says, whatever is done to the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechattn import tree
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.search.phrases import Hits, Phrases, PhraseScorer, PhraseTables, hits
from speechattn.text import Pieces, spelled

pytestmark = pytest.mark.usefixtures("precise")

BONUS = 1.5
V = 3
tokens = st.integers(0, V - 1)
phrase_sets = st.lists(st.lists(tokens, min_size=1, max_size=6), max_size=6)
texts = st.lists(tokens, max_size=14)


def inside(phrases: Sequence[Sequence[int]], text: Sequence[int]) -> list[bool]:
    """Which tokens lie in a phrase said in full: by looking everywhere."""
    found = [False] * len(text)
    for phrase in phrases:
        for i in range(len(text) - len(phrase) + 1):
            if list(text[i : i + len(phrase)]) == list(phrase):
                found[i : i + len(phrase)] = [True] * len(phrase)
    return found


def begun(phrases: Sequence[Sequence[int]], text: Sequence[int]) -> int:
    """The length of the longest end of the text that a phrase begins with."""
    ends = (n for n in range(len(text), 0, -1) if any(list(p[:n]) == list(text[len(text) - n :]) for p in phrases))
    return next(ends, 0)


def given_to(book: Phrases, text: Sequence[int], node: Tensor | None = None) -> tuple[Tensor, list[float]]:
    """The last node and the bonus of each token."""
    node = book.start(1, 1) if node is None else node
    bonuses = []
    for token in text:
        node, bonus = book.step(node, torch.tensor([[token]]))
        bonuses.append(float(bonus))
    return node, bonuses


@settings(deadline=None, max_examples=250)
@given(phrase_sets, texts)
def test_each_token_inside_a_phrase_said_is_worth_the_bonus_once(phrases: list[list[int]], text: list[int]) -> None:
    book = Phrases(phrases, bonus=BONUS, vocab=V)
    node = book.start(1, 1)
    total = 0.0
    for u, token in enumerate(text):
        node, bonus = book.step(node, torch.tensor([[token]]))
        total += float(bonus)
        so_far = text[: u + 1]
        said = inside(phrases, so_far)
        half = begun(phrases, so_far)
        assert total == BONUS * (sum(said) + said[len(said) - half :].count(False))  # and of the phrase that goes on
        assert total + float(book.finish(node)) == BONUS * sum(said)


@pytest.mark.parametrize(
    ("phrases", "text", "bonuses", "last"),
    [
        ([[1, 2, 3]], [1, 2, 3], [1, 1, 1], 0),  # all said
        ([[1, 2, 3]], [1, 2, 0], [1, 1, -2], 0),  # abandoned
        ([[1, 2, 3]], [1, 2], [1, 1], -2),  # cut off
        ([[1, 1, 2]], [1, 1, 1, 2], [1, 1, 0, 1], 0),  # begun anew inside itself
        ([[1, 2], [2, 3, 4]], [1, 2, 3, 4], [1, 1, 1, 1], 0),  # overlapping: the shared token counts once
        ([[1, 2], [2, 3, 4]], [1, 2, 3, 0], [1, 1, 1, -1], 0),  # and is not given back
        ([[2, 3, 4]], [1, 2, 3, 0], [0, 1, 1, -2], 0),
        ([[1], [1, 2, 3]], [1, 2, 0], [1, 1, -1], 0),  # one the beginning of the other
        ([[2], [1, 2, 3]], [1, 2, 0], [1, 1, -1], 0),  # one in the middle of the other
        ([], [1, 2], [0, 0], 0),
    ],
)
def test_by_hand(phrases: list[list[int]], text: list[int], bonuses: list[float], last: float) -> None:
    book = Phrases(phrases, vocab=5)
    node, found = given_to(book, text)
    assert found == bonuses
    assert book.finish(node).tolist() == [[last]]


@settings(deadline=None, max_examples=60)
@given(phrase_sets, st.lists(texts, min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([BONUS, -0.5, 0.0]))
def test_dense_scores_are_the_bonus_of_each_step_in_any_shape(
    phrases: list[list[int]], said: list[list[int]], k: int, worth: float
) -> None:
    book = Phrases(phrases, bonus=worth, vocab=V)
    nodes = torch.stack([given_to(book, text)[0][0] for text in said]).expand(len(said), k).contiguous()
    dense = book.scores(nodes)
    assert dense.shape == (len(said), k, V)
    every = torch.arange(V)
    for b, text in enumerate(said):
        alone = [given_to(book, [*text, t])[1][-1] for t in range(V)]
        assert dense[b].tolist() == [alone] * k
    after, bonus = book.step(nodes[..., None], every)
    assert torch.equal(bonus, dense)
    assert after.shape == (len(said), k, V)
    for token in (-1, V):  # such as nothing, or a blank behind all tokens
        after, bonus = book.step(nodes, torch.tensor(token))
        assert torch.equal(bonus, book.finish(nodes))
        assert torch.equal(after, book.start(len(said), k))
    assert book.step(nodes[:0], every[:0, None].expand(0, k))[0].shape == (0, k)
    assert book.scores(nodes[:0]).shape == (0, k, V)


def walked(tables: PhraseTables, bonus: float, node: int, token: int) -> tuple[int, float]:
    """What a compiled loop makes of the tables."""
    origin = node
    while True:
        span = slice(tables.first[node], tables.first[node + 1])
        at = int(np.searchsorted(tables.token[span], token))
        if at < span.stop - span.start and tables.token[span][at] == token:
            return int(tables.child[span][at]), bonus + tables.owed[node] - tables.owed[origin]
        if node == tables.root[node]:
            return node, tables.owed[node] - tables.owed[origin]
        node = int(tables.failure[node])


@settings(deadline=None, max_examples=60)
@given(phrase_sets, phrase_sets)
def test_the_tables_say_the_same(one: list[list[int]], two: list[list[int]]) -> None:
    book = Phrases(one, bonus=BONUS, vocab=V)
    book.add(two)
    tables = book.tables()
    nodes = torch.arange(len(tables.root))
    for token in range(V):
        after, bonus = book.step(nodes, torch.full_like(nodes, token))
        assert [walked(tables, BONUS, n, token) for n in nodes.tolist()] == list(
            zip(after.tolist(), bonus.tolist(), strict=True)
        )
        assert (tables.depth[after.numpy()] <= tables.depth + 1).all()
        assert (tables.root[after.numpy()] == tables.root).all()
    assert torch.equal(book.finish(nodes), -torch.from_numpy(tables.owed))


def test_many_nodes_only_where_phrases_overlap() -> None:
    apart = Phrases([[1, 2, 3], [4, 5, 6]], vocab=9)
    assert len(apart.tables().root) == 7
    overlapping = Phrases([[1, 2, 3], [3, 4, 5]], vocab=9)  # "3" and "3 4" paid and not; "3 4 5" is paid anyhow
    assert len(overlapping.tables().root) == 9


@settings(deadline=None, max_examples=60)
@given(st.lists(phrase_sets, min_size=2, max_size=4), texts, st.randoms(use_true_random=False))
def test_rows_of_one_batch_have_their_own_sets_that_come_and_go(
    sets: list[list[list[int]]], text: list[int], order: random.Random
) -> None:
    book = Phrases(sets[0], bonus=BONUS, vocab=V)
    spare = [book.add(phrases) for phrases in sets[1:]]
    for root in order.sample(spare, len(spare) // 2):
        book.remove(root)
    roots = [book.root, *(book.add(phrases) for phrases in sets[1:])]
    assert len({*roots}) == len(roots)
    node = book.start(len(sets), 2, root=torch.tensor(roots))
    total = torch.zeros(len(sets), 2)
    for token in text:
        node, bonus = book.step(node, torch.full_like(node, token))
        total += bonus
        halves = tree.split(node)
        node = tree.concat(halves[::-1])[range(len(sets) - 1, -1, -1)]  # the state is a tree: taken apart and put back
    total += book.finish(node)
    assert total.tolist() == [[BONUS * sum(inside(phrases, text))] * 2 for phrases in sets]
    book.remove(roots[1])
    assert book.scores(book.start(1, 1))[0, 0].tolist() == [
        BONUS * any(phrase[0] == t for phrase in sets[0]) for t in range(V)
    ]
    with pytest.raises(KeyError):
        book.start(1, 1, root=roots[1])
    with pytest.raises(KeyError):
        book.remove(roots[1])


@settings(deadline=None, max_examples=80)
@given(phrase_sets, phrase_sets, texts, texts)
def test_phrases_change_in_the_middle_of_a_text(
    old: list[list[int]], new: list[list[int]], before: list[int], behind: list[int]
) -> None:
    book = Phrases(old, bonus=BONUS, vocab=V)
    node, bonuses = given_to(book, before)
    root = book.add(new)
    recent = torch.tensor([[[*before, 0, 1]]])
    node, exchanged = book.moved(node, root, recent, torch.tensor([[len(before)]]))
    book.remove(book.root)
    node, more = given_to(book, behind, node)
    total = sum(bonuses) + float(exchanged) + sum(more) + float(book.finish(node))
    gained = sum(inside(new, before + behind)) - sum(inside(new, before))
    assert total == BONUS * (sum(inside(old, before)) + gained)


def test_hypotheses_of_different_length_move_together() -> None:
    book = Phrases([[0, 1]], vocab=V)
    root = book.add([[1, 2, 0]])
    recent = torch.tensor([[[1, 2], [2, 1]], [[1, 0], [0, 0]]])
    node, _ = book.moved(book.start(2, 2), torch.tensor([root, book.root]), recent, torch.tensor([[2, 1], [1, 1]]))
    assert (-book.finish(node)).tolist() == [[2, 0], [0, 1]]


def test_the_scorer_keeps_the_law_for_selected_hypotheses() -> None:
    phrases = [[1, 2, 1], [2, 2]]
    book = Phrases(phrases, bonus=BONUS, vocab=V)
    scorer = PhraseScorer(book)
    assert not scorer.partial
    values = torch.full((2, 0, 4), torch.nan)
    x = Frames(values, torch.ones(2, 0, dtype=torch.bool))
    state = scorer.read(x, scorer.start(x))
    said: list[list[tuple[list[int], float]]] = [[([], 0.0)], [([], 0.0)]]
    pick = random.Random(0)
    for _ in range(12):
        scores, state = scorer.score(state)
        assert scores.shape == (2, len(said[0]), V)
        parents = [[pick.randrange(len(row)) for _ in range(4)] for row in said]
        new = [[pick.randrange(V) for _ in range(4)] for _ in said]
        said = [
            [
                ([*row[p][0], t], row[p][1] + float(scores[b, p, t]))
                for p, t in zip(parents[b], new[b], strict=True)
            ]
            for b, row in enumerate(said)
        ]  # fmt: skip
        state = scorer.extend(state, torch.tensor(parents), torch.tensor(new))
        order = torch.tensor([[3, 0, 1, 2], [1, 1, 0, 3]])
        state = scorer.select(state, order)
        said = [[row[i] for i in order[b].tolist()] for b, row in enumerate(said)]
    totals = torch.tensor([[score for _, score in row] for row in said]) + book.finish(state)
    assert totals.tolist() == [[BONUS * sum(inside(phrases, text)) for text, _ in row] for row in said]


def test_single_precision_is_that_of_the_moment(precise: None) -> None:
    book = Phrases([[1, 2]], bonus=0.1, vocab=V)
    assert book.step(book.start(1, 1), torch.tensor([[1]]))[1].dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    assert book.step(book.start(1, 1), torch.tensor([[1]]))[1].dtype == torch.float32


@pytest.mark.parametrize(("phrases", "said"), [([[]], "without tokens"), ([[1, 3]], "0 to 2"), ([[-1]], "0 to 2")])
def test_a_wrong_phrase_is_an_error(phrases: list[list[int]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Phrases(phrases, vocab=V)


def test_a_vocabulary_is_not_empty() -> None:
    with pytest.raises(ValueError, match="vocabulary of 0"):
        Phrases(vocab=0)
    book = Phrases([[0, 0]], vocab=1)
    assert given_to(book, [0, 0, 0])[1] == [1, 1, 1]


class Bytes:
    """A vocabulary as that of Whisper: a space belongs to the token behind it, and counts."""

    pieces = ("New", " New", " York", "York", "new", " new")

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            piece = next((piece for piece in self.pieces if text.startswith(piece)), None)
            if piece is None:
                raise ValueError(text)
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids


def test_plain_text_is_spelled_as_at_the_beginning_and_behind_a_space() -> None:
    (phrase,) = spelled(["New  York "], Bytes())
    assert phrase == ("New  York ", ((0, 2), (1, 2)))
    small = Pieces(["<blank>", "<unk>", "▁", "▁new", "▁york", "a", "<sos/eos>"])
    assert spelled(["New York"], small) == [("New York", ((3, 4),))]  # there is no upper case
    loud = Pieces(["<blank>", " ", "A", "B"])
    assert spelled(["ab a"], loud)[0].spellings == ((2, 3, 1, 2),)
    book = Phrases.from_text(["ab a"], loud, bonus=BONUS, vocab=loud.size)
    assert given_to(book, [2, 3, 1, 2])[1] == [BONUS] * 4


@pytest.mark.parametrize("tokenizer", [Bytes(), Pieces(["<blank>", "<unk>", "n"]), Pieces(["<blank>", "n"])])
def test_a_phrase_that_cannot_be_spelled_is_named(tokenizer: Bytes | Pieces) -> None:
    with pytest.raises(InputError, match="cannot spell: 'Zoë', ' '"):
        spelled(["Zoë", " "], tokenizer)


def test_the_report_counts_every_phrase() -> None:
    phrases = [("a", [[1, 2], [0, 1, 2]]), ("b", [[2, 2]]), ("never", [[5]]), ("c", [[1], [2, 2, 2, 1], [2, 2]])]
    assert hits(phrases, [0, 1, 2, 2, 2, 1, 2]) == [
        Hits("a", ((0, 3), (5, 7))), Hits("b", ((2, 4), (3, 5))), Hits("never", ()), Hits("c", ((1, 2), (2, 6))),
    ]  # fmt: skip
    times = [(0.0, 0.5), (0.6, 0.9)]
    assert hits([("New York", [["new", "york"]])], ["new", "york"], times) == [Hits("New York", ((0.0, 0.9),))]
    assert hits(phrases, [])[0].spans == ()
    assert hits([], [1]) == []
