"""Phrase biasing: what it gives is what an exhaustive search for the phrases says, whatever is done to the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set

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
beginnings = st.none() | st.frozensets(tokens)  # of words


def inside(
    phrases: Sequence[Sequence[int]], text: Sequence[int], begins: Set[int] | None = None, *, over: bool = True
) -> list[bool]:
    """Which tokens lie in a phrase said: by looking everywhere. Is the text `over`, or may its last word go on?"""
    found = [False] * len(text)
    for phrase in phrases:
        for i in range(len(text) - len(phrase) + 1):
            end = i + len(phrase)
            whole = begins is None or (over if end == len(text) else text[end] in begins)
            if whole and list(text[i:end]) == list(phrase):
                found[i:end] = [True] * len(phrase)
    return found


def begun(phrases: Sequence[Sequence[int]], text: Sequence[int]) -> int:
    """The length of the longest end of the text that a phrase begins with."""
    ends = (n for n in range(len(text), 0, -1) if any(list(p[:n]) == list(text[len(text) - n :]) for p in phrases))
    return next(ends, 0)


def known(phrases: Sequence[Sequence[int]], begins: Set[int] | None, bonus: float = BONUS) -> Phrases:
    """The book of these phrases."""
    return Phrases(phrases, bonus=bonus, vocab=V, begins=None if begins is None else sorted(begins))


def given_to(book: Phrases, text: Sequence[int], node: Tensor | None = None) -> tuple[Tensor, list[float]]:
    """The last node and the bonus of each token."""
    node = book.start(1, 1) if node is None else node
    bonuses = []
    for token in text:
        node, bonus = book.step(node, torch.tensor([[token]]))
        bonuses.append(float(bonus))
    return node, bonuses


@settings(deadline=None, max_examples=400)
@given(phrase_sets, texts, beginnings)
def test_each_token_inside_a_phrase_said_is_worth_the_bonus_once(
    phrases: list[list[int]], text: list[int], begins: frozenset[int] | None
) -> None:
    book = known(phrases, begins)
    node = book.start(1, 1)
    total = 0.0
    for u, token in enumerate(text):
        node, bonus = book.step(node, torch.tensor([[token]]))
        total += float(bonus)
        so_far = text[: u + 1]
        said = inside(phrases, so_far, begins, over=False)
        half = begun(phrases, so_far)
        assert total == BONUS * (sum(said) + said[len(said) - half :].count(False))  # and of the phrase that goes on
        assert total + float(book.finish(node)) == BONUS * sum(inside(phrases, so_far, begins))


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


MARK, GO, ON, LD = 1, 2, 3, 4  # a space, words, and the end of a word


@pytest.mark.parametrize(
    ("phrases", "text", "bonuses", "last"),
    [
        ([[GO]], [GO], [1], 0),  # the text ends
        ([[GO]], [GO, ON], [1, 0], 0),  # a word begins
        ([[GO]], [GO, LD], [1, -1], 0),  # the word goes on
        ([[GO]], [GO, LD, ON], [1, -1, 0], 0),  # it was another
        ([[GO]], [GO, GO, LD], [1, 1, -1], 0),
        ([[GO], [GO, ON]], [GO, ON, ON], [1, 1, 0], 0),
        ([[GO], [GO, ON]], [GO, ON, LD], [1, 1, -1], 0),  # the shorter one was said
        ([[GO], [GO, ON]], [GO, LD], [1, -1], 0),
        ([[GO], [GO, ON, LD]], [GO, ON], [1, 1], -1),
        ([[GO, ON]], [GO, ON, LD], [1, 1, -2], 0),
        ([[GO], [GO, LD]], [GO, LD, MARK], [1, 1, 0], 0),  # "gold", which has no "go" in it
        ([[GO], [GO, LD]], [GO, LD, LD], [1, 1, -2], 0),
        ([[GO], [GO, LD, LD]], [GO, LD, MARK], [1, 1, -2], 0),
        ([[GO, ON], [ON, LD, GO]], [GO, ON, LD, GO, MARK], [1, 1, 0, 1, 0], 0),  # "on" was not paid twice
        ([[MARK, LD]], [MARK, LD, MARK, LD, LD], [1, 1, 1, 1, -2], 0),  # letters behind spaces
        ([[LD]], [GO, LD, ON], [0, 1, 0], 0),  # it may begin anywhere
    ],
)
def test_a_word_that_goes_on_was_not_said(
    phrases: list[list[int]], text: list[int], bonuses: list[float], last: float
) -> None:
    book = Phrases(phrases, vocab=5, begins=[MARK, GO, ON])
    node, found = given_to(book, text)
    assert found == bonuses
    assert book.finish(node).tolist() == [[last]]


def test_every_token_may_end_a_phrase_where_each_begins_a_word() -> None:
    phrases, draw = [[0, 1], [1, 2, 0], [1], [2, 2]], random.Random(0)
    every, none = known(phrases, {*range(V)}), known(phrases, None)
    for _ in range(20):
        text = [draw.randrange(V) for _ in range(12)]
        (one, bonuses), (other, same) = given_to(every, text), given_to(none, text)
        assert bonuses == same
        assert torch.equal(every.finish(one), none.finish(other))


@settings(deadline=None, max_examples=100)
@given(
    phrase_sets, st.lists(texts, min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([BONUS, -0.5, 0.0]),
    beginnings,
)  # fmt: skip
def test_dense_scores_are_the_bonus_of_each_step_in_any_shape(
    phrases: list[list[int]], said: list[list[int]], k: int, worth: float, begins: frozenset[int] | None
) -> None:
    book = known(phrases, begins, worth)
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
    node = int(tables.ended[node]) if tables.begins[token] else node
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
@given(phrase_sets, phrase_sets, beginnings)
def test_the_tables_say_the_same(one: list[list[int]], two: list[list[int]], begins: frozenset[int] | None) -> None:
    book = known(one, begins)
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
    assert torch.equal(book.finish(nodes), -torch.from_numpy(tables.owed[tables.ended]))
    assert (tables.root[tables.ended] == tables.root).all()


def test_many_nodes_only_where_phrases_overlap() -> None:
    apart = Phrases([[1, 2, 3], [4, 5, 6]], vocab=9)
    assert len(apart.tables().root) == 7
    overlapping = Phrases([[1, 2, 3], [3, 4, 5]], vocab=9)  # "3" and "3 4" paid and not; "3 4 5" is paid anyhow
    assert len(overlapping.tables().root) == 9
    words = Phrases([[1, 2, 3], [4, 5, 6]], vocab=9, begins=[1, 4])
    assert len(words.tables().root) == 9  # two more: where the phrases were said
    longer = Phrases([[1, 2, 3], [1, 2, 3, 4, 5]], vocab=9, begins=[1])
    assert len(longer.tables().root) == 8  # "4 5" has no copy where "1 2 3" was said


def test_a_thousand_phrases_are_a_few_thousand_nodes() -> None:
    draw = random.Random(0)
    words = [[[draw.randrange(250, 500), *(draw.randrange(1, 250) for _ in range(draw.randint(0, 3)))]
              for _ in range(draw.randint(1, 3))] for _ in range(1000)]  # fmt: skip
    phrases = [[token for word in phrase for token in word] for phrase in words]
    tables = Phrases(phrases, vocab=500, begins=range(250, 500)).tables()
    assert len(tables.root) < 1.25 * len(Phrases(phrases, vocab=500).tables().root)
    assert sum(part.nbytes for part in tables) < 500_000


@settings(deadline=None, max_examples=60)
@given(st.lists(phrase_sets, min_size=2, max_size=4), texts, st.randoms(use_true_random=False), beginnings)
def test_rows_of_one_batch_have_their_own_sets_that_come_and_go(
    sets: list[list[list[int]]], text: list[int], order: random.Random, begins: frozenset[int] | None
) -> None:
    book = known(sets[0], begins)
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
    assert total.tolist() == [[BONUS * sum(inside(phrases, text, begins))] * 2 for phrases in sets]
    book.remove(roots[1])
    assert book.scores(book.start(1, 1))[0, 0].tolist() == [
        BONUS * any(phrase[0] == t for phrase in sets[0]) for t in range(V)
    ]
    with pytest.raises(KeyError):
        book.start(1, 1, root=roots[1])
    with pytest.raises(KeyError):
        book.remove(roots[1])


@settings(deadline=None, max_examples=120)
@given(phrase_sets, phrase_sets, texts, texts, beginnings)
def test_phrases_change_in_the_middle_of_a_text(
    old: list[list[int]], new: list[list[int]], before: list[int], behind: list[int], begins: frozenset[int] | None
) -> None:
    book = known(old, begins)
    node, bonuses = given_to(book, before)
    root = book.add(new)
    recent = torch.tensor([[[*before, 0, 1]]])
    node, exchanged = book.moved(node, root, recent, torch.tensor([[len(before)]]))
    book.remove(book.root)
    node, more = given_to(book, behind, node)
    total = sum(bonuses) + float(exchanged) + sum(more) + float(book.finish(node))
    gained = sum(inside(new, before + behind, begins)) - sum(inside(new, before, begins, over=False))
    assert total == BONUS * (sum(inside(old, before, begins, over=False)) + gained)


def test_hypotheses_of_different_length_move_together() -> None:
    book = Phrases([[0, 1]], vocab=V)
    root = book.add([[1, 2, 0]])
    recent = torch.tensor([[[1, 2], [2, 1]], [[1, 0], [0, 0]]])
    node, _ = book.moved(book.start(2, 2), torch.tensor([root, book.root]), recent, torch.tensor([[2, 1], [1, 1]]))
    assert (-book.finish(node)).tolist() == [[2, 0], [0, 1]]


@pytest.mark.parametrize("begins", [None, {1}, {0, 2}])
def test_the_scorer_keeps_the_law_for_selected_hypotheses(begins: set[int] | None) -> None:
    phrases = [[1, 2, 1], [2, 2]]
    book = known(phrases, begins)
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
    assert totals.tolist() == [[BONUS * sum(inside(phrases, text, begins)) for text, _ in row] for row in said]


def test_single_precision_is_that_of_the_moment(precise: None) -> None:
    book = Phrases([[1, 2]], bonus=0.1, vocab=V)
    assert book.step(book.start(1, 1), torch.tensor([[1]]))[1].dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    assert book.step(book.start(1, 1), torch.tensor([[1]]))[1].dtype == torch.float32


@pytest.mark.parametrize(("phrases", "said"), [([[]], "without tokens"), ([[1, 3]], "0 to 2"), ([[-1]], "0 to 2")])
def test_a_wrong_phrase_is_an_error(phrases: list[list[int]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Phrases(phrases, vocab=V)


def test_what_begins_a_word_is_a_token() -> None:
    with pytest.raises(ValueError, match=r"tokens \[-1, 3\] begin a word: tokens are 0 to 2"):
        Phrases(vocab=V, begins=[3, 0, -1])


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


def test_words_are_those_of_the_tokenizer() -> None:
    letters = Pieces(["<blank>", "▁", "m", "a", "r", "c", "k", "<unk>", "<sos/eos>"])
    book = Phrases.from_text(["marc"], letters, vocab=letters.size)
    assert book.begins == {1, 8}
    marc = letters.encode("marc")
    assert given_to(book, [*marc, 8])[1] == [1] * 5 + [0]  # with the end of the sentence
    assert given_to(book, [*marc, *letters.encode("a")])[1] == [1] * 6 + [-1]
    for other in (6, 7):  # "marck"; what has no spelling begins no word
        assert given_to(book, [*marc, other])[1] == [1] * 5 + [-5]
    scores, _ = PhraseScorer(book).score(given_to(book, marc)[0])
    assert scores[0, 0].tolist() == [-5, 1, -5, -5, -5, -5, -5, -5, 0]
    root = book.add(spelled(["mark"], letters)[0].spellings)  # another set knows them too
    assert given_to(book, letters.encode("mark mar"), book.start(1, 1, root=root))[1] == [1] * 9
    assert given_to(book, [*letters.encode("mark"), 2], book.start(1, 1, root=root))[1] == [1] * 5 + [-5]


def test_pieces_that_know_no_words_end_phrases_anywhere() -> None:
    assert Phrases.from_text(["一二"], Pieces(["<blank>", "一", "二", "<sos/eos>"]), vocab=4).begins is None
    assert Phrases.from_text(["New"], Bytes(), vocab=6).begins is None
    spaces = Pieces(["<blank>", " ", "A", "B", "   "])
    assert Phrases.from_text(["a b"], spaces, vocab=5).begins == {1, 4}


@pytest.mark.parametrize("pieces", [["<blank>", "mar", "c▁"], ["<blank>", "▁", "a", "c▁"], ["<blank>", " ", "a", "a "]])
def test_pieces_that_end_with_a_space_cannot_say_where_a_word_ends(pieces: list[str]) -> None:
    with pytest.raises(InputError, match=f"begin with the space, not end with it as {pieces[-1]!r}"):
        Phrases.from_text([], Pieces(pieces), vocab=len(pieces))


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
